// Formulas of the advantages, shared by the CPU and CUDA backends.
#pragma once
#include "math.h"

namespace rk {
namespace {

// Number, mean and sum of squared differences to the mean.
struct Moments {
  double count, mean, m2;
};

// Of two sets together (Chan et al., 1979).
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
  // One element, or equal ones, with eps = 0: 0 / 0 is meant to be 0.
  const double spread = sqrt(variance + eps);
  return {all.mean, spread == 0.0 ? 0.0 : 1.0 / spread, shift_mean ? 0.0 : all.mean};
}

// A sequence's score within [-clip, clip]; 0 means no clipping.
RK_HD float clipped_score(float score, float clip) {
  if (!(clip > 0.0f)) return score;
  return score < -clip ? -clip : score > clip ? clip : score;
}

// A group's n rewards: the first of them, the mean of the differences to it, their spread. Equal
// rewards have a spread of exactly 0, and a common offset costs nothing.
struct GroupStatistics {
  double n, first, mean, spread;
};
RK_HD double others_of(double n) { return n > 1.0 ? n - 1.0 : 1.0; }

// A reward by its group's baseline, scaled by the group's spread if asked.
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

// Whether the mean of all baselined rewards is 0 by construction.
RK_HD bool zero_mean(int32_t baseline) {
  return baseline == kBaselineMean || baseline == kBaselineLeaveOneOut;
}

}  // namespace
}  // namespace rk
