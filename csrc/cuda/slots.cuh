// Tiles of sequences, and the slot that each one has for its partial results.
//
// Sequences are cut into tiles from their own start, padded or packed, so that a token meets the
// same arithmetic wherever its sequence lies. Padded, slot s * tiles + k is tile k of sequence s.
// Packed, it is offsets[s] / kTile + s + k: slots that grow with s, known without reading the
// offsets on the host; some stay empty.
#pragma once
#include "common.cuh"

namespace rk::cuda {
namespace {

template <int kTile>
int64_t token_slots(int64_t sequences, int64_t cols, bool packed) {
  return packed ? cols / kTile + sequences : sequences * ceil_div(cols, kTile);
}

// cu_seqlens[s] within [0, total]: bad offsets give bad numbers, not bad addresses.
__device__ __forceinline__ int64_t offset_at(const Tensor& offsets, int64_t s, int64_t total) {
  const int64_t x = load_integer(offsets, s * offsets.stride1);
  return x < 0 ? 0 : (x > total ? total : x);
}

// Tile k of sequence s, whose tokens are [begin, begin + length) of its row; `first_slot` is the
// first of the sequence, `tiles` how many it has, `count` the tokens of this one.
struct TokenTile {
  int64_t sequence, begin, length, first_slot, tiles, k;
  int count;
};

template <int kTile>
__device__ __forceinline__ TokenTile slot_tile(const LossTokens& t, int64_t slot) {
  TokenTile tile;
  if (t.offsets.given) {
    // The last sequence whose first slot is not after this one.
    int64_t low = 0, high = t.sequences - 1;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (offset_at(t.offsets, middle, t.cols) / kTile + middle <= slot)
        low = middle;
      else
        high = middle - 1;
    }
    tile.sequence = low;
    tile.begin = offset_at(t.offsets, low, t.cols);
    // Without a sequence there is no such entry.
    const int64_t end = low < t.sequences ? offset_at(t.offsets, low + 1, t.cols) : 0;
    tile.length = end > tile.begin ? end - tile.begin : 0;
    tile.first_slot = tile.begin / kTile + low;
  } else {
    const uint32_t tiles = static_cast<uint32_t>((t.cols + kTile - 1) / kTile);
    tile.sequence = static_cast<uint32_t>(slot) / tiles;
    tile.begin = 0;
    tile.length = t.cols;
    tile.first_slot = tile.sequence * tiles;
  }
  tile.tiles = (tile.length + kTile - 1) / kTile;
  tile.k = slot - tile.first_slot;
  const int64_t left = tile.k < 0 ? 0 : tile.length - tile.k * kTile;
  tile.count = left <= 0 ? 0 : (left < kTile ? static_cast<int>(left) : kTile);
  return tile;
}

// Whether one of this thread's share of cu_seqlens does anything but rise from 0 to cols.
template <int kThreads>
__device__ __forceinline__ bool wrong_offsets(const LossTokens& t) {
  bool wrong = false;
  for (int64_t i = threadIdx.x; i <= t.sequences; i += kThreads) {
    const int64_t entry = load_integer(t.offsets, i * t.offsets.stride1);
    const int64_t low = i > 0 ? load_integer(t.offsets, (i - 1) * t.offsets.stride1) : 0;
    const int64_t high = i > 0 ? t.cols : 0;
    wrong |= entry < low || entry > high || (i == t.sequences && entry != t.cols);
  }
  return wrong;
}

}  // namespace
}  // namespace rk::cuda
