// What the scans of advantages share: a thread's steps, and the score of a sequence.
#pragma once
#include "../advantages_math.h"
#include "../policy_math.h"
#include "slots.cuh"

namespace rk::cuda {
namespace {

// Consecutive steps of a thread. The emulator's tiles are shorter, so that short tests cross their
// borders.
#ifdef RK_EMULATED
constexpr int kSteps = kSide;
#else
constexpr int kSteps = 2 * kSide;
#endif
constexpr int kChunk = kWarp * kSteps;

struct Larger {
  __device__ __forceinline__ int operator()(int a, int b) const { return a > b ? a : b; }
};

__device__ __forceinline__ float score_of(const GaeArgs& a, int64_t sequence) {
  return clipped_score(load_float(a.scores, sequence * a.scores.stride1),
                       static_cast<float>(a.reward_clip));
}

// A thread's steps: rewards, without the score, and values, 0 where they are masked.
struct OwnSteps : OwnTokens<kSteps, kSide> {
  // Bit j of each: step j is not masked; step j takes part (a masked one does unless "carry" skips
  // it).
  unsigned kept, exists;
  float rewards[kSteps], values[kSteps];

  // Without rewards and values.
  __device__ __forceinline__ OwnSteps(const GaeArgs& a, const TokenTile& tile, int64_t tile_begin,
                                      int own)
      : OwnTokens(tile, tile_begin, own) {
    kept = a.mask.given ? flags(a.mask, inside) : inside;
    exists = a.carry ? kept : inside;
  }
  __device__ __forceinline__ void load_rewards(const GaeArgs& a, bool valued) {
    const bool shaped = a.ref_logprobs.given && a.kl_coef != 0.0;
#pragma unroll
    for (int j = 0; j < kSteps; ++j) rewards[j] = values[j] = 0.0f;
    if (!a.scores.given) {
      load(kept, Numbers{a.rewards, rewards}, Numbers{a.values, values, valued});
      return;
    }
    float ref[kSteps] = {};
    load(kept, Numbers{a.logprobs, rewards, shaped}, Numbers{a.ref_logprobs, ref, shaped},
         Numbers{a.values, values, valued});
    if (!shaped) return;
#pragma unroll
    for (int j = 0; j < kSteps; ++j) {
      const float kl = kl_penalty_term(rewards[j] - ref[j], a.kl_estimator).value;
      rewards[j] = kept >> j & 1 ? static_cast<float>(-a.kl_coef * kl) : 0.0f;
    }
  }
  // The last unmasked step, -1 if there is none.
  __device__ __forceinline__ int last_kept() const {
    int last = -1;
#pragma unroll
    for (int j = 0; j < kSteps; ++j)
      if (kept >> j & 1) last = j;
    return last;
  }
  __device__ __forceinline__ void add_score(int step, float score) {
#pragma unroll
    for (int j = 0; j < kSteps; ++j)
      if (j == step) rewards[j] += score;
  }
  // The reward beyond the value of step j.
  __device__ __forceinline__ double surplus(int j) const {
    return static_cast<double>(rewards[j]) - values[j];
  }
};

}  // namespace
}  // namespace rk::cuda
