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

// Maximum m, s = sum of e = exp((x - m) / T) and t = sum of e (x - m) / T over some columns.
template <class T>
struct Sums {
  float m;
  T s, t;
};

}  // namespace
}  // namespace rk::cuda
