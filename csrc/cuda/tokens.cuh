// What the losses over tokens share: a thread's tokens, ordered sums over tiles, the divisor.
#pragma once
#include "slots.cuh"

namespace rk::cuda {
namespace {

constexpr int kTokenThreads = 256;
// Tokens of a thread, side by side in as many groups as make two 16-byte loads of fp32.
constexpr int kPerThread = 2 * kSide, kTokenTile = kTokenThreads * kPerThread;
// A thread in sixteen folds a column of a block's sums; the padding keeps their banks apart.
constexpr int kFold = 16, kColumn = kTokenThreads + kFold;
// The first rows of the scratch [rows, slots], of statistics_kernel.
enum : int { kTokens, kLogRatio, kLogWeight, kStatistics };

// This thread's tokens of a tile.
struct Tokens : OwnTokens<kPerThread, kTokenThreads * kSide> {
  TokenTile tile;
  // Bit j: token j is not masked.
  unsigned kept;

  __device__ __forceinline__ Tokens(const LossTokens& t, int64_t slot)
      : Tokens(t, slot_tile<kTokenTile>(t, slot)) {}
  __device__ __forceinline__ bool keeps(int j) const { return kept >> j & 1; }

 private:
  __device__ __forceinline__ Tokens(const LossTokens& t, const TokenTile& own)
      : OwnTokens(own, own.begin + own.k * kTokenTile, static_cast<int>(threadIdx.x) * kSide),
        tile(own),
        kept(flags(t.mask, inside)) {}
};

// The sums of a block's columns into `sums`, for all threads to read; `shared` is scratch.
template <class T, int kColumns>
__device__ __forceinline__ void column_sums(const T (&x)[kColumns], T (*shared)[kColumn], T* sums) {
  static_assert(kColumns * kFold <= kTokenThreads, "a column has kFold threads");
#pragma unroll
  for (int c = 0; c < kColumns; ++c) shared[c][threadIdx.x] = x[c];
  __syncthreads();
  const int column = threadIdx.x / kFold, part = threadIdx.x % kFold;
  // Whole warps.
  if (column < (kColumns + 1) / 2 * 2) {
    T total = T(0);
    if (column < kColumns)
      for (int i = part; i < kTokenThreads; i += kFold) total += shared[column][i];
#pragma unroll
    for (int offset = kFold / 2; offset > 0; offset /= 2)
      total += __shfl_xor_sync(0xffffffffu, total, offset);
    if (part == 0 && column < kColumns) sums[column] = total;
  }
  __syncthreads();
}

// The fp64 sum of a row of the scratch over the slots of a sequence, by a warp, in every lane.
__device__ __forceinline__ double sequence_total(const float* row, const TokenTile& tile) {
  double total = 0.0;
  for (int64_t k = threadIdx.x % kWarp; k < tile.tiles; k += kWarp)
    total += row[tile.first_slot + k];
  return warp_reduce(total, Sum{});
}

// 1 / tokens of a sequence, at least 1 of them.
__device__ __forceinline__ double sequence_share(const float* partials, int64_t slots,
                                                 const TokenTile& tile) {
  const double tokens = sequence_total(partials + kTokens * slots, tile);
  return 1.0 / (tokens > 1.0 ? tokens : 1.0);
}

// Whether slot is the first of its sequence with a token; `tile` says which of the sequence each
// slot is. Empty slots between two with tokens are looked at once.
__device__ __forceinline__ bool opens_sequence(const float* tokens, const float* tile,
                                               int64_t slot) {
  if (!(tokens[slot] > 0.0f)) return false;
  for (int64_t back = 1, k = static_cast<int64_t>(tile[slot]); back <= k; ++back)
    if (tokens[slot - back] > 0.0f) return false;
  return true;
}

// What the combining block, of kTokenThreads, finds about the batch.
struct Batch {
  // Sequences with a token; whether cu_seqlens do anything but rise from 0 to cols.
  double sequences;
  bool bad_offsets;
};

__device__ __forceinline__ Batch look_at_batch(const LossTokens& t, const float* tokens,
                                               const float* tile, int64_t slots, bool count,
                                               double (*shared)[kColumn], double* sums) {
  double found[2] = {0.0, 0.0};
  if (count)
    for (int64_t slot = threadIdx.x; slot < slots; slot += kTokenThreads)
      found[0] += opens_sequence(tokens, tile, slot) ? 1.0 : 0.0;
  if (t.offsets.given) found[1] = wrong_offsets<kTokenThreads>(t) ? 1.0 : 0.0;
  column_sums(found, shared, sums);
  const Batch batch{sums[0], sums[1] != 0.0};
  __syncthreads();
  return batch;
}

// Whether the divisor is the number of sequences.
__device__ __forceinline__ bool divides_by_sequences(int32_t aggregation, const Tensor& normalizer,
                                                     double divisor) {
  const bool by_sequence = aggregation == kSeqMeanTokenMean || aggregation == kSeqMeanTokenSum;
  return by_sequence && !normalizer.given && divisor == 0.0;
}

// 1 / the divisor: the one given, else `count`, at least 1. NaN if it is no divisor.
__device__ __forceinline__ double loss_scale(const Tensor& normalizer, double divisor, double count,
                                             bool bad_offsets) {
  double d = divisor;
  if (normalizer.given)
    d = normalizer.dtype == kFloat64 ? *static_cast<const double*>(normalizer.data)
                                     : load_float(normalizer, 0);
  else if (d == 0.0)
    d = count > 1.0 ? count : 1.0;
  const bool good = d > 0.0 && d < __builtin_inf() && !bad_offsets;
  return good ? 1.0 / d : __builtin_nan("");
}

}  // namespace
}  // namespace rk::cuda
