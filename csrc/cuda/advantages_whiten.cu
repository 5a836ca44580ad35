// whiten: moments of tiles of the flat order of tokens, combined in order, then applied.
//
// A tile's moments are taken around its own mean, in fp64: a common offset costs nothing, and equal
// elements have a variance of exactly zero.
#include "../advantages_math.h"
#include "common.cuh"

namespace rk::cuda {
namespace {

constexpr int kThreads = 256, kPerThread = 8;
constexpr int kTile = kThreads * kPerThread;
constexpr int kCombineThreads = 1024;

// This thread's tokens of a tile, of dtype E. kEven: all tensors are evenly spaced; kFull: no token
// of the tile is beyond the last, which only the last tile has.
template <class E, bool kEven, bool kFull>
struct Elements {
  float x[kPerThread];
  // Bit j: token j is there, and is not masked.
  unsigned inside = (1u << kPerThread) - 1, kept;

  __device__ __forceinline__ explicit Elements(const WhitenArgs& a) {
    if constexpr (!kFull) {
      inside = 0;
#pragma unroll
      for (int j = 0; j < kPerThread; ++j) inside |= place(j) < a.rows * a.cols ? 1u << j : 0u;
    }
    typename E::Storage y[kPerThread];
    fetch(a.x, a.cols, y);
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) x[j] = E::get(y[j]);
    kept = inside;
    if (!a.mask.given) return;
    kept = 0;
    switch (a.mask.dtype) {
      case kInt64: flags<int64_t>(a); break;
      case kInt32: flags<int32_t>(a); break;
      default: flags<uint8_t>(a);
    }
  }
  static __device__ __forceinline__ int64_t place(int j) {
    return static_cast<int64_t>(blockIdx.x) * kTile + j * kThreads + threadIdx.x;
  }
  __device__ __forceinline__ bool has(int j) const { return kFull || (inside >> j & 1); }
  __device__ __forceinline__ bool keeps(int j) const { return kept >> j & 1; }

 private:
  // A tensor's values, all loads in flight at once; 0 where there is no token.
  template <class T>
  __device__ __forceinline__ void fetch(const Tensor& t, int64_t cols, T (&y)[kPerThread]) const {
#pragma unroll
    for (int j = 0; j < kPerThread; ++j)
      y[j] = has(j) ? static_cast<const T*>(t.data)[token_at<kEven>(t, place(j), cols)] : T(0);
  }
  template <class T>
  __device__ __forceinline__ void flags(const WhitenArgs& a) {
    T y[kPerThread];
    fetch(a.mask, a.cols, y);
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) kept |= y[j] != T(0) ? 1u << j : 0u;
  }
};

// Calls f with Elements<...>, the thread's own.
template <class E, bool kEven, class F>
__device__ __forceinline__ void with_elements(const WhitenArgs& a, const F& f) {
  // Divisions spill registers where they are in both branches.
  if (kEven && (static_cast<int64_t>(blockIdx.x) + 1) * kTile <= a.rows * a.cols)
    f(Elements<E, kEven, true>(a));
  else
    f(Elements<E, kEven, false>(a));
}

template <class E, bool kEven>
__global__ void __launch_bounds__(kThreads) moments_kernel(const WhitenArgs a, Moments* partials) {
  __shared__ double shared[3][kThreads / kWarp];
  // Taken out of the two branches, so that the reductions are there once.
  float x[kPerThread];
  unsigned kept;
  with_elements<E, kEven>(a, [&](const auto& own) {
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) x[j] = own.x[j];
    kept = own.kept;
  });
  const auto keeps = [&](int j) { return (kept >> j & 1) != 0; };
  double count = 0.0, sum = 0.0, m2 = 0.0;
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) {
    count += keeps(j) ? 1.0 : 0.0;
    sum += keeps(j) ? static_cast<double>(x[j]) : 0.0;
  }
  count = block_reduce<kThreads>(count, Sum{}, shared[0]);
  const double mean = block_reduce<kThreads>(sum, Sum{}, shared[1]) / (count > 1.0 ? count : 1.0);
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) {
    const double d = keeps(j) ? x[j] - mean : 0.0;
    m2 += d * d;
  }
  m2 = block_reduce<kThreads>(m2, Sum{}, shared[2]);
  if (threadIdx.x == 0) partials[blockIdx.x] = {count, mean, m2};
}

// The map to apply, from the moments of all tiles; one block.
__global__ void __launch_bounds__(kCombineThreads)
    combine_kernel(const Moments* partials, int64_t tiles, bool shift_mean, bool unbiased,
                   double eps, Whitening* out) {
  __shared__ double shared[3][kCombineThreads / kWarp];
  Moments all{0.0, 0.0, 0.0};
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < tiles; i += kCombineThreads) {
    all.count += partials[i].count;
    sum += partials[i].count * partials[i].mean;
  }
  all.count = block_reduce<kCombineThreads>(all.count, Sum{}, shared[0]);
  sum = block_reduce<kCombineThreads>(sum, Sum{}, shared[1]);
  all.mean = sum / (all.count > 1.0 ? all.count : 1.0);
  // The variation within the tiles, and that of their means.
  for (int64_t i = threadIdx.x; i < tiles; i += kCombineThreads) {
    const Moments own = partials[i];
    const double d = own.mean - all.mean;
    all.m2 += own.count == 0.0 ? 0.0 : own.m2 + own.count * d * d;
  }
  all.m2 = block_reduce<kCombineThreads>(all.m2, Sum{}, shared[2]);
  if (threadIdx.x == 0) *out = whitening(all, shift_mean, unbiased, eps);
}

template <class E, bool kEven>
__global__ void __launch_bounds__(kThreads) apply_kernel(const WhitenArgs a, const Whitening* map) {
  // In place, masked tokens hold 0, or the NaN of a result that is poisoned as a whole.
  const bool in_place = a.x.data == a.out;
  with_elements<E, kEven>(a, [&](const auto& own) {
    const Whitening w = *map;
#pragma unroll
    for (int j = 0; j < kPerThread; ++j) {
      if (!own.has(j)) continue;
      const float y = static_cast<float>((own.x[j] - w.mean) * w.scale + w.shift);
      a.out[own.place(j)] = own.keeps(j) ? y : (in_place ? own.x[j] : 0.0f);
    }
  });
}

}  // namespace

int64_t whiten_scratch(int64_t tokens) {
  return sizeof(Whitening) + ceil_div(tokens, kTile) * sizeof(Moments);
}

void enqueue_whitening(const WhitenArgs& a, void* scratch) {
  const int64_t tiles = ceil_div(a.rows * a.cols, kTile);
  auto* map = static_cast<Whitening*>(scratch);
  auto* partials = reinterpret_cast<Moments*>(map + 1);
  const bool even = evenly_spaced(a.x, a.rows, a.cols) && evenly_spaced(a.mask, a.rows, a.cols);
  for_dtype(a.x.dtype, [&](auto element) {
    for_flag(even, [&](auto flag) {
      using E = decltype(element);
      const auto moments = moments_kernel<E, decltype(flag)::value>;
      const auto apply = apply_kernel<E, decltype(flag)::value>;
      RK_ENQUEUE(a.exec, tiles, kThreads, moments, a, partials);
      RK_ENQUEUE(a.exec, 1, kCombineThreads, combine_kernel, partials, tiles, a.shift_mean,
                 a.unbiased, a.eps, map);
      RK_ENQUEUE(a.exec, tiles, kThreads, apply, a, map);
    });
  });
}

Status whiten(const WhitenArgs& a) {
  const OnDevice guard(a.exec);
  enqueue_whitening(a, a.exec.scratch);
  return {};
}

}  // namespace rk::cuda
