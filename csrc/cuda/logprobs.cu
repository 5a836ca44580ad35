// token_logprobs: log-probability and entropy of rows of logits, and their gradient.
#include "rows.cuh"

namespace rk::cuda {
namespace {

// 16-byte loads a thread has in flight. The gradient keeps more in registers and reduces nothing.
constexpr int kSlots = 8;
constexpr int kBackwardSlots = 4;

// What the backward needs of each row; zeros where it takes no gradient.
struct Coefficients {
  float m, rate;   // rate is 1 / T
  float a0, a1;    // dz = e (a0 + a1 log2 e): the entropy's part is linear in log p
  float at_label;  // gradient at the label itself
};

template <class E, class Args>
__device__ __forceinline__ const typename E::Storage* row_logits(const Args& a, int64_t row) {
  return static_cast<const typename E::Storage*>(a.logits.data) + token_at(a.logits, row, a.cols);
}

// (m, s, t) of one tile of one row. partials: [rows * cols, tiles, 3].
template <class E, bool kChange, bool kEntropy>
__global__ void __launch_bounds__(kRowThreads, kChange ? 2 : 3)
    partial_kernel(const LogprobsArgs a, uint32_t tiles, bool aligned, float* partials) {
  constexpr int kColumns = tile_columns(kSlots, sizeof(typename E::Storage));
  __shared__ float shared[3][kRowThreads / kWarp];
  const Tile tile = this_tile(tiles, a.vocab, kColumns);
  if (row_label(a, tile.row) == a.options.ignore_index) return;
  const float minus_inf = -__builtin_inff();
  Pack<E> slots[kSlots];
  load_tile<E, kRowThreads>(row_logits<E>(a, tile.row) + tile.first, tile.count, aligned, minus_inf,
                            slots);
  const float rate = 1.0f / static_cast<float>(row_temperature(a, tile.row));
  const LogitOptions<kChange> options(a.options);
  const auto logit = [&](int k, int w) {
    const float x = slots[k].get(w);
    if constexpr (!kChange) return x;
    // Options may make -inf finite: what lies beyond the row must stay out by its position.
    const bool inside = slot_column<E, kRowThreads>(k) + w < tile.count;
    return inside ? options(x).z : minus_inf;
  };
  float m = minus_inf;
#pragma unroll
  for (int k = 0; k < kSlots; ++k)
#pragma unroll
    for (int w = 0; w < kWidth<E>; ++w) m = fmaxf(m, logit(k, w));
  m = block_reduce<kRowThreads>(m, Max{}, shared[0]);
  float s = 0.0f, t = 0.0f;
  // Nothing but -inf adds nothing. The maximum hides a NaN, which belongs in the sums; under a cap
  // there is nothing but NaN here.
  if (m == minus_inf) {
#pragma unroll
    for (int k = 0; k < kSlots; ++k)
#pragma unroll
      for (int w = 0; w < kWidth<E>; ++w)
        s += slots[k].get(w) == slots[k].get(w) ? 0.0f : slots[k].get(w);
    s = warp_reduce(s, Sum{});
  } else {
    const float lowest = kLowest / rate, rate2 = rate * kLog2e;
#pragma unroll
    for (int k = 0; k < kSlots; ++k) {
#pragma unroll
      for (int w = 0; w < kWidth<E>; ++w) {
        // Clamped: 0 times the distance of -inf would be NaN.
        const float d = max_nan(lowest, logit(k, w) - m);
        const float e = exp2_fast(d * rate2);
        s += e;
        if constexpr (kEntropy) t = fmaf(e, d, t);
      }
    }
    s = warp_reduce(s, Sum{});
    if constexpr (kEntropy) t = warp_reduce(t, Sum{}) * rate;
  }
  if (threadIdx.x % kWarp == 0) {
    shared[1][threadIdx.x / kWarp] = s;
    shared[2][threadIdx.x / kWarp] = t;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kRowThreads / kWarp; ++w) {
    s += shared[1][w];
    t += shared[2][w];
  }
  float* out = partials + 3 * static_cast<int64_t>(blockIdx.x);
  out[0] = m, out[1] = s, out[2] = t;
}

// (m, s, t) of a row from those of its tiles, by a warp: 32 tiles at a time, groups in order.
__device__ __forceinline__ Sums<double> combine_tiles(const float* partials, int64_t tiles,
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
    const float m = inside ? partials[3 * tile] : minus_inf;
    const float top = fmaxf(r.m, warp_reduce(m, Max{}));
    const float base = top == minus_inf ? 0.0f : top;
    const Sums<double> now = moved(inside ? partials[3 * tile + 1] : 0.0,
                                   inside ? partials[3 * tile + 2] : 0.0, m - base);
    const Sums<double> before = moved(r.s, r.t, r.m - base);
    r = {top, before.s + warp_reduce(now.s, Sum{}), before.t + warp_reduce(now.t, Sum{})};
  }
  return r;
}

// Log-probability, entropy and statistics of a row; a warp to a row.
template <class E>
__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(const LogprobsArgs a, uint32_t tiles, const float* partials) {
  const int64_t row =
      static_cast<int64_t>(blockIdx.x) * (kCombineThreads / kWarp) + threadIdx.x / kWarp;
  if (row >= a.rows * a.cols) return;
  const int64_t label = row_label(a, row);
  float m = 0.0f, s = 1.0f, mean = 0.0f, logprob = 0.0f, entropy = 0.0f;
  if (label != a.options.ignore_index) {
    const double temperature = row_temperature(a, row), rate = 1.0 / temperature;
    const Sums<double> r =
        combine_tiles(partials + row * tiles * 3, tiles, static_cast<float>(rate));
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
    // A shard of the vocabulary that has not the label; its sums are as of any row.
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
  Coefficients c{0.0f, 1.0f, 0.0f, 0.0f, 0.0f};
  if (label != a.options.ignore_index && (g != 0.0f || h != 0.0f)) {
    const float* stats = a.stats + 3 * row;
    const double rate = 1.0 / row_temperature(a, row), s = stats[1], mean = stats[2];
    const bool known = label >= 0 && label < a.vocab;
    const Logit own =
        AnyLogitOptions(a.options)(known ? E::get(row_logits<E>(a, row)[label]) : 0.0f);
    const double logprob = logprob_from_stats(own.z, stats[0], s, rate);
    c.m = stats[0];
    c.rate = static_cast<float>(rate);
    c.a0 = static_cast<float>((-g + h * mean) / s * rate);
    c.a1 = static_cast<float>(-h / s * rate / static_cast<double>(kLog2e));
    const double distance = (static_cast<double>(own.z) - stats[0]) * rate;
    const double dz = label_gradient(logprob, distance, mean, g, h, rate);
    c.at_label = static_cast<float>(dz * own.slope);
  }
  out[row] = c;
}

// One tile of dz = p (-g - h (log p + H)) / T, plus g / T at the label.
template <class E, bool kChange, bool kEntropy>
__global__ void __launch_bounds__(kRowThreads)
    backward_kernel(const LogprobsBackwardArgs a, uint32_t tiles, bool aligned,
                    const Coefficients* coefficients) {
  using S = typename E::Storage;
  constexpr int kColumns = tile_columns(kBackwardSlots, sizeof(S));
  const Tile tile = this_tile(tiles, a.vocab, kColumns);
  const Coefficients c = coefficients[tile.row];
  S* out =
      static_cast<S*>(a.grad_logits.data) + token_at(a.grad_logits, tile.row, a.cols) + tile.first;
  if (c.a0 == 0.0f && c.a1 == 0.0f) {
    zero_tile<E, kRowThreads, kBackwardSlots>(out, tile.count, aligned);
    return;
  }
  Pack<E> slots[kBackwardSlots];
  load_tile<E, kRowThreads>(row_logits<E>(a, tile.row) + tile.first, tile.count, aligned, 0.0f,
                            slots);
  const LogitOptions<kChange> options(a.options);
  const float lowest = kLowest / c.rate, rate2 = c.rate * kLog2e;
  // The label's column in this tile, or one that is in none.
  const int64_t y = row_label(a, tile.row);
  const bool here = y >= tile.first && y < tile.first + tile.count;
  const int label = here ? static_cast<int>(y - tile.first) : -1;
#pragma unroll
  for (int k = 0; k < kBackwardSlots; ++k) {
    const int column = slot_column<E, kRowThreads>(k);
#pragma unroll
    for (int w = 0; w < kWidth<E>; ++w) {
      const Logit x = options(slots[k].get(w));
      const float d = x.z - c.m, log2_e = d * rate2;
      const float e = exp2_fast(log2_e);
      float dz = kEntropy ? e * fmaf(c.a1, log2_e, c.a0) : e * c.a0;
      if constexpr (kChange) dz *= x.slope;
      // Exactly zero, also at -inf, where e d would be NaN.
      dz = d < lowest ? 0.0f : dz;
      slots[k].set(w, E::put(column + w == label ? c.at_label : dz));
    }
    store_slot<E>(out, column, tile.count, aligned, slots[k]);
  }
}

}  // namespace

int64_t token_logprobs_scratch(int64_t tokens, int64_t vocab, int64_t element_size) {
  return tokens * ceil_div(vocab, tile_columns(kSlots, element_size)) * 3 * sizeof(float);
}

int64_t token_logprobs_backward_scratch(int64_t tokens) { return tokens * sizeof(Coefficients); }

Status token_logprobs(const LogprobsArgs& a) {
  const OnDevice guard(a.exec);
  const int64_t tokens = a.rows * a.cols;
  float* partials = static_cast<float*>(a.exec.scratch);
  const int64_t tiles = ceil_div(a.vocab, tile_columns(kSlots, element_size(a.logits.dtype)));
  const bool aligned = rows_aligned(a.logits, a.rows, a.cols);
  for_dtype(a.logits.dtype, [&](auto element) {
    using E = decltype(element);
    for_flag(a.options.change_logits(), [&](auto change) {
      for_flag(a.entropy.given, [&](auto entropy) {
        RK_ENQUEUE(a.exec, tokens * tiles, kRowThreads,
                   (partial_kernel<E, change.value, entropy.value>), a,
                   static_cast<uint32_t>(tiles), aligned, partials);
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
  const int64_t tiles =
      ceil_div(a.vocab, tile_columns(kBackwardSlots, element_size(a.logits.dtype)));
  const bool aligned =
      rows_aligned(a.logits, a.rows, a.cols) && rows_aligned(a.grad_logits, a.rows, a.cols);
  for_dtype(a.logits.dtype, [&](auto element) {
    using E = decltype(element);
    RK_ENQUEUE(a.exec, ceil_div(tokens, kCombineThreads), kCombineThreads, coefficients_kernel<E>,
               a, coefficients);
    for_flag(a.options.change_logits(), [&](auto change) {
      for_flag(a.grad_entropy.given, [&](auto entropy) {
        RK_ENQUEUE(a.exec, tokens * tiles, kRowThreads,
                   (backward_kernel<E, change.value, entropy.value>), a,
                   static_cast<uint32_t>(tiles), aligned, coefficients);
      });
    });
  });
  return {};
}

}  // namespace rk::cuda
