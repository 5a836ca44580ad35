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
    // With no sequence there is no such entry.
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

// ---- Tokens of a thread -------------------------------------------------------------------------

// Tokens side by side that a thread loads at once: 16 bytes of fp32.
constexpr int kSide = 4;

// kSide numbers side by side at p, a multiple of their size or of 16 bytes.
template <class T>
__device__ __forceinline__ void load_side(const T* p, T* x) {
  if constexpr (sizeof(T) == 1) {
    const uint32_t v = *reinterpret_cast<const uint32_t*>(p);
#pragma unroll
    for (int i = 0; i < kSide; ++i) x[i] = static_cast<T>(v >> (8 * i));
  } else if constexpr (sizeof(T) == 2) {
    const uint2 v = *reinterpret_cast<const uint2*>(p);
    x[0] = static_cast<T>(v.x), x[1] = static_cast<T>(v.x >> 16);
    x[2] = static_cast<T>(v.y), x[3] = static_cast<T>(v.y >> 16);
  } else if constexpr (std::is_same_v<T, float>) {
    const float4 v = *reinterpret_cast<const float4*>(p);
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
  } else if constexpr (sizeof(T) == 4) {
    const uint4 v = *reinterpret_cast<const uint4*>(p);
    x[0] = static_cast<T>(v.x), x[1] = static_cast<T>(v.y);
    x[2] = static_cast<T>(v.z), x[3] = static_cast<T>(v.w);
  } else {
#pragma unroll
    for (int i = 0; i < kSide; i += 2) {
      const uint4 v = reinterpret_cast<const uint4*>(p)[i / 2];
      x[i] = static_cast<T>(static_cast<uint64_t>(v.y) << 32 | v.x);
      x[i + 1] = static_cast<T>(static_cast<uint64_t>(v.w) << 32 | v.z);
    }
  }
}

// kCount tokens of a thread: kSide side by side, kSide more of them every kStep tokens.
template <int kCount, int kStep>
struct OwnTokens {
  static constexpr unsigned kAll = (1u << kCount) - 1;
  static_assert(kCount % kSide == 0);
  int64_t sequence, first;
  // Bit j: token j is there.
  unsigned inside;

  // Where the loaded values of a tensor go, if they are wanted.
  struct Numbers {
    const Tensor& t;
    float (&x)[kCount];
    bool wanted = true;
  };

  // `own` is this thread's first token in the tile.
  __device__ __forceinline__ OwnTokens(const TokenTile& tile, int64_t tile_begin, int own)
      : sequence(tile.sequence), first(tile_begin + own), inside(0) {
#pragma unroll
    for (int s = 0; s < kCount / kSide; ++s) {
      const int left = tile.count - own - s * kStep;
      const int there = left < 0 ? 0 : (left < kSide ? left : kSide);
      inside |= ((1u << there) - 1) << (s * kSide);
    }
  }
  // The offset of token j from the first.
  static __device__ __forceinline__ constexpr int behind(int j) {
    return j / kSide * kStep + j % kSide;
  }
  __device__ __forceinline__ bool has(int j) const { return inside >> j & 1; }
  // The first token's offset in a contiguous result.
  __device__ __forceinline__ int64_t place(const LossTokens& t) const {
    return t.offsets.given ? first : sequence * t.cols + first;
  }

  // The bits of `wanted` under which `t` is not 0; none is read without a bit.
  __device__ __forceinline__ unsigned flags(const Tensor& t, unsigned wanted) const {
    switch (t.dtype) {
      case kInt64: return flags_as<int64_t>(t, wanted);
      case kInt32: return flags_as<int32_t>(t, wanted);
      default: return flags_as<uint8_t>(t, wanted);
    }
  }

  // The numbers of each tensor that is wanted where a bit of `wanted` is set, all loads in flight;
  // 0 elsewhere. Without a bit none is read.
  template <class... N>
  __device__ __forceinline__ void load(unsigned wanted, const N&... numbers) const {
    // One branch for all, and no other: the loads of one tensor must not wait for another's.
    if (wanted != 0 && inside == kAll && (direct(numbers) && ...)) {
      (load_direct(numbers), ...);
    } else {
      (load_any(wanted, numbers), ...);
    }
    if (wanted == kAll) return;
    const auto mask = [&](const Numbers& n) {
#pragma unroll
      for (int j = 0; j < kCount; ++j)
        if (!(wanted >> j & 1)) n.x[j] = 0.0f;
    };
    (mask(numbers), ...);
  }

  // What `store` would overwrite; 0 where there is no token.
  __device__ __forceinline__ void fetch(const float* out, float (&x)[kCount]) const {
    if (inside == kAll && misaligned(out) == 0) {
#pragma unroll
      for (int s = 0; s < kCount / kSide; ++s) load_side(out + behind(s * kSide), x + s * kSide);
      return;
    }
#pragma unroll
    for (int j = 0; j < kCount; ++j) x[j] = has(j) ? out[behind(j)] : 0.0f;
  }

  // Stores to the tokens that exist; `out` points at the first one's.
  __device__ __forceinline__ void store(float* out, const float (&x)[kCount]) const {
    if (inside == kAll && misaligned(out) == 0) {
#pragma unroll
      for (int s = 0; s < kCount / kSide; ++s) {
        Pack<F32> pack;
#pragma unroll
        for (int i = 0; i < kSide; ++i) pack.set(i, x[s * kSide + i]);
        pack.store(out + behind(s * kSide));
      }
      return;
    }
#pragma unroll
    for (int j = 0; j < kCount; ++j)
      if (has(j)) out[behind(j)] = x[j];
  }

 private:
  template <class T>
  __device__ __forceinline__ const T* start(const Tensor& t) const {
    return static_cast<const T*>(t.data) + sequence * t.stride0 + first * t.stride1;
  }
  // Whether kSide tokens lie side by side at a multiple of their size, or of 16 bytes.
  template <class T>
  __device__ __forceinline__ bool side_by_side(const Tensor& t) const {
    constexpr uintptr_t kBytes = sizeof(T) * kSide < 16 ? sizeof(T) * kSide : 16;
    return t.stride1 == 1 && reinterpret_cast<uintptr_t>(start<T>(t)) % kBytes == 0;
  }
  __device__ __forceinline__ bool direct(const Numbers& n) const {
    return !n.wanted || (n.t.dtype == kFloat32 && side_by_side<float>(n.t));
  }
  __device__ __forceinline__ void load_direct(const Numbers& n) const {
    if (!n.wanted) return;
    const float* p = start<float>(n.t);
#pragma unroll
    for (int s = 0; s < kCount / kSide; ++s) load_side(p + behind(s * kSide), n.x + s * kSide);
  }
  __device__ __forceinline__ void load_any(unsigned wanted, const Numbers& n) const {
    if (!n.wanted) return;
    switch (n.t.dtype) {
      case kFloat32: return load_as<F32>(wanted, n);
      case kBFloat16: return load_as<BF16>(wanted, n);
      default: return load_as<F16>(wanted, n);
    }
  }
  template <class E>
  __device__ __forceinline__ void load_as(unsigned wanted, const Numbers& n) const {
    const auto* p = start<typename E::Storage>(n.t);
#pragma unroll
    for (int j = 0; j < kCount; ++j)
      n.x[j] = wanted >> j & 1 ? E::get(p[behind(j) * n.t.stride1]) : 0.0f;
  }
  template <class T>
  __device__ __forceinline__ unsigned flags_as(const Tensor& t, unsigned wanted) const {
    if (wanted == 0) return 0;
    T x[kCount];
    const T* p = start<T>(t);
    if (inside == kAll && side_by_side<T>(t)) {
#pragma unroll
      for (int s = 0; s < kCount / kSide; ++s) load_side(p + behind(s * kSide), x + s * kSide);
    } else {
#pragma unroll
      for (int j = 0; j < kCount; ++j) x[j] = wanted >> j & 1 ? p[behind(j) * t.stride1] : T(0);
    }
    unsigned found = 0;
#pragma unroll
    for (int j = 0; j < kCount; ++j) found |= x[j] != T(0) ? 1u << j : 0u;
    return found & wanted;
  }
};

}  // namespace
}  // namespace rk::cuda
