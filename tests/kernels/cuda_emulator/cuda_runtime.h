// CUDA's language and runtime, as far as csrc/cuda uses them, on the CPU: so that the kernels
// themselves are tested where there is no GPU. Stands in for the header of the same name.
//
// A thread of a block is a fiber with its own stack. It runs until a barrier or a shuffle and then
// hands on to the next; blocks run one after another, those of a cluster together. Fibers run in an
// order that changes from block to block, so that a missing barrier changes results, and a barrier
// that not all reach is an error.
#pragma once
#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <ucontext.h>
#include <math.h>

#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
// Blocks of a thread of the process run one after another. RK_SHARED: for those that run together.
#define __shared__ static thread_local
#define RK_SHARED(type, name) type& name = ::emulator::shared_of_block<type>()
#define RK_LAUNCH(kernel, blocks, threads, stream, ...) \
  ::emulator::launch(blocks, threads, [&] { (kernel)(__VA_ARGS__); })

struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// Not macros: fields of a launch have the same names.
inline thread_local uint3 blockDim{1, 1, 1}, gridDim{1, 1, 1};

namespace emulator {

constexpr unsigned kWarp = 32, kMaxThreads = 1024, kMaxCluster = 8;
constexpr unsigned kMaxFibers = kMaxCluster * kMaxThreads;
constexpr size_t kStack = 256 << 10;

struct Barrier {
  unsigned arrived = 0, generation = 0;
};

struct Fiber {
  std::unique_ptr<char[]> stack;
  ucontext_t start;
  jmp_buf at;
  bool started = false, done = true;
};

// Shared memory of a block in a cluster: a variable.
struct alignas(16) Memory {
  char bytes[1024];
};

// What one thread of the process emulates: a cluster at a time, of one block where a kernel has no
// clusters. `threads` are a block's, `current` and `alive` count those of the cluster.
struct Cluster {
  std::vector<Fiber> fibers;
  const std::function<void()>* kernel = nullptr;
  unsigned threads = 0, blocks = 1, first_block = 0, current = 0, alive = 0;
  unsigned block_alive[kMaxCluster], warp_alive[kMaxFibers / kWarp];
  Barrier all, of_block[kMaxCluster], warps[kMaxFibers / kWarp];
  Memory shared[kMaxCluster];
  uint64_t slots[kMaxFibers];
  uint64_t progress = 0;
  jmp_buf scheduler;
  uint3 thread{0, 0, 0}, block{0, 0, 0};
};
inline thread_local Cluster state;

// The current fiber's block in the cluster.
inline unsigned block() { return state.current / state.threads; }

template <class T>
T& shared_of_block() {
  static_assert(sizeof(T) <= sizeof(Memory) && std::is_trivial_v<T>);
  return *reinterpret_cast<T*>(state.shared[block()].bytes);
}

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "emulated CUDA: %s (block %u, thread %u)\n", what, state.block.x, state.thread.x);
  abort();
}

// To the scheduler, and back when it is this fiber's turn.
inline void yield() {
  if (_setjmp(state.fibers[state.current].at) == 0) _longjmp(state.scheduler, 1);
}

inline void release_if_complete(Barrier& b, unsigned alive) {
  if (b.arrived != 0 && b.arrived == alive) {
    b.arrived = 0;
    ++b.generation;
    ++state.progress;
  }
}

inline void wait(Barrier& b, unsigned& alive) {
  const unsigned generation = b.generation;
  ++b.arrived;
  ++state.progress;
  release_if_complete(b, alive);
  while (b.generation == generation) yield();
}

// Parked between blocks, so that a context is made once.
inline void fiber_main() {
  for (;;) {
    (*state.kernel)();
    const unsigned warp = state.current / kWarp, own = block();
    state.fibers[state.current].done = true;
    ++state.progress;
    --state.alive;
    --state.block_alive[own];
    --state.warp_alive[warp];
    // On the device, threads that have left count as arrived.
    release_if_complete(state.all, state.alive);
    release_if_complete(state.of_block[own], state.block_alive[own]);
    release_if_complete(state.warps[warp], state.warp_alive[warp]);
    yield();
  }
}

inline void resume(unsigned thread) {
  Fiber& f = state.fibers[thread];
  state.current = thread;
  state.thread.x = thread % state.threads;
  state.block.x = state.first_block + block();
  if (_setjmp(state.scheduler) != 0) return;
  if (f.started) _longjmp(f.at, 1);
  f.started = true;
  f.stack.reset(new char[kStack]);
  getcontext(&f.start);
  f.start.uc_stack.ss_sp = f.stack.get();
  f.start.uc_stack.ss_size = kStack;
  f.start.uc_link = nullptr;
  makecontext(&f.start, fiber_main, 0);
  setcontext(&f.start);
}

inline void run_cluster() {
  const unsigned n = state.threads * state.blocks;
  state.alive = n;
  for (unsigned b = 0; b < state.blocks; ++b) {
    state.block_alive[b] = state.threads;
    state.of_block[b].arrived = 0;
    // What a block left behind helps no other.
    memset(state.shared[b].bytes, 0xff, sizeof(Memory));
  }
  for (unsigned w = 0; w * kWarp < n; ++w) {
    state.warp_alive[w] = n - w * kWarp < kWarp ? n - w * kWarp : kWarp;
    state.warps[w].arrived = 0;
  }
  state.all.arrived = 0;
  for (unsigned i = 0; i < n; ++i) state.fibers[i].done = false;
  while (state.alive > 0) {
    const uint64_t before = state.progress;
    for (unsigned i = 0; i < n; ++i) {
      // Forwards, backwards, and the warps of each half after those of the other.
      const unsigned order[] = {i, n - 1 - i, (i + n / 2 / kWarp * kWarp) % n};
      const unsigned thread = order[state.first_block / state.blocks % 3];
      if (!state.fibers[thread].done) resume(thread);
    }
    if (state.progress == before) fail("threads wait for one another at different barriers");
  }
}

inline void launch(unsigned blocks, unsigned threads, const std::function<void()>& kernel,
                   unsigned cluster = 1) {
  if (threads == 0 || threads > kMaxThreads || blocks == 0) fail("bad launch");
  // The emulated warps of two blocks lie side by side.
  if (cluster == 0 || cluster > kMaxCluster || blocks % cluster != 0 ||
      (cluster > 1 && threads % kWarp != 0))
    fail("bad clusters");
  if (state.fibers.size() < cluster * threads)
    state.fibers.resize(cluster > 1 ? kMaxFibers : kMaxThreads);
  state.kernel = &kernel;
  state.threads = threads;
  state.blocks = cluster;
  blockDim.x = threads;
  gridDim.x = blocks;
  for (unsigned b = 0; b < blocks; b += cluster) {
    state.first_block = b;
    run_cluster();
  }
}

// What `lane` of this warp has put in; all lanes must be here.
template <class T>
inline T exchange(unsigned mask, T value, unsigned lane) {
  static_assert(sizeof(T) <= 8, "shuffles move up to 64 bits");
  const unsigned warp = state.current / kWarp;
  if (mask != 0xffffffffu || state.warp_alive[warp] != kWarp)
    fail("a shuffle without all lanes of the warp");
  memcpy(&state.slots[state.current], &value, sizeof(T));
  wait(state.warps[warp], state.warp_alive[warp]);
  T result;
  memcpy(&result, &state.slots[warp * kWarp + lane % kWarp], sizeof(T));
  wait(state.warps[warp], state.warp_alive[warp]);
  return result;
}

}  // namespace emulator

#define threadIdx (::emulator::state.thread)
#define blockIdx (::emulator::state.block)

inline void __syncthreads() {
  const unsigned own = emulator::block();
  emulator::wait(emulator::state.of_block[own], emulator::state.block_alive[own]);
}
inline void emulated_cluster_barrier() { emulator::wait(emulator::state.all, emulator::state.alive); }
inline void __syncwarp(unsigned = 0xffffffffu) {
  const unsigned warp = emulator::state.current / emulator::kWarp;
  emulator::wait(emulator::state.warps[warp], emulator::state.warp_alive[warp]);
}
inline void __threadfence() {}
inline int __ffs(int x) { return __builtin_ffs(x); }

template <class T>
inline T __shfl_sync(unsigned mask, T x, int lane) {
  return emulator::exchange(mask, x, static_cast<unsigned>(lane));
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T x, int lanes) {
  return emulator::exchange(mask, x, (threadIdx.x % emulator::kWarp) ^ lanes);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T x, unsigned by) {
  const unsigned lane = threadIdx.x % emulator::kWarp;
  return emulator::exchange(mask, x, lane < by ? lane : lane - by);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T x, unsigned by) {
  const unsigned lane = threadIdx.x % emulator::kWarp;
  return emulator::exchange(mask, x, lane + by < emulator::kWarp ? lane + by : lane);
}
inline unsigned __ballot_sync(unsigned mask, bool x) {
  unsigned bits = 0;
  for (unsigned lane = 0; lane < emulator::kWarp; ++lane)
    bits |= static_cast<unsigned>(emulator::exchange(mask, x, lane)) << lane;
  return bits;
}
inline bool __any_sync(unsigned mask, bool x) { return __ballot_sync(mask, x) != 0; }
inline bool __all_sync(unsigned mask, bool x) { return __ballot_sync(mask, x) == 0xffffffffu; }

template <class T>
inline T __ldg(const T* p) {
  return *p;
}
inline float __uint_as_float(unsigned x) {
  float y;
  memcpy(&y, &x, 4);
  return y;
}
inline unsigned __float_as_uint(float x) {
  unsigned y;
  memcpy(&y, &x, 4);
  return y;
}

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorNoKernelImageForDevice = 209 };
inline const char* cudaGetErrorString(cudaError_t) { return "none"; }
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1) : x(x), y(1), z(1) {}
};
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    uint3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* c, void (*kernel)(P...), A&&... args) {
  if (c->numAttrs != 1 || c->attrs->id != cudaLaunchAttributeClusterDimension)
    emulator::fail("a launch with other attributes than clusters");
  emulator::launch(c->gridDim.x, c->blockDim.x, [&] { kernel(args...); },
                   c->attrs->val.clusterDim.x);
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 0, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 0, cudaSuccess; }
