// What the kernels of divergences share: a tile of a pair of rows, the sums of the pair from those
// of its tiles, and a tile of the gradient. kl.cu has the divergences without options. Those with
// options are kernels of their own, in kl_general.cu: they take twice the registers, and round
// other terms.
//
// With P the distribution that weighs (policy for reverse, reference for forward) and Q the other:
// KL = t / (T s_P) - (log s_P - log s_Q), t = sum e_P ((x_P - m_P) - (x_Q - m_Q)). The difference
// is taken element by element: where the two rows are close, so is the sum.
#pragma once
#include "rows.cuh"

namespace rk::cuda {

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

// The columns of a tile of logits, and how many such tiles a row pair has.
template <class E, int kCount>
constexpr int kPairColumns = tile_columns(kCount, sizeof(typename E::Storage));
inline int64_t pair_tiles(const KlArgs& a, int slots) {
  return ceil_div(a.vocab, tile_columns(slots, element_size(a.logits.dtype)));
}

// A lane's slots of a tile of both rows; `left` columns of them are the row's, `beyond` the rest.
template <class E, int kCount>
struct PairTile {
  Pack<E> p[kCount], q[kCount];
  int64_t left;

  __device__ __forceinline__ PairTile(const Tile& tile, const Tensor& of_p, const Tensor& of_q,
                                      int64_t vocab, float beyond) {
    const int64_t first = static_cast<int64_t>(tile.index) * kPairColumns<E, kCount>;
    left = vocab - first;
    load_tile<E>(tile.start<E>(of_p) + first, left, beyond, p);
    load_tile<E>(tile.start<E>(of_q) + first, left, beyond, q);
  }
};

// What distances to a maximum are taken from: nothing but -inf has no reference point, and sums of
// zero around any.
__device__ __forceinline__ float reference_point(float m) {
  return m == -__builtin_inff() ? 0.0f : m;
}

// The sums of this warp's tile. value_p and value_q make logits of the largest ones; add(slots,
// base_p, base_q, least, r) adds a lane's own to r, of which `least` is the least.
template <class E, class ValueP, class ValueQ, class Add>
__device__ __forceinline__ PairSums<float> tile_sums(const Tile& tile, const Tensor& p,
                                                     const Tensor& q, int64_t vocab,
                                                     const ValueP& value_p, const ValueQ& value_q,
                                                     const Add& add) {
  const PairTile<E, kSlots> slots(tile, p, q, vocab, -__builtin_inff());
  const Ends ends_p = lane_ends<E>(slots.p), ends_q = lane_ends<E>(slots.q);
  PairSums<float> r{value_p(warp_reduce(ends_p.most, MaxNan{})), 0.0f,
                    value_q(warp_reduce(ends_q.most, MaxNan{})), 0.0f, 0.0f};
  add(slots, reference_point(r.m_p), reference_point(r.m_q), fminf(ends_p.least, ends_q.least), r);
  r.s_p = warp_reduce(r.s_p, Sum{});
  r.s_q = warp_reduce(r.s_q, Sum{});
  r.t = warp_reduce(r.t, Sum{});
  return r;
}

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
    const float base_p = reference_point(top_p), base_q = reference_point(top_q);
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

inline void enqueue_combine(const KlArgs& a, int64_t tiles, const PairSums<float>* partials) {
  RK_ENQUEUE(a.exec, ceil_div(a.rows * a.cols, kCombineThreads / kWarp), kCombineThreads,
             combine_kernel, a, static_cast<uint32_t>(tiles), partials);
}

// ---- The gradient -------------------------------------------------------------------------------

// The coefficients of this thread's row: make(stats, scaled) of its statistics and its upstream
// gradient, of which the policy's own term takes `part`; zeros where there is none.
template <class C, class Make>
__device__ __forceinline__ void row_coefficients(const KlBackwardArgs& a, bool forward, double part,
                                                 C* out, const Make& make) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kCombineThreads + threadIdx.x;
  if (row >= a.rows * a.cols) return;
  const float g = static_cast<const float*>(a.grad_kl.data)[token_at(a.grad_kl, row, a.cols)];
  C c{};
  if (g != 0.0f) {
    const float* stats = a.stats + 5 * row;
    const double mean = stats[4];
    // An infinite reverse divergence leaves no number as the difference to its mean. The forward
    // divergence has a gradient there.
    const double poison = !forward || mean != mean ? mean - mean : 0.0;
    c = make(stats, g * part / a.temperature + poison);
  }
  out[row] = c;
}

// A tile of the gradient by a warp; O is its dtype. body(map) applies map(change) to the tile,
// where change(slots, slots of the reference) overwrites the policy's logits; a row without a
// gradient has zeros.
template <class E, class O, class C, class Body>
__device__ __forceinline__ void gradient_tile(const KlBackwardArgs& a, const Tile& tile, const C& c,
                                              const Body& body) {
  using S = typename E::Storage;
  const S *x = tile.start<E>(a.logits), *y = tile.start<E>(a.ref_logits);
  auto* out = const_cast<typename O::Storage*>(tile.start<O>(a.grad_logits));
  const Window<E, kWindowSlots<E, O, kSlots>, O> window(tile.index, a.vocab, out, x, y);
  if (c.a == 0.0f && c.b == 0.0f) {
    window.clear(out);
    return;
  }
  body([&](const auto& change) { window.map(x, y, out, change); });
}

// Calls f(E{}, O{}, tiles) for the element types of the logits and of the gradient.
template <class F>
void for_gradient_tiles(const KlBackwardArgs& a, const F& f) {
  for_gradient(a.logits.dtype, a.grad_logits.dtype, [&](auto element, auto result) {
    const int64_t tiles = window_tiles<decltype(element), decltype(result), kSlots>(a.vocab);
    f(element, result, RowTiles(a.rows, a.cols, tiles));
  });
}

}  // namespace
}  // namespace rk::cuda
