// mismatch_weights: every token read once, for its weight, what criteria of tokens keep, and the
// sums of its tile. One block then judges the sequences and makes the metrics; a last kernel
// changes the results where a sequence, or the batch, decides.
#include "../mismatch_math.h"
#include "tokens.cuh"

namespace rk::cuda {
namespace {

// Rows of the scratch [kRows, slots]; behind them the verdicts of the sequences and the batch's.
enum : int { kLeast = kMismatchSums, kMost, kLeastWeight, kMostWeight, kRows };
constexpr int kWeightSums = kMismatchSums - kPlainSums, kHalf = kMismatchTotals / 2;
static_assert(kMismatchTotals == 2 * kHalf);

// What the last kernel needs: the factor to divide by, and whether the offsets are bad.
struct BatchVerdict {
  float factor;
  bool bad_offsets;
};
struct Scratch {
  float* partials;
  MismatchVerdict* sequences;
  BatchVerdict* batch;

  Scratch(const Exec& exec, int64_t slots, int64_t count)
      : partials(static_cast<float*>(exec.scratch)),
        sequences(reinterpret_cast<MismatchVerdict*>(partials + kRows * slots)),
        batch(reinterpret_cast<BatchVerdict*>(sequences + count)) {}
};

// The smallest and largest of a block.
__device__ __forceinline__ void block_ends(float& least, float& most, float* shared) {
  least = -block_reduce<kTokenThreads>(-least, Max{}, shared);
  __syncthreads();
  most = block_reduce<kTokenThreads>(most, Max{}, shared);
  __syncthreads();
}

template <bool kOfTokens>
__global__ void __launch_bounds__(kTokenThreads)
    tile_kernel(const MismatchArgs a, float* partials, int64_t slots) {
  __shared__ float shared[kPlainSums][kColumn], sums[kMismatchSums], warps[kTokenThreads / kWarp];
  const MismatchParams p = a.params;
  const Tokens own(a.tokens, blockIdx.x);
  float old[kPerThread], rollout[kPerThread], weights[kPerThread];
  own.load(own.kept, Tokens::Numbers{a.old_logprobs, old},
           Tokens::Numbers{a.rollout_logprobs, rollout});
  float s[kPlainSums] = {}, of_weights[kWeightSums] = {};
  const auto weight_sum = [&](int i) -> float& { return of_weights[i - kPlainSums]; };
  MismatchEnds ends = kNoEnds;
  unsigned stays = 0;
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) {
    weights[j] = 0.0f;
    if (!own.keeps(j)) continue;
    const MismatchToken<float> t = mismatch_token(old[j], rollout[j], p);
    s[kMissingOf] += t.missing;
    if (a.drop && t.missing > 0.0f) continue;
    const float rejected = outside(t.near, p.token_low, p.token_high);
    s[kTokensOf] += 1.0f;
    s[kRejectedOf] += rejected;
    s[kLogRatioOf] += t.x;
    s[kNearOf] += t.near;
    s[kOldOf] += t.old;
    s[kRolloutOf] += t.rollout;
    s[kK2Of] = fmaf(0.5f * t.near, t.near, s[kK2Of]);
    s[kK3Of] += t.ratio.em1mx;
    s[kRatioOf] += t.ratio.e;
    s[kExcessOf] += t.ratio.em1;
    s[kExcessSquareOf] = fmaf(t.ratio.em1, t.ratio.em1, s[kExcessSquareOf]);
    ends.least = fminf(t.near, ends.least), ends.most = fmaxf(t.near, ends.most);
    stays |= rejected > 0.0f ? 0u : 1u << j;
    if constexpr (kOfTokens) {
      const float w = bounded_weight(t.ratio.e, t.near, a.mode, p), off = w - 1.0f;
      weight_sum(kWeightOf) += w;
      weight_sum(kWeightSquareOf) = fmaf(w, w, weight_sum(kWeightSquareOf));
      weight_sum(kOffOf) += off;
      weight_sum(kOffSquareOf) = fmaf(off, off, weight_sum(kOffSquareOf));
      weight_sum(kLowOf) += t.near < p.count_log_low ? 1.0f : 0.0f;
      weight_sum(kHighOf) += t.near > p.count_log_high ? 1.0f : 0.0f;
      ends.least_weight = fminf(w, ends.least_weight);
      ends.most_weight = fmaxf(w, ends.most_weight);
      weights[j] = rejected > 0.0f ? 0.0f : w;
    }
  }
  const int64_t place = own.place(a.tokens);
  auto* kept = static_cast<uint8_t*>(a.kept.data) + place;
#pragma unroll
  for (int j = 0; j < kPerThread; ++j)
    if (own.has(j)) kept[Tokens::behind(j)] = stays >> j & 1;
  if (kOfTokens) own.store(static_cast<float*>(a.weights.data) + place, weights);

  column_sums(s, shared, sums);
  if (kOfTokens) column_sums(of_weights, shared, sums + kPlainSums);
  block_ends(ends.least, ends.most, warps);
  if (kOfTokens) block_ends(ends.least_weight, ends.most_weight, warps);
  if (threadIdx.x != 0) return;
  float* out = partials + blockIdx.x;
  for (int i = 0; i < kMismatchSums; ++i)
    out[i * slots] = kOfTokens || i < kPlainSums ? sums[i] : 0.0f;
  out[kLeast * slots] = ends.least;
  out[kMost * slots] = ends.most;
  out[kLeastWeight * slots] = ends.least_weight;
  out[kMostWeight * slots] = ends.most_weight;
}

// The sums of sequence s, from its slots in order.
__device__ __forceinline__ MismatchSequence sequence_of(const LossTokens& t, int64_t s,
                                                        const float* partials, int64_t slots) {
  int64_t first = 0, length = t.cols;
  if (t.offsets.given) {
    const int64_t begin = offset_at(t.offsets, s, t.cols);
    const int64_t end = offset_at(t.offsets, s + 1, t.cols);
    length = end > begin ? end - begin : 0;
    first = begin / kTokenTile + s;
  }
  const int64_t tiles = (length + kTokenTile - 1) / kTokenTile;
  if (!t.offsets.given) first = s * tiles;
  MismatchSequence q{};
  q.ends = kNoEnds;
  for (int64_t slot = first; slot < first + tiles; ++slot) {
    const float* from = partials + slot;
#pragma unroll
    for (int i = 0; i < kMismatchSums; ++i) q.sums[i] += static_cast<double>(from[i * slots]);
    merge_ends(q.ends, {from[kLeast * slots], from[kMost * slots], from[kLeastWeight * slots],
                        from[kMostWeight * slots]});
  }
  return q;
}

__global__ void __launch_bounds__(kTokenThreads)
    judge_kernel(const MismatchArgs a, const Scratch scratch, int64_t slots) {
  __shared__ double shared[kHalf][kColumn], sums[kMismatchTotals];
  __shared__ float warps[kTokenThreads / kWarp];
  const LossTokens& t = a.tokens;
  MismatchTotals total;
  total.clear();
  for (int64_t s = threadIdx.x; s < t.sequences; s += kTokenThreads) {
    const MismatchSequence q = sequence_of(t, s, scratch.partials, slots);
    scratch.sequences[s] = add_sequence(q, a.level, a.mode, a.params, total);
  }
  double half[kHalf];
#pragma unroll
  for (int part = 0; part < 2; ++part) {
#pragma unroll
    for (int i = 0; i < kHalf; ++i) half[i] = total.sums[part * kHalf + i];
    column_sums(half, shared, sums + part * kHalf);
  }
#pragma unroll
  for (int i = 0; i < kMismatchEnds; ++i) block_ends(total.least[i], total.most[i], warps);
  const float wrong = t.offsets.given && wrong_offsets<kTokenThreads>(t) ? 1.0f : 0.0f;
  const bool bad = block_reduce<kTokenThreads>(wrong, Max{}, warps) > 0.0f;
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int i = 0; i < kMismatchTotals; ++i) total.sums[i] = sums[i];
  const double factor = norm_factor(total, a.level, a.normalize);
  *a.metrics = mismatch_metrics(total, a.level, factor, bad ? __builtin_nan("") : kNoFault);
  *scratch.batch = {static_cast<float>(factor), bad};
}

__global__ void __launch_bounds__(kTokenThreads)
    finish_kernel(const MismatchArgs a, const Scratch scratch) {
  const LossTokens& t = a.tokens;
  auto* weights = static_cast<float*>(a.weights.data);
  auto* kept = static_cast<uint8_t*>(a.kept.data);
  const BatchVerdict batch = *scratch.batch;
  if (batch.bad_offsets) {
    // Sequences mean nothing: NaN for all tokens, in plain tiles.
    const int64_t first = static_cast<int64_t>(blockIdx.x) * kTokenTile;
    for (int64_t i = first + threadIdx.x; i < first + kTokenTile && i < t.cols; i += kTokenThreads)
      weights[i] = __uint_as_float(0x7fc00000u), kept[i] = 1;
    return;
  }
  const TokenTile tile = slot_tile<kTokenTile>(t, blockIdx.x);
  if (tile.count == 0) return;
  const MismatchVerdict own = scratch.sequences[tile.sequence];
  const bool of_tokens = a.level == kTokenWeight;
  if (of_tokens && !own.rejected && batch.factor == 1.0f) return;
  const float weight = own.weight / batch.factor;
  int64_t first = tile.begin + tile.k * kTokenTile;
  if (!t.offsets.given) first += tile.sequence * t.cols;
  for (int64_t i = first + threadIdx.x; i < first + tile.count; i += kTokenThreads) {
    if (own.rejected) {
      weights[i] = 0.0f, kept[i] = 0;
    } else {
      weights[i] = of_tokens ? weights[i] / batch.factor : (kept[i] ? weight : 0.0f);
    }
  }
}

}  // namespace

int64_t mismatch_weights_scratch(int64_t sequences, int64_t cols, bool packed) {
  const int64_t slots = token_slots<kTokenTile>(sequences, cols, packed);
  return kRows * slots * static_cast<int64_t>(sizeof(float)) +
         sequences * static_cast<int64_t>(sizeof(MismatchVerdict)) +
         static_cast<int64_t>(sizeof(BatchVerdict));
}

Status mismatch_weights(const MismatchArgs& a) {
  const OnDevice guard(a.exec);
  const LossTokens& t = a.tokens;
  const int64_t slots = token_slots<kTokenTile>(t.sequences, t.cols, t.offsets.given);
  const Scratch scratch(a.exec, slots, t.sequences);
  for_flag(a.level == kTokenWeight, [&](auto of_tokens) {
    RK_ENQUEUE(a.exec, slots, kTokenThreads, tile_kernel<of_tokens.value>, a, scratch.partials,
               slots);
  });
  RK_ENQUEUE(a.exec, 1, kTokenThreads, judge_kernel, a, scratch, slots);
  // Bad offsets poison the weights too.
  if (a.level != kTokenWeight || a.normalize || t.offsets.given || judges_sequences(a.params))
    RK_ENQUEUE(a.exec, slots, kTokenThreads, finish_kernel, a, scratch);
  return {};
}

}  // namespace rk::cuda
