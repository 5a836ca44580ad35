// Clusters: blocks of one launch that run at once and wait for one another. The GPUs have them from
// compute capability 9.0 on; for others a kernel with RK_CLUSTERS = 0 is empty.
#pragma once
#include <utility>

#include "common.cuh"

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define RK_CLUSTERS 1
#else
#define RK_CLUSTERS 0
#endif

// RK_SHARED(type, name): a variable in a block's shared memory. The tests' emulator, whose
// __shared__ is that of blocks one after another, defines it otherwise.
#ifndef RK_SHARED
#define RK_SHARED(type, name) __shared__ type name
#endif

namespace rk::cuda {
namespace {

// Blocks of a cluster on any of these GPUs.
constexpr int kMaxCluster = 8;

// Waits for all threads of the cluster; they then see what each wrote before.
__device__ __forceinline__ void cluster_barrier() {
#if defined(RK_EMULATED)
  emulated_cluster_barrier();
#elif defined(__CUDA_ARCH__) && RK_CLUSTERS
  asm volatile("barrier.cluster.arrive.aligned;\n\tbarrier.cluster.wait.aligned;" ::: "memory");
#endif
}

// Enqueues `count` clusters of `size` blocks of `threads`.
template <class... Parameters, class... Arguments>
void enqueue_clusters(const Exec& exec, int64_t count, unsigned size, unsigned threads,
                      void (*kernel)(Parameters...), Arguments&&... arguments) {
  if (count == 0) return;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = size;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(grid_size(count * size));
  config.blockDim = dim3(threads);
  config.stream = static_cast<cudaStream_t>(exec.stream);
  config.attrs = &cluster;
  config.numAttrs = 1;
  check(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
}

}  // namespace
}  // namespace rk::cuda
