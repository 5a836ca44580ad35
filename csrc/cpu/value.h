// The value loss, its metrics and its gradient: a count of the mask, then one pass over the tokens.
#pragma once

namespace rk {
namespace {

struct ValueSums {
  double loss, clipped, value;
  Moments target, error;
};

struct ValueBlock {
  const float *mask, *values, *old, *returns;
  float* grad;
};

inline void value_block(const ValueArgs& a, const ValueBlock& b, int64_t n, int64_t count,
                        double weight, ValueSums& sums) {
  using V = Lanes;
  const V zero(0.0f), range(a.clip_range), token_weight(static_cast<float>(weight));
  V loss = zero, clipped = zero, value = zero, target = zero, error = zero;
  // Selected, so that NaN at masked tokens is gone. Without clipping old_values are not read.
  const auto kept = [&](const float* p, int64_t i) {
    return select_less(zero, V(load(b.mask + i)), V(load(p + i)), zero);
  };
  for (int64_t i = 0; i < n; i += kLanes) {
    prefetch_ahead<F32, 1>(b.values + i);
    prefetch_ahead<F32, 1>(b.returns + i);
    if (b.old) prefetch_ahead<F32, 1>(b.old + i);
    if (b.grad) prefetch_ahead<F32, 1, true>(b.grad + i);
    const V v = kept(b.values, i), r = kept(b.returns, i);
    const ValueTerm<V> t =
        value_term(v, b.old ? kept(b.old, i) : zero, r, range, a.clip_range > 0.0f);
    loss = loss + t.loss;
    clipped = clipped + t.clipped;
    value = value + v;
    target = target + r;
    error = error + (r - v);
    // At masked tokens v and r are 0, and therefore the slope.
    if (b.grad) store(b.grad + i, (t.slope * token_weight).v);
  }
  sums.loss += weight * reduce_add(loss.v);
  sums.clipped += reduce_add(clipped.v);
  sums.value += reduce_add(value.v);
  const double k = static_cast<double>(count);
  Moments targets{k, reduce_add(target.v) / k, 0.0}, errors{k, reduce_add(error.v) / k, 0.0};
  const V target_mean(static_cast<float>(targets.mean)),
      error_mean(static_cast<float>(errors.mean));
  V t2 = zero, e2 = zero, td = zero, ed = zero;
  for (int64_t i = 0; i < n; i += kLanes) {
    const V m = load(b.mask + i), r = kept(b.returns, i), v = kept(b.values, i);
    const V t = (r - target_mean) * m, e = (r - v - error_mean) * m;
    t2 = fma(t, t, t2), e2 = fma(e, e, e2);
    td = td + t, ed = ed + e;
  }
  // Deviations are taken from the rounded mean; subtracting their own mean corrects for this.
  const double t_off = reduce_add(td.v) / k, e_off = reduce_add(ed.v) / k;
  targets.m2 = reduce_add(t2.v) - k * t_off * t_off;
  errors.m2 = reduce_add(e2.v) - k * e_off * e_off;
  sums.target = merge_moments(sums.target, targets);
  sums.error = merge_moments(sums.error, errors);
}

Status value_loss(const ValueArgs& a) {
  const LossTokens& t = a.tokens;
  const Status status = check_offsets(t);
  if (status.code != kOk) return status;
  const Plan plan(t);
  if (!plan.ok()) return {kOutOfMemory, -1};
  const Scratch<SequenceSums> piece_sums(plan.pieces), sequences(t.sequences);
  const Scratch<ValueSums> partial(plan.items);
  if (!piece_sums.data || !sequences.data || !partial.data) return {kOutOfMemory, -1};

  if (a.divisor == 0.0 || a.aggregation == kSeqMeanTokenMean) {
    plan.for_pieces(a.exec.threads, [&](int64_t p, int64_t) {
      for_blocks(t, plan.piece[p], [&](int64_t, int64_t, const float*, int64_t count) {
        piece_sums[p].tokens += static_cast<double>(count);
      });
    });
    add_pieces(plan, piece_sums, sequences);
  }
  const double divisor = loss_divisor(t, a.aggregation, a.divisor, sequences);
  plan.for_pieces(a.exec.threads, [&](int64_t index, int64_t item) {
    const Piece& p = plan.piece[index];
    const double weight = sequence_weight(a.aggregation, divisor, sequences[p.sequence].tokens);
    alignas(64) float buffers[4][kTokenBlock];
    for_blocks(t, p, [&](int64_t begin, int64_t n, const float* mask, int64_t count) {
      const auto at = [&](const Tensor& x) { return token_at(t, x, p.sequence, begin); };
      if (count == 0) return zero_block(a.grad_values, at(a.grad_values), n);
      const auto in = [&](const Tensor& x, int i) { return read_block(x, at(x), n, buffers[i]); };
      const ValueBlock block{mask, in(a.values, 0),
                             a.clip_range > 0.0f ? in(a.old_values, 1) : nullptr, in(a.returns, 2),
                             result_block(a.grad_values, at(a.grad_values), n, buffers[3])};
      value_block(a, block, n, count, weight, partial[item]);
      write_block(a.grad_values, at(a.grad_values), n, buffers[3]);
    });
  });

  ValueSums sums{};
  for (int64_t i = 0; i < plan.items; ++i) {
    const ValueSums& s = partial[i];
    sums.loss += s.loss, sums.clipped += s.clipped, sums.value += s.value;
    sums.target = merge_moments(sums.target, s.target);
    sums.error = merge_moments(sums.error, s.error);
  }
  const ValueTotals totals{sums.loss,      sums.clipped,  sums.value,       sums.target.mean,
                           sums.target.m2, sums.error.m2, sums.target.count};
  *a.metrics = value_metrics(totals, kNoFault);
  *a.loss = a.metrics->loss;
  return {};
}

}  // namespace
}  // namespace rk
