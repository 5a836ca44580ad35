// mismatch_weights: one pass over the tokens, for their weights, what criteria of tokens keep, and
// every sequence's sums. Weights of sequences, their rejection and normalisation follow from these
// in a second pass over the results alone, where there are any.
#pragma once

namespace rk {
namespace {

// Tokens of up to this many sequences, one after another, are judged as one work item.
constexpr int64_t kJudged = 256;

struct MismatchBlock {
  const float *mask, *old, *rollout;
  float* weights;
  uint8_t* kept;
};

// A sum of which exp is taken, with what its additions round off.
struct Compensated {
  Lanes sum = Lanes(0.0f), rest = Lanes(0.0f);

  void add(Lanes x) {
    const Lanes next = sum + x, added = next - sum;
    rest = rest + ((sum - (next - added)) + (x - added));
    sum = next;
  }
  double total() const { return reduce_add(sum.v) + reduce_add(rest.v); }
};

// Adds n tokens to the sums; writes what is kept and, with kTokens, the weights.
template <bool kTokens>
void mismatch_block(const MismatchArgs& a, const MismatchBlock& b, int64_t n, MismatchSequence& q) {
  using V = Lanes;
  const MismatchParams p = a.params;
  const V zero(0.0f), one(1.0f), half(0.5f), far(kUnbounded);
  V sums[kMismatchSums];
  for (V& s : sums) s = zero;
  V least(far), most(-far), least_weight(far), most_weight(-far);
  Compensated log_ratio, near;
  alignas(64) float keep[kLanes];
  for (int64_t i = 0; i < n; i += kLanes) {
    prefetch_ahead<F32, 1>(b.old + i);
    prefetch_ahead<F32, 1>(b.rollout + i);
    if (kTokens) prefetch_ahead<F32, 1, true>(b.weights + i);
    V m = load(b.mask + i);
    // Selected, so that NaN at masked tokens is gone.
    MismatchToken<V> t = mismatch_token(select_less(zero, m, V(load(b.old + i)), zero),
                                        select_less(zero, m, V(load(b.rollout + i)), zero), p);
    sums[kMissingOf] = sums[kMissingOf] + t.missing;
    if (a.drop) {
      m = m - t.missing;
      t.old = select_less(zero, m, t.old, zero);
      t.rollout = select_less(zero, m, t.rollout, zero);
    }
    const V rejected = m * outside(t.near, p.token_low, p.token_high);
    sums[kTokensOf] = sums[kTokensOf] + m;
    sums[kRejectedOf] = sums[kRejectedOf] + rejected;
    log_ratio.add(t.x);
    near.add(t.near);
    sums[kOldOf] = sums[kOldOf] + t.old;
    sums[kRolloutOf] = sums[kRolloutOf] + t.rollout;
    sums[kK2Of] = fma(half * t.near, t.near, sums[kK2Of]);
    sums[kK3Of] = sums[kK3Of] + t.ratio.em1mx;
    sums[kRatioOf] = sums[kRatioOf] + select_less(zero, m, t.ratio.e, zero);
    sums[kExcessOf] = sums[kExcessOf] + t.ratio.em1;
    sums[kExcessSquareOf] = fma(t.ratio.em1, t.ratio.em1, sums[kExcessSquareOf]);
    least = min(select_less(zero, m, t.near, far), least);
    most = max(select_less(zero, m, t.near, -far), most);
    const V stays = m - rejected;
    if constexpr (kTokens) {
      const V w = select_less(zero, m, bounded_weight(t.ratio.e, t.near, a.mode, p), zero);
      const V off = select_less(zero, m, w - one, zero);
      sums[kWeightOf] = sums[kWeightOf] + w;
      sums[kWeightSquareOf] = fma(w, w, sums[kWeightSquareOf]);
      sums[kOffOf] = sums[kOffOf] + off;
      sums[kOffSquareOf] = fma(off, off, sums[kOffSquareOf]);
      sums[kLowOf] = sums[kLowOf] + m * outside(t.near, p.count_log_low, kUnbounded);
      sums[kHighOf] = sums[kHighOf] + m * outside(t.near, -kUnbounded, p.count_log_high);
      least_weight = min(select_less(zero, m, w, far), least_weight);
      most_weight = max(select_less(zero, m, w, -far), most_weight);
      store(b.weights + i, select_less(zero, stays, w, zero).v);
    }
    store(keep, stays.v);
    for (int j = 0; j < kLanes; ++j) b.kept[i + j] = keep[j] > 0.0f;
  }
  for (int s = 0; s < (kTokens ? kMismatchSums : kPlainSums); ++s)
    q.sums[s] += reduce_add(sums[s].v);
  q.sums[kLogRatioOf] += log_ratio.total();
  q.sums[kNearOf] += near.total();
  merge_ends(q.ends, {lane_min(least), reduce_max(most.v), lane_min(least_weight),
                      reduce_max(most_weight.v)});
}

inline void mismatch_piece(const MismatchArgs& a, const Piece& p, MismatchSequence& q) {
  const LossTokens& t = a.tokens;
  q.ends = kNoEnds;
  alignas(64) float old[kTokenBlock], rollout[kTokenBlock], weights[kTokenBlock];
  alignas(64) uint8_t kept[kTokenBlock];
  const bool tokens = a.level == kTokenWeight;
  for_blocks(t, p, [&](int64_t begin, int64_t n, const float* mask, int64_t count) {
    const auto at = [&](const Tensor& x) { return token_at(t, x, p.sequence, begin); };
    uint8_t* const to = static_cast<uint8_t*>(a.kept.data) + at(a.kept);
    if (count == 0) {
      memset(to, 0, static_cast<size_t>(n));
      return zero_block(a.weights, at(a.weights), n);
    }
    const bool whole = n % kLanes == 0;
    const MismatchBlock block{mask, read_block(a.old_logprobs, at(a.old_logprobs), n, old),
                              read_block(a.rollout_logprobs, at(a.rollout_logprobs), n, rollout),
                              result_block(a.weights, at(a.weights), n, weights),
                              whole ? to : kept};
    (tokens ? mismatch_block<true> : mismatch_block<false>)(a, block, n, q);
    if (tokens) write_block(a.weights, at(a.weights), n, weights);
    if (!whole) memcpy(to, kept, static_cast<size_t>(n));
  });
}

// What remains to be done to the weights of a piece: none of a rejected sequence, one for all of
// its tokens, or each divided by `factor`.
inline void finish_piece(const MismatchArgs& a, const Piece& p, const MismatchVerdict& v,
                         float factor) {
  const LossTokens& t = a.tokens;
  float* const w =
      static_cast<float*>(a.weights.data) + token_at(t, a.weights, p.sequence, p.begin);
  uint8_t* const kept =
      static_cast<uint8_t*>(a.kept.data) + token_at(t, a.kept, p.sequence, p.begin);
  if (v.rejected) {
    memset(w, 0, static_cast<size_t>(p.length) * sizeof(float));
    memset(kept, 0, static_cast<size_t>(p.length));
  } else if (a.level != kTokenWeight) {
    const float own = v.weight / factor;
    for (int64_t i = 0; i < p.length; ++i) w[i] = keep_or_zero(kept[i], own);
  } else if (factor != 1.0f) {
    for (int64_t i = 0; i < p.length; ++i) w[i] = w[i] / factor;
  }
}

Status mismatch_weights(const MismatchArgs& a) {
  const LossTokens& t = a.tokens;
  const Status status = check_offsets(t);
  if (status.code != kOk) return status;
  const Plan plan(t);
  if (!plan.ok()) return {kOutOfMemory, -1};
  const int64_t groups = (t.sequences + kJudged - 1) / kJudged;
  const Scratch<MismatchSequence> pieces(plan.pieces);
  const Scratch<int64_t> first(t.sequences + 1);
  const Scratch<MismatchTotals> partial(groups);
  const Scratch<MismatchVerdict> verdicts(t.sequences);
  if (!pieces.data || !first.data || !partial.data || !verdicts.data) return {kOutOfMemory, -1};

  for (int64_t p = 0; p < plan.pieces; ++p) ++first[plan.piece[p].sequence + 1];
  for (int64_t s = 0; s < t.sequences; ++s) first[s + 1] += first[s];
  plan.for_pieces(a.exec.threads,
                  [&](int64_t p, int64_t) { mismatch_piece(a, plan.piece[p], pieces[p]); });

  parallel_for(groups, a.exec.threads, [&](int64_t g) {
    partial[g].clear();
    for (int64_t s = g * kJudged; s < t.sequences && s < (g + 1) * kJudged; ++s) {
      MismatchSequence q{};
      q.ends = kNoEnds;
      for (int64_t p = first[s]; p < first[s + 1]; ++p) {
        for (int i = 0; i < kMismatchSums; ++i) q.sums[i] += pieces[p].sums[i];
        merge_ends(q.ends, pieces[p].ends);
      }
      verdicts[s] = add_sequence(q, a.level, a.mode, a.params, partial[g]);
    }
  });

  MismatchTotals total;
  total.clear();
  for (int64_t g = 0; g < groups; ++g) {
    for (int i = 0; i < kMismatchTotals; ++i) total.sums[i] += partial[g].sums[i];
    for (int i = 0; i < kMismatchEnds; ++i) total.end(i, partial[g].least[i], partial[g].most[i]);
  }
  const double factor = norm_factor(total, a.level, a.normalize);
  *a.metrics = mismatch_metrics(total, a.level, factor, kNoFault);
  plan.for_pieces(a.exec.threads, [&](int64_t p, int64_t) {
    finish_piece(a, plan.piece[p], verdicts[plan.piece[p].sequence], static_cast<float>(factor));
  });
  return {};
}

}  // namespace
}  // namespace rk
