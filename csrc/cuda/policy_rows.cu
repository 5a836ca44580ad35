// policy_rows: from fp32 logits to their gradient by a policy loss whose tokens stand alone.
//
// A cluster of blocks takes a row. Its warps sum the row's tiles as token_logprobs does; a warp of
// each block finds the log-probability, entropy and loss of the token and the coefficients of its
// gradient, the same in every block; and all warps read the row again and write its gradient. The
// bits are those of token_logprobs, policy_loss and token_logprobs_backward.
//
// The second read comes from L2: a multiprocessor holds two blocks, 32 warps, and a cluster has so
// many blocks that no warp owns more than two tiles of 4 KiB. That is 256 KiB of rows between their
// two reads on each multiprocessor at most: 34.6 of the 50 MB of L2 of H100 and H200 with 132 of
// them, 38.8 of the 126 MB of B200 with 148. About half of it on average, because a row's bytes are
// wanted from their first read to their second; and the gradient that waits to be written, half as
// much again in 16 bits. With one block to a row of 151,936 logits it would be 78 MB, or 157 with
// two blocks on a multiprocessor. The mapping, like the tiles, depends on the vocabulary alone.
#include "clusters.cuh"
#include "logprobs.cuh"
#include "policy_token.cuh"

namespace rk::cuda {
namespace {

constexpr int kThreads = 512, kWarps = kThreads / kWarp, kBlocks = 2;
constexpr int kTilesOfWarp = 2;
constexpr int kTileColumns = tile_columns(kSlots, sizeof(float));

// Blocks of a row.
constexpr int64_t row_blocks(int64_t tiles) {
  return (tiles + kTilesOfWarp * kWarps - 1) / (kTilesOfWarp * kWarps);
}

// How a row is shared out, for the kernel's arguments.
struct RowShares {
  Divisor blocks;
  uint32_t tiles, windows;
  float rate;
  LogitValues value;
};

// What a token of the loss reads beside its log-probability.
enum : int { kOld, kAdvantage, kRef, kRollout, kWeight, kNumbers };
struct TokenTensors {
  Tensor of[kNumbers];
};

// What a block knows of its row.
struct RowShared {
  Coefficients coefficients;
  int64_t label;
  float numbers[kNumbers], logit;
};

// The gradients of an unmasked token's log-probability and entropy.
struct TokenGradient {
  float g, h;
};

// Whether a compiler contracts a product into a sum may depend on who else uses it: with these it
// rounds as in policy_loss, which has metrics of them.
__device__ __forceinline__ void as_if_used(float x) {
#if defined(__CUDA_ARCH__)
  asm volatile("" ::"f"(x));
#else
  volatile float used = x;
  (void)used;
#endif
}

template <bool kFull>
__device__ __forceinline__ TokenGradient token_gradient(const PolicyConfig& c,
                                                        const TokenTensors& given,
                                                        const float* numbers, float logprob) {
  const TokenNumbers x{logprob,
                       given.of[kOld].given ? numbers[kOld] : logprob,
                       numbers[kAdvantage],
                       numbers[kRef],
                       numbers[kRollout],
                       given.of[kRef].given,
                       given.of[kRollout].given};
  const Ratio<float> no_sequence{1.0f, 0.0f, 0.0f, 0.0f};
  float g = 0.0f;
  for_objective(c.objective, [&](auto objective) {
    const PolicyToken t = policy_token<objective.value, kFull>(x, c, no_sequence, 1.0f);
    g = t.term.direct + t.term.ratio;
    as_if_used(t.old_k3);
    as_if_used(t.term.loss);
    if (x.ref_given) {
      as_if_used(t.kl.value);
      as_if_used(t.kl.k3);
    }
  });
  return {g * numbers[kWeight], -c.entropy_coef * numbers[kWeight]};
}

// A warp's windows, from `first` on, of the gradient of the row at x, by its coefficients.
template <class O, bool kBonus>
__device__ __forceinline__ void write_gradient(const PolicyRowsArgs& a, const RowShares& shares,
                                               const Slopes& slopes,
                                               const Coefficients* coefficients, uint32_t row,
                                               uint32_t first) {
  const float* x = static_cast<const float*>(a.logits.data) + row * a.logits.stride1;
  auto* out = static_cast<typename O::Storage*>(a.grad_logits.data) + row * a.grad_logits.stride1;
#pragma unroll 1
  for (uint32_t i = first; i < shares.windows; i += shares.blocks.divisor * kWarps)
    gradient_tile<F32, O, false, kBonus>(i, a.vocab, shares.value, slopes, coefficients, x, out);
}

// O is the dtype of the gradient; kFull: the loss has_further_options. partials: [tokens, tiles].
template <class O, bool kBonus, bool kFull>
__global__ void __launch_bounds__(kThreads, kBlocks)
    rows_kernel(const PolicyRowsArgs a, const TokenTensors given, const RowShares shares,
                float4* partials) {
#if RK_CLUSTERS
  RK_SHARED(RowShared, shared);
  const uint32_t row = shares.blocks.quotient(blockIdx.x);
  const uint32_t block = blockIdx.x - row * shares.blocks.divisor;
  const uint32_t warp = block * kWarps + threadIdx.x / kWarp;
  const auto at = [&](const Tensor& t) { return row * t.stride1; };
  const int64_t label = load_integer(a.labels, at(a.labels));
  const auto results = [&](const RowStatistics& r) {
    if (block != 0 || threadIdx.x != 0) return;
    static_cast<float*>(a.logprobs.data)[row] = r.logprob;
    static_cast<float*>(a.entropy.data)[row] = r.entropy;
  };
  const auto temperature_at = [&] {
    return static_cast<const float*>(a.temperatures.data)[at(a.temperatures)];
  };
  // The same for all of the cluster.
  if (label == a.options.ignore_index) {
    results({});
    write_gradient<O, kBonus>(a, shares, no_gradient().slopes, nullptr, row, warp);
    return;
  }
  const float* x = static_cast<const float*>(a.logits.data) + at(a.logits);
  // Not kept in registers by all.
  if (threadIdx.x == kNumbers) shared.label = label;
  partials += static_cast<int64_t>(row) * shares.tiles;
  uint32_t i = warp;
#pragma unroll 1
  for (; i < shares.tiles; i += shares.blocks.divisor * kWarps) {
    const int first = static_cast<int>(i) * kTileColumns;
    const int left = static_cast<int>(a.vocab) - first;
    Pack<F32> slots[kSlots];
    load_tile<F32>(x + first, left, -__builtin_inff(), slots);
    const float rate = a.temperatures.given ? 1.0f / temperature_at() : shares.rate;
    const Sums<float> r = tile_sums<F32, false, true>(slots, left, shares.value, rate);
    if (threadIdx.x % kWarp == 0) partials[i] = make_float4(r.m, r.s, r.t, 0.0f);
  }
  // The numbers of the token, all loads in flight; the label's logit before another block may
  // write its gradient.
  if (threadIdx.x < kNumbers) {
    const Tensor& t = given.of[threadIdx.x];
    shared.numbers[threadIdx.x] = t.given ? load_float(t, at(t)) : 0.0f;
  } else if (threadIdx.x == kNumbers) {
    shared.logit = is_known(shared.label, a.vocab) ? x[shared.label] : 0.0f;
  }
  cluster_barrier();
  if (threadIdx.x < kWarp) {
    const double temperature =
        a.temperatures.given ? static_cast<double>(temperature_at()) : a.options.temperature;
    const RowStatistics r = row_statistics(a.options, a.vocab, shared.label, shared.logit,
                                           temperature, partials, shares.tiles);
    const TokenGradient t = token_gradient<kFull>(a.config, given, shared.numbers, r.logprob);
    const float h = kBonus ? t.h : 0.0f;
    const Coefficients found =
        t.g != 0.0f || h != 0.0f ? row_coefficients(a.options, a.vocab, shared.label, shared.logit,
                                                    temperature, r.m, r.s, r.mean, t.g, h)
                                 : no_gradient();
    if (threadIdx.x == 0) shared.coefficients = found;
    results(r);
  }
  __syncthreads();
  const Slopes slopes = shared.coefficients.slopes;
  // Each warp goes on where it stopped, those with the fewest tiles first.
  write_gradient<O, kBonus>(a, shares, slopes, &shared.coefficients, row, i - shares.tiles);
#endif
}

}  // namespace

int64_t policy_rows_scratch(int64_t tokens, int64_t vocab) {
  return tokens * ceil_div(vocab, kTileColumns) * sizeof(float4);
}

// In a smaller vocabulary most warps of a block have no tile, and what they wait for between a
// row's two reads takes longer than a second read from memory. In a larger one a row needs more
// blocks than make a cluster. And options that change logits take so many instructions that memory
// does not bind, and more registers than two blocks to a multiprocessor leave.
bool policy_rows_suits(int64_t vocab, const RowOptions& options) {
  const int64_t tiles = ceil_div(vocab, kTileColumns);
  return tiles >= kWarps && row_blocks(tiles) <= kMaxCluster && !options.change_logits();
}

Status policy_rows(const PolicyRowsArgs& a) {
  const OnDevice guard(a.exec);
  const int64_t tiles = ceil_div(a.vocab, kTileColumns), blocks = row_blocks(tiles);
  const int32_t out = a.grad_logits.dtype;
  if (tiles == 0 || blocks > kMaxCluster || a.options.change_logits() ||
      a.logits.dtype != kFloat32 || (out != kFloat32 && out != kBFloat16))
    throw std::runtime_error(
        "rlhf_kernels: no policy_rows for this vocabulary, these options or dtypes");
  const TokenTensors given{
      {a.old_logprobs, a.advantages, a.ref_logprobs, a.rollout_logprobs, a.weights}};
  const auto enqueue = [&](auto result) {
    using O = decltype(result);
    const int64_t windows = window_tiles<F32, O, kBackwardSlots>(a.vocab);
    const RowShares shares{
        Divisor(blocks), static_cast<uint32_t>(tiles), static_cast<uint32_t>(windows),
        1.0f / static_cast<float>(a.options.temperature), LogitValues(a.options)};
    for_flag(a.config.entropy_coef != 0.0f, [&](auto bonus) {
      for_flag(has_further_options(a.config), [&](auto full) {
        enqueue_clusters(a.exec, a.tokens, static_cast<unsigned>(blocks), kThreads,
                         rows_kernel<O, bonus.value, full.value>, a, given, shares,
                         static_cast<float4*>(a.exec.scratch));
      });
    });
  };
  out == kBFloat16 ? enqueue(BF16{}) : enqueue(F32{});
  return {};
}

}  // namespace rk::cuda
