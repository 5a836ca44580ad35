// policy_loss: every token read once, for its terms, their gradient and the partial sums.
//
// The gradient comes without its common factor 1 / divisor, which is known only after the last
// token: loss_backward multiplies by it as it multiplies by the upstream gradient. Launches:
// statistics, where a sequence's sums are needed; policy, the sweep; pooled, which adds the slope
// of a sequence's ratio to the gradient of its tokens; combine, of one block, which adds the
// partial sums in order.
#include "policy_token.cuh"
#include "statistics.cuh"

namespace rk::cuda {
namespace {

// Columns of the sums, in the order of PolicySums; then the slope of the sequence's ratio.
enum : int {
  kPg,
  kKl,
  kBonus,
  kLow,
  kHigh,
  kDual,
  kR,
  kRr,
  kX,
  kOldK3,
  kXRef,
  kRefK3,
  kEntropy,
  kW,
  kCount,
  kSlope,
  kSums
};
// Rows of the scratch [kRows, slots]: statistics, which tile of its sequence the slot is, a gate's
// distance, sums, the extremes of the ratio, and sums of a gate.
constexpr int kTileIndex = kStatistics, kDistance = kTileIndex + 1, kFirst = kDistance + 1,
              kRMin = kFirst + kSums, kRMax = kRMin + 1, kGates = kRMax + 1, kRows = kGates + 2;

struct Smaller {
  __device__ __forceinline__ float operator()(float a, float b) const { return a < b ? a : b; }
};
struct Larger {
  __device__ __forceinline__ float operator()(float a, float b) const { return a > b ? a : b; }
};

// Extremes of a warp to its place in `shared`, and, after a barrier, those of the block from it,
// for thread 0.
using WarpExtremes = float[2][kTokenThreads / kWarp];
__device__ __forceinline__ void share_extremes(float& r_min, float& r_max, WarpExtremes& shared) {
  r_min = warp_reduce(r_min, Smaller{});
  r_max = warp_reduce(r_max, Larger{});
  if (threadIdx.x % kWarp == 0) {
    shared[0][threadIdx.x / kWarp] = r_min;
    shared[1][threadIdx.x / kWarp] = r_max;
  }
}
__device__ __forceinline__ void block_extremes(const WarpExtremes& shared, float& r_min,
                                               float& r_max) {
  for (int w = 1; w < kTokenThreads / kWarp; ++w) {
    r_min = Smaller{}(r_min, shared[0][w]);
    r_max = Larger{}(r_max, shared[1][w]);
  }
}

// The caller's weight of a token; NaN if it is none.
__device__ __forceinline__ float good_weight(float x) {
  return x >= 0.0f && x < __builtin_inff() ? x : __builtin_nanf("");
}

// kFull: the tokens have weights, or the loss what has_further_options, or a geometric correction.
template <int kObjective, bool kFull>
__global__ void __launch_bounds__(kTokenThreads, 2)
    policy_kernel(const PolicyArgs a, float* partials, int64_t slots) {
  __shared__ float shared[kSums][kColumn], sums[kSums];
  __shared__ WarpExtremes extremes;
  const PolicyConfig& c = a.config;
  const Tokens own(a.tokens, blockIdx.x);
  const bool token_ratio = c.ratio_level == kTokenRatio;
  float logprobs[kPerThread], olds[kPerThread], advantages[kPerThread], refs[kPerThread],
      rollouts[kPerThread], entropies[kPerThread];
  using N = Tokens::Numbers;
  const auto load = [&](const auto&... more) {
    own.load(own.kept, N{a.logprobs, logprobs}, N{a.old_logprobs, olds},
             N{a.advantages, advantages}, N{a.ref_logprobs, refs, a.ref_logprobs.given},
             N{a.rollout_logprobs, rollouts, a.rollout_logprobs.given},
             N{a.entropy, entropies, a.entropy.given}, more...);
  };
  float weights[kPerThread];
  if constexpr (kFull)
    load(N{a.weights, weights, a.weights.given});
  else
    load();

  // What a token takes from its sequence.
  Ratio<float> sequence{1.0f, 0.0f, 0.0f, 0.0f};
  float weight = 1.0f, sequence_w = 1.0f;
  bool learns = true;
  if (!token_ratio || c.aggregation == kSeqMeanTokenMean) {
    const double share = sequence_share(partials, slots, own.tile);
    if (c.aggregation == kSeqMeanTokenMean) weight = static_cast<float>(share);
    if (!token_ratio) {
      const float mean =
          static_cast<float>(sequence_total(partials + kLogRatio * slots, own.tile) * share);
      sequence = policy_ratio(mean, c);
      learns = inside_clamp(mean, 1.0f, c) != 0.0f;
    }
  }
  if (corrects_by_sequence(c) && a.rollout_logprobs.given) {
    double total = sequence_total(partials + kLogWeight * slots, own.tile);
    if constexpr (kFull) {
      if (c.correction_level == kGeometricCorrection)
        total *= sequence_share(partials, slots, own.tile);
    }
    sequence_w = correction_weight(static_cast<float>(total), c);
  }

  float distance = 0.0f;
  if constexpr (kFull) {
    if (c.gate == kOpsmGate)
      distance = static_cast<float>(sequence_total(partials + kDistance * slots, own.tile) *
                                    sequence_share(partials, slots, own.tile));
  }

  float s[kSums] = {}, gates[2] = {};
  float r_min = 3.0e38f, r_max = -3.0e38f, gradients[kPerThread], bonuses[kPerThread];
#pragma unroll
  for (int j = 0; j < kPerThread; ++j) {
    float g = 0.0f, h = 0.0f;
    if (own.keeps(j)) {
      const PolicyToken x = policy_token<kObjective, kFull>(
          {logprobs[j], olds[j], advantages[j], refs[j], rollouts[j], a.ref_logprobs.given,
           a.rollout_logprobs.given},
          c, sequence, sequence_w, distance);
      s[kW] += x.weight;
      const PolicyTerm<float>& t = x.term;
      const float own_weight = kFull && a.weights.given ? good_weight(weights[j]) : 1.0f;
      const auto weighed = [&](float y) { return kFull ? y * own_weight : y; };
      if constexpr (kFull) {
        gates[0] += x.gate.low;
        gates[1] += x.gate.high;
        if (kObjective == kPenalty && clips_tokens(c)) {
          const TokenClip<float> cut = token_clip(x.log_ratio, advantages[j], c);
          s[kLow] += cut.low, s[kHigh] += cut.high;
        }
      }
      if (a.ref_logprobs.given) {
        s[kKl] += weighed(x.kl.value);
        s[kXRef] += x.log_ref;
        s[kRefK3] += x.kl.k3;
      }
      s[kPg] += weighed(t.loss);
      s[kLow] += t.low;
      s[kHigh] += t.high;
      s[kDual] += t.dual;
      if (a.entropy.given) {
        s[kEntropy] += entropies[j];
        if constexpr (kFull) s[kBonus] += weighed(entropies[j]);
      }
      const float r = x.ratio.r;
      s[kR] += r;
      s[kRr] = fmaf(r, r, s[kRr]);
      s[kX] += x.log_ratio;
      s[kOldK3] += x.old_k3;
      s[kCount] += 1.0f;
      r_min = Smaller{}(r_min, r);
      r_max = Larger{}(r_max, r);
      s[kSlope] += weighed(t.ratio);
      g = t.direct;
      if (token_ratio || (c.ratio_level == kSequenceTokenRatio && learns)) g += t.ratio;
      g = weighed(g * weight);
      h = weighed(-c.entropy_coef * weight);
    }
    gradients[j] = g;
    bonuses[j] = h;
  }
  const int64_t place = own.place(a.tokens);
  if (a.grad_logprobs.given)
    own.store(static_cast<float*>(a.grad_logprobs.data) + place, gradients);
  if (a.grad_entropy.given) own.store(static_cast<float*>(a.grad_entropy.data) + place, bonuses);
  if constexpr (!kFull) s[kBonus] = s[kEntropy];
  // These may step over a NaN; the sum of r does not.
  share_extremes(r_min, r_max, extremes);
  column_sums(s, shared, sums);
  float* out = partials + blockIdx.x;
  if (threadIdx.x < kSums)
    out[(kFirst + threadIdx.x) * slots] = sums[threadIdx.x] * (threadIdx.x < kLow ? weight : 1.0f);
  if (threadIdx.x == 0) {
    block_extremes(extremes, r_min, r_max);
    out[kRMin * slots] = r_min;
    out[kRMax * slots] = r_max;
    out[kTileIndex * slots] = static_cast<float>(own.tile.k);
  }
  if constexpr (kFull) {
    if (c.gate == kNoGate) return;
    __shared__ float gate_sums[2];
    column_sums(gates, shared, gate_sums);
    if (threadIdx.x < 2) out[(kGates + threadIdx.x) * slots] = gate_sums[threadIdx.x];
  }
}

// Adds to each unmasked token its share of the slope of its sequence's ratio; kClips: but to those
// that the ratio has clipped.
template <bool kClips>
__global__ void __launch_bounds__(kTokenThreads)
    pooled_kernel(const PolicyArgs a, const float* partials, int64_t slots) {
  const Tokens own(a.tokens, blockIdx.x);
  const double each = sequence_share(partials, slots, own.tile);
  const double mean = sequence_total(partials + kLogRatio * slots, own.tile) * each;
  double share = sequence_total(partials + (kFirst + kSlope) * slots, own.tile) * each;
  if (a.config.aggregation == kSeqMeanTokenMean) share *= each;
  const float slope = inside_clamp(static_cast<float>(mean), static_cast<float>(share), a.config);
  float* grad = static_cast<float*>(a.grad_logprobs.data) + own.place(a.tokens);
  float sums[kPerThread];
  own.fetch(grad, sums);
  if constexpr (kClips) {
    float x[kPerThread], y[kPerThread], gains[kPerThread];
    own.load(own.kept, Tokens::Numbers{a.logprobs, x}, Tokens::Numbers{a.old_logprobs, y},
             Tokens::Numbers{a.advantages, gains});
#pragma unroll
    for (int j = 0; j < kPerThread; ++j)
      if (own.keeps(j)) sums[j] += unclipped_share(x[j] - y[j], gains[j], slope, a.config);
  } else {
#pragma unroll
    for (int j = 0; j < kPerThread; ++j)
      if (own.keeps(j)) sums[j] += slope;
  }
  own.store(grad, sums);
}

// Loss, metrics and 1 / divisor from the partial sums of all slots, in fp64.
__global__ void __launch_bounds__(kTokenThreads)
    combine_kernel(const PolicyArgs a, const float* partials, int64_t slots) {
  __shared__ double shared[kSums][kColumn], sums[kSums];
  __shared__ WarpExtremes extremes;
  double s[kSums] = {};
  float r_min = 3.0e38f, r_max = -3.0e38f;
  for (int64_t slot = threadIdx.x; slot < slots; slot += kTokenThreads) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) s[i] += partials[(kFirst + i) * slots + slot];
    r_min = Smaller{}(r_min, partials[kRMin * slots + slot]);
    r_max = Larger{}(r_max, partials[kRMax * slots + slot]);
  }
  share_extremes(r_min, r_max, extremes);
  const bool counted = divides_by_sequences(a.config.aggregation, a.normalizer, a.divisor);
  const Batch batch = look_at_batch(a.tokens, partials + (kFirst + kCount) * slots,
                                    partials + kTileIndex * slots, slots, counted, shared, sums);
  column_sums(s, shared, sums);
  double gate_sums[2] = {};
  if (a.config.gate != kNoGate) {
    for (int64_t slot = threadIdx.x; slot < slots; slot += kTokenThreads)
      for (int i = 0; i < 2; ++i) gate_sums[i] += partials[(kGates + i) * slots + slot];
    __shared__ double gates[2];
    column_sums(gate_sums, shared, gates);
    for (int i = 0; i < 2; ++i) gate_sums[i] = gates[i];
  }
  if (threadIdx.x != 0) return;
  block_extremes(extremes, r_min, r_max);
  const double tokens = sums[kCount];
  const double factor =
      loss_scale(a.normalizer, a.divisor, counted ? batch.sequences : tokens, batch.bad_offsets);
  *a.scale = static_cast<float>(factor);
  const PolicySums total{sums[kPg] * factor,
                         sums[kKl] * factor,
                         sums[kBonus] * factor,
                         sums[kLow],
                         sums[kHigh],
                         sums[kDual],
                         sums[kR],
                         sums[kRr],
                         sums[kX],
                         sums[kOldK3],
                         sums[kXRef],
                         sums[kRefK3],
                         sums[kEntropy],
                         sums[kW],
                         tokens,
                         gate_sums[0],
                         gate_sums[1],
                         r_min,
                         r_max};
  // NaN where the factor is NaN.
  *a.metrics = policy_metrics(a.config, total, factor - factor);
  *a.loss = a.metrics->loss;
}

// 16-byte stores of a thread of the backward.
constexpr int kBackwardSlots = 2;
template <class E>
constexpr int kBackwardTile = kTokenThreads * kBackwardSlots * kWidth<E>;

// gradient * (scale * upstream) of up to two gradients, of E or, element by element, of any dtype.
template <class E>
__global__ void __launch_bounds__(kTokenThreads) backward_kernel(const LossBackwardArgs a) {
  const float factor = *a.scale * load_float(a.upstream, 0);
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kBackwardTile<E>;
  const int64_t left = a.count - begin;
  const auto place = [](int k) {
    return (k * kTokenThreads + static_cast<int>(threadIdx.x)) * kWidth<E>;
  };
  const auto scaled = [&](const float* from, const Tensor& to) {
    from += begin;
    auto* out = static_cast<typename E::Storage*>(to.data) + begin;
    if (left >= kBackwardTile<E> && to.dtype == E::kDType && misaligned(from) == 0 &&
        misaligned(out) == 0) {
      Pack<F32> in[kBackwardSlots][kWidth<E> / 4];
#pragma unroll
      for (int k = 0; k < kBackwardSlots; ++k)
#pragma unroll
        for (int i = 0; i < kWidth<E> / 4; ++i) in[k][i].load(from + place(k) + 4 * i);
#pragma unroll
      for (int k = 0; k < kBackwardSlots; ++k) {
        Pack<E> pack;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float x[kPerWord<E>];
#pragma unroll
          for (int w = 0; w < kPerWord<E>; ++w) {
            const int j = i * kPerWord<E> + w;
            x[w] = in[k][j / 4].get(j % 4) * factor;
          }
          pack.words[i] = E::word(x);
        }
        pack.store(out + place(k));
      }
      return;
    }
#pragma unroll 1
    for (int j = 0; j < kBackwardTile<E> / kTokenThreads; ++j) {
      const int i = j * kTokenThreads + static_cast<int>(threadIdx.x);
      if (i < left) store_float(to, begin + i, from[i] * factor);
    }
  };
  scaled(a.first, a.first_out);
  if (a.second_out.given) scaled(a.second, a.second_out);
}

// Every value once, or none where the factor is 1: so few blocks that this takes no time.
constexpr int kScaleBlocks = 2048, kScaleLoads = 4;

template <class E>
__global__ void __launch_bounds__(kTokenThreads) scale_kernel(const ScaleArgs a) {
  const float factor = load_float(a.factor, 0);
  if (factor == 1.0f) return;
  auto* x = static_cast<typename E::Storage*>(a.values.data);
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kTokenThreads + threadIdx.x;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kTokenThreads;
  const int64_t packs = misaligned(x) == 0 ? a.count / kWidth<E> : 0;
  for (int64_t at = first; at < packs; at += kScaleLoads * step) {
    Pack<E> values[kScaleLoads];
#pragma unroll
    for (int k = 0; k < kScaleLoads; ++k)
      if (at + k * step < packs) values[k].load(x + (at + k * step) * kWidth<E>);
#pragma unroll
    for (int k = 0; k < kScaleLoads; ++k) {
      if (at + k * step >= packs) break;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float scaled[kPerWord<E>];
#pragma unroll
        for (int w = 0; w < kPerWord<E>; ++w)
          scaled[w] = values[k].get(i * kPerWord<E> + w) * factor;
        values[k].words[i] = E::word(scaled);
      }
      values[k].store(x + (at + k * step) * kWidth<E>);
    }
  }
  for (int64_t at = packs * kWidth<E> + first; at < a.count; at += step)
    x[at] = E::put(E::get(x[at]) * factor);
}

}  // namespace

int64_t policy_loss_scratch(int64_t sequences, int64_t cols, bool packed) {
  return kRows * token_slots<kTokenTile>(sequences, cols, packed) * sizeof(float);
}

Status policy_loss(const PolicyArgs& a) {
  const OnDevice guard(a.exec);
  const LossTokens& t = a.tokens;
  const PolicyConfig& c = a.config;
  auto* partials = static_cast<float*>(a.exec.scratch);
  const int64_t slots = token_slots<kTokenTile>(t.sequences, t.cols, t.offsets.given);
  float* distances = partials + kDistance * slots;
  const bool by_sequence = c.ratio_level != kTokenRatio;
  const bool by_weight = corrects_by_sequence(c);
  const bool full =
      a.weights.given || has_further_options(c) || c.correction_level == kGeometricCorrection;
  const bool by_distance = c.gate == kOpsmGate;
  const bool against_rollout = gates_against_rollout(c, a.rollout_logprobs.given);
  if (by_sequence || by_weight || by_distance || c.aggregation == kSeqMeanTokenMean)
    for_flag(by_distance, [&](auto gated) {
      for_flag(clips_tokens(c), [&](auto clips) {
        RK_ENQUEUE(a.exec, slots, kTokenThreads, (statistics_kernel<gated.value, clips.value>), t,
                   by_sequence || by_distance ? a.logprobs : Tensor{}, a.old_logprobs,
                   by_weight || (by_distance && against_rollout) ? a.rollout_logprobs : Tensor{},
                   against_rollout, partials, distances, slots, a.advantages, c.clip_low,
                   c.clip_high);
      });
    });
  for_objective(c.objective, [&](auto objective) {
    for_flag(full, [&](auto all) {
      RK_ENQUEUE(a.exec, slots, kTokenThreads, (policy_kernel<objective.value, all.value>), a,
                 partials, slots);
    });
  });
  if (pools_slopes(c) && a.grad_logprobs.given)
    for_flag(clips_tokens(c), [&](auto clips) {
      RK_ENQUEUE(a.exec, slots, kTokenThreads, pooled_kernel<clips.value>, a, partials, slots);
    });
  RK_ENQUEUE(a.exec, 1, kTokenThreads, combine_kernel, a, partials, slots);
  return {};
}

Status loss_backward(const LossBackwardArgs& a) {
  const OnDevice guard(a.exec);
  for_dtype(a.first_out.dtype, [&](auto element) {
    using E = decltype(element);
    RK_ENQUEUE(a.exec, ceil_div(a.count, kBackwardTile<E>), kTokenThreads, backward_kernel<E>, a);
  });
  return {};
}

Status scale(const ScaleArgs& a) {
  const OnDevice guard(a.exec);
  for_dtype(a.values.dtype, [&](auto element) {
    using E = decltype(element);
    const int64_t blocks = ceil_div(a.count, kWidth<E> * kTokenThreads);
    RK_ENQUEUE(a.exec, blocks < kScaleBlocks ? blocks : kScaleBlocks, kTokenThreads,
               scale_kernel<E>, a);
  });
  return {};
}

}  // namespace rk::cuda
