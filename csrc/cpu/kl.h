// KL divergence between two rows of logits over the whole vocabulary, and the per-token estimators.
//
// P is the weighting distribution (policy for reverse, reference for forward), Q the other one:
// KL = sum P (log P - log Q) = t / s_P - (log s_P - log s_Q), t = sum e_P ((x_P - m_P) - (x_Q -
// m_Q)). The difference is taken element by element, so t is accurate where the two rows are close.
#pragma once

namespace rk {
namespace {

// The reduction of a pair of rows. P is the weighting distribution.
struct PairSums {
  RowSums p, q;  // p.t is the sum above; q.t is unused
};

// Moves the reference point of a row's sums from r.m to m. Returns the factor that scales every e.
inline double rebase(RowSums& r, float m, double inv_t) {
  double scale = 1.0;
  if (r.s != 0.0) scale = exp((static_cast<double>(r.m) - m) * inv_t);
  r.s *= scale;
  r.m = m;
  return scale;
}

// Half a block of each row, so that both together fit the L1 cache.
constexpr int64_t kPairBlock = kBlock / 2;
constexpr int kPairUnroll = 2;

struct PairMax {
  float p, q;
};

// Adds a block of n pairs of logits to the sums. With kNext, returns the maxima of the next full
// block, as add_block does for one row.
template <class E, bool kNext>
inline PairMax add_pairs(PairSums& r, const typename E::Storage* xp, const typename E::Storage* xq,
                         int64_t n, Vec rate, Vec lowest) {
  const float minus_inf = -__builtin_inff();
  const Vec zero = splat(0.0f);
  // A row of only -inf so far has no reference point yet; its sums are 0 with any.
  const Vec vp = splat(r.p.m == minus_inf ? 0.0f : r.p.m);
  const Vec vq = splat(r.q.m == minus_inf ? 0.0f : r.q.m);
  Vec sp[kPairUnroll], sq[kPairUnroll], t[kPairUnroll], next_p[kPairUnroll], next_q[kPairUnroll];
  for (int u = 0; u < kPairUnroll; ++u) {
    sp[u] = sq[u] = t[u] = zero;
    next_p[u] = next_q[u] = splat(minus_inf);
  }
  const auto accumulate = [&](int u, Vec zp, Vec zq) {
    const Vec dp = sub(zp, vp), dq = sub(zq, vq);
    // Weights below the range of exp are exactly zero, so that a reference logit of -inf does not
    // give 0 * inf, and sums over only -inf stay 0.
    const Vec ep = select_less(dp, lowest, zero, exp_scaled(max(lowest, dp), rate));
    const Vec eq = select_less(dq, lowest, zero, exp_scaled(max(lowest, dq), rate));
    sp[u] = add(sp[u], ep);
    sq[u] = add(sq[u], eq);
    const Vec term = mul(ep, sub(dp, dq));
    t[u] = add(t[u], select_less(dp, lowest, zero, term));
  };
  int64_t i = 0;
  for (; i + kPairUnroll * kLanes <= n; i += kPairUnroll * kLanes) {
    prefetch_ahead<E, kPairUnroll>(xp + i + kPairBlock);
    prefetch_ahead<E, kPairUnroll>(xq + i + kPairBlock);
    for (int u = 0; u < kPairUnroll; ++u) {
      const int64_t k = i + u * kLanes;
      accumulate(u, E::load(xp + k), E::load(xq + k));
      if constexpr (kNext) {
        next_p[u] = max(next_p[u], E::load(xp + kPairBlock + k));
        next_q[u] = max(next_q[u], E::load(xq + kPairBlock + k));
      }
    }
  }
  for (; i < n; i += kLanes) {
    const int left = n - i < kLanes ? static_cast<int>(n - i) : kLanes;
    accumulate(0, load_partial<E>(xp + i, left, minus_inf),
               load_partial<E>(xq + i, left, minus_inf));
  }
  r.p.s += reduce_add(add(sp[0], sp[1]));
  r.q.s += reduce_add(add(sq[0], sq[1]));
  r.p.t += reduce_add(add(t[0], t[1]));
  return {reduce_max(max(next_p[0], next_p[1])), reduce_max(max(next_q[0], next_q[1]))};
}

template <class E>
inline PairSums pair_sums(const typename E::Storage* xp, const typename E::Storage* xq,
                          int64_t vocab, double inv_t) {
  const float minus_inf = -__builtin_inff();
  PairSums r;
  const Vec rate = splat(static_cast<float>(inv_t * kLog2e));
  const Vec lowest = splat(static_cast<float>(kExpMin / inv_t));
  PairMax next{};
  bool known = false;
  for (int64_t start = 0; start < vocab; start += kPairBlock) {
    const int64_t n = vocab - start < kPairBlock ? vocab - start : kPairBlock;
    const float mp = known ? next.p : block_max<E>(xp + start, n);
    const float mq = known ? next.q : block_max<E>(xq + start, n);
    if (mp > r.p.m) {
      // The new maximum m' also lowers every x_P - m_P by m' - m.
      const double shift = static_cast<double>(r.p.m) - mp;
      const bool any = r.p.s != 0.0;
      const double scale = rebase(r.p, mp, inv_t);
      // Weights that underflow contribute 0, even if their terms were infinite.
      if (any) r.p.t = scale == 0.0 ? 0.0 : scale * r.p.t + r.p.s * shift;
    }
    if (mq > r.q.m) {
      // Raises every -(x_Q - m_Q) by m' - m; skipped while the reference has seen only -inf.
      if (r.p.s != 0.0 && r.q.m != minus_inf) r.p.t += r.p.s * (static_cast<double>(mq) - r.q.m);
      rebase(r.q, mq, inv_t);
    }
    if (mp == minus_inf && has_nan<E>(xp + start, n)) r.p.s = __builtin_nan("");
    if (mq == minus_inf && has_nan<E>(xq + start, n)) r.q.s = __builtin_nan("");
    known = vocab - start >= 2 * kPairBlock;
    if (known)
      next = add_pairs<E, true>(r, xp + start, xq + start, n, rate, lowest);
    else
      add_pairs<E, false>(r, xp + start, xq + start, n, rate, lowest);
  }
  return r;
}

template <class E>
void kl_row(const KlArgs& a, int64_t row) {
  const int64_t i = row / a.cols, j = row % a.cols;
  const double inv_t = 1.0 / a.temperature;
  const Tensor& p = a.reverse ? a.logits : a.ref_logits;
  const Tensor& q = a.reverse ? a.ref_logits : a.logits;
  const PairSums r = pair_sums<E>(row_at<E>(p, i, j), row_at<E>(q, i, j), a.vocab, inv_t);
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
  const auto row = a.logits.dtype == kBFloat16  ? kl_row<BF16>
                   : a.logits.dtype == kFloat16 ? kl_row<F16>
                                                : kl_row<F32>;
  parallel_for(a.rows * a.cols, a.exec.threads, [&](int64_t r) { row(a, r); });
  return {};
}

Status kl_divergence_backward(const KlBackwardArgs& a) {
  const auto choose = [&](auto e) {
    using E = decltype(e);
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
