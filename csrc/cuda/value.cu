// value_loss: every token read once, for its error, the gradient and the partial sums.
//
// Launched as policy_loss is, whose backward it shares: value and combine, before them the
// sequences' statistics where the aggregation needs each one's tokens.
#include "statistics.cuh"

namespace rk::cuda {
namespace {

// Sums of a tile, then mean and sum of squared deviations of the returns and of the errors, and
// which tile of its sequence the slot is: rows of the scratch [kRows, slots], after the statistics.
enum : int { kLoss, kClipped, kValue, kCount, kReturn, kError, kSums };
constexpr int kFirst = kStatistics, kReturnMean = kFirst + kReturn, kErrorMean = kFirst + kError,
              kReturnM2 = kFirst + kSums, kErrorM2 = kReturnM2 + 1, kTileIndex = kErrorM2 + 1,
              kRows = kTileIndex + 1;

__global__ void __launch_bounds__(kTokenThreads, 1)
    value_kernel(const ValueArgs a, float* partials, int64_t slots) {
  __shared__ float shared[kSums][kColumn], sums[kSums], off[4];
  const Tokens own(a.tokens, blockIdx.x);
  const bool clip = a.clip_range > 0.0f;
  float values[kPerThread], olds[kPerThread] = {}, targets[kPerThread];
  using N = Tokens::Numbers;
  own.load(own.kept, N{a.values, values}, N{a.returns, targets}, N{a.old_values, olds, clip});
  float weight = 1.0f;
  if (a.aggregation == kSeqMeanTokenMean)
    weight = static_cast<float>(sequence_share(partials, slots, own.tile));
  float s[kSums] = {}, slopes[kPerThread];
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) {
    // Masked: value, target and with them all terms are 0.
    const ValueTerm<float> t = value_term(values[j], olds[j], targets[j], a.clip_range, clip);
    s[kLoss] += t.loss;
    s[kClipped] += t.clipped;
    s[kValue] += values[j];
    s[kCount] += own.keeps(j) ? 1.0f : 0.0f;
    s[kReturn] += targets[j];
    s[kError] += targets[j] - values[j];
    slopes[j] = t.slope * weight;
  }
  if (a.grad_values.given)
    own.store(static_cast<float*>(a.grad_values.data) + own.place(a.tokens), slopes);
  column_sums(s, shared, sums);
  const float n = sums[kCount] > 1.0f ? sums[kCount] : 1.0f;
  const float target_mean = sums[kReturn] / n, error_mean = sums[kError] / n;
  float d[4] = {};
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) {
    const float target = own.keeps(j) ? targets[j] - target_mean : 0.0f;
    const float error = own.keeps(j) ? targets[j] - values[j] - error_mean : 0.0f;
    d[0] += target, d[1] += error;
    d[2] = fmaf(target, target, d[2]), d[3] = fmaf(error, error, d[3]);
  }
  column_sums(d, shared, off);
  if (threadIdx.x != 0) return;
  float* out = partials + blockIdx.x;
  out[(kFirst + kLoss) * slots] = sums[kLoss] * weight;
  out[(kFirst + kClipped) * slots] = sums[kClipped];
  out[(kFirst + kValue) * slots] = sums[kValue];
  out[(kFirst + kCount) * slots] = sums[kCount];
  // The deviations are from the rounded mean: their own mean corrects for that.
  const float target_off = off[0] / n, error_off = off[1] / n;
  out[kReturnMean * slots] = target_mean + target_off;
  out[kErrorMean * slots] = error_mean + error_off;
  out[kReturnM2 * slots] = off[2] - n * target_off * target_off;
  out[kErrorM2 * slots] = off[3] - n * error_off * error_off;
  out[kTileIndex * slots] = static_cast<float>(own.tile.k);
}

// Loss, metrics and 1 / divisor from the partial sums of all slots, in fp64.
__global__ void __launch_bounds__(kTokenThreads)
    combine_kernel(const ValueArgs a, const float* partials, int64_t slots) {
  __shared__ double shared[kSums][kColumn], sums[kSums], squares[2];
  const auto at = [&](int row, int64_t slot) {
    return static_cast<double>(partials[row * slots + slot]);
  };
  double s[kSums] = {};
  for (int64_t slot = threadIdx.x; slot < slots; slot += kTokenThreads) {
    const double n = at(kFirst + kCount, slot);
    s[kLoss] += at(kFirst + kLoss, slot);
    s[kClipped] += at(kFirst + kClipped, slot);
    s[kValue] += at(kFirst + kValue, slot);
    s[kCount] += n;
    s[kReturn] += n * at(kReturnMean, slot);
    s[kError] += n * at(kErrorMean, slot);
  }
  const bool counted = divides_by_sequences(a.aggregation, a.normalizer, a.divisor);
  const Batch batch = look_at_batch(a.tokens, partials + (kFirst + kCount) * slots,
                                    partials + kTileIndex * slots, slots, counted, shared, sums);
  column_sums(s, shared, sums);
  const double tokens = sums[kCount], n = tokens > 1.0 ? tokens : 1.0;
  const double target_mean = sums[kReturn] / n, error_mean = sums[kError] / n;
  // The variation within the tiles, and that of their means.
  double d[2] = {0.0, 0.0};
  for (int64_t slot = threadIdx.x; slot < slots; slot += kTokenThreads) {
    const double here = at(kFirst + kCount, slot);
    const double target = at(kReturnMean, slot) - target_mean;
    const double error = at(kErrorMean, slot) - error_mean;
    d[0] += at(kReturnM2, slot) + here * target * target;
    d[1] += at(kErrorM2, slot) + here * error * error;
  }
  column_sums(d, shared, squares);
  if (threadIdx.x != 0) return;
  const double factor =
      loss_scale(a.normalizer, a.divisor, counted ? batch.sequences : tokens, batch.bad_offsets);
  *a.scale = static_cast<float>(factor);
  const ValueTotals total{sums[kLoss] * factor, sums[kClipped], sums[kValue], target_mean,
                          squares[0],           squares[1],     tokens};
  // NaN where the factor is NaN.
  *a.metrics = value_metrics(total, factor - factor);
  *a.loss = a.metrics->loss;
}

}  // namespace

int64_t value_loss_scratch(int64_t sequences, int64_t cols, bool packed) {
  return kRows * token_slots<kTokenTile>(sequences, cols, packed) * sizeof(float);
}

Status value_loss(const ValueArgs& a) {
  const OnDevice guard(a.exec);
  const LossTokens& t = a.tokens;
  auto* partials = static_cast<float*>(a.exec.scratch);
  const int64_t slots = token_slots<kTokenTile>(t.sequences, t.cols, t.offsets.given);
  if (a.aggregation == kSeqMeanTokenMean)
    RK_ENQUEUE(a.exec, slots, kTokenThreads, (statistics_kernel<false, false>), t, Tensor{},
               Tensor{}, Tensor{}, false, partials, nullptr, slots, Tensor{}, 0.0f, 0.0f);
  RK_ENQUEUE(a.exec, slots, kTokenThreads, value_kernel, a, partials, slots);
  RK_ENQUEUE(a.exec, 1, kTokenThreads, combine_kernel, a, partials, slots);
  return {};
}

}  // namespace rk::cuda
