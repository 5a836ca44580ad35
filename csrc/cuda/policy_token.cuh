// A token of a policy loss: its terms, and their slopes in its log-probability.
#pragma once
#include "common.cuh"

namespace rk::cuda {
namespace {

// What a token reads; `ref` and `rollout` where they are given.
struct TokenNumbers {
  float logprob, old, advantage, ref, rollout;
  bool ref_given, rollout_given;
};

// `weight` is the correction's, which is a metric where the loss does not use it. kl and log_ref
// only where a reference is given.
struct PolicyToken {
  PolicyTerm<float> term;
  Ratio<float> ratio;
  KlTerm<float> kl;
  float log_ratio, old_k3, log_ref, weight;
  GateTerm<float> gate;
};

// An unmasked token. sequence, sequence_weight, distance: the ratio and the weight of its sequence,
// and that of policy_gate, for a loss that takes those. kFull: the loss may have what
// has_further_options.
template <int kObjective, bool kFull>
__device__ __forceinline__ PolicyToken policy_token(const TokenNumbers& x, const PolicyConfig& c,
                                                    const Ratio<float>& sequence,
                                                    float sequence_weight, float distance = 0.0f) {
  const bool token_ratio = c.ratio_level == kTokenRatio;
  PolicyToken t;
  t.log_ratio = x.logprob - x.old;
  const Ratio<float> own = policy_ratio(t.log_ratio, c);
  t.old_k3 = own.em1mx;
  t.ratio = token_ratio ? own : sequence;
  t.weight = 1.0f;
  float w = 1.0f;
  if (x.rollout_given) {
    t.weight = corrects_by_sequence(c) ? sequence_weight
                                       : correction_weight(log_weight(x.old, x.rollout), c);
    if (c.correction_level != kNoCorrection) w = t.weight;
  }
  float objective_logprob = x.logprob;
  t.gate = {0.0f, 0.0f};
  if constexpr (kFull) {
    if (c.gate != kNoGate)
      t.gate = drop_token(objective_logprob, w, x.old, x.rollout, x.rollout_given, x.advantage,
                          distance, c);
  }
  t.term = policy_objective<kObjective>(t.ratio, objective_logprob, x.advantage, w, c);
  if (x.ref_given) {
    t.log_ref = x.logprob - x.ref;
    t.kl = policy_kl(t.log_ref, c);
    // Without a coefficient it is only a metric: 0 * NaN would be NaN.
    const bool weighs = c.kl_coef != 0.0f;
    if constexpr (kFull) {
      const KlWeightSlopes<float> s = weigh_kl(t.kl, t.ratio.r, c);
      if (weighs) {
        t.term.ratio = fmaf(c.kl_coef, s.ratio, t.term.ratio);
        t.term.direct = fmaf(c.kl_coef, s.direct, t.term.direct);
      }
    } else if (c.kl_weight == kRatioKlWeight) {
      t.kl.value *= t.ratio.r;
      t.kl.slope *= t.ratio.r;
      if (weighs) t.term.ratio = fmaf(c.kl_coef, t.kl.value, t.term.ratio);
    }
    if (weighs) t.term.direct = fmaf(c.kl_coef, t.kl.slope, t.term.direct);
  }
  if (token_ratio) t.term.ratio = inside_clamp(t.log_ratio, t.term.ratio, c);
  return t;
}

// f(objective) for the objective of a config as a template parameter.
template <class F>
__host__ __device__ __forceinline__ void for_objective(int32_t objective, const F& f) {
  switch (objective) {
    case kPenalty: return f(std::integral_constant<int, kPenalty>{});
    case kReinforce: return f(std::integral_constant<int, kReinforce>{});
    case kCispo: return f(std::integral_constant<int, kCispo>{});
    case kSapo: return f(std::integral_constant<int, kSapo>{});
    default: return f(std::integral_constant<int, kClip>{});
  }
}

}  // namespace
}  // namespace rk::cuda
