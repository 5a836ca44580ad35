// token_logprobs: log-probability and entropy of rows of logits, and their gradient.
#include "logprobs.cuh"

namespace rk::cuda {
namespace {

// Blocks that a multiprocessor holds: as many as spill no register.
template <bool kChange, bool kSquares>
constexpr int kForwardBlocks = (kChange ? 3 : 4) - kSquares;
template <class E, bool kChange, bool kEntropy, bool kSquares>
constexpr int kBackwardBlocks =
    kSquares ? 2 : (kChange ? 3 : (kEntropy && std::is_same_v<E, F16> ? 4 : 6));

// Calls f with two flags: whether the entropy's terms are wanted and whether those of the squares
// are, which come with the entropy's.
template <class F>
void for_terms(bool entropy, bool squares, const F& f) {
  if (squares)
    f(std::true_type{}, std::true_type{});
  else
    for_flag(entropy, [&](auto flag) { f(flag, std::false_type{}); });
}

// (m, s, t, q) of one tile of one row, by a warp; 0 for t and q where they are not wanted.
// partials: [rows * cols, tiles].
template <class E, bool kChange, bool kEntropy, bool kSquares>
__global__ void __launch_bounds__(kRowThreads, (kForwardBlocks<kChange, kSquares>))
    partial_kernel(const LogprobsArgs a, const RowTiles tiles, float rate_of_all,
                   const LogitValues value, float4* partials) {
  constexpr int kColumns = tile_columns(kSlots, sizeof(typename E::Storage));
  const Tile tile(tiles);
  if (tile.id >= tiles.total) return;
  if (load_integer(a.labels, tile.of(a.labels)) == a.options.ignore_index) return;
  const int64_t first = static_cast<int64_t>(tile.index) * kColumns;
  Pack<E> slots[kSlots];
  load_tile<E>(tile.start<E>(a.logits) + first, a.vocab - first, -__builtin_inff(), slots);
  const float rate =
      a.temperatures.given
          ? 1.0f / static_cast<const float*>(a.temperatures.data)[tile.of(a.temperatures)]
          : rate_of_all;
  const auto r = tile_sums<E, kChange, kEntropy, kSquares>(slots, a.vocab - first, value, rate);
  if (threadIdx.x % kWarp == 0) partials[tile.id] = make_float4(r.m, r.s, r.t, r.q);
}

// After combine_kernel: the sum of the squared probabilities and the most likely column of a row,
// where they are wanted; a warp to a row. Of more blocks at a time sm_80 would spill.
template <class E>
__global__ void __launch_bounds__(kCombineThreads, 4)
    further_kernel(const LogprobsArgs a, uint32_t tiles, const float4* partials) {
  const int64_t row = row_of_warp();
  if (row >= a.rows * a.cols) return;
  const bool ignored = row_label(a, row) == a.options.ignore_index;
  const float4* own = partials + row * tiles;
  if (a.collision.given) {
    const float rate = static_cast<float>(1.0 / row_temperature(a, row));
    const float* stats = a.stats + 3 * row;
    const double sum = ignored ? 0.0 : row_collision(own, tiles, rate, stats[0], stats[1]);
    if (threadIdx.x % kWarp == 0)
      static_cast<float*>(a.collision.data)[row] = static_cast<float>(sum);
  }
  if (a.argmax.given) {
    const int64_t found =
        ignored ? -1
                : row_argmax<E>(row_logits<E>(a, row), a.vocab, own, tiles, order_slack(a.options));
    if (threadIdx.x % kWarp == 0) static_cast<int64_t*>(a.argmax.data)[row] = found;
  }
}

// Log-probability, entropy and statistics of a row; a warp to a row.
template <class E>
__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(const LogprobsArgs a, uint32_t tiles, const float4* partials) {
  const int64_t row = row_of_warp();
  if (row >= a.rows * a.cols) return;
  const int64_t label = row_label(a, row);
  RowStatistics r;
  if (label != a.options.ignore_index)
    r = row_statistics(a.options, a.vocab, label, label_logit<E>(a, row, label),
                       row_temperature(a, row), partials + row * tiles, tiles);
  if (threadIdx.x % kWarp != 0) return;
  static_cast<float*>(a.logprobs.data)[row] = r.logprob;
  if (a.entropy.given) static_cast<float*>(a.entropy.data)[row] = r.entropy;
  float* stats = a.stats + 3 * row;
  stats[0] = r.m, stats[1] = r.s, stats[2] = r.mean;
}

// A kernel of its own: fp64 once per row, and the label's logit is read before the gradient may
// overwrite it.
template <class E>
__global__ void __launch_bounds__(kCombineThreads)
    coefficients_kernel(const LogprobsBackwardArgs a, Coefficients* out) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kCombineThreads + threadIdx.x;
  if (row >= a.rows * a.cols) return;
  const auto upstream = [&](const Tensor& g) { return upstream_at(g, row, a.cols); };
  const float g = upstream(a.grad_logprobs), h = upstream(a.grad_entropy);
  const float of_lse = upstream(a.grad_lse), of_collision = upstream(a.grad_collision);
  const int64_t label = row_label(a, row);
  const float* stats = a.stats + 3 * row;
  out[row] = label != a.options.ignore_index &&
                     (g != 0.0f || h != 0.0f || of_lse != 0.0f || of_collision != 0.0f)
                 ? row_coefficients(a.options, a.vocab, label, label_logit<E>(a, row, label),
                                    row_temperature(a, row), stats[0], stats[1], stats[2], g, h,
                                    of_lse, of_collision, upstream(a.collision))
                 : no_gradient();
}

// A tile of the gradient by a warp.
template <class E, class O, bool kChange, bool kEntropy, bool kSquares>
__global__ void __launch_bounds__(kRowThreads, (kBackwardBlocks<E, kChange, kEntropy, kSquares>))
    backward_kernel(const LogprobsBackwardArgs a, const RowTiles tiles, const LogitValues value,
                    const Coefficients* coefficients) {
  const Tile tile(tiles);
  if (tile.id >= tiles.total) return;
  const Slopes c = coefficients[tile.token].slopes;
  gradient_tile<E, O, kChange, kEntropy, kSquares>(
      tile.index, a.vocab, value, c, coefficients + tile.token, tile.start<E>(a.logits),
      const_cast<typename O::Storage*>(tile.start<O>(a.grad_logits)));
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
      for_terms(a.entropy.given, a.collision.given, [&](auto entropy, auto squares) {
        RK_ENQUEUE(a.exec, all.blocks(), kRowThreads,
                   (partial_kernel<E, change.value, entropy.value, squares.value>), a, all, rate,
                   value, partials);
      });
    });
    RK_ENQUEUE(a.exec, ceil_div(tokens, kCombineThreads / kWarp), kCombineThreads,
               combine_kernel<E>, a, static_cast<uint32_t>(tiles), partials);
    if (a.collision.given || a.argmax.given)
      RK_ENQUEUE(a.exec, ceil_div(tokens, kCombineThreads / kWarp), kCombineThreads,
                 further_kernel<E>, a, static_cast<uint32_t>(tiles), partials);
  });
  return {};
}

Status token_logprobs_backward(const LogprobsBackwardArgs& a) {
  const OnDevice guard(a.exec);
  const int64_t tokens = a.rows * a.cols;
  auto* coefficients = static_cast<Coefficients*>(a.exec.scratch);
  const LogitValues value(a.options);
  for_gradient(a.logits.dtype, a.grad_logits.dtype, [&](auto element, auto result) {
    using E = decltype(element);
    using O = decltype(result);
    const RowTiles all(a.rows, a.cols, window_tiles<E, O, kBackwardSlots>(a.vocab));
    RK_ENQUEUE(a.exec, ceil_div(tokens, kCombineThreads), kCombineThreads, coefficients_kernel<E>,
               a, coefficients);
    for_flag(a.options.change_logits(), [&](auto change) {
      for_terms(a.grad_entropy.given, a.grad_collision.given, [&](auto entropy, auto squares) {
        RK_ENQUEUE(a.exec, all.blocks(), kRowThreads,
                   (backward_kernel<E, O, change.value, entropy.value, squares.value>), a, all,
                   value, coefficients);
      });
    });
  });
  return {};
}

}  // namespace rk::cuda
