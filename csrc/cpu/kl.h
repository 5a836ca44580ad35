// KL divergence between two rows of logits over the whole vocabulary, and the per-token estimators.
#pragma once

namespace rk {
namespace {

enum class Divergence { kReverse, kForward, kMixture };

// The divergence of a row pair and its statistics from its sums.
inline void store_divergence(const KlArgs& a, int64_t row, const PairSums& r) {
  const double inv_t = 1.0 / a.temperature;
  const float minus_inf = -__builtin_inff();
  double kl = __builtin_nan("");
  if (r.p.m != minus_inf && r.q.m != minus_inf) {
    kl = r.p.t / r.p.s * inv_t - (log(r.p.s) - log(r.q.s));
    // A KL divergence is never negative (Gibbs), but rounding may make it so. NaN stays.
    if (kl < 0.0) kl = 0.0;
  }
  static_cast<float*>(a.kl.data)[row] = static_cast<float>(kl);
  float* stats = a.stats + 5 * row;
  const RowSums& policy = a.reverse ? r.p : r.q;
  const RowSums& ref = a.reverse ? r.q : r.p;
  stats[0] = policy.m, stats[1] = static_cast<float>(policy.s);
  stats[2] = ref.m, stats[3] = static_cast<float>(ref.s);
  // The mean difference, not the divergence: the gradient does not need the logarithms, whose
  // difference loses digits by cancellation.
  stats[4] = static_cast<float>(kl != kl ? kl : r.p.t / r.p.s);
}

// The policy's entropy from the sums of its row.
inline void store_entropy(const KlArgs& a, int64_t row, const RowSums& policy, double u) {
  const double h = log(policy.s) - u / policy.s * (1.0 / a.temperature);
  static_cast<float*>(a.entropy.data)[row] =
      policy.m == -__builtin_inff() ? __builtin_nanf("") : static_cast<float>(h);
}

template <class E, bool kGeneral>
void kl_row(const KlArgs& a, int64_t row) {
  const int64_t i = row / a.cols, j = row % a.cols;
  const Tensor& p = a.reverse ? a.logits : a.ref_logits;
  const Tensor& q = a.reverse ? a.ref_logits : a.logits;
  const PairLogits<kGeneral> of(a.options);
  const PairRow<kGeneral> of_row{1.0 / a.temperature, a.reverse ? of.own : of.ref,
                                 a.reverse ? of.ref : of.own, a.reverse};
  const PairSums r = pair_sums<E>(row_at<E>(p, i, j), row_at<E>(q, i, j), a.vocab, of_row);
  store_divergence(a, row, r);
  if constexpr (kGeneral) {
    if (a.entropy.given) store_entropy(a, row, a.reverse ? r.p : r.q, r.u);
    // Without a logit that is finite it is NaN already.
    const bool finite = r.p.m != -__builtin_inff() && r.q.m != -__builtin_inff();
    if (a.options.beta > 0.0 && finite) mixture_row<E>(a, row);
  }
}

// Gradient w.r.t. the policy's logits. Reverse: p_j (log p_j - log q_j - KL) / T, which is p_j / T
// times the difference (x - m - (y - m')) / T minus its mean under p. Forward: (p_j - q_j) / T.
// Mixture: (1 - beta) p_j (log(p_j / m_j) - KL(p || m)) / T. Times the slope of the policy's cap.
template <class E, Divergence kKind, bool kGeneral>
void kl_backward_row(const KlBackwardArgs& a, int64_t row) {
  using S = typename E::Storage;
  const int64_t i = row / a.cols, j = row % a.cols;
  const float g = upstream_at(a.grad_kl, i, j);
  S* out = row_at<E>(a.grad_logits, i, j);
  if (g == 0.0f) {
    memset(out, 0, sizeof(S) * static_cast<size_t>(a.vocab));
    return;
  }
  const S *x = row_at<E>(a.logits, i, j), *y = row_at<E>(a.ref_logits, i, j);
  const float* stats = a.stats + 5 * row;
  const PairLogits<kGeneral> of(a.options);
  const PairStatistics pair(stats, a.temperature);
  const float mean = stats[4];
  // An infinite reverse divergence has a NaN gradient, as differences to its mean are NaN. An
  // infinite forward divergence has a finite gradient.
  const float poison = kKind != Divergence::kForward || mean != mean ? mean - mean : 0.0f;
  const double part = kKind == Divergence::kMixture ? 1.0 - a.options.beta : 1.0;
  const double scaled = kGeneral ? g * part / a.temperature : g * (1.0 / a.temperature);
  const Vec weight = splat(static_cast<float>(scaled / stats[1] + poison));
  const Vec ref_weight = splat(static_cast<float>(scaled / stats[3] + poison));
  const Vec offset = splat(mean);
  const Vec log_ratio = kKind == Divergence::kMixture ? log_ratio_of(stats) : offset;
  const Lanes beta(static_cast<float>(a.options.beta));
  const Lanes other(static_cast<float>(1.0 - a.options.beta));
  const auto gradient = [&](Vec zx, Vec zy) {
    const Logits policy = of.own(zx);
    const Vec d = sub(policy.z, pair.m), ref_d = sub(of.ref.values(zy), pair.ref_m);
    const auto sloped = [&](Vec dz) { return kGeneral ? mul(dz, policy.slope) : dz; };
    if constexpr (kKind == Divergence::kForward)
      return sub(sloped(pair.weighted(d, weight)), sloped(pair.weighted(ref_d, ref_weight)));
    Vec excess = mul(sub(sub(d, ref_d), offset), pair.scale);
    if constexpr (kKind == Divergence::kMixture) {
      const Lanes log_of(pair.log_of_ratio(d, ref_d, log_ratio));
      excess = sub(mixture_terms(log_of, beta, other).of_p.v, offset);
    }
    return pair.kept(d, mul(sloped(pair.term(d, weight)), excess));
  };
  constexpr int kUnroll = kGeneral ? 1 : 2;
  int64_t k = 0;
  for (; k + kUnroll * kLanes <= a.vocab; k += kUnroll * kLanes) {
    prefetch_ahead<E, kUnroll>(x + k);
    prefetch_ahead<E, kUnroll>(y + k);
    prefetch_ahead<E, kUnroll, true>(out + k);
    Vec dz[kUnroll];
    for (int u = 0; u < kUnroll; ++u)
      dz[u] = gradient(E::load(x + k + u * kLanes), E::load(y + k + u * kLanes));
    for (int u = 0; u < kUnroll; ++u) E::store(out + k + u * kLanes, dz[u]);
  }
  for (; k < a.vocab; k += kLanes) {
    const int n = a.vocab - k < kLanes ? static_cast<int>(a.vocab - k) : kLanes;
    store_partial<E>(out + k,
                     gradient(load_partial<E>(x + k, n, 0.0f), load_partial<E>(y + k, n, 0.0f)), n);
  }
}

Status kl_divergence(const KlArgs& a) {
  const auto row = for_dtype(a.logits.dtype, [&](auto e) {
    using E = decltype(e);
    return a.general() ? kl_row<E, true> : kl_row<E, false>;
  });
  parallel_for(a.rows * a.cols, a.exec.threads, [&](int64_t r) { row(a, r); });
  return {};
}

Status kl_divergence_backward(const KlBackwardArgs& a) {
  const auto row = for_dtype(a.logits.dtype, [&](auto e) {
    using E = decltype(e);
    if (a.options.beta > 0.0) return kl_backward_row<E, Divergence::kMixture, true>;
    if (a.general())
      return a.reverse ? kl_backward_row<E, Divergence::kReverse, true>
                       : kl_backward_row<E, Divergence::kForward, true>;
    return a.reverse ? kl_backward_row<E, Divergence::kReverse, false>
                     : kl_backward_row<E, Divergence::kForward, false>;
  });
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
