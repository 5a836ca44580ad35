// KL divergence between two rows of logits over the whole vocabulary, and the per-token estimators.
//
// With P the distribution that weighs (policy for reverse, reference for forward) and Q the other:
// KL = t / (T s_P) - (log s_P - log s_Q), t = sum e_P ((x_P - m_P) - (x_Q - m_Q)). The difference
// is taken element by element: where the two rows are close, so is the sum.
#include "rows.cuh"

namespace rk::cuda {
namespace {

// 16-byte loads of each of the two rows that a thread has in flight.
constexpr int kSlots = 4;
constexpr int kPenaltyThreads = 256;

// A row pair's or a tile's sums.
template <class T>
struct PairSums {
  float m_p;
  T s_p;
  float m_q;
  T s_q, t;
};

// Reverse: dz = e a (x - m - (y - m') - b) / T. Forward: dz = e a - e' b. a and b are 0 where the
// row takes no gradient.
struct Coefficients {
  float m, ref_m, a, b;
};

template <class E>
__device__ __forceinline__ const typename E::Storage* row_of(const Tensor& x, int64_t row,
                                                             int64_t cols) {
  return static_cast<const typename E::Storage*>(x.data) + token_at(x, row, cols);
}

// exp(rate d), and exactly 0 below the normal floats: what is under such a weight is unread.
__device__ __forceinline__ float weight_of(float d, float rate) {
  return d * rate < kLowest ? 0.0f : exp2_fast(d * (rate * kLog2e));
}

// The sums of one tile of one row pair.
template <class E>
__global__ void __launch_bounds__(kRowThreads)
    partial_kernel(const Tensor p, const Tensor q, int64_t cols, int64_t vocab, float temperature,
                   uint32_t tiles, bool aligned, PairSums<float>* partials) {
  constexpr int kColumns = tile_columns(kSlots, sizeof(typename E::Storage));
  __shared__ float shared[5][kRowThreads / kWarp];
  const Tile tile = this_tile(tiles, vocab, kColumns);
  const float minus_inf = -__builtin_inff();
  Pack<E> slots_p[kSlots], slots_q[kSlots];
  load_tile<E, kRowThreads>(row_of<E>(p, tile.row, cols) + tile.first, tile.count, aligned,
                            minus_inf, slots_p);
  load_tile<E, kRowThreads>(row_of<E>(q, tile.row, cols) + tile.first, tile.count, aligned,
                            minus_inf, slots_q);
  PairSums<float> r{minus_inf, 0.0f, minus_inf, 0.0f, 0.0f};
#pragma unroll
  for (int k = 0; k < kSlots; ++k) {
#pragma unroll
    for (int w = 0; w < kWidth<E>; ++w) {
      r.m_p = max_nan(r.m_p, slots_p[k].get(w));
      r.m_q = max_nan(r.m_q, slots_q[k].get(w));
    }
  }
  r.m_p = block_reduce<kRowThreads>(r.m_p, MaxNan{}, shared[0]);
  r.m_q = block_reduce<kRowThreads>(r.m_q, MaxNan{}, shared[1]);
  const float rate = 1.0f / temperature;
  // Nothing but -inf leaves no reference point: any will do for sums of zeros.
  const float base_p = r.m_p == minus_inf ? 0.0f : r.m_p;
  const float base_q = r.m_q == minus_inf ? 0.0f : r.m_q;
#pragma unroll
  for (int k = 0; k < kSlots; ++k) {
#pragma unroll
    for (int w = 0; w < kWidth<E>; ++w) {
      const float d_p = slots_p[k].get(w) - base_p;
      const float d_q = slots_q[k].get(w) - base_q;
      const float e = weight_of(d_p, rate);
      r.s_p += e;
      r.s_q += weight_of(d_q, rate);
      // No weight, no term, also where Q is -inf there.
      r.t += e == 0.0f ? 0.0f : e * (d_p - d_q);
    }
  }
  r.s_p = block_reduce<kRowThreads>(r.s_p, Sum{}, shared[2]);
  r.s_q = block_reduce<kRowThreads>(r.s_q, Sum{}, shared[3]);
  r.t = block_reduce<kRowThreads>(r.t, Sum{}, shared[4]);
  if (threadIdx.x == 0) partials[blockIdx.x] = r;
}

// Sums around m seen from the reference point `base`: their weight and distance.
struct Rebased {
  double shift, weight;
};
__device__ __forceinline__ Rebased rebased(float m, double s, float base, float rate) {
  // Sums of nothing have no distance to anything.
  const double shift = s == 0.0 ? 0.0 : static_cast<double>(m) - base;
  return {shift, weight_of(static_cast<float>(shift), rate)};
}

// The sums of a row pair from those of its tiles, by a warp: 32 tiles at a time, groups in order.
__device__ __forceinline__ PairSums<double> combine_pairs(const PairSums<float>* partials,
                                                          int64_t tiles, float rate) {
  const float minus_inf = -__builtin_inff();
  PairSums<double> r{minus_inf, 0.0, minus_inf, 0.0, 0.0};
  for (int64_t start = 0; start < tiles; start += kWarp) {
    const int64_t tile = start + threadIdx.x % kWarp;
    PairSums<float> x{minus_inf, 0.0f, minus_inf, 0.0f, 0.0f};
    if (tile < tiles) x = partials[tile];
    const float top_p = max_nan(r.m_p, warp_reduce(x.m_p, MaxNan{}));
    const float top_q = max_nan(r.m_q, warp_reduce(x.m_q, MaxNan{}));
    const float base_p = top_p == minus_inf ? 0.0f : top_p;
    const float base_q = top_q == minus_inf ? 0.0f : top_q;
    const auto moved = [&](float m_p, double s_p, float m_q, double s_q, double t) {
      const Rebased p = rebased(m_p, s_p, base_p, rate), q = rebased(m_q, s_q, base_q, rate);
      // Every x - m moves with m. A weight that underflows leaves nothing of an infinite term.
      const double term = p.weight == 0.0 ? 0.0 : p.weight * (t + s_p * (p.shift - q.shift));
      return PairSums<double>{0.0f, p.weight * s_p, 0.0f, q.weight * s_q, term};
    };
    const PairSums<double> now = moved(x.m_p, x.s_p, x.m_q, x.s_q, x.t);
    const PairSums<double> before = moved(r.m_p, r.s_p, r.m_q, r.s_q, r.t);
    r = {top_p, before.s_p + warp_reduce(now.s_p, Sum{}), top_q,
         before.s_q + warp_reduce(now.s_q, Sum{}), before.t + warp_reduce(now.t, Sum{})};
  }
  return r;
}

// Divergence of a row pair and its statistics; a warp to a row.
__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(const KlArgs a, uint32_t tiles, const PairSums<float>* partials) {
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * (kCombineThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= a.rows * a.cols) return;
  const double rate = 1.0 / a.temperature;
  const PairSums<double> r = combine_pairs(partials + row * tiles, tiles, static_cast<float>(rate));
  if (threadIdx.x % kWarp != 0) return;
  double kl = r.t / r.s_p * rate - (log(r.s_p) - log(r.s_q));
  // Gibbs: never negative. The comparison keeps NaN.
  if (kl < 0.0) kl = 0.0;
  if (r.m_p == -__builtin_inff() || r.m_q == -__builtin_inff()) kl = __builtin_nan("");
  static_cast<float*>(a.kl.data)[row] = static_cast<float>(kl);
  float* stats = a.stats + 5 * row;
  const int of_p = a.reverse ? 0 : 2, of_q = 2 - of_p;
  stats[of_p] = r.m_p, stats[of_p + 1] = static_cast<float>(r.s_p);
  stats[of_q] = r.m_q, stats[of_q + 1] = static_cast<float>(r.s_q);
  // Not the divergence: in that the logarithms cancel, which the gradient needs nothing of.
  stats[4] = static_cast<float>(kl != kl ? kl : r.t / r.s_p);
}

__global__ void __launch_bounds__(kCombineThreads)
    coefficients_kernel(const KlBackwardArgs a, Coefficients* out) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kCombineThreads + threadIdx.x;
  if (row >= a.rows * a.cols) return;
  const float g = static_cast<const float*>(a.grad_kl.data)[token_at(a.grad_kl, row, a.cols)];
  Coefficients c{0.0f, 0.0f, 0.0f, 0.0f};
  if (g != 0.0f) {
    const float* stats = a.stats + 5 * row;
    const double s = stats[1], ref_s = stats[3], mean = stats[4];
    // Where the reverse divergence is infinite no difference to its mean is a number. The forward
    // one has a gradient there.
    const double poison = a.reverse || mean != mean ? mean - mean : 0.0;
    const double scaled = g / a.temperature + poison;
    c.m = stats[0];
    c.ref_m = stats[2];
    c.a = static_cast<float>(scaled / s);
    c.b = static_cast<float>(a.reverse ? mean : scaled / ref_s);
  }
  out[row] = c;
}

// One tile of p (log p - log q - KL) g / T (reverse) or (p - q) g / T (forward).
template <class E, bool kReverse>
__global__ void __launch_bounds__(kRowThreads)
    backward_kernel(const KlBackwardArgs a, uint32_t tiles, bool aligned,
                    const Coefficients* coefficients) {
  using S = typename E::Storage;
  constexpr int kColumns = tile_columns(kSlots, sizeof(S));
  const Tile tile = this_tile(tiles, a.vocab, kColumns);
  const Coefficients c = coefficients[tile.row];
  S* out =
      static_cast<S*>(a.grad_logits.data) + token_at(a.grad_logits, tile.row, a.cols) + tile.first;
  if (c.a == 0.0f && c.b == 0.0f) {
    zero_tile<E, kRowThreads, kSlots>(out, tile.count, aligned);
    return;
  }
  Pack<E> x[kSlots], y[kSlots];
  load_tile<E, kRowThreads>(row_of<E>(a.logits, tile.row, a.cols) + tile.first, tile.count, aligned,
                            0.0f, x);
  load_tile<E, kRowThreads>(row_of<E>(a.ref_logits, tile.row, a.cols) + tile.first, tile.count,
                            aligned, 0.0f, y);
  const float rate = 1.0f / static_cast<float>(a.temperature);
#pragma unroll
  for (int k = 0; k < kSlots; ++k) {
#pragma unroll
    for (int w = 0; w < kWidth<E>; ++w) {
      const float d = x[k].get(w) - c.m, ref_d = y[k].get(w) - c.ref_m;
      const float e = weight_of(d, rate);
      float dz;
      if constexpr (kReverse) {
        dz = e == 0.0f ? 0.0f : e * c.a * ((d - ref_d - c.b) * rate);
      } else {
        const float ref_e = weight_of(ref_d, rate);
        // Selected: a and b may be the NaN of a row without a finite divergence.
        dz = (e == 0.0f ? 0.0f : e * c.a) - (ref_e == 0.0f ? 0.0f : ref_e * c.b);
      }
      x[k].set(w, E::put(dz));
    }
    store_slot<E>(out, slot_column<E, kRowThreads>(k), tile.count, aligned, x[k]);
  }
}

template <bool kBackward>
__global__ void __launch_bounds__(kPenaltyThreads)
    penalty_kernel(const KlPenaltyArgs a, int32_t estimator) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kPenaltyThreads + threadIdx.x;
  if (i >= a.rows * a.cols) return;
  const float x = load_float(a.logprobs, token_at(a.logprobs, i, a.cols)) -
                  load_float(a.ref_logprobs, token_at(a.ref_logprobs, i, a.cols));
  const KlPenalty p = kl_penalty_term(x, estimator);
  if constexpr (kBackward) {
    const float g = load_float(a.grad, token_at(a.grad, i, a.cols));
    // A token without upstream gradient takes none, whatever its value.
    store_float(a.out, i, g == 0.0f ? 0.0f : g * p.slope);
  } else {
    store_float(a.out, i, p.value);
  }
}

template <bool kBackward>
Status run_penalty(const KlPenaltyArgs& a, int32_t estimator) {
  const OnDevice guard(a.exec);
  RK_ENQUEUE(a.exec, ceil_div(a.rows * a.cols, kPenaltyThreads), kPenaltyThreads,
             penalty_kernel<kBackward>, a, estimator);
  return {};
}

}  // namespace

int64_t kl_divergence_scratch(int64_t tokens, int64_t vocab, int64_t element_size) {
  return tokens * ceil_div(vocab, tile_columns(kSlots, element_size)) * sizeof(PairSums<float>);
}

int64_t kl_divergence_backward_scratch(int64_t tokens) { return tokens * sizeof(Coefficients); }

Status kl_divergence(const KlArgs& a) {
  const OnDevice guard(a.exec);
  const int64_t tokens = a.rows * a.cols;
  auto* partials = static_cast<PairSums<float>*>(a.exec.scratch);
  const int64_t tiles = ceil_div(a.vocab, tile_columns(kSlots, element_size(a.logits.dtype)));
  const bool aligned =
      rows_aligned(a.logits, a.rows, a.cols) && rows_aligned(a.ref_logits, a.rows, a.cols);
  const Tensor& p = a.reverse ? a.logits : a.ref_logits;
  const Tensor& q = a.reverse ? a.ref_logits : a.logits;
  for_dtype(a.logits.dtype, [&](auto element) {
    RK_ENQUEUE(a.exec, tokens * tiles, kRowThreads, partial_kernel<decltype(element)>, p, q, a.cols,
               a.vocab, static_cast<float>(a.temperature), static_cast<uint32_t>(tiles), aligned,
               partials);
  });
  RK_ENQUEUE(a.exec, ceil_div(tokens, kCombineThreads / kWarp), kCombineThreads, combine_kernel, a,
             static_cast<uint32_t>(tiles), partials);
  return {};
}

Status kl_divergence_backward(const KlBackwardArgs& a) {
  const OnDevice guard(a.exec);
  const int64_t tokens = a.rows * a.cols;
  auto* coefficients = static_cast<Coefficients*>(a.exec.scratch);
  const int64_t tiles = ceil_div(a.vocab, tile_columns(kSlots, element_size(a.logits.dtype)));
  const bool aligned = rows_aligned(a.logits, a.rows, a.cols) &&
                       rows_aligned(a.ref_logits, a.rows, a.cols) &&
                       rows_aligned(a.grad_logits, a.rows, a.cols);
  RK_ENQUEUE(a.exec, ceil_div(tokens, kCombineThreads), kCombineThreads, coefficients_kernel, a,
             coefficients);
  for_dtype(a.logits.dtype, [&](auto element) {
    for_flag(a.reverse, [&](auto reverse) {
      RK_ENQUEUE(a.exec, tokens * tiles, kRowThreads,
                 (backward_kernel<decltype(element), reverse.value>), a,
                 static_cast<uint32_t>(tiles), aligned, coefficients);
    });
  });
  return {};
}

Status kl_penalty(const KlPenaltyArgs& a) { return run_penalty<false>(a, a.estimator); }

Status kl_penalty_backward(const KlPenaltyArgs& a) {
  return run_penalty<true>(a, a.straight_through ? static_cast<int32_t>(kK2) : a.estimator);
}

}  // namespace rk::cuda
