// KL divergence between two rows of logits over the whole vocabulary, and the per-token estimators.
#include "kl.cuh"

namespace rk::cuda {
namespace {

constexpr int kPenaltyThreads = 256, kPenaltyTokens = 4;

// Reverse: dz = e a (x - m - (y - m') - b). Forward: dz = e a - e' b. a and b are 0 where the row
// takes no gradient.
struct alignas(16) Coefficients {
  float m, ref_m, a, b;
};

// Logits within, of both rows, leave every distance and every difference of two finite.
constexpr float kFinite = 1.0e38f;

// Adds a lane's sums of a tile; kAllFinite: every logit lies within kFinite.
template <class E, bool kAllFinite>
__device__ __forceinline__ void add_pairs(const PairTile<E, kSlots>& tile, float base_p,
                                          float base_q, float rate, PairSums<float>& r) {
  const float rate2 = rate * kLog2e;
#pragma unroll
  for (int k = 0; k < kSlots; ++k) {
#pragma unroll
    for (int w = 0; w < kWidth<E>; ++w) {
      const float d_p = tile.p[k].get(w) - base_p, d_q = tile.q[k].get(w) - base_q;
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
  const Tile tile(tiles);
  if (tile.id >= tiles.total) return;
  const auto same = [](float x) { return x; };
  const PairSums<float> sums =
      tile_sums<E>(tile, p, q, vocab, same, same,
                   [&](const auto& slots, float base_p, float base_q, float least, auto& r) {
                     if (least > -kFinite && r.m_p < kFinite && r.m_q < kFinite)
                       add_pairs<E, true>(slots, base_p, base_q, rate, r);
                     else
                       add_pairs<E, false>(slots, base_p, base_q, rate, r);
                   });
  if (threadIdx.x % kWarp == 0) partials[tile.id] = sums;
}

__global__ void __launch_bounds__(kCombineThreads)
    coefficients_kernel(const KlBackwardArgs a, Coefficients* out) {
  row_coefficients(a, !a.reverse, 1.0, out, [&](const float* stats, double scaled) {
    const double s = stats[1], ref_s = stats[3];
    return Coefficients{
        stats[0], stats[2], static_cast<float>(scaled / s / (a.reverse ? a.temperature : 1.0)),
        static_cast<float>(a.reverse ? static_cast<double>(stats[4]) : scaled / ref_s)};
  });
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
  overwrite<E>(x, [&](int k, int w) {
    const float d = x[k].get(w) - c.m, ref_d = y[k].get(w) - c.ref_m;
    const float e = exp2_fast(d * rate2);
    if constexpr (kReverse) {
      // Added, so that no zero has a sign.
      return kAllFinite || e != 0.0f ? fmaf(e * c.a, d - ref_d - c.b, 0.0f) : 0.0f;
    } else {
      const float ref_e = exp2_fast(ref_d * rate2);
      // Selected: a and b may be the NaN of a row without a finite divergence.
      return kAllFinite ? fmaf(e, c.a, -(ref_e * c.b))
                        : (e == 0.0f ? 0.0f : e * c.a) - (ref_e == 0.0f ? 0.0f : ref_e * c.b);
    }
  });
}

// One tile of p (log p - log q - KL) g / T (reverse) or (p - q) g / T (forward), by a warp; O is
// the dtype of the gradient.
template <class E, class O, bool kReverse>
__global__ void __launch_bounds__(kRowThreads, 4)
    backward_kernel(const KlBackwardArgs a, float rate, const RowTiles tiles,
                    const Coefficients* coefficients) {
  const Tile tile(tiles);
  if (tile.id >= tiles.total) return;
  const Coefficients c = coefficients[tile.token];
  gradient_tile<E, O>(a, tile, c, [&](const auto& map) {
    const float rate2 = rate * kLog2e;
    const bool finite = c.a * 0.0f == 0.0f && c.b * 0.0f == 0.0f && fabsf(c.ref_m) < 1.0e30f &&
                        floor_weighs_nothing<E>(c.m, rate2);
    if (finite)
      map([&](auto& own, auto& ref) { gradients<E, kReverse, true>(c, rate2, own, ref); });
    else
      map([&](auto& own, auto& ref) { gradients<E, kReverse, false>(c, rate2, own, ref); });
  });
}

// A thread's tokens, of all its tile or of what there is of the last one. kEven: all tensors are
// evenly spaced; kFloat: and of fp32.
template <bool kBackward, bool kEven, bool kFloat, bool kFull>
__device__ __forceinline__ void penalties(const KlPenaltyArgs& a, int32_t estimator,
                                          int64_t first) {
  const auto inside = [&](int j) { return kFull || first + j * kPenaltyThreads < a.rows * a.cols; };
  const auto load = [&](const Tensor& t, int j) {
    const int64_t at = token_at<kEven>(t, first + j * kPenaltyThreads, a.cols);
    return kFloat ? static_cast<const float*>(t.data)[at] : load_float(t, at);
  };
  float x[kPenaltyTokens], ref[kPenaltyTokens], g[kPenaltyTokens];
  // All loads in flight before the first use.
#pragma unroll
  for (int j = 0; j < kPenaltyTokens; ++j) {
    if (!inside(j)) continue;
    x[j] = load(a.logprobs, j);
    ref[j] = load(a.ref_logprobs, j);
    if constexpr (kBackward) g[j] = load(a.grad, j);
  }
#pragma unroll
  for (int j = 0; j < kPenaltyTokens; ++j) {
    if (!inside(j)) continue;
    const KlPenalty p = kl_penalty_term(x[j] - ref[j], estimator);
    float y = p.value;
    // A token without upstream gradient takes none, whatever its value.
    if constexpr (kBackward) y = g[j] == 0.0f ? 0.0f : g[j] * p.slope;
    const int64_t at = first + j * kPenaltyThreads;
    if constexpr (kFloat)
      static_cast<float*>(a.out.data)[at] = y;
    else
      store_float(a.out, at, y);
  }
}

template <bool kBackward, bool kEven, bool kFloat>
__global__ void __launch_bounds__(kPenaltyThreads)
    penalty_kernel(const KlPenaltyArgs a, int32_t estimator) {
  constexpr int64_t tile = kPenaltyThreads * kPenaltyTokens;
  const int64_t first = blockIdx.x * tile + threadIdx.x;
  if (kEven && (blockIdx.x + 1) * tile <= a.rows * a.cols)
    penalties<kBackward, kEven, kFloat, true>(a, estimator, first);
  else
    penalties<kBackward, kEven, kFloat, false>(a, estimator, first);
}

template <bool kBackward>
Status run_penalty(const KlPenaltyArgs& a, int32_t estimator) {
  const OnDevice guard(a.exec);
  const auto every = [&](const auto& holds) {
    return holds(a.logprobs) && holds(a.ref_logprobs) && (!kBackward || holds(a.grad));
  };
  const bool even = every([&](const Tensor& t) { return evenly_spaced(t, a.rows, a.cols); });
  const bool plain =
      even && a.out.dtype == kFloat32 && every([](const Tensor& t) { return t.dtype == kFloat32; });
  const int64_t blocks = ceil_div(a.rows * a.cols, kPenaltyThreads * kPenaltyTokens);
  const auto enqueue = [&](const auto& kernel) {
    RK_ENQUEUE(a.exec, blocks, kPenaltyThreads, kernel, a, estimator);
  };
  if (plain)
    enqueue(penalty_kernel<kBackward, true, true>);
  else if (even)
    enqueue(penalty_kernel<kBackward, true, false>);
  else
    enqueue(penalty_kernel<kBackward, false, false>);
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
  auto* partials = static_cast<PairSums<float>*>(a.exec.scratch);
  const int64_t tiles = pair_tiles(a, kSlots);
  const RowTiles all(a.rows, a.cols, tiles);
  const float rate = 1.0f / static_cast<float>(a.temperature);
  const Tensor& p = a.reverse ? a.logits : a.ref_logits;
  const Tensor& q = a.reverse ? a.ref_logits : a.logits;
  for_dtype(a.logits.dtype, [&](auto element) {
    RK_ENQUEUE(a.exec, all.blocks(), kRowThreads, partial_kernel<decltype(element)>, p, q, a.vocab,
               rate, all, partials);
  });
  enqueue_combine(a, tiles, partials);
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
  for_gradient_tiles(a, [&](auto element, auto result, const RowTiles& all) {
    using E = decltype(element);
    using O = decltype(result);
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
