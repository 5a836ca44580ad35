// The contract between Python and native code: dtype codes, strided views and argument structs.
// No torch and no Python here, so one build serves every torch version, and the CUDA backend
// takes the same structs. Sizes and strides are in elements. Whether a tensor is given says
// `given`, never its address: that of a tensor without elements is null.
#pragma once
#include <stdint.h>

#if defined(__CUDACC__)
#define RK_HD __host__ __device__ __forceinline__
#else
#define RK_HD inline
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

// A tensor of tokens [rows, cols]. For logits the vocabulary is a third dimension of stride 1.
struct Tensor {
  void* data = nullptr;
  int32_t dtype = kFloat32;
  int64_t stride0 = 0;
  int64_t stride1 = 0;
  bool given = false;
};

// Where a call runs. CPU: `threads`. CUDA: `stream` (a cudaStream_t) of `device`, with `scratch`,
// the bytes that the operation's <name>_scratch function asks for.
struct Exec {
  int32_t threads = 1;
  int32_t device = 0;
  void* stream = nullptr;
  void* scratch = nullptr;
};

// What a kernel found in the data. `position` is the flat row-major index of the first offence.
enum StatusCode : int32_t {
  kOk = 0,
  kLabelOutOfRange = 1,
  kBadTemperature = 2,
  kBadOffsets = 3,
  kOutOfMemory = 4,
  // support: `position` is that of the entry, in indptr or in indices.
  kBadIndptr = 5,
  kIndexOutOfRange = 6,
  kIndexRepeated = 7
};
struct Status {
  int32_t code = kOk;
  int64_t position = -1;
};

// Sentinel: the label is owned by another shard of the vocabulary. The log-probability is NaN;
// statistics and gradient are those of any row. Valid only with kShardIgnored as ignore_index.
constexpr int64_t kLabelElsewhere = INT64_MIN;
constexpr int64_t kShardIgnored = INT64_MIN + 1;

// Options of rows of logits: core/row_options.py. softcap 0 means none. Each backend applies them
// to a logit in one place: cuda/rows.cuh, cpu/rows.h. What they make of logits does not
// decrease.
struct RowOptions {
  double temperature, softcap;
  int64_t ignore_index;

  // Whether they make anything of a logit before the temperature divides it.
  RK_HD bool change_logits() const { return softcap > 0.0; }
};

// token_logprobs. `stats` is fp32 [rows, cols, 3], contiguous: row maximum m (NaN for a row of NaN
// and -inf), s = sum exp((x-m)/T), and with `entropy` the mean of (x-m)/T, which is log s less the
// entropy. `temperatures` (fp32) overrides the temperature of the options.
struct LogprobsArgs {
  int64_t rows, cols, vocab;
  Tensor logits, labels, temperatures;
  RowOptions options;
  Tensor logprobs, entropy;
  float* stats;
  Exec exec;
};

// Its gradient. `grad_logits` may be the memory of `logits`. An upstream gradient that is not given
// is zero.
struct LogprobsBackwardArgs {
  int64_t rows, cols, vocab;
  Tensor logits, labels, temperatures;
  RowOptions options;
  const float* stats;
  Tensor grad_logprobs, grad_entropy;
  Tensor grad_logits;
  Exec exec;
};

// The kept token ids of each token, as rows of a sparse matrix: those of token n are
// indices[indptr[n]] to indices[indptr[n + 1]]. `entries` is the length of indices.
struct Support {
  int64_t entries;
  Tensor indptr, indices;
};

// token_logprobs over each token's support, from logits [rows, cols, vocab], or, with `weight`,
// from hidden states in their place, `width` of them, times weight [vocab, width] plus bias (fp32).
// `kept` is fp32 [entries], the logit of each entry; entries of ignored tokens are not written.
struct SupportArgs {
  int64_t rows, cols, vocab, width;
  Tensor logits, weight, bias, labels, temperatures;
  Support support;
  RowOptions options;
  Tensor logprobs, entropy;
  float *stats, *kept;
  Exec exec;
};

// Its gradient in the kept logits, `dz` fp32 [entries], and, where given, spread into
// `grad_logits`.
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

// From `dz` to the head's operands; a gradient that is not given is not wanted. Entries with a
// gradient of zero are not read. `starts` is scratch of vocab + 1, `uses` of `entries`. On a GPU
// `starts` holds where each token id's entries begin in `order`, entries sorted by token id, and
// `owner` the token of each entry.
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

// kl_divergence over the whole vocabulary. `stats` is fp32 [rows, cols, 5], contiguous: m and s of
// the policy, m and s of the reference, and the mean under P of (x_P - m_P) - (x_Q - m_Q), which
// is finite where the divergence is. reverse = KL(policy || ref), else KL(ref || policy).
struct KlArgs {
  int64_t rows, cols, vocab;
  Tensor logits, ref_logits;
  double temperature;
  bool reverse;
  Tensor kl;
  float* stats;
  Exec exec;
};

struct KlBackwardArgs {
  int64_t rows, cols, vocab;
  Tensor logits, ref_logits;
  double temperature;
  bool reverse;
  const float* stats;
  Tensor grad_kl, grad_logits;
  Exec exec;
};

// An enum here has the names and the order of a tuple in rlhf_kernels/config/enums.py.

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

// Options of the policy loss. PolicyCodes and PolicyParams have the names and the order of those in
// rlhf_kernels/config/policy.py: absent bounds are +-3e38, never infinite.
enum Objective : int32_t { kClip = 0, kPenalty = 1, kReinforce = 2, kCispo = 3, kSapo = 4 };
enum RatioLevel : int32_t { kTokenRatio = 0, kSequenceRatio = 1, kSequenceTokenRatio = 2 };
enum CorrectionLevel : int32_t { kNoCorrection = 0, kTokenCorrection = 1, kSequenceCorrection = 2 };
enum CorrectionMode : int32_t { kTruncate = 0, kMask = 1 };
enum Aggregation : int32_t {
  kTokenMean = 0,
  kSeqMeanTokenMean = 1,
  kSeqMeanTokenSum = 2,
  kConstant = 3
};
struct PolicyCodes {
  int32_t objective, ratio_level, kl_estimator, kl_straight_through, kl_importance_weighted;
  int32_t correction_level, correction_mode, aggregation;
};
struct PolicyParams {
  float clip_low, clip_high, dual_clip, delta, log_ratio_low, log_ratio_high;
  float penalty_coef, sapo_tau_pos, sapo_tau_neg;
  float kl_coef, kl_input_low, kl_input_high, kl_value_clamp, entropy_coef;
  float correction_low, correction_high;
};
struct PolicyConfig : PolicyCodes, PolicyParams {};

// The tokens of a loss: padded [sequences, cols], or packed with `offsets` [sequences + 1] into
// `cols` tokens, which lie along stride1.
struct LossTokens {
  int64_t sequences, cols;
  Tensor offsets, mask;
};

// The metrics of a loss, with the names and the order of those in rlhf_kernels/config/metrics.py.
struct PolicyMetrics {
  float loss, pg_loss, kl_loss, entropy_loss;
  float clip_frac_low, clip_frac_high, dual_clip_frac;
  float ratio_mean, ratio_min, ratio_max;
  float k1_old, k3_old, k1_ref, k3_ref;
  float entropy, ess, correction_mean, tokens;
};
struct ValueMetrics {
  float loss, clip_frac, value_mean, return_mean, explained_variance, tokens;
};

// policy_loss with its gradient. A tensor with a value per sequence has stride1 = 0. `divisor` 0
// means the count that the aggregation implies. On a GPU the divisor may be read from `normalizer`,
// and the gradients, fp32 and contiguous, are yet to be multiplied by `scale`, which is 1 /
// divisor; on the CPU both are null.
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
  Exec exec;
};

// first and, where second_out is given, second, fp32 [count], times scale and upstream; GPU alone.
struct LossBackwardArgs {
  int64_t count;
  const float *first, *second, *scale;
  Tensor upstream, first_out, second_out;
  Exec exec;
};

// value_loss with its gradient, as of policy_loss. `clip_range` 0 means none.
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

// gae, discounted_returns and ppo_advantages: one reverse scan. Padded [rows, cols], sequence s
// being row s; or packed, rows = 1, sequence s being columns offsets[s] to offsets[s + 1].
// `bootstrap` and `scores` have an entry per sequence along stride1. Without `values` it computes
// discounted returns and no `advantages`; with `scores` it forms the rewards from these and the
// log-probabilities, into `shaped`. Results
// are contiguous. With `whiten` advantages are whitened and `moments` is scratch of 3 doubles
// per 2048 tokens begun, and of 3 more on a GPU.
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

// `rewards` and `greedy` lie along stride1. Groups are consecutive runs of `group_size`; where
// that is 0, runs of equal `sorted_ids`, their members `order`. `work`: on a GPU, scratch of
// `count` doubles.
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
