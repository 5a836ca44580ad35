// Formulas of the advantages, shared by the CPU and CUDA backends.
#pragma once
#include "math.h"

namespace rk {
namespace {

// Count, mean and sum of squared differences to the mean.
struct Moments {
  double count, mean, m2;
};

// Moments of the union of two sets (Chan et al., 1979).
RK_HD Moments merge_moments(const Moments& a, const Moments& b) {
  if (a.count == 0.0 || b.count == 0.0) return a.count == 0.0 ? b : a;
  const double count = a.count + b.count, difference = b.mean - a.mean;
  return {count, a.mean + difference * (b.count / count),
          a.m2 + b.m2 + difference * difference * (a.count * b.count / count)};
}

// Whitening maps x to (x - mean) * scale + shift.
struct Whitening {
  double mean, scale, shift;
};
RK_HD Whitening whitening(const Moments& all, bool shift_mean, bool unbiased, double eps) {
  const double divisor = all.count - (unbiased ? 1.0 : 0.0);
  const double variance = divisor > 0.0 ? all.m2 / divisor : 0.0;
  // Equal elements with eps = 0 would give 0 / 0; the result is 0.
  const double spread = sqrt(variance + eps);
  return {all.mean, spread == 0.0 ? 0.0 : 1.0 / spread, shift_mean ? 0.0 : all.mean};
}

// The whitening of a scan's advantages, in place.
inline WhitenArgs whitening_args(const GaeArgs& a) {
  const Tensor advantages{a.advantages, kFloat32, a.cols, 1, true};
  return {a.rows, a.cols, advantages, a.mask, true, true, a.whiten_eps, a.advantages, a.exec};
}

// A sequence's score clipped to [-clip, clip]; clip = 0 means no clipping.
RK_HD float clipped_score(float score, float clip) {
  if (!(clip > 0.0f)) return score;
  return score < -clip ? -clip : score > clip ? clip : score;
}

// Statistics of a group's n rewards: the first reward, and the mean and spread of the differences
// to it. Equal rewards have a spread of exactly 0, and a common offset costs no precision.
struct GroupStatistics {
  double n, first, mean, spread;
};
// A mean that is infinite becomes NaN: differences to it would depend on which reward comes first.
RK_HD double finite_mean(double mean) { return mean + 0.0 * mean; }
RK_HD double others_of(double n) { return n > 1.0 ? n - 1.0 : 1.0; }

// A reward minus its group's baseline, divided by the group's spread if so configured.
RK_HD double group_advantage(double reward, double greedy, const GroupStatistics& s,
                             int32_t baseline, int32_t scale, double eps) {
  const double centred = reward - s.first - s.mean;
  double x = reward;
  if (baseline == kBaselineMean) x = centred;
  // r_i - mean of the others = n / (n - 1) * (r_i - mean of all)
  if (baseline == kBaselineLeaveOneOut) x = centred * (s.n / others_of(s.n));
  if (baseline == kBaselineGreedy) x = reward - greedy;
  return scale == kScaleGroup ? (s.spread == 0.0 ? 0.0 : x / (s.spread + eps)) : x;
}

// Whether the mean over the batch is already 0 after the baseline.
RK_HD bool zero_mean(int32_t baseline) {
  return baseline == kBaselineMean || baseline == kBaselineLeaveOneOut;
}

}  // namespace
}  // namespace rk
