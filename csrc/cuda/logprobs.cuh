// Rows of logits with a label each: the sums of a tile, what a row is from those of its tiles, and
// a tile of the gradient.
#pragma once
#include "rows.cuh"

namespace rk::cuda {
namespace {

// 16-byte loads a lane has in flight. The gradient keeps more in registers and reduces nothing.
constexpr int kSlots = 8;
constexpr int kBackwardSlots = 4;

// What the backward needs of each row; zeros where it takes no gradient. With d = x - m and
// e = exp2(d rate2), that is e (a0 + a1 d rate2): the entropy's part is linear in log p.
struct alignas(16) Slopes {
  float m, rate2, a0, a1;
};
struct alignas(16) Coefficients {
  Slopes slopes;
  // Column of the label, negative where the row has none, and the gradient there.
  int64_t label;
  float at_label;
  // Of e e a2, the squares' part.
  float a2;
};
// Of a row without a gradient.
__device__ __forceinline__ Coefficients no_gradient() {
  return {{0.0f, 0.0f, 0.0f, 0.0f}, -1, 0.0f, 0.0f};
}

template <class E, class Args>
__device__ __forceinline__ const typename E::Storage* row_logits(const Args& a, int64_t row) {
  return static_cast<const typename E::Storage*>(a.logits.data) + token_at(a.logits, row, a.cols);
}

__device__ __forceinline__ bool is_known(int64_t label, int64_t vocab) {
  return label >= 0 && label < vocab;
}

// The label's logit; 0 where it is not known.
template <class E, class Args>
__device__ __forceinline__ float label_logit(const Args& a, int64_t row, int64_t label) {
  return is_known(label, a.vocab) ? E::get(row_logits<E>(a, row)[label]) : 0.0f;
}

// s, t and q of a lane's slots around m, the maximum of the tile.
template <class E, bool kEntropy, bool kSquares>
__device__ __forceinline__ Sums<float> lane_sums(Pack<E> (&slots)[kSlots], float m, float rate) {
  float s = 0.0f, t = 0.0f, q = 0.0f;
  const float rate2 = rate * kLog2e;
  const auto add = [&](float d) {
    const float e = exp2_fast(d * rate2);
    s += e;
    if constexpr (kEntropy) t = fmaf(e, d, t);
    if constexpr (kSquares) q = fmaf(e, e, q);
  };
  const auto add_all = [&](const auto& distance) {
#pragma unroll
    for (int k = 0; k < kSlots; ++k)
#pragma unroll
      for (int w = 0; w < kWidth<E>; ++w) add(distance(slots[k].get(w) - m));
  };
  // Raised or clamped, because 0 times the distance of -inf would be NaN.
  if (!kEntropy || floor_weighs_nothing<E>(m, rate2)) {
    if constexpr (kEntropy) raise_to<E>(floor_of<E>(), slots);
    add_all([](float d) { return d; });
  } else {
    const float lowest = kLowest / rate;
    add_all([&](float d) { return max_nan(lowest, d); });
  }
  return {m, s, t * rate, q};
}

// The same for logits that the options change, the largest of them m; `left` columns are the row's.
template <class E, bool kEntropy, bool kSquares>
__device__ __forceinline__ Sums<float> changed_sums(const Pack<E> (&slots)[kSlots], int64_t left,
                                                    float m, const LogitValues& value, float rate) {
  float s = 0.0f, t = 0.0f, q = 0.0f;
  const float rate2 = rate * kLog2e;
  for_columns<E, kSlots>(left, [&](int k, int w, bool inside) {
    const float d = value(slots[k].get(w)) - m, e = exp2_fast(d * rate2);
    s += inside ? e : 0.0f;
    if constexpr (kEntropy) t = inside ? fmaf(e, d, t) : t;
    if constexpr (kSquares) q = inside ? fmaf(e, e, q) : q;
  });
  return {m, s, t * rate, q};
}

// The sums of a warp's tile of which `left` columns are the row's.
template <class E, bool kChange, bool kEntropy, bool kSquares = false>
__device__ __forceinline__ Sums<float> tile_sums(Pack<E> (&slots)[kSlots], int64_t left,
                                                 const LogitValues& value, float rate) {
  const float minus_inf = -__builtin_inff();
  Sums<float> r{tile_max<E>(slots), 0.0f, 0.0f};
  if constexpr (kChange) {
    r = changed_sums<E, kEntropy, kSquares>(slots, left, value(r.m), value, rate);
  } else if (r.m == minus_inf) {
    // A tile of nothing but -inf adds nothing. The maximum hides a NaN, which belongs in the sums.
#pragma unroll
    for (int k = 0; k < kSlots; ++k)
#pragma unroll
      for (int w = 0; w < kWidth<E>; ++w)
        r.s += slots[k].get(w) == slots[k].get(w) ? 0.0f : slots[k].get(w);
  } else {
    r = lane_sums<E, kEntropy, kSquares>(slots, r.m, rate);
  }
  r.s = warp_reduce(r.s, Sum{});
  if constexpr (kEntropy) r.t = warp_reduce(r.t, Sum{});
  if constexpr (kSquares) r.q = warp_reduce(r.q, Sum{});
  return r;
}

// (m, s, t) of a row from those of its tiles, by a warp: 32 tiles at a time, groups in order.
__device__ __forceinline__ Sums<double> combine_tiles(const float4* partials, int64_t tiles,
                                                      float rate) {
  const float minus_inf = -__builtin_inff();
  Sums<double> r{minus_inf, 0.0, 0.0};
  const auto moved = [&](double s, double t, float shift) {
    // Tiles of -inf have a sum of 0 and no distance to anything. Logits masked with the lowest
    // float may be at distance -inf, under a weight of 0.
    const float distance = s == 0.0 ? 0.0f : shift * rate;
    const double weight = exp2_fast(distance * kLog2e);
    return Sums<double>{0.0f, weight * s, weight == 0.0 ? 0.0 : weight * (t + s * distance)};
  };
  for (int64_t start = 0; start < tiles; start += kWarp) {
    const int64_t tile = start + threadIdx.x % kWarp;
    const bool inside = tile < tiles;
    const float4 x = inside ? partials[tile] : make_float4(minus_inf, 0.0f, 0.0f, 0.0f);
    const float top = fmaxf(r.m, warp_reduce(x.x, Max{}));
    const float base = top == minus_inf ? 0.0f : top;
    const Sums<double> now = moved(x.y, x.z, x.x - base);
    const Sums<double> before = moved(r.s, r.t, r.m - base);
    r = {top, before.s + warp_reduce(now.s, Sum{}), before.t + warp_reduce(now.t, Sum{})};
  }
  return r;
}

// The sum of the squared probabilities of a row with these m and s from its tiles, by a warp.
__device__ __forceinline__ double row_collision(const float4* partials, int64_t tiles, float rate,
                                                float m, double s) {
  double q = 0.0;
  for (int64_t start = 0; start < tiles; start += kWarp) {
    const int64_t tile = start + threadIdx.x % kWarp;
    float4 x = make_float4(m, 0.0f, 0.0f, 0.0f);
    if (tile < tiles) x = partials[tile];
    const float distance = x.w == 0.0f ? 0.0f : (x.x - m) * rate;
    const double weight = exp2_fast(distance * kLog2e);
    q += warp_reduce(weight * weight * x.w, Sum{});
  }
  return q / (s * s);
}

// A logit's place in their order, NaN above all and both zeros the same.
__device__ __forceinline__ uint32_t order_of(float x) {
  if (x != x) return 0xffffffffu;
  const uint32_t bits = __float_as_uint(x + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

struct Later {
  __device__ __forceinline__ uint32_t operator()(uint32_t a, uint32_t b) const {
    return a > b ? a : b;
  }
};
struct Earlier {
  __device__ __forceinline__ uint32_t operator()(uint32_t a, uint32_t b) const {
    return a < b ? a : b;
  }
};

// The first of the largest logits of the row at x, the first NaN if there is one, by a warp. Only
// tiles that may hold it are read: those with the row's maximum, or a NaN in their sums. Under a
// cap the maxima of tiles are in the order of the logits but for `slack`.
template <class E>
__device__ __forceinline__ int64_t row_argmax(const typename E::Storage* x, int64_t vocab,
                                              const float4* partials, int64_t tiles, float slack) {
  constexpr int kColumns = tile_columns(kSlots, sizeof(typename E::Storage));
  const int lane = threadIdx.x % kWarp;
  float top = -__builtin_inff();
  for (int64_t tile = lane; tile < tiles; tile += kWarp) top = fmaxf(top, partials[tile].x);
  top = warp_reduce(top, Max{}) - slack;
  uint32_t most = 0, at = 0;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const float4 sums = partials[tile];
    if (sums.x < top && sums.y == sums.y) continue;
    const int64_t first = tile * kColumns;
    const int64_t end = first + kColumns < vocab ? first + kColumns : vocab;
    // A lane's columns come in order: the first of the largest stays.
    for (int64_t k = first + lane; k < end; k += kWarp) {
      const uint32_t own = order_of(E::get(x[k]));
      if (own > most) most = own, at = static_cast<uint32_t>(k);
    }
  }
  const uint32_t best = warp_reduce(most, Later{});
  return warp_reduce(most == best ? at : 0xffffffffu, Earlier{});
}

// What a row's kernels give; that of an ignored row.
struct RowStatistics {
  float m = 0.0f, s = 1.0f, mean = 0.0f, logprob = 0.0f, entropy = 0.0f;
};

// Of a row that is not ignored, by a warp; x: the label's logit.
__device__ __forceinline__ RowStatistics row_statistics(const RowOptions& options, int64_t vocab,
                                                        int64_t label, float x, double temperature,
                                                        const float4* partials, uint32_t tiles) {
  const double rate = 1.0 / temperature;
  const Sums<double> r = combine_tiles(partials, tiles, static_cast<float>(rate));
  const bool known = is_known(label, vocab);
  const float z = LogitOptions(options)(x).z;
  // A label outside the vocabulary, a bad temperature and a row of -inf poison the row.
  const bool elsewhere = label == kLabelElsewhere && options.ignore_index == kShardIgnored;
  const bool good =
      (known || elsewhere) && good_temperature(temperature) && r.m != -__builtin_inff();
  const float poison = good ? 0.0f : __builtin_nanf("");
  RowStatistics row;
  // A NaN among nothing but -inf, so that no shard of it passes for an empty one.
  row.m = r.m == -__builtin_inff() && r.s != r.s ? __builtin_nanf("") : r.m;
  row.s = static_cast<float>(r.s) + poison;
  // A shard of the vocabulary without the label; its sums are those of any row.
  if (known)
    row.logprob = static_cast<float>(logprob_from_stats(z, r.m, r.s, rate)) + poison;
  else
    row.logprob = __builtin_nanf("");
  row.mean = static_cast<float>(r.t / r.s) + poison;
  row.entropy = static_cast<float>(log(r.s) - r.t / r.s) + poison;
  return row;
}

// Those of a row that is not ignored from its m, s and mean and the upstream gradients: g, h, of
// the log-sum-exp, and of the sum of the squared probabilities, `collision`; x as in
// row_statistics.
__device__ __forceinline__ Coefficients row_coefficients(const RowOptions& options, int64_t vocab,
                                                         int64_t label, float x, double temperature,
                                                         float m, double s, double mean, float g,
                                                         float h, float of_lse = 0.0f,
                                                         float of_collision = 0.0f,
                                                         double collision = 0.0) {
  Coefficients all = no_gradient();
  Slopes& c = all.slopes;
  const double rate = 1.0 / temperature;
  const Logit own = LogitOptions(options)(x);
  const double logprob = logprob_from_stats(own.z, m, s, rate);
  c.m = m;
  c.rate2 = static_cast<float>(rate) * kLog2e;
  c.a0 = static_cast<float>((-(static_cast<double>(g) - of_lse) + h * mean) / s * rate);
  c.a1 = static_cast<float>(-h / s * rate / static_cast<double>(kLog2e));
  if (of_collision != 0.0f) {
    const double slope = 2.0 * of_collision / s * rate;
    c.a0 = static_cast<float>((-(static_cast<double>(g) - of_lse) + h * mean) / s * rate -
                              slope * collision);
    all.a2 = static_cast<float>(slope / s);
  }
  // Their weights cancel beside a gradient at the label: not a row without one.
  if (of_lse != 0.0f && c.a0 == 0.0f && c.a1 == 0.0f) c.a0 = 0x1p-126f;
  const double distance = (static_cast<double>(own.z) - m) * rate;
  double dz = label_gradient(logprob, distance, mean, g, h, rate);
  if (of_lse != 0.0f || of_collision != 0.0f)
    dz += further_label_gradient(logprob, collision, of_lse, of_collision) * rate;
  all.at_label = static_cast<float>(dz * own.slope);
  if (is_known(label, vocab)) all.label = label;
  return all;
}

// Overwrites a lane's slots with their gradients, without the label's own term.
template <class E, bool kChange, bool kEntropy, bool kSquares = false, int kCount>
__device__ __forceinline__ void gradients(const Slopes& c, const LogitValues& value,
                                          Pack<E> (&slots)[kCount], float a2 = 0.0f) {
  const auto each = [&](const auto& gradient) {
    overwrite<E>(slots, [&](int k, int w) { return gradient(slots[k].get(w)); });
  };
  const auto scaled = [&](float e, float log2_e) {
    // Added, so that no zero has a sign.
    if constexpr (kSquares) return fmaf(e, fmaf(a2, e, fmaf(c.a1, log2_e, c.a0)), 0.0f);
    return fmaf(e, kEntropy ? fmaf(c.a1, log2_e, c.a0) : c.a0, 0.0f);
  };
  // In a row that is NaN, a logit without weight still has no gradient.
  // Nor where the slope times the largest distance is none: under a low temperature, or a large
  // upstream gradient.
  const float least = (floor_of<E>() - c.m) * c.rate2;
  const bool number =
      c.a0 * 0.0f == 0.0f && (kEntropy ? c.a1 * least : c.a1) * 0.0f == 0.0f && a2 * 0.0f == 0.0f;
  if (!kChange && number && (!kEntropy || least < -130.0f)) {
    if constexpr (kEntropy) raise_to<E>(floor_of<E>(), slots);
    each([&](float x) {
      const float log2_e = (x - c.m) * c.rate2;
      return scaled(exp2_fast(log2_e), log2_e);
    });
  } else {
    each([&](float x) {
      const Logit z = kChange ? value.with_slope(x) : Logit{x, 1.0f};
      const float log2_e = (z.z - c.m) * c.rate2, e = exp2_fast(log2_e);
      float dz = scaled(e, log2_e);
      if constexpr (kChange) dz *= z.slope;
      // Exactly zero, also at -inf, where e log e would be NaN.
      return e == 0.0f ? 0.0f : dz;
    });
  }
}

// A tile of dz = p (l - g - h (log p + H) + 2 c (p - C)) / T, plus g / T at the label, of the row
// at x, by a warp; O is the dtype of dz. c: the slopes of `coefficients`, which are read again for
// the label.
template <class E, class O, bool kChange, bool kEntropy, bool kSquares = false>
__device__ __forceinline__ void gradient_tile(uint32_t index, int64_t vocab,
                                              const LogitValues& value, const Slopes& c,
                                              const Coefficients* coefficients,
                                              const typename E::Storage* x,
                                              typename O::Storage* out) {
  const Window<E, kWindowSlots<E, O, kBackwardSlots>, O> window(index, vocab, out, x, x);
  const float a2 = kSquares ? coefficients->a2 : 0.0f;
  if (c.a0 == 0.0f && c.a1 == 0.0f && a2 == 0.0f) {
    window.clear(out);
    return;
  }
  window.map(x, x, out, [&](auto& slots, const auto&) {
    gradients<E, kChange, kEntropy, kSquares>(c, value, slots, a2);
  });
  // By the lane that has just stored this column.
  const int64_t label = coefficients->label, at = label - window.first;
  if (label >= 0 && at >= 0 && at < window.kColumns &&
      static_cast<int>(at) / kWidth<O> % kWarp == static_cast<int>(threadIdx.x % kWarp))
    out[label] = O::put(coefficients->at_label);
}

}  // namespace
}  // namespace rk::cuda
