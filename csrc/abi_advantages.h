// Arguments of the scans, of whiten and of group_advantages.
// Enums have the names and the order of tuples in rlhf_kernels/config/enums.py.
#pragma once
#include "abi_types.h"

namespace rk {

// gae, discounted_returns and ppo_advantages: one reverse scan. Padded [rows, cols]: sequence s is
// row s. Packed: rows = 1, and sequence s is columns offsets[s] to offsets[s + 1]. `bootstrap` and
// `scores` have one entry per sequence along stride1. Without `values` the scan computes discounted
// returns and no `advantages`. With `scores` it computes the rewards from scores and
// log-probabilities and writes them to `shaped`. Results are contiguous. `whiten` whitens the
// advantages.
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
// rewards; a last one that is shorter only where rewards stand alone. With group_size = 0 they are
// runs of equal `sorted_ids`, and `order` holds the reward indices in that order.
struct GroupAdvantagesArgs {
  int64_t count;
  Tensor rewards, greedy;
  const int64_t *order, *sorted_ids;
  int64_t group_size;
  int32_t baseline, scale;
  double eps;
  float* out;
  Exec exec;
};

}  // namespace rk
