// What the kernels of divergences share: the sums of a pair of rows, from those of its tiles.
//
// With P the distribution that weighs (policy for reverse, reference for forward) and Q the other:
// KL = t / (T s_P) - (log s_P - log s_Q), t = sum e_P ((x_P - m_P) - (x_Q - m_Q)). The difference
// is taken element by element: where the two rows are close, so is the sum.
#pragma once
#include "rows.cuh"

namespace rk::cuda {

// With PairOptions, and the entropy: kl_general.cu.
Status general_divergence(const KlArgs& a);
Status general_divergence_backward(const KlBackwardArgs& a);

namespace {

// 16-byte loads of each of the two rows that a lane has in flight.
constexpr int kSlots = 4;

// A row pair's or a tile's sums.
template <class T>
struct alignas(16) PairSums {
  float m_p;
  T s_p;
  float m_q;
  T s_q, t;
};

// Of a row in scratch, beside the sums of its tiles and the policy's further one.
constexpr int64_t kRowConstants = 32;

// exp(rate d), and exactly 0 below the normal floats: what is under such a weight is unread.
__device__ __forceinline__ float weight_of(float d, float rate) {
  return d * rate < kLowest ? 0.0f : exp2_fast(d * (rate * kLog2e));
}

// Sums around m seen from the reference point `base`: their weight and distance.
struct Rebased {
  double shift, weight;
};
__device__ __forceinline__ Rebased rebased(float m, double s, float base, float rate) {
  // An empty tile has no distance to anything.
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
  const int64_t row = row_of_warp();
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
  // Not taken from the divergence, in which the logarithms cancel.
  stats[4] = static_cast<float>(kl != kl ? kl : r.t / r.s_p);
}

}  // namespace
}  // namespace rk::cuda
