// The divergence of a pair of rows with options: caps, a scale of the reference's logits, the
// policy's entropy, and the generalised Jensen-Shannon divergence
// beta KL(q || m) + (1 - beta) KL(p || m), m = (1 - beta) p + beta q, of policy p and reference q.
// Its terms need the sums of both rows, so it reads them twice.
#include "../kl_math.h"
#include "kl.cuh"

namespace rk::cuda {
namespace {

enum class Divergence { kReverse, kForward, kMixture };

// A logit of one of the two rows as the options make it, and the slope of that; RowOptions' cap,
// then a scale, which the slope leaves out: that of the policy is 1.
struct PairLogit {
  LogitValues value;
  float scale;

  PairLogit(double cap, double factor)
      : value(RowOptions{1.0, cap, 0}), scale(static_cast<float>(factor)) {}
  // The fast value, for sums.
  __device__ __forceinline__ float operator()(float x) const {
    return (value.cap > 0.0f ? value(x) : x) * scale;
  }
  __device__ __forceinline__ Logit exact(float x) const {
    if (!(value.cap > 0.0f)) return {x * scale, 1.0f};
    const TanhParts p = tanh_parts(x / value.cap);
    return {value.cap * p.value * scale, p.slope};
  }
};

struct PairLogits {
  PairLogit own, ref;

  explicit PairLogits(const PairOptions& o)
      : own(o.softcap, 1.0), ref(o.ref_softcap, o.ref_scale) {}
};

// Calls f(k, w) for the columns of a lane's slots that are among the `left` of the row. A cap makes
// what lies beyond the row finite, so it must stay out by its position.
template <class E, int kCount = kSlots, class F>
__device__ __forceinline__ void for_columns(int64_t left, const F& f) {
  const auto each = [&](auto whole) {
#pragma unroll
    for (int k = 0; k < kCount; ++k)
#pragma unroll
      for (int w = 0; w < kWidth<E>; ++w)
        if (whole.value || slot_column<E>(k) + w < left) f(k, w);
  };
  if (left >= tile_columns(kCount, sizeof(typename E::Storage)))
    each(std::true_type{});
  else
    each(std::false_type{});
}

// The sums of one tile of one row pair, by a warp, and in `own_sums` the sum of e (x - m) of the
// policy, which is P where `own_p`.
template <class E>
__global__ void __launch_bounds__(kRowThreads, 2)
    partial_kernel(const Tensor p, const Tensor q, int64_t vocab, float rate, const PairLogit of_p,
                   const PairLogit of_q, bool own_p, const RowTiles tiles,
                   PairSums<float>* partials, float* own_sums) {
  constexpr int kColumns = tile_columns(kSlots, sizeof(typename E::Storage));
  const Tile tile(tiles);
  if (tile.id >= tiles.total) return;
  const float minus_inf = -__builtin_inff();
  const int64_t first = static_cast<int64_t>(tile.index) * kColumns;
  Pack<E> slots_p[kSlots], slots_q[kSlots];
  load_tile<E>(tile.start<E>(p) + first, vocab - first, minus_inf, slots_p);
  load_tile<E>(tile.start<E>(q) + first, vocab - first, minus_inf, slots_q);
  PairSums<float> r{of_p(warp_reduce(lane_ends<E>(slots_p).most, MaxNan{})), 0.0f,
                    of_q(warp_reduce(lane_ends<E>(slots_q).most, MaxNan{})), 0.0f, 0.0f};
  // A tile of nothing but -inf has no reference point; its sums are zero around any.
  const float base_p = r.m_p == minus_inf ? 0.0f : r.m_p;
  const float base_q = r.m_q == minus_inf ? 0.0f : r.m_q;
  const float rate2 = rate * kLog2e;
  float own = 0.0f;
  for_columns<E>(vocab - first, [&](int k, int w) {
    const float d_p = of_p(slots_p[k].get(w)) - base_p, d_q = of_q(slots_q[k].get(w)) - base_q;
    const float e_p = exp2_fast(d_p * rate2), e_q = exp2_fast(d_q * rate2);
    r.s_p += e_p;
    r.s_q += e_q;
    // No weight, no term, also where a distance is infinite.
    if (e_p != 0.0f) r.t = fmaf(e_p, d_p - d_q, r.t);
    const float e = own_p ? e_p : e_q;
    if (e != 0.0f) own = fmaf(e, own_p ? d_p : d_q, own);
  });
  r.s_p = warp_reduce(r.s_p, Sum{});
  r.s_q = warp_reduce(r.s_q, Sum{});
  r.t = warp_reduce(r.t, Sum{});
  own = warp_reduce(own, Sum{});
  if (threadIdx.x % kWarp == 0) partials[tile.id] = r, own_sums[tile.id] = own;
}

// After combine_kernel: the policy's entropy; a warp to a row.
__global__ void __launch_bounds__(kCombineThreads)
    entropy_kernel(const KlArgs a, uint32_t tiles, const PairSums<float>* partials,
                   const float* own_sums) {
  const int64_t row = row_of_warp();
  if (row >= a.rows * a.cols) return;
  const float* stats = a.stats + 5 * row;
  const float rate = static_cast<float>(1.0 / a.temperature), m = stats[0];
  double u = 0.0;
  for (int64_t start = 0; start < tiles; start += kWarp) {
    const int64_t tile = start + threadIdx.x % kWarp;
    double term = 0.0;
    if (tile < tiles) {
      const PairSums<float> x = partials[row * tiles + tile];
      const double s = a.reverse ? x.s_p : x.s_q;
      const Rebased moved = rebased(a.reverse ? x.m_p : x.m_q, s, m, rate);
      if (moved.weight != 0.0)
        term = moved.weight * (own_sums[row * tiles + tile] + s * moved.shift);
    }
    u += warp_reduce(term, Sum{});
  }
  if (threadIdx.x % kWarp != 0) return;
  const double s = stats[1], h = log(s) - u / s / a.temperature;
  static_cast<float*>(a.entropy.data)[row] =
      m == -__builtin_inff() ? __builtin_nanf("") : static_cast<float>(h);
}

// What the terms of a mixture need of a row: 1 / s of both, and log(s / ref_s).
struct alignas(16) RowConstants {
  float m, ref_m, weight, ref_weight, log_ratio;
};
static_assert(sizeof(RowConstants) <= kRowConstants);

__global__ void __launch_bounds__(kCombineThreads)
    constants_kernel(const KlArgs a, RowConstants* out) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kCombineThreads + threadIdx.x;
  if (row >= a.rows * a.cols) return;
  const float* stats = a.stats + 5 * row;
  const double s = stats[1], ref_s = stats[3];
  out[row] = {stats[0], stats[2], static_cast<float>(1.0 / s), static_cast<float>(1.0 / ref_s),
              static_cast<float>(log(s) - log(ref_s))};
}

// log(p / q) from the distances of both; finite where a probability is 0.
__device__ __forceinline__ float log_of_ratio(float d, float ref_d, float rate, float log_ratio) {
  const float lowest = kLowest / rate;
  return (max_nan(lowest, d) - max_nan(lowest, ref_d)) * rate - log_ratio;
}

// The sums of p log(p / m) and q log(q / m) over a tile.
struct alignas(8) MixtureSums {
  float of_p, of_q;
};

// With more, 16-bit logits spill on sm_100. The sums of these tiles lie where those of larger ones
// were.
constexpr int kMixtureSlots = 2;
static_assert(kSlots == 2 * kMixtureSlots);
static_assert(2 * sizeof(MixtureSums) <= sizeof(PairSums<float>) + sizeof(float));

// Those of one tile of one row pair, by a warp.
template <class E>
__global__ void __launch_bounds__(kRowThreads, 2)
    mixture_kernel(const KlArgs a, float rate, float beta, float other, const PairLogits of,
                   const RowTiles tiles, const RowConstants* constants, MixtureSums* partials) {
  constexpr int kColumns = tile_columns(kMixtureSlots, sizeof(typename E::Storage));
  const Tile tile(tiles);
  if (tile.id >= tiles.total) return;
  const int64_t first = static_cast<int64_t>(tile.index) * kColumns;
  Pack<E> slots[kMixtureSlots], ref_slots[kMixtureSlots];
  load_tile<E>(tile.start<E>(a.logits) + first, a.vocab - first, 0.0f, slots);
  load_tile<E>(tile.start<E>(a.ref_logits) + first, a.vocab - first, 0.0f, ref_slots);
  const RowConstants c = constants[tile.token];
  float of_p = 0.0f, of_q = 0.0f;
  for_columns<E, kMixtureSlots>(a.vocab - first, [&](int k, int w) {
    const float d = of.own(slots[k].get(w)) - c.m, ref_d = of.ref(ref_slots[k].get(w)) - c.ref_m;
    const auto log_of = mixture_terms(log_of_ratio(d, ref_d, rate, c.log_ratio), beta, other);
    of_p = fmaf(weight_of(d, rate) * c.weight, log_of.of_p, of_p);
    of_q = fmaf(weight_of(ref_d, rate) * c.ref_weight, log_of.of_q, of_q);
  });
  of_p = warp_reduce(of_p, Sum{});
  of_q = warp_reduce(of_q, Sum{});
  if (threadIdx.x % kWarp == 0) partials[tile.id] = {of_p, of_q};
}

// The divergence of a row from a mixture, and KL(p || m); a warp to a row.
__global__ void __launch_bounds__(kCombineThreads)
    mixture_combine_kernel(const KlArgs a, uint32_t tiles, const MixtureSums* partials) {
  const int64_t row = row_of_warp();
  if (row >= a.rows * a.cols) return;
  double of_p = 0.0, of_q = 0.0;
  for (int64_t start = 0; start < tiles; start += kWarp) {
    const int64_t tile = start + threadIdx.x % kWarp;
    MixtureSums x{0.0f, 0.0f};
    if (tile < tiles) x = partials[row * tiles + tile];
    of_p += warp_reduce(static_cast<double>(x.of_p), Sum{});
    of_q += warp_reduce(static_cast<double>(x.of_q), Sum{});
  }
  if (threadIdx.x % kWarp != 0) return;
  double value = a.options.beta * of_q + (1.0 - a.options.beta) * of_p;
  // Never negative. The comparison keeps NaN.
  if (value < 0.0) value = 0.0;
  static_cast<float*>(a.kl.data)[row] = static_cast<float>(value);
  a.stats[5 * row + 4] = static_cast<float>(of_p);
}

// As in kl.cu; of a mixture dz = e a (log(p / m) - b). Times the slope of the cap.
struct alignas(16) GeneralCoefficients {
  float m, ref_m, a, b, log_ratio;
};
static_assert(sizeof(GeneralCoefficients) <= kRowConstants);

template <Divergence kKind>
__global__ void __launch_bounds__(kCombineThreads)
    coefficients_kernel(const KlBackwardArgs a, GeneralCoefficients* out) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kCombineThreads + threadIdx.x;
  if (row >= a.rows * a.cols) return;
  const float g = static_cast<const float*>(a.grad_kl.data)[token_at(a.grad_kl, row, a.cols)];
  GeneralCoefficients c{0.0f, 0.0f, 0.0f, 0.0f, 0.0f};
  if (g != 0.0f) {
    const float* stats = a.stats + 5 * row;
    const double s = stats[1], ref_s = stats[3], mean = stats[4];
    const bool forward = kKind == Divergence::kForward;
    const double poison = !forward || mean != mean ? mean - mean : 0.0;
    const double kept = kKind == Divergence::kMixture ? 1.0 - a.options.beta : 1.0;
    const double scaled = g * kept / a.temperature + poison;
    c = {stats[0], stats[2], static_cast<float>(scaled / s),
         static_cast<float>(forward ? scaled / ref_s : mean),
         static_cast<float>(log(s) - log(ref_s))};
  }
  out[row] = c;
}

template <class E, class O, Divergence kKind>
__global__ void __launch_bounds__(kRowThreads, 2)
    backward_kernel(const KlBackwardArgs a, float rate, float beta, float other,
                    const PairLogits of, const RowTiles tiles,
                    const GeneralCoefficients* coefficients) {
  using S = typename E::Storage;
  const Tile tile(tiles);
  if (tile.id >= tiles.total) return;
  const GeneralCoefficients c = coefficients[tile.token];
  const S *x = tile.start<E>(a.logits), *y = tile.start<E>(a.ref_logits);
  auto* out = const_cast<typename O::Storage*>(tile.start<O>(a.grad_logits));
  const Window<E, kWindowSlots<E, O, kSlots>, O> window(tile.index, a.vocab, out, x, y);
  if (c.a == 0.0f && c.b == 0.0f) {
    window.clear(out);
    return;
  }
  const auto gradient = [&](float own, float ref) {
    const Logit z = of.own.exact(own);
    const float d = z.z - c.m, ref_d = of.ref.exact(ref).z - c.ref_m;
    const float e = weight_of(d, rate);
    float dz = 0.0f;
    if constexpr (kKind == Divergence::kForward) {
      const float ref_e = weight_of(ref_d, rate);
      // Selected: a and b may be the NaN of a row without a finite divergence.
      dz = (e == 0.0f ? 0.0f : e * c.a) - (ref_e == 0.0f ? 0.0f : ref_e * c.b);
      return dz == 0.0f ? 0.0f : dz * z.slope;
    } else {
      float excess = (d - ref_d - c.b) * rate;
      if constexpr (kKind == Divergence::kMixture)
        excess = mixture_terms(log_of_ratio(d, ref_d, rate, c.log_ratio), beta, other).of_p - c.b;
      // Added, so that no zero has a sign.
      return e == 0.0f ? 0.0f : fmaf(e * c.a * z.slope, excess, 0.0f);
    }
  };
  window.map(x, y, out, [&](auto& own, auto& ref) {
    constexpr int kCount = sizeof(own) / sizeof(own[0]);
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float dz[kPerWord<E>];
#pragma unroll
        for (int w = 0; w < kPerWord<E>; ++w) {
          const int at = i * kPerWord<E> + w;
          dz[w] = gradient(own[k].get(at), ref[k].get(at));
        }
        own[k].words[i] = E::word(dz);
      }
    }
  });
}

template <class F>
void for_kind(const KlBackwardArgs& a, const F& f) {
  if (a.options.beta > 0.0)
    f(std::integral_constant<Divergence, Divergence::kMixture>{});
  else if (a.reverse)
    f(std::integral_constant<Divergence, Divergence::kReverse>{});
  else
    f(std::integral_constant<Divergence, Divergence::kForward>{});
}

// The terms of a mixture, from the statistics of both rows.
Status kl_mixture(const KlArgs& a) {
  const int64_t tokens = a.rows * a.cols;
  auto* constants = static_cast<RowConstants*>(a.exec.scratch);
  auto* partials =
      reinterpret_cast<MixtureSums*>(static_cast<char*>(a.exec.scratch) + tokens * kRowConstants);
  const int64_t tiles =
      ceil_div(a.vocab, tile_columns(kMixtureSlots, element_size(a.logits.dtype)));
  const RowTiles all(a.rows, a.cols, tiles);
  const float rate = 1.0f / static_cast<float>(a.temperature);
  const float beta = static_cast<float>(a.options.beta);
  const float other = static_cast<float>(1.0 - a.options.beta);
  const PairLogits of(a.options);
  RK_ENQUEUE(a.exec, ceil_div(tokens, kCombineThreads), kCombineThreads, constants_kernel, a,
             constants);
  for_dtype(a.logits.dtype, [&](auto element) {
    RK_ENQUEUE(a.exec, all.blocks(), kRowThreads, mixture_kernel<decltype(element)>, a, rate, beta,
               other, of, all, constants, partials);
  });
  RK_ENQUEUE(a.exec, ceil_div(tokens, kCombineThreads / kWarp), kCombineThreads,
             mixture_combine_kernel, a, static_cast<uint32_t>(tiles), partials);
  return {};
}

}  // namespace

Status general_divergence(const KlArgs& a) {
  const OnDevice guard(a.exec);
  const int64_t tokens = a.rows * a.cols;
  const int64_t tiles = ceil_div(a.vocab, tile_columns(kSlots, element_size(a.logits.dtype)));
  auto* partials = static_cast<PairSums<float>*>(a.exec.scratch);
  auto* own_sums = reinterpret_cast<float*>(partials + tokens * tiles);
  const RowTiles all(a.rows, a.cols, tiles);
  const float rate = 1.0f / static_cast<float>(a.temperature);
  const PairLogits of(a.options);
  const bool own_p = a.reverse;
  const Tensor &p = own_p ? a.logits : a.ref_logits, &q = own_p ? a.ref_logits : a.logits;
  const PairLogit &of_p = own_p ? of.own : of.ref, &of_q = own_p ? of.ref : of.own;
  for_dtype(a.logits.dtype, [&](auto element) {
    RK_ENQUEUE(a.exec, all.blocks(), kRowThreads, partial_kernel<decltype(element)>, p, q, a.vocab,
               rate, of_p, of_q, own_p, all, partials, own_sums);
  });
  const int64_t blocks = ceil_div(tokens, kCombineThreads / kWarp);
  const uint32_t count = static_cast<uint32_t>(tiles);
  RK_ENQUEUE(a.exec, blocks, kCombineThreads, combine_kernel, a, count, partials);
  if (a.entropy.given)
    RK_ENQUEUE(a.exec, blocks, kCombineThreads, entropy_kernel, a, count, partials, own_sums);
  // The scratch is free again.
  return a.options.beta > 0.0 ? kl_mixture(a) : Status{};
}

Status general_divergence_backward(const KlBackwardArgs& a) {
  const OnDevice guard(a.exec);
  const int64_t tokens = a.rows * a.cols;
  auto* coefficients = static_cast<GeneralCoefficients*>(a.exec.scratch);
  const float rate = 1.0f / static_cast<float>(a.temperature);
  const float beta = static_cast<float>(a.options.beta);
  const float other = static_cast<float>(1.0 - a.options.beta);
  const PairLogits of(a.options);
  for_kind(a, [&](auto kind) {
    RK_ENQUEUE(a.exec, ceil_div(tokens, kCombineThreads), kCombineThreads,
               coefficients_kernel<kind.value>, a, coefficients);
    for_gradient(a.logits.dtype, a.grad_logits.dtype, [&](auto element, auto result) {
      using E = decltype(element);
      using O = decltype(result);
      const RowTiles all(
          a.rows, a.cols,
          window_tiles(a.vocab, kWindowSlots<E, O, kSlots>, sizeof(typename O::Storage)));
      RK_ENQUEUE(a.exec, all.blocks(), kRowThreads, (backward_kernel<E, O, kind.value>), a, rate,
                 beta, other, of, all, coefficients);
    });
  });
  return {};
}

}  // namespace rk::cuda
