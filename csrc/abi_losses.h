// Arguments of the policy and value losses and of mismatch_weights.
// Enums have the names and the order of tuples in rlhf_kernels/config/enums.py.
#pragma once
#include "abi_rows.h"

namespace rk {

// Options of the policy loss. PolicyCodes and PolicyParams have the names and the order of the
// named tuples in rlhf_kernels/config/policy_codes.py. An absent bound is +-3e38, never infinite.
enum Objective : int32_t { kClip = 0, kPenalty = 1, kReinforce = 2, kCispo = 3, kSapo = 4 };
enum RatioLevel : int32_t {
  kTokenRatio = 0,
  kSequenceRatio = 1,
  kSequenceTokenRatio = 2,
  kClippedSequenceRatio = 3
};
enum CorrectionLevel : int32_t {
  kNoCorrection = 0,
  kTokenCorrection = 1,
  kSequenceCorrection = 2,
  kGeometricCorrection = 3
};
enum CorrectionMode : int32_t { kTruncate = 0, kMask = 1 };
enum Aggregation : int32_t {
  kTokenMean = 0,
  kSeqMeanTokenMean = 1,
  kSeqMeanTokenSum = 2,
  kConstant = 3
};
enum KlWeight : int32_t {
  kNoKlWeight = 0,
  kRatioKlWeight = 1,
  kDetachedRatioKlWeight = 2,
  kOneKlWeight = 3
};
enum Gate : int32_t { kNoGate = 0, kTvGate = 1, kBinaryKlGate = 2, kRatioGate = 3, kOpsmGate = 4 };
enum GateAnchor : int32_t { kOldAnchor = 0, kRolloutAnchor = 1 };
struct PolicyCodes {
  int32_t objective, ratio_level, kl_estimator, kl_straight_through, kl_weight;
  int32_t correction_level, correction_mode, aggregation;
  int32_t gate, gate_against, gate_two_sided, kl_weight_capped;
};
struct PolicyParams {
  float clip_low, clip_high, dual_clip, delta, log_ratio_low, log_ratio_high;
  float penalty_coef, sapo_tau_pos, sapo_tau_neg;
  float kl_coef, kl_input_low, kl_input_high, kl_value_clamp, entropy_coef;
  float correction_low, correction_high;
  float gate_low, gate_high, kl_weight_max;
};
struct PolicyConfig : PolicyCodes, PolicyParams {};

// The tokens of a loss: padded [sequences, cols], or, with `offsets` [sequences + 1], `cols` packed
// tokens along stride1.
struct LossTokens {
  int64_t sequences, cols;
  Tensor offsets, mask;
};

// The metrics of a loss, with the names and the order of rlhf_kernels/config/metrics.py.
struct PolicyMetrics {
  float loss, pg_loss, kl_loss, entropy_loss;
  float clip_frac_low, clip_frac_high, dual_clip_frac;
  float gate_frac_low, gate_frac_high;
  float ratio_mean, ratio_min, ratio_max;
  float k1_old, k3_old, k1_ref, k3_ref;
  float entropy, ess, correction_mean, tokens;
};
struct ValueMetrics {
  float loss, clip_frac, value_mean, return_mean, explained_variance, tokens;
};

// policy_loss with its gradient. A tensor with one value per sequence has stride1 = 0. `weights`
// scale the terms of the tokens; on a GPU a bad one makes them NaN. `divisor` 0 means the count
// that the aggregation implies. On a GPU the divisor may be read from `normalizer`;
// the gradients, fp32 and contiguous, are unscaled, and the backward pass multiplies them by
// `scale` = 1 / divisor. On the CPU `normalizer` and `scale` are null.
struct PolicyArgs {
  LossTokens tokens;
  Tensor logprobs, old_logprobs, advantages, ref_logprobs, rollout_logprobs, entropy;
  double divisor;
  Tensor normalizer;
  PolicyConfig config;
  float* loss;
  PolicyMetrics* metrics;
  float* scale;
  Tensor grad_logprobs, grad_entropy;
  Tensor weights;
  Exec exec;
};

// Rows of fp32 logits [tokens, vocab] of a policy loss whose tokens stand alone: token ratio, no
// correction by sequences. Writes log-probabilities and entropies (fp32), and the gradient in the
// logits of the sum of the tokens' losses times `weights` (fp32); fp32 or bfloat16, and
// `grad_logits` may share the memory of `logits`. Without `old_logprobs` each token's own. A label
// of ignore_index masks the token. GPU only.
struct PolicyRowsArgs {
  int64_t tokens, vocab;
  Tensor logits, labels, temperatures;
  RowOptions options;
  Tensor old_logprobs, advantages, ref_logprobs, rollout_logprobs, weights;
  PolicyConfig config;
  Tensor logprobs, entropy;
  Tensor grad_logits;
  Exec exec;
};

// Writes first, and second if second_out is given (fp32 [count]), times scale and upstream. GPU
// only.
struct LossBackwardArgs {
  int64_t count;
  const float *first, *second, *scale;
  Tensor upstream, first_out, second_out;
  Exec exec;
};

// Multiplies `values` (contiguous [count]) in place by `factor`, a number on the device. GPU only.
struct ScaleArgs {
  int64_t count;
  Tensor values, factor;
  Exec exec;
};

// value_loss with its gradient, fields as in PolicyArgs. `clip_range` 0 means no clipping.
struct ValueArgs {
  LossTokens tokens;
  Tensor values, old_values, returns;
  double divisor;
  Tensor normalizer;
  int32_t aggregation;
  float clip_range;
  float* loss;
  ValueMetrics* metrics;
  float* scale;
  Tensor grad_values;
  Exec exec;
};

// Of what a weight of mismatch_weights is; kNoWeight: all are 1. Any but a token's is a sequence's.
enum MismatchLevel : int32_t {
  kNoWeight = 0,
  kTokenWeight = 1,
  kSequenceWeight = 2,
  kGeometricWeight = 3,
  kSequenceMeanWeight = 4,
  kSequenceMaxWeight = 5
};

// With the names and the order of MismatchParams in rlhf_kernels/config/mismatch.py. An absent
// bound is +-3e38, never infinite.
struct MismatchParams {
  float clamp, low, high, log_low, log_high;
  float count_low, count_high, count_log_low, count_log_high;
  float token_low, token_high, extreme_low, extreme_high;
  float sum_low, sum_high, mean_low, mean_high;
  float sum_k2, mean_k2, sum_k3, mean_k3;
};

struct MismatchMetrics {
  float weight_mean, weight_std, weight_min, weight_max, ess;
  float fraction_low, fraction_high, raw_min, raw_max;
  float seq_weight_mean, seq_weight_std, seq_weight_min, seq_weight_max;
  float seq_max_deviation, seq_fraction_low, seq_fraction_high, norm_factor;
  float kl, k3_kl, chi2_token, chi2_seq;
  float training_ppl, training_log_ppl, rollout_ppl, rollout_log_ppl;
  float log_ppl_diff, log_ppl_abs_diff, log_ppl_diff_min, log_ppl_diff_max, ppl_ratio;
  float rejected, rejected_sequences, missing, sequences, tokens;
};

// mismatch_weights. `mode` is a CorrectionMode. `drop`: a token without a ratio leaves the mask,
// else its ratio is 1. `weights` and `kept` are contiguous.
struct MismatchArgs {
  LossTokens tokens;
  Tensor old_logprobs, rollout_logprobs;
  int32_t level, mode;
  bool drop, normalize;
  MismatchParams params;
  Tensor weights, kept;
  MismatchMetrics* metrics;
  Exec exec;
};

}  // namespace rk
