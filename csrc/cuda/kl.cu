// KL divergence between two rows of logits over the whole vocabulary, and the per-token estimators.
#include "kl.cuh"

namespace rk::cuda {
namespace {

constexpr int kPenaltyThreads = 256;

// Reverse: dz = e a (x - m - (y - m') - b). Forward: dz = e a - e' b. a and b are 0 where the row
// takes no gradient.
struct alignas(16) Coefficients {
  float m, ref_m, a, b;
};

// Logits within, of both rows, leave every distance and every difference of two finite.
constexpr float kFinite = 1.0e38f;

// A lane's sums of a tile; kFinite: every logit lies within.
template <class E, bool kAllFinite>
__device__ __forceinline__ void add_pairs(const Pack<E> (&p)[kSlots], const Pack<E> (&q)[kSlots],
                                          float base_p, float base_q, float rate,
                                          PairSums<float>& r) {
  const float rate2 = rate * kLog2e;
#pragma unroll
  for (int k = 0; k < kSlots; ++k) {
#pragma unroll
    for (int w = 0; w < kWidth<E>; ++w) {
      const float d_p = p[k].get(w) - base_p, d_q = q[k].get(w) - base_q;
      const float e = exp2_fast(d_p * rate2);
      r.s_p += e;
      r.s_q += exp2_fast(d_q * rate2);
      // No weight, no term, also where Q is -inf there.
      if (kAllFinite || e != 0.0f) r.t = fmaf(e, d_p - d_q, r.t);
    }
  }
}

// The sums of one tile of one row pair, by a warp. partials: [rows * cols, tiles].
template <class E>
__global__ void __launch_bounds__(kRowThreads, 4)
    partial_kernel(const Tensor p, const Tensor q, int64_t vocab, float rate, const RowTiles tiles,
                   PairSums<float>* partials) {
  constexpr int kColumns = tile_columns(kSlots, sizeof(typename E::Storage));
  const Tile tile(tiles);
  if (tile.id >= tiles.total) return;
  const float minus_inf = -__builtin_inff();
  const int64_t first = static_cast<int64_t>(tile.index) * kColumns;
  Pack<E> slots_p[kSlots], slots_q[kSlots];
  load_tile<E>(tile.start<E>(p) + first, vocab - first, minus_inf, slots_p);
  load_tile<E>(tile.start<E>(q) + first, vocab - first, minus_inf, slots_q);
  const Ends ends_p = lane_ends<E>(slots_p), ends_q = lane_ends<E>(slots_q);
  PairSums<float> r{warp_reduce(ends_p.most, MaxNan{}), 0.0f, warp_reduce(ends_q.most, MaxNan{}),
                    0.0f, 0.0f};
  // A tile of nothing but -inf has no reference point; its sums are zero around any.
  const float base_p = r.m_p == minus_inf ? 0.0f : r.m_p;
  const float base_q = r.m_q == minus_inf ? 0.0f : r.m_q;
  const float least = fminf(ends_p.least, ends_q.least);
  if (least > -kFinite && r.m_p < kFinite && r.m_q < kFinite)
    add_pairs<E, true>(slots_p, slots_q, base_p, base_q, rate, r);
  else
    add_pairs<E, false>(slots_p, slots_q, base_p, base_q, rate, r);
  r.s_p = warp_reduce(r.s_p, Sum{});
  r.s_q = warp_reduce(r.s_q, Sum{});
  r.t = warp_reduce(r.t, Sum{});
  if (threadIdx.x % kWarp == 0) partials[tile.id] = r;
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
    // An infinite reverse divergence leaves no number as the difference to its mean. The forward
    // divergence has a gradient there.
    const double poison = a.reverse || mean != mean ? mean - mean : 0.0;
    const double scaled = g / a.temperature + poison;
    c.m = stats[0];
    c.ref_m = stats[2];
    c.a = static_cast<float>(scaled / s / (a.reverse ? a.temperature : 1.0));
    c.b = static_cast<float>(a.reverse ? mean : scaled / ref_s);
  }
  out[row] = c;
}

// Overwrites a lane's slots of x with their gradients. kAllFinite: every pair's divergence has a
// gradient, and all logits but -inf lie within kFinite.
template <class E, bool kReverse, bool kAllFinite, int kCount>
__device__ __forceinline__ void gradients(const Coefficients& c, float rate2, Pack<E> (&x)[kCount],
                                          Pack<E> (&y)[kCount]) {
  if constexpr (kAllFinite && kReverse) {
    // Where the policy has no weight any difference will do that is a number.
    raise_to<E>(floor_of<E>(), x);
    raise_to<E>(E::kLeast, y);
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float dz[kPerWord<E>];
#pragma unroll
      for (int w = 0; w < kPerWord<E>; ++w) {
        const float d = x[k].get(i * kPerWord<E> + w) - c.m;
        const float ref_d = y[k].get(i * kPerWord<E> + w) - c.ref_m;
        const float e = exp2_fast(d * rate2);
        if constexpr (kReverse) {
          // Added, so that no zero has a sign.
          dz[w] = kAllFinite || e != 0.0f ? fmaf(e * c.a, d - ref_d - c.b, 0.0f) : 0.0f;
        } else {
          const float ref_e = exp2_fast(ref_d * rate2);
          // Selected: a and b may be the NaN of a row without a finite divergence.
          dz[w] = kAllFinite ? fmaf(e, c.a, -(ref_e * c.b))
                             : (e == 0.0f ? 0.0f : e * c.a) - (ref_e == 0.0f ? 0.0f : ref_e * c.b);
        }
      }
      x[k].words[i] = E::word(dz);
    }
  }
}

// One tile of p (log p - log q - KL) g / T (reverse) or (p - q) g / T (forward), by a warp; O is
// the dtype of the gradient.
template <class E, class O, bool kReverse>
__global__ void __launch_bounds__(kRowThreads, 4)
    backward_kernel(const KlBackwardArgs a, float rate, const RowTiles tiles,
                    const Coefficients* coefficients) {
  using S = typename E::Storage;
  const Tile tile(tiles);
  if (tile.id >= tiles.total) return;
  const Coefficients c = coefficients[tile.token];
  const S *x = tile.start<E>(a.logits), *y = tile.start<E>(a.ref_logits);
  auto* out = const_cast<typename O::Storage*>(tile.start<O>(a.grad_logits));
  const Window<E, kWindowSlots<E, O, kSlots>, O> window(tile.index, a.vocab, out, x, y);
  if (c.a == 0.0f && c.b == 0.0f) {
    window.clear(out);
    return;
  }
  const float rate2 = rate * kLog2e;
  const bool finite = c.a * 0.0f == 0.0f && c.b * 0.0f == 0.0f && fabsf(c.ref_m) < 1.0e30f &&
                      floor_weighs_nothing<E>(c.m, rate2);
  if (finite)
    window.map(x, y, out,
               [&](auto& own, auto& ref) { gradients<E, kReverse, true>(c, rate2, own, ref); });
  else
    window.map(x, y, out,
               [&](auto& own, auto& ref) { gradients<E, kReverse, false>(c, rate2, own, ref); });
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
  const int64_t tiles = ceil_div(vocab, tile_columns(kSlots, element_size));
  return tokens * (kRowConstants + tiles * (sizeof(PairSums<float>) + sizeof(float)));
}

int64_t kl_divergence_backward_scratch(int64_t tokens) { return tokens * kRowConstants; }

Status kl_divergence(const KlArgs& a) {
  if (a.general()) return general_divergence(a);
  const OnDevice guard(a.exec);
  const int64_t tokens = a.rows * a.cols;
  auto* partials = static_cast<PairSums<float>*>(a.exec.scratch);
  const int64_t tiles = ceil_div(a.vocab, tile_columns(kSlots, element_size(a.logits.dtype)));
  const RowTiles all(a.rows, a.cols, tiles);
  const float rate = 1.0f / static_cast<float>(a.temperature);
  const Tensor& p = a.reverse ? a.logits : a.ref_logits;
  const Tensor& q = a.reverse ? a.ref_logits : a.logits;
  for_dtype(a.logits.dtype, [&](auto element) {
    RK_ENQUEUE(a.exec, all.blocks(), kRowThreads, partial_kernel<decltype(element)>, p, q, a.vocab,
               rate, all, partials);
  });
  RK_ENQUEUE(a.exec, ceil_div(tokens, kCombineThreads / kWarp), kCombineThreads, combine_kernel, a,
             static_cast<uint32_t>(tiles), partials);
  return {};
}

Status kl_divergence_backward(const KlBackwardArgs& a) {
  if (a.general()) return general_divergence_backward(a);
  const OnDevice guard(a.exec);
  const int64_t tokens = a.rows * a.cols;
  auto* coefficients = static_cast<Coefficients*>(a.exec.scratch);
  const float rate = 1.0f / static_cast<float>(a.temperature);
  RK_ENQUEUE(a.exec, ceil_div(tokens, kCombineThreads), kCombineThreads, coefficients_kernel, a,
             coefficients);
  for_gradient(a.logits.dtype, a.grad_logits.dtype, [&](auto element, auto result) {
    using E = decltype(element);
    using O = decltype(result);
    const RowTiles all(
        a.rows, a.cols,
        window_tiles(a.vocab, kWindowSlots<E, O, kSlots>, sizeof(typename O::Storage)));
    for_flag(a.reverse, [&](auto reverse) {
      RK_ENQUEUE(a.exec, all.blocks(), kRowThreads, (backward_kernel<E, O, reverse.value>), a, rate,
                 all, coefficients);
    });
  });
  return {};
}

Status kl_penalty(const KlPenaltyArgs& a) { return run_penalty<false>(a, a.estimator); }

Status kl_penalty_backward(const KlPenaltyArgs& a) {
  return run_penalty<true>(a, a.straight_through ? static_cast<int32_t>(kK2) : a.estimator);
}

}  // namespace rk::cuda
