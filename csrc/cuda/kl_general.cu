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
      : value(RowOptions::of_cap(cap)), scale(static_cast<float>(factor)) {}
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

// The sums of one tile of one row pair, by a warp, and in `own_sums` the sum of e (x - m) of the
// policy, which is P where `own_p`.
template <class E>
__global__ void __launch_bounds__(kRowThreads, 2)
    partial_kernel(const Tensor p, const Tensor q, int64_t vocab, float rate, const PairLogit of_p,
                   const PairLogit of_q, bool own_p, const RowTiles tiles,
                   PairSums<float>* partials, float* own_sums) {
  const Tile tile(tiles);
  if (tile.id >= tiles.total) return;
  float own = 0.0f;
  const auto add = [&](const auto& slots, float base_p, float base_q, float, auto& r) {
    const float rate2 = rate * kLog2e;
    for_columns<E, kSlots>(slots.left, [&](int k, int w, bool inside) {
      if (!inside) return;
      const float d_p = of_p(slots.p[k].get(w)) - base_p, d_q = of_q(slots.q[k].get(w)) - base_q;
      const float e_p = exp2_fast(d_p * rate2), e_q = exp2_fast(d_q * rate2);
      r.s_p += e_p;
      r.s_q += e_q;
      // No weight, no term, also where a distance is infinite.
      if (e_p != 0.0f) r.t = fmaf(e_p, d_p - d_q, r.t);
      const float e = own_p ? e_p : e_q;
      if (e != 0.0f) own = fmaf(e, own_p ? d_p : d_q, own);
    });
  };
  const PairSums<float> r = tile_sums<E>(tile, p, q, vocab, of_p, of_q, add);
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

// What a tile needs of its row: m of both; two coefficients, for the terms of a mixture 1 / s of
// both; and log(s / ref_s).
struct alignas(16) RowConstants {
  float m, ref_m, a, b, log_ratio;

  RowConstants() = default;
  // From its statistics.
  __device__ __forceinline__ RowConstants(const float* stats, double a, double b)
      : m(stats[0]),
        ref_m(stats[2]),
        a(static_cast<float>(a)),
        b(static_cast<float>(b)),
        log_ratio(static_cast<float>(log(static_cast<double>(stats[1])) -
                                     log(static_cast<double>(stats[3])))) {}
};
static_assert(sizeof(RowConstants) <= kRowConstants);

__global__ void __launch_bounds__(kCombineThreads)
    constants_kernel(const KlArgs a, RowConstants* out) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kCombineThreads + threadIdx.x;
  if (row >= a.rows * a.cols) return;
  const float* stats = a.stats + 5 * row;
  const double s = stats[1], ref_s = stats[3];
  out[row] = {stats, 1.0 / s, 1.0 / ref_s};
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
  const Tile tile(tiles);
  if (tile.id >= tiles.total) return;
  const PairTile<E, kMixtureSlots> slots(tile, a.logits, a.ref_logits, a.vocab, 0.0f);
  const RowConstants c = constants[tile.token];
  float of_p = 0.0f, of_q = 0.0f;
  for_columns<E, kMixtureSlots>(slots.left, [&](int k, int w, bool inside) {
    if (!inside) return;
    const float d = of.own(slots.p[k].get(w)) - c.m, ref_d = of.ref(slots.q[k].get(w)) - c.ref_m;
    const auto log_of = mixture_terms(log_of_ratio(d, ref_d, rate, c.log_ratio), beta, other);
    of_p = fmaf(weight_of(d, rate) * c.a, log_of.of_p, of_p);
    of_q = fmaf(weight_of(ref_d, rate) * c.b, log_of.of_q, of_q);
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

// As in kl.cu, but for a reverse divergence's 1 / T; of a mixture dz = e a (log(p / m) - b). Times
// the slope of the cap.
template <Divergence kKind>
__global__ void __launch_bounds__(kCombineThreads)
    coefficients_kernel(const KlBackwardArgs a, RowConstants* out) {
  constexpr bool kForward = kKind == Divergence::kForward;
  const double part = kKind == Divergence::kMixture ? 1.0 - a.options.beta : 1.0;
  row_coefficients(a, kForward, part, out, [&](const float* stats, double scaled) {
    const double s = stats[1], ref_s = stats[3], mean = stats[4];
    return RowConstants(stats, scaled / s, kForward ? scaled / ref_s : mean);
  });
}

template <class E, class O, Divergence kKind>
__global__ void __launch_bounds__(kRowThreads, 2)
    backward_kernel(const KlBackwardArgs a, float rate, float beta, float other,
                    const PairLogits of, const RowTiles tiles, const RowConstants* coefficients) {
  const Tile tile(tiles);
  if (tile.id >= tiles.total) return;
  const RowConstants c = coefficients[tile.token];
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
  gradient_tile<E, O>(a, tile, c, [&](const auto& map) {
    map([&](auto& own, auto& ref) {
      overwrite<E>(own, [&](int k, int w) { return gradient(own[k].get(w), ref[k].get(w)); });
    });
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
  const int64_t tiles = pair_tiles(a, kMixtureSlots);
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
  const int64_t tiles = pair_tiles(a, kSlots);
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
  enqueue_combine(a, tiles, partials);
  if (a.entropy.given)
    RK_ENQUEUE(a.exec, ceil_div(tokens, kCombineThreads / kWarp), kCombineThreads, entropy_kernel,
               a, static_cast<uint32_t>(tiles), partials, own_sums);
  // The scratch is free again.
  return a.options.beta > 0.0 ? kl_mixture(a) : Status{};
}

Status general_divergence_backward(const KlBackwardArgs& a) {
  const OnDevice guard(a.exec);
  const int64_t tokens = a.rows * a.cols;
  auto* coefficients = static_cast<RowConstants*>(a.exec.scratch);
  const float rate = 1.0f / static_cast<float>(a.temperature);
  const float beta = static_cast<float>(a.options.beta);
  const float other = static_cast<float>(1.0 - a.options.beta);
  const PairLogits of(a.options);
  for_kind(a, [&](auto kind) {
    RK_ENQUEUE(a.exec, ceil_div(tokens, kCombineThreads), kCombineThreads,
               coefficients_kernel<kind.value>, a, coefficients);
    for_gradient_tiles(a, [&](auto element, auto result, const RowTiles& all) {
      using E = decltype(element);
      using O = decltype(result);
      RK_ENQUEUE(a.exec, all.blocks(), kRowThreads, (backward_kernel<E, O, kind.value>), a, rate,
                 beta, other, of, all, coefficients);
    });
  });
  return {};
}

}  // namespace rk::cuda
