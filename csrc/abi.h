// The contract between Python and native code: dtype codes, strided views and argument structs.
// This header includes neither torch nor Python, so one build serves every torch version. The CPU
// and CUDA backends take the same structs. Sizes and strides are in elements. The flag `given` says
// whether a tensor was passed; its address does not, because an empty tensor has a null address.
#pragma once
#include <stdint.h>

// A function of host and device. RK_HD_INLINE: always inlined, so that a compiler contracts
// products and sums of its callers as if its body stood there.
#if defined(__CUDACC__)
#define RK_HD __host__ __device__ __forceinline__
#define RK_HD_INLINE RK_HD
#else
#define RK_HD inline
#define RK_HD_INLINE inline __attribute__((always_inline))
#endif

namespace rk {

enum DType : int32_t {
  kFloat32 = 0,
  kBFloat16 = 1,
  kFloat16 = 2,
  kInt64 = 3,
  kInt32 = 4,
  kBool = 5,
  kFloat64 = 6
};

// A tensor of tokens [rows, cols]. Logits have the vocabulary as a third dimension of stride 1.
struct Tensor {
  void* data = nullptr;
  int32_t dtype = kFloat32;
  int64_t stride0 = 0;
  int64_t stride1 = 0;
  bool given = false;
};

// Where a call runs. CPU: `threads`. CUDA: `stream` (a cudaStream_t) of `device`, and `scratch`,
// whose size in bytes the operation's <name>_scratch function returns.
struct Exec {
  int32_t threads = 1;
  int32_t device = 0;
  void* stream = nullptr;
  void* scratch = nullptr;
};

// Errors that a kernel found in the data. `position` is the flat row-major index of the first one.
enum StatusCode : int32_t {
  kOk = 0,
  kLabelOutOfRange = 1,
  kBadTemperature = 2,
  kBadOffsets = 3,
  kOutOfMemory = 4,
  // For a support, `position` is the index of the entry in indptr or in indices.
  kBadIndptr = 5,
  kIndexOutOfRange = 6,
  kIndexRepeated = 7
};
struct Status {
  int32_t code = kOk;
  int64_t position = -1;
};

// Sentinel: the label is owned by another vocabulary shard. The log-probability is NaN; statistics
// and gradient are computed as usual. Valid only with kShardIgnored as ignore_index.
constexpr int64_t kLabelElsewhere = INT64_MIN;
constexpr int64_t kShardIgnored = INT64_MIN + 1;

// Options of rows of logits; see core/row_options.py. softcap 0 means none. Each backend applies
// the options to a logit in one place: cuda/rows.cuh, cpu/rows.h. This map of logits is monotone
// (it never decreases).
struct RowOptions {
  double temperature, softcap;
  int64_t ignore_index;

  // Whether the options change a logit before the temperature divides it.
  RK_HD bool change_logits() const { return softcap > 0.0; }
};

// token_logprobs. `stats` is fp32 [rows, cols, 3], contiguous: row maximum m (NaN for a row of only
// NaN and -inf), s = sum exp((x-m)/T), and with `entropy` the mean of (x-m)/T, which equals
// log s - entropy; on the CPU it may be null, where no gradient follows. `temperatures` (fp32)
// overrides the temperature of the options. `collision` is the sum of the squared probabilities,
// `argmax` (int64) the first of the largest logits or, if there is one, of the NaN; -1 where
// ignored.
struct LogprobsArgs {
  int64_t rows, cols, vocab;
  Tensor logits, labels, temperatures;
  RowOptions options;
  Tensor logprobs, entropy;
  float* stats;
  Tensor collision, argmax;
  Exec exec;
};

// The gradient of token_logprobs. `grad_logits` may share the memory of `logits`. An upstream
// gradient that is not given counts as zero. What only the rarer ones need stands last: a GPU reads
// neighbouring arguments of a kernel together, so that their places decide how many instructions
// the common gradient takes.
struct LogprobsBackwardArgs {
  int64_t rows, cols, vocab;
  Tensor logits, labels, temperatures;
  RowOptions options;
  const float* stats;
  Tensor grad_logprobs, grad_entropy, grad_logits;
  // `collision` is the result of the forward pass, where it has a gradient.
  Tensor grad_lse, grad_collision, collision;
  Exec exec;
};

// token_logprobs with `count` labels per token, [rows, cols, count] of unit stride over count.
// `rows` is the call for the tokens: its label is kLabelElsewhere, or kShardIgnored where all
// labels of a token have `ignore_index`, or else a bad one; what becomes of its `logprobs` means
// nothing. `of_labels` is fp32, contiguous. Each has the bits that it has as the only label.
struct ManyLabelsArgs {
  LogprobsArgs rows;
  int64_t count, ignore_index;
  Tensor labels;
  float* of_labels;
};

// The gradient of the above. In `rows`, `grad_logprobs` is the sum of a token's upstream gradients;
// `grad_of_labels` are these, fp32 as `labels` lie. `work` is scratch [rows, cols, count].
struct ManyLabelsBackwardArgs {
  LogprobsBackwardArgs rows;
  int64_t count, ignore_index;
  Tensor labels, grad_of_labels;
  double* work;
};

// The kept token ids of each token, as a sparse matrix in CSR form: token n kept the half-open
// range [indptr[n], indptr[n + 1]) of indices. `entries` is the length of indices.
struct Support {
  int64_t entries;
  Tensor indptr, indices;
};

// token_logprobs over each token's support. Without `weight`, `logits` is [rows, cols, vocab]. With
// `weight` [vocab, width], `logits` holds hidden states [rows, cols, width], and a logit is hidden
// times a row of `weight`, plus `bias` (fp32). `kept` is fp32 [entries], the logit of each entry;
// entries of ignored tokens are not written.
struct SupportArgs {
  int64_t rows, cols, vocab, width;
  Tensor logits, weight, bias, labels, temperatures;
  Support support;
  RowOptions options;
  Tensor logprobs, entropy;
  float *stats, *kept;
  Exec exec;
};

// The gradient of the above: `dz`, fp32 [entries], w.r.t. the kept logits. If `grad_logits` is
// given, `dz` is also scattered into it.
struct SupportBackwardArgs {
  int64_t rows, cols, vocab;
  Tensor labels, temperatures;
  Support support;
  RowOptions options;
  const float *stats, *kept;
  Tensor grad_logprobs, grad_entropy;
  float* dz;
  Tensor grad_logits;
  Exec exec;
};

// Gradients of the head's operands from `dz`; a gradient that is not given is not computed. The
// token ids of entries with dz = 0 are not read. CPU: `starts` (vocab + 1) and `uses` (`entries`)
// are scratch. GPU: `order` lists the entries sorted by token id, `starts` is the first position of
// each token id in `order`, and `owner` is the token of each entry.
struct SupportUse {
  int64_t token;
  float dz;
};
struct SupportHeadArgs {
  int64_t rows, cols, vocab, width;
  Tensor hidden, weight;
  Support support;
  const float* dz;
  Tensor grad_hidden, grad_weight, grad_bias;
  int64_t* starts;
  SupportUse* uses;
  const int64_t *order, *owner;
  Exec exec;
};

// Options of a divergence beside its direction and temperature; see core/pair_options.py. `beta` is
// that of the generalised Jensen-Shannon divergence, 0 for none. The caps are of the two tensors of
// logits, 0 for none. `ref_scale` multiplies the reference's logits after their cap.
struct PairOptions {
  double beta, softcap, ref_softcap, ref_scale;

  // Whether they change a logit before the temperature divides it.
  RK_HD bool change_logits() const {
    return softcap > 0.0 || ref_softcap > 0.0 || ref_scale != 1.0;
  }
};

// kl_divergence over the whole vocabulary. `stats` is fp32 [rows, cols, 5], contiguous: m and s of
// the policy, m and s of the reference, and the mean under P of (x_P - m_P) - (x_Q - m_Q). This
// mean is finite exactly where the divergence is. reverse = KL(policy || ref), else
// KL(ref || policy). With beta the last is KL(policy || mixture) instead, and `reverse` is true.
// `entropy` is the policy's.
struct KlArgs {
  int64_t rows, cols, vocab;
  Tensor logits, ref_logits;
  double temperature;
  bool reverse;
  Tensor kl;
  float* stats;
  Exec exec;
  PairOptions options;
  Tensor entropy;

  // Whether the kernels for options are needed.
  bool general() const { return options.beta > 0.0 || options.change_logits() || entropy.given; }
};

struct KlBackwardArgs {
  int64_t rows, cols, vocab;
  Tensor logits, ref_logits;
  double temperature;
  bool reverse;
  const float* stats;
  Tensor grad_kl, grad_logits;
  Exec exec;
  PairOptions options;

  bool general() const { return options.beta > 0.0 || options.change_logits(); }
};

// The enums below have the names and the order of tuples in rlhf_kernels/config/enums.py.

// kl_penalty per token from x = logprob - ref_logprob.
enum KlEstimator : int32_t { kK1 = 0, kK2 = 1, kK3 = 2, kAbs = 3 };
struct KlPenaltyArgs {
  int64_t rows, cols;
  Tensor logprobs, ref_logprobs;
  int32_t estimator;
  bool straight_through;  // backward only: the gradient of k2 whatever the estimator
  Tensor grad;            // backward only: upstream gradient
  Tensor out;
  Exec exec;
};

// Options of the policy loss. PolicyCodes and PolicyParams have the names and the order of the
// named tuples in rlhf_kernels/config/policy.py. An absent bound is +-3e38, never infinite.
enum Objective : int32_t { kClip = 0, kPenalty = 1, kReinforce = 2, kCispo = 3, kSapo = 4 };
enum RatioLevel : int32_t { kTokenRatio = 0, kSequenceRatio = 1, kSequenceTokenRatio = 2 };
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

// gae, discounted_returns and ppo_advantages: one reverse scan. Padded [rows, cols]: sequence s is
// row s. Packed: rows = 1, and sequence s is columns offsets[s] to offsets[s + 1]. `bootstrap` and
// `scores` have one entry per sequence along stride1. Without `values` the scan computes discounted
// returns and no `advantages`. With `scores` it computes the rewards from scores and
// log-probabilities and writes them to `shaped`. Results are contiguous. `whiten` whitens the
// advantages; `moments` is then scratch of 3 doubles per chunk of 2048 tokens (rounded up), plus 3
// on a GPU.
struct GaeArgs {
  int64_t rows, cols, sequences;
  Tensor offsets;
  Tensor rewards, values, mask, dones, bootstrap;
  Tensor scores, logprobs, ref_logprobs;
  double kl_coef;
  int32_t kl_estimator;
  // 0: no clipping.
  double reward_clip;
  double gamma, lam;
  bool carry;
  bool whiten;
  float *advantages, *returns, *shaped;
  double* moments;
  double whiten_eps;
  Exec exec;
};

// `gae` with more options; `values` are given.
//
// `gae.dones` are the terminated steps. After a truncated step the value is that of `cut_values`,
// of the shape of the tokens. `gammas` and `lams` replace the numbers if they are given: one rate
// per token where `*_per_step` is set, else one per sequence along stride1. A rate outside [0, 1]
// makes results NaN. If `decoupled`, the returns are those of value_lam or `value_lams`, and the
// advantages those of lam.
struct GeneralGaeArgs {
  GaeArgs gae;
  Tensor truncated, cut_values;
  Tensor gammas, lams, value_lams;
  bool gamma_per_step, lam_per_step, value_lam_per_step;
  bool decoupled;
  double value_lam;
};

struct WhitenArgs {
  int64_t rows, cols;
  Tensor x, mask;
  bool shift_mean, unbiased;
  double eps;
  double* moments;
  float* out;
  Exec exec;
};

enum Baseline : int32_t {
  kBaselineMean = 0,
  kBaselineLeaveOneOut = 1,
  kBaselineGreedy = 2,
  kBaselineNone = 3
};
enum Scale : int32_t { kScaleGroup = 0, kScaleBatch = 1, kScaleNone = 2 };

// `rewards` and `greedy` are 1-D along stride1. Groups are consecutive runs of `group_size`
// rewards. With group_size = 0 they are runs of equal `sorted_ids`, and `order` holds the reward
// indices in that order. `work` is scratch of `count` doubles on a GPU.
struct GroupAdvantagesArgs {
  int64_t count;
  Tensor rewards, greedy;
  const int64_t *order, *sorted_ids;
  int64_t group_size;
  int32_t baseline, scale;
  double eps;
  double* work;
  float* out;
  Exec exec;
};

}  // namespace rk
