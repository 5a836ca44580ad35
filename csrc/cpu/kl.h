// KL divergence between two rows of logits over the whole vocabulary, and the per-token estimators.
#pragma once

namespace rk {
namespace {

template <class E>
void kl_row(const KlArgs& a, int64_t row) {
  const int64_t i = row / a.cols, j = row % a.cols;
  const Tensor& p = a.reverse ? a.logits : a.ref_logits;
  const Tensor& q = a.reverse ? a.ref_logits : a.logits;
  const PairRow<false> of_row{1.0 / a.temperature, {}, {}};
  store_divergence(a, row, pair_sums<E>(row_at<E>(p, i, j), row_at<E>(q, i, j), a.vocab, of_row));
}

// Gradient w.r.t. the policy's logits. Reverse: p_j (log p_j - log q_j - KL) / T, which is p_j / T
// times the difference (x - m - (y - m')) / T minus its mean under p. Forward: (p_j - q_j) / T.
template <class E, bool kReverse>
void kl_backward_row(const KlBackwardArgs& a, int64_t row) {
  using S = typename E::Storage;
  const int64_t i = row / a.cols, j = row % a.cols;
  const float g = upstream_at(a.grad_kl, i, j);
  S* out = row_at<E>(a.grad_logits, i, j);
  if (g == 0.0f) {
    memset(out, 0, sizeof(S) * static_cast<size_t>(a.vocab));
    return;
  }
  const S *x = row_at<E>(a.logits, i, j), *ref = row_at<E>(a.ref_logits, i, j);
  const float* stats = a.stats + 5 * row;
  const double inv_t = 1.0 / a.temperature;
  const float mean = stats[4];
  // An infinite reverse divergence has a NaN gradient, as differences to its mean are NaN. An
  // infinite forward divergence has a finite gradient.
  const float poison = kReverse || mean != mean ? mean - mean : 0.0f;
  const Vec rate = splat(static_cast<float>(inv_t * kLog2e));
  const Vec lowest = splat(static_cast<float>(kExpMin / inv_t));
  const Vec mp = splat(stats[0]), mq = splat(stats[2]), zero = splat(0.0f);
  const Vec wp = splat(static_cast<float>(g * inv_t / stats[1] + poison));
  const Vec wq = splat(static_cast<float>(g * inv_t / stats[3] + poison));
  const Vec scale = splat(static_cast<float>(inv_t)), offset = splat(mean);
  const auto gradient = [&](Vec zp, Vec zq) {
    const Vec dp = sub(zp, mp), dq = sub(zq, mq);
    const Vec ep = exp_scaled(max(lowest, dp), rate);
    if constexpr (kReverse) {
      const Vec dz = mul(mul(ep, wp), mul(sub(sub(dp, dq), offset), scale));
      return select_less(dp, lowest, zero, dz);
    } else {
      const Vec p = select_less(dp, lowest, zero, mul(ep, wp));
      const Vec eq = exp_scaled(max(lowest, dq), rate);
      return sub(p, select_less(dq, lowest, zero, mul(eq, wq)));
    }
  };
  int64_t k = 0;
  for (; k + 2 * kLanes <= a.vocab; k += 2 * kLanes) {
    prefetch_ahead<E, 2>(x + k);
    prefetch_ahead<E, 2>(ref + k);
    prefetch_ahead<E, 2, true>(out + k);
    const Vec d0 = gradient(E::load(x + k), E::load(ref + k));
    const Vec d1 = gradient(E::load(x + k + kLanes), E::load(ref + k + kLanes));
    E::store(out + k, d0);
    E::store(out + k + kLanes, d1);
  }
  for (; k < a.vocab; k += kLanes) {
    const int n = a.vocab - k < kLanes ? static_cast<int>(a.vocab - k) : kLanes;
    store_partial<E>(
        out + k, gradient(load_partial<E>(x + k, n, 0.0f), load_partial<E>(ref + k, n, 0.0f)), n);
  }
}

Status kl_divergence(const KlArgs& a) {
  const auto choose = [&](auto e) {
    using E = decltype(e);
    return a.general() ? general_kl_row<E> : kl_row<E>;
  };
  const auto row = a.logits.dtype == kBFloat16  ? choose(BF16{})
                   : a.logits.dtype == kFloat16 ? choose(F16{})
                                                : choose(F32{});
  parallel_for(a.rows * a.cols, a.exec.threads, [&](int64_t r) { row(a, r); });
  return {};
}

Status kl_divergence_backward(const KlBackwardArgs& a) {
  const auto choose = [&](auto e) {
    using E = decltype(e);
    if (a.options.beta > 0.0) return general_backward_row<E, Divergence::kMixture>;
    if (a.general())
      return a.reverse ? general_backward_row<E, Divergence::kReverse>
                       : general_backward_row<E, Divergence::kForward>;
    return a.reverse ? kl_backward_row<E, true> : kl_backward_row<E, false>;
  };
  const auto row = a.logits.dtype == kBFloat16  ? choose(BF16{})
                   : a.logits.dtype == kFloat16 ? choose(F16{})
                                                : choose(F32{});
  for_gradient_rows(a, a.grad_logits.data, row);
  return {};
}

// Calls body(row, col, n) for every run of at most kTokenBlock tokens of a row.
template <class F>
inline void for_token_blocks(int64_t rows, int64_t cols, int32_t threads, const F& body) {
  const int64_t per_row = (cols + kTokenBlock - 1) / kTokenBlock, blocks = rows * per_row;
  const int64_t widest = cols < kTokenBlock ? cols : kTokenBlock;
  const int64_t per_item = (kItemTokens + widest - 1) / widest;
  parallel_for((blocks + per_item - 1) / per_item, threads, [&](int64_t item) {
    const int64_t end = (item + 1) * per_item < blocks ? (item + 1) * per_item : blocks;
    for (int64_t k = item * per_item; k < end; ++k) {
      const int64_t col = k % per_row * kTokenBlock;
      body(k / per_row, col, cols - col < kTokenBlock ? cols - col : kTokenBlock);
    }
  });
}

// Estimate and slope of a vector of x = logprob - ref_logprob, for |x| <= kExpRange in k3.
constexpr float kExpRange = 80.0f;
template <bool kSlope>
inline Lanes kl_lanes(Lanes x, int32_t estimator) {
  const Lanes zero(0.0f), one(1.0f);
  if (estimator == kK2) return kSlope ? x : Lanes(0.5f) * x * x;
  if (estimator == kAbs)
    return kSlope ? select_less(zero, x, one, select_less(x, zero, -one, x)) : abs(x);
  // one + 0 * x would be NaN where x is infinite.
  if (estimator == kK1) return kSlope ? one : x;
  const auto e = exp_parts(max(Lanes(-kExpRange), min(Lanes(kExpRange), -x)));
  return kSlope ? -e.em1 : e.em1mx;
}

template <bool kSlope>
Status kl_penalty_blocks(const KlPenaltyArgs& a, int32_t estimator) {
  for_token_blocks(a.rows, a.cols, a.exec.threads, [&](int64_t i, int64_t j, int64_t n) {
    alignas(64) float p_buffer[kTokenBlock], q_buffer[kTokenBlock], g_buffer[kTokenBlock];
    alignas(64) float out_buffer[kTokenBlock];
    const auto read = [&](const Tensor& t, float* buffer) {
      return read_block(t, i * t.stride0 + j * t.stride1, n, buffer);
    };
    const float* p = read(a.logprobs, p_buffer);
    const float* q = read(a.ref_logprobs, q_buffer);
    const float* g = kSlope ? read(a.grad, g_buffer) : nullptr;
    float* out = result_block(a.out, i * a.cols + j, n, out_buffer);
    const Lanes zero(0.0f), range(kExpRange);
    Lanes beyond = zero;
    const auto gradient = [&](Lanes upstream, Lanes slope) {
      // A selection instead of a product: a zero upstream gradient gives 0, even if slope is NaN.
      const Lanes product = upstream * slope;
      return select_less(zero, upstream, product, select_less(upstream, zero, product, upstream));
    };
    for (int64_t k = 0; k < n; k += kLanes) {
      prefetch_ahead<F32, 1>(p + k);
      prefetch_ahead<F32, 1>(q + k);
      if (kSlope) prefetch_ahead<F32, 1>(g + k);
      prefetch_ahead<F32, 1, true>(out + k);
      const Lanes x = Lanes(load(p + k)) - Lanes(load(q + k));
      Lanes y = kl_lanes<kSlope>(x, estimator);
      if (kSlope) y = gradient(Lanes(load(g + k)), y);
      beyond = beyond + select_less(range, abs(x), Lanes(1.0f), zero);
      store(out + k, y.v);
    }
    if (estimator == kK3 && reduce_add(beyond.v) > 0.0) {
      for (int64_t k = 0; k < n; ++k) {
        const float x = p[k] - q[k];
        if (!(fabsf(x) > kExpRange)) continue;
        out[k] = kl_estimate(x, estimator);
        if (kSlope) out[k] = g[k] == 0.0f ? 0.0f : g[k] * kl_estimate_slope(x, estimator);
      }
    }
    write_block(a.out, i * a.cols + j, n, out);
  });
  return {};
}

Status kl_penalty(const KlPenaltyArgs& a) { return kl_penalty_blocks<false>(a, a.estimator); }

Status kl_penalty_backward(const KlPenaltyArgs& a) {
  return kl_penalty_blocks<true>(a, a.straight_through ? static_cast<int32_t>(kK2) : a.estimator);
}

}  // namespace
}  // namespace rk
