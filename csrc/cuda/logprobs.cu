// token_logprobs: log-probability and entropy of rows of logits, and their gradient.
#include "rows.cuh"

namespace rk::cuda {
namespace {

// 16-byte loads a lane has in flight. The gradient keeps more in registers and reduces nothing.
constexpr int kSlots = 8;
constexpr int kBackwardSlots = 4;

// Blocks of the backward that a multiprocessor holds: as many as spill no register.
template <class E, bool kChange, bool kEntropy>
constexpr int kBackwardBlocks = kChange ? 2 : (kEntropy && std::is_same_v<E, F16> ? 4 : 6);

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
};

template <class E, class Args>
__device__ __forceinline__ const typename E::Storage* row_logits(const Args& a, int64_t row) {
  return static_cast<const typename E::Storage*>(a.logits.data) + token_at(a.logits, row, a.cols);
}

// s and t of a lane's slots around m, the maximum of the tile.
template <class E, bool kEntropy>
__device__ __forceinline__ Sums<float> lane_sums(Pack<E> (&slots)[kSlots], float m, float rate) {
  float s = 0.0f, t = 0.0f;
  const float rate2 = rate * kLog2e;
  const auto add = [&](float d) {
    const float e = exp2_fast(d * rate2);
    s += e;
    if constexpr (kEntropy) t = fmaf(e, d, t);
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
  return {m, s, t * rate};
}

// The same for logits that the options change, the largest of them m; `left` columns are the row's.
template <class E, bool kEntropy>
__device__ __forceinline__ Sums<float> changed_sums(const Pack<E> (&slots)[kSlots], int64_t left,
                                                    float m, const LogitValues& value, float rate) {
  float s = 0.0f, t = 0.0f;
  const float rate2 = rate * kLog2e;
  // Options may make -inf finite: what lies beyond the row must stay out by its position.
  const auto sums = [&](auto whole) {
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
#pragma unroll
      for (int w = 0; w < kWidth<E>; ++w) {
        const float d = value(slots[k].get(w)) - m, e = exp2_fast(d * rate2);
        const bool inside = whole.value || slot_column<E>(k) + w < left;
        s += inside ? e : 0.0f;
        if constexpr (kEntropy) t = inside ? fmaf(e, d, t) : t;
      }
    }
  };
  if (left >= tile_columns(kSlots, sizeof(typename E::Storage)))
    sums(std::true_type{});
  else
    sums(std::false_type{});
  return {m, s, t * rate};
}

// (m, s, t) of one tile of one row, by a warp. partials: [rows * cols, tiles].
template <class E, bool kChange, bool kEntropy>
__global__ void __launch_bounds__(kRowThreads, kChange ? 3 : 4)
    partial_kernel(const LogprobsArgs a, const RowTiles tiles, float rate_of_all,
                   const LogitValues value, float4* partials) {
  constexpr int kColumns = tile_columns(kSlots, sizeof(typename E::Storage));
  const Tile tile(tiles);
  if (tile.id >= tiles.total) return;
  if (load_integer(a.labels, tile.of(a.labels)) == a.options.ignore_index) return;
  const float minus_inf = -__builtin_inff();
  const int64_t first = static_cast<int64_t>(tile.index) * kColumns;
  Pack<E> slots[kSlots];
  load_tile<E>(tile.start<E>(a.logits) + first, a.vocab - first, minus_inf, slots);
  const float rate =
      a.temperatures.given
          ? 1.0f / static_cast<const float*>(a.temperatures.data)[tile.of(a.temperatures)]
          : rate_of_all;
  Sums<float> r{tile_max<E>(slots), 0.0f, 0.0f};
  if constexpr (kChange) {
    r = changed_sums<E, kEntropy>(slots, a.vocab - first, value(r.m), value, rate);
  } else if (r.m == minus_inf) {
    // A tile of nothing but -inf adds nothing. The maximum hides a NaN, which belongs in the sums.
#pragma unroll
    for (int k = 0; k < kSlots; ++k)
#pragma unroll
      for (int w = 0; w < kWidth<E>; ++w)
        r.s += slots[k].get(w) == slots[k].get(w) ? 0.0f : slots[k].get(w);
  } else {
    r = lane_sums<E, kEntropy>(slots, r.m, rate);
  }
  r.s = warp_reduce(r.s, Sum{});
  if constexpr (kEntropy) r.t = warp_reduce(r.t, Sum{});
  if (threadIdx.x % kWarp == 0) partials[tile.id] = make_float4(r.m, r.s, r.t, 0.0f);
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

// Log-probability, entropy and statistics of a row; a warp to a row.
template <class E>
__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(const LogprobsArgs a, uint32_t tiles, const float4* partials) {
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * (kCombineThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= a.rows * a.cols) return;
  const int64_t label = row_label(a, row);
  float m = 0.0f, s = 1.0f, mean = 0.0f, logprob = 0.0f, entropy = 0.0f;
  if (label != a.options.ignore_index) {
    const double temperature = row_temperature(a, row), rate = 1.0 / temperature;
    const Sums<double> r = combine_tiles(partials + row * tiles, tiles, static_cast<float>(rate));
    const bool known = label >= 0 && label < a.vocab;
    const float x = known ? E::get(row_logits<E>(a, row)[label]) : 0.0f;
    const float z = AnyLogitOptions(a.options)(x).z;
    // A label outside the vocabulary, a bad temperature and a row of -inf poison the row.
    const bool elsewhere = label == kLabelElsewhere && a.options.ignore_index == kShardIgnored;
    const bool good =
        (known || elsewhere) && good_temperature(temperature) && r.m != -__builtin_inff();
    const float poison = good ? 0.0f : __builtin_nanf("");
    // A NaN among nothing but -inf, so that no shard of it passes for an empty one.
    m = r.m == -__builtin_inff() && r.s != r.s ? __builtin_nanf("") : r.m;
    s = static_cast<float>(r.s) + poison;
    // A shard of the vocabulary without the label; its sums are those of any row.
    if (known)
      logprob = static_cast<float>(logprob_from_stats(z, r.m, r.s, rate)) + poison;
    else
      logprob = __builtin_nanf("");
    mean = static_cast<float>(r.t / r.s) + poison;
    entropy = static_cast<float>(log(r.s) - r.t / r.s) + poison;
  }
  if (threadIdx.x % kWarp != 0) return;
  static_cast<float*>(a.logprobs.data)[row] = logprob;
  if (a.entropy.given) static_cast<float*>(a.entropy.data)[row] = entropy;
  float* stats = a.stats + 3 * row;
  stats[0] = m, stats[1] = s, stats[2] = mean;
}

// A kernel of its own: fp64 once per row, and the label's logit is read before the gradient may
// overwrite it.
template <class E>
__global__ void __launch_bounds__(kCombineThreads)
    coefficients_kernel(const LogprobsBackwardArgs a, Coefficients* out) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kCombineThreads + threadIdx.x;
  if (row >= a.rows * a.cols) return;
  const auto upstream = [&](const Tensor& g) {
    return g.given ? static_cast<const float*>(g.data)[token_at(g, row, a.cols)] : 0.0f;
  };
  const float g = upstream(a.grad_logprobs), h = upstream(a.grad_entropy);
  const int64_t label = row_label(a, row);
  Coefficients all{{0.0f, 0.0f, 0.0f, 0.0f}, -1, 0.0f};
  Slopes& c = all.slopes;
  if (label != a.options.ignore_index && (g != 0.0f || h != 0.0f)) {
    const float* stats = a.stats + 3 * row;
    const double rate = 1.0 / row_temperature(a, row), s = stats[1], mean = stats[2];
    const bool known = label >= 0 && label < a.vocab;
    const Logit own =
        AnyLogitOptions(a.options)(known ? E::get(row_logits<E>(a, row)[label]) : 0.0f);
    const double logprob = logprob_from_stats(own.z, stats[0], s, rate);
    c.m = stats[0];
    c.rate2 = static_cast<float>(rate) * kLog2e;
    c.a0 = static_cast<float>((-g + h * mean) / s * rate);
    c.a1 = static_cast<float>(-h / s * rate / static_cast<double>(kLog2e));
    const double distance = (static_cast<double>(own.z) - stats[0]) * rate;
    const double dz = label_gradient(logprob, distance, mean, g, h, rate);
    all.at_label = static_cast<float>(dz * own.slope);
    if (known) all.label = label;
  }
  out[row] = all;
}

// Overwrites a lane's slots with their gradients, without the label's own term.
template <class E, bool kChange, bool kEntropy, int kCount>
__device__ __forceinline__ void gradients(const Slopes& c, const LogitOptions<kChange>& options,
                                          Pack<E> (&slots)[kCount]) {
  const auto each = [&](const auto& gradient) {
#pragma unroll
    for (int k = 0; k < kCount; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float dz[kPerWord<E>];
#pragma unroll
        for (int w = 0; w < kPerWord<E>; ++w) dz[w] = gradient(slots[k].get(i * kPerWord<E> + w));
        slots[k].words[i] = E::word(dz);
      }
    }
  };
  const auto scaled = [&](float e, float log2_e) {
    // Added, so that no zero has a sign.
    return fmaf(e, kEntropy ? fmaf(c.a1, log2_e, c.a0) : c.a0, 0.0f);
  };
  // In a row that is NaN, a logit without weight still has no gradient.
  const bool number = c.a0 * 0.0f == 0.0f && c.a1 * 0.0f == 0.0f;
  if (!kChange && number && (!kEntropy || floor_weighs_nothing<E>(c.m, c.rate2))) {
    if constexpr (kEntropy) raise_to<E>(floor_of<E>(), slots);
    each([&](float x) {
      const float log2_e = (x - c.m) * c.rate2;
      return scaled(exp2_fast(log2_e), log2_e);
    });
  } else {
    each([&](float x) {
      const Logit z = options(x);
      const float log2_e = (z.z - c.m) * c.rate2, e = exp2_fast(log2_e);
      float dz = scaled(e, log2_e);
      if constexpr (kChange) dz *= z.slope;
      // Exactly zero, also at -inf, where e log e would be NaN.
      return e == 0.0f ? 0.0f : dz;
    });
  }
}

// One tile of dz = p (-g - h (log p + H)) / T, plus g / T at the label, by a warp; O is the dtype
// of dz.
template <class E, class O, bool kChange, bool kEntropy>
__global__ void __launch_bounds__(kRowThreads, kBackwardBlocks<E, kChange, kEntropy>)
    backward_kernel(const LogprobsBackwardArgs a, const RowTiles tiles,
                    const Coefficients* coefficients) {
  const Tile tile(tiles);
  if (tile.id >= tiles.total) return;
  const Slopes c = coefficients[tile.token].slopes;
  const typename E::Storage* x = tile.start<E>(a.logits);
  auto* out = const_cast<typename O::Storage*>(tile.start<O>(a.grad_logits));
  const Window<E, kWindowSlots<E, O, kBackwardSlots>, O> window(tile, a.vocab, out, x, x);
  if (c.a0 == 0.0f && c.a1 == 0.0f) {
    window.clear(out);
    return;
  }
  const LogitOptions<kChange> options(a.options);
  window.map(x, x, out,
             [&](auto& slots, const auto&) { gradients<E, kChange, kEntropy>(c, options, slots); });
  // By the lane that has just stored this column.
  const int64_t label = coefficients[tile.token].label, at = label - window.first;
  if (label >= 0 && at >= 0 && at < window.kColumns &&
      static_cast<int>(at) / kWidth<O> % kWarp == static_cast<int>(threadIdx.x % kWarp))
    out[label] = O::put(coefficients[tile.token].at_label);
}

}  // namespace

int64_t token_logprobs_scratch(int64_t tokens, int64_t vocab, int64_t element_size) {
  return tokens * ceil_div(vocab, tile_columns(kSlots, element_size)) * sizeof(float4);
}

int64_t token_logprobs_backward_scratch(int64_t tokens) { return tokens * sizeof(Coefficients); }

Status token_logprobs(const LogprobsArgs& a) {
  const OnDevice guard(a.exec);
  const int64_t tokens = a.rows * a.cols;
  auto* partials = static_cast<float4*>(a.exec.scratch);
  const int64_t tiles = ceil_div(a.vocab, tile_columns(kSlots, element_size(a.logits.dtype)));
  const RowTiles all(a.rows, a.cols, tiles);
  const float rate = 1.0f / static_cast<float>(a.options.temperature);
  const LogitValues value(a.options);
  for_dtype(a.logits.dtype, [&](auto element) {
    using E = decltype(element);
    for_flag(a.options.change_logits(), [&](auto change) {
      for_flag(a.entropy.given, [&](auto entropy) {
        RK_ENQUEUE(a.exec, all.blocks(), kRowThreads,
                   (partial_kernel<E, change.value, entropy.value>), a, all, rate, value, partials);
      });
    });
    RK_ENQUEUE(a.exec, ceil_div(tokens, kCombineThreads / kWarp), kCombineThreads,
               combine_kernel<E>, a, static_cast<uint32_t>(tiles), partials);
  });
  return {};
}

Status token_logprobs_backward(const LogprobsBackwardArgs& a) {
  const OnDevice guard(a.exec);
  const int64_t tokens = a.rows * a.cols;
  auto* coefficients = static_cast<Coefficients*>(a.exec.scratch);
  for_gradient(a.logits.dtype, a.grad_logits.dtype, [&](auto element, auto result) {
    using E = decltype(element);
    using O = decltype(result);
    const RowTiles all(
        a.rows, a.cols,
        window_tiles(a.vocab, kWindowSlots<E, O, kBackwardSlots>, sizeof(typename O::Storage)));
    RK_ENQUEUE(a.exec, ceil_div(tokens, kCombineThreads), kCombineThreads, coefficients_kernel<E>,
               a, coefficients);
    for_flag(a.options.change_logits(), [&](auto change) {
      for_flag(a.grad_entropy.given, [&](auto entropy) {
        RK_ENQUEUE(a.exec, all.blocks(), kRowThreads,
                   (backward_kernel<E, O, change.value, entropy.value>), a, all, coefficients);
      });
    });
  });
  return {};
}

}  // namespace rk::cuda
