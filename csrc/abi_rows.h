// Arguments of the operations on rows of logits, and of kl_penalty.
// Enums have the names and the order of tuples in rlhf_kernels/config/enums.py.
#pragma once
#include "abi_types.h"

namespace rk {

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

  // A cap alone, for rows that have no other option.
  static RowOptions of_cap(double softcap) { return {1.0, softcap, 0}; }

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
// `grad_of_labels` are these, fp32 as `labels` lie.
struct ManyLabelsBackwardArgs {
  LogprobsBackwardArgs rows;
  int64_t count, ignore_index;
  Tensor labels, grad_of_labels;
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

}  // namespace rk
