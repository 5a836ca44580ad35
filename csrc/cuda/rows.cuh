// Rows of logits cut into tiles: a block per tile, then a warp per row that combines them in order.
//
// The tiles depend on the vocabulary and the dtype alone, so a row's bits do not depend on the
// batch around it, and a few rows fill the device as many do. A block reads its tile once, into
// registers.
#pragma once
#include "common.cuh"

namespace rk::cuda {
namespace {

constexpr int kRowThreads = 256;
// Threads of a kernel that has a warp, or a thread, per row.
constexpr int kCombineThreads = 128;

// Columns of a tile of kSlots 16-byte loads a thread.
__host__ __device__ constexpr int64_t tile_columns(int slots, int64_t element_size) {
  return slots * kRowThreads * (16 / element_size);
}

// Where a block works: `tiles` blocks to a row.
struct Tile {
  int64_t row, index, first;
  int count;
};
__device__ __forceinline__ Tile this_tile(uint32_t tiles, int64_t vocab, int64_t columns) {
  const uint32_t row = blockIdx.x / tiles, index = blockIdx.x % tiles;
  const int64_t first = index * columns;
  const int64_t left = vocab - first;
  return {row, index, first, static_cast<int>(left < columns ? left : columns)};
}

// ---- Options of rows ----------------------------------------------------------------------------

// A logit as the options make it, before the temperature divides it, and the slope of that.
struct Logit {
  float z, slope;
};

// What RowOptions make of a logit; nothing without kChange (RowOptions::change_logits).
template <bool kChange>
struct LogitOptions {
  float cap;

  __device__ __forceinline__ explicit LogitOptions(const RowOptions& o)
      : cap(static_cast<float>(o.softcap)) {}
  __device__ __forceinline__ Logit operator()(float x) const {
    if constexpr (!kChange) return {x, 1.0f};
    const TanhParts p = tanh_parts(x / cap);
    return {cap * p.value, p.slope};
  }
};

// The same where a kernel has no variant of its own for options that change logits.
struct AnyLogitOptions {
  bool change;
  LogitOptions<true> changed;

  __device__ __forceinline__ explicit AnyLogitOptions(const RowOptions& o)
      : change(o.change_logits()), changed(o) {}
  __device__ __forceinline__ Logit operator()(float x) const {
    if (!change) return {x, 1.0f};
    return changed(x);
  }
};

template <class Args>
__device__ __forceinline__ double row_temperature(const Args& a, int64_t row) {
  if (!a.temperatures.given) return a.options.temperature;
  return static_cast<const float*>(a.temperatures.data)[token_at(a.temperatures, row, a.cols)];
}

template <class Args>
__device__ __forceinline__ int64_t row_label(const Args& a, int64_t row) {
  return load_integer(a.labels, token_at(a.labels, row, a.cols));
}

// ---- Sums of tiles ------------------------------------------------------------------------------

// Maximum m, s = sum of e = exp((x - m) / T) and t = sum of e (x - m) / T over some columns.
template <class T>
struct Sums {
  float m;
  T s, t;
};

}  // namespace
}  // namespace rk::cuda
