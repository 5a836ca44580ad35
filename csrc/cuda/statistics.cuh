// What the losses know of a sequence before their sweep: the first launch, where they need it.
#pragma once
#include "tokens.cuh"

namespace rk::cuda {
namespace {

// Unmasked tokens of each slot, their sums of logprob - old and of log_weight where `logprobs`
// and `rollout` are given; for a gate by sequences also the sum of its anchor less logprob. kClips:
// of logprob - old as clipped_log_ratio gives it.
template <bool kGated, bool kClips>
__global__ void __launch_bounds__(kTokenThreads)
    statistics_kernel(const LossTokens t, const Tensor logprobs, const Tensor old,
                      const Tensor rollout, bool against_rollout, float* partials, float* distances,
                      int64_t slots, const Tensor advantages, float clip_low, float clip_high) {
  constexpr int kColumns = kGated ? kStatistics + 1 : kStatistics;
  __shared__ float shared[kColumns][kColumn], sums[kColumns];
  const Tokens own(t, blockIdx.x);
  float x[kPerThread], y[kPerThread], z[kPerThread], a[kPerThread], found[kColumns] = {};
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) found[kTokens] += own.keeps(j) ? 1.0f : 0.0f;
  using N = Tokens::Numbers;
  const auto load = [&](const auto&... more) {
    own.load(own.kept, N{old, y, logprobs.given || rollout.given}, N{logprobs, x, logprobs.given},
             N{rollout, z, rollout.given}, more...);
  };
  if constexpr (kClips)
    load(N{advantages, a});
  else
    load();
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) {
    if constexpr (kClips) {
      // Masked: all are 0, within bounds on both sides of 0.
      found[kLogRatio] += clipped_log_ratio(x[j] - y[j], a[j], clip_low, clip_high);
    } else {
      if (logprobs.given) found[kLogRatio] += x[j] - y[j];
    }
    if (rollout.given) found[kLogWeight] += log_weight(y[j], z[j]);
    if constexpr (kGated)
      found[kStatistics] += log_weight(gate_anchor(y[j], z[j], against_rollout), x[j]);
  }
  column_sums(found, shared, sums);
  if (threadIdx.x < kStatistics) partials[threadIdx.x * slots + blockIdx.x] = sums[threadIdx.x];
  if (kGated && threadIdx.x == kStatistics) distances[blockIdx.x] = sums[kStatistics];
}

}  // namespace
}  // namespace rk::cuda
