// group_advantages: a warp to a group, found where the sorted ids change; fp64 throughout.
//
// A lane takes every 32nd member in the order of the group, so bits depend on the group alone.
#include "../advantages_math.h"
#include "common.cuh"

namespace rk::cuda {
namespace {

constexpr int kGroupThreads = 128;
constexpr int kBatchThreads = 1024;

__device__ __forceinline__ double reward_at(const Tensor& x, int64_t i) {
  const int64_t at = i * x.stride1;
  return x.dtype == kFloat64 ? static_cast<const double*>(x.data)[at] : load_float(x, at);
}

// The end of the group of sorted ids that starts at `begin`; by a warp.
__device__ __forceinline__ int64_t group_end(const int64_t* ids, int64_t begin, int64_t count) {
  const int64_t own = ids[begin];
  for (int64_t end = begin;; end += kWarp) {
    const int64_t i = end + threadIdx.x % kWarp;
    const int same = warp_reduce(i < count && ids[i] == own ? 1 : 0, Sum{});
    if (same < kWarp) return end + same;
  }
}

__global__ void __launch_bounds__(kGroupThreads, 1) group_kernel(const GroupAdvantagesArgs a) {
  const int64_t warp =
      static_cast<int64_t>(blockIdx.x) * (kGroupThreads / kWarp) + threadIdx.x / kWarp;
  const bool listed = a.group_size == 0;
  const int64_t begin = listed ? warp : warp * a.group_size;
  if (begin >= a.count) return;
  int64_t end = begin + a.group_size;
  if (listed) {
    if (begin > 0 && a.sorted_ids[begin - 1] == a.sorted_ids[begin]) return;
    end = group_end(a.sorted_ids, begin, a.count);
  }
  if (end > a.count) end = a.count;
  auto* const work = static_cast<double*>(a.exec.scratch);
  const auto member = [&](int64_t k) { return listed ? a.order[k] : k; };
  const int64_t first = begin + threadIdx.x % kWarp;
  GroupStatistics s{static_cast<double>(end - begin), reward_at(a.rewards, member(begin)), 0.0,
                    0.0};
  if (zero_mean(a.baseline) || a.scale == kScaleGroup) {
    for (int64_t k = first; k < end; k += kWarp)
      s.mean += reward_at(a.rewards, member(k)) - s.first;
    s.mean = finite_mean(warp_reduce(s.mean, Sum{}) / s.n);
    double m2 = 0.0;
    for (int64_t k = first; k < end; k += kWarp) {
      const double d = reward_at(a.rewards, member(k)) - s.first - s.mean;
      m2 += d * d;
    }
    s.spread = sqrt(warp_reduce(m2, Sum{}) / others_of(s.n));
  }
  for (int64_t k = first; k < end; k += kWarp) {
    const int64_t i = member(k);
    const double greedy = a.greedy.given ? reward_at(a.greedy, i) : 0.0;
    const double x =
        group_advantage(reward_at(a.rewards, i), greedy, s, a.baseline, a.scale, a.eps);
    if (a.scale == kScaleBatch)
      work[i] = x;
    else
      a.out[i] = static_cast<float>(x);
  }
}

// Scales baselined rewards by the standard deviation of all of them; one block.
__global__ void __launch_bounds__(kBatchThreads) batch_kernel(const GroupAdvantagesArgs a) {
  __shared__ double shared[2][kBatchThreads / kWarp];
  const auto* const work = static_cast<const double*>(a.exec.scratch);
  double first = 0.0, mean = 0.0, m2 = 0.0;
  if (!zero_mean(a.baseline)) {
    first = work[0];
    for (int64_t i = threadIdx.x; i < a.count; i += kBatchThreads) mean += work[i] - first;
    mean = block_reduce<kBatchThreads>(mean, Sum{}, shared[0]) / a.count;
  }
  const auto centred = [&](int64_t i) { return work[i] - first - mean; };
  for (int64_t i = threadIdx.x; i < a.count; i += kBatchThreads) m2 += centred(i) * centred(i);
  m2 = block_reduce<kBatchThreads>(m2, Sum{}, shared[1]);
  const double spread = sqrt(m2 / others_of(static_cast<double>(a.count)));
  for (int64_t i = threadIdx.x; i < a.count; i += kBatchThreads)
    a.out[i] = static_cast<float>(spread == 0.0 ? 0.0 : centred(i) / (spread + a.eps));
}

}  // namespace

int64_t group_advantages_scratch(int64_t count, bool of_batch) {
  return of_batch ? count * sizeof(double) : 0;
}

Status group_advantages(const GroupAdvantagesArgs& a) {
  const OnDevice guard(a.exec);
  const int64_t warps = a.group_size == 0 ? a.count : ceil_div(a.count, a.group_size);
  RK_ENQUEUE(a.exec, ceil_div(warps, kGroupThreads / kWarp), kGroupThreads, group_kernel, a);
  if (a.scale == kScaleBatch) RK_ENQUEUE(a.exec, 1, kBatchThreads, batch_kernel, a);
  return {};
}

}  // namespace rk::cuda
