// Per-token formulas shared by the CPU and CUDA backends.
#pragma once
#include <math.h>
#include <stdint.h>

#include "abi.h"

namespace rk {
namespace {

// log(p_y) from a row's statistics, in double: (x - m) / T - log s instead of x - lse, so that a
// large common offset of the logits costs no precision. It is never positive, as s >= 1 and x <= m.
RK_HD double logprob_from_stats(double x, double m, double s, double inv_temperature) {
  return (x - m) * inv_temperature - log(s);
}

// The gradient of the label's own logit. 1 - p_y = -expm1(log p_y) is accurate where p_y is close
// to 1. log p_y + H = `distance` - mean, with distance = (x_y - m) / T; the logarithms of s cancel.
RK_HD double label_gradient(double logprob, double distance, double mean, double g_logprob,
                            double g_entropy, double inv_temperature) {
  double g = g_logprob * -expm1(logprob);
  // p log p is 0 at p = 0, even where log p is -inf.
  if (g_entropy != 0.0 && logprob > -745.0) g -= g_entropy * exp(logprob) * (distance - mean);
  return g * inv_temperature;
}

// T times what the log-sum-exp and the sum of the squared probabilities add to it.
RK_HD double further_label_gradient(double logprob, double collision, double g_lse,
                                    double g_collision) {
  const double p = exp(logprob);
  double g = 0.0;
  if (g_lse != 0.0) g += g_lse * p;
  if (g_collision != 0.0) g += 2.0 * g_collision * p * (p - collision);
  return g;
}

// T times what upstream gradients of other labels of the same token, g_others in sum, add to it.
RK_HD double other_labels_gradient(double logprob, double g_others) {
  return -g_others * exp(logprob);
}

// Whether an effective temperature (divided by logit_scale) is within the bounds of
// rlhf_kernels/core/temperature_rules.py.
RK_HD bool good_temperature(double t) { return t >= 0x1p-60 && t <= 0x1p60; }

// k3 = exp(-x) - 1 + x; +inf at x = -inf, where the sum would be inf - inf.
RK_HD float k3_estimate(float x) {
  const float e = expm1f(-x);
  return e > 3.4e38f ? e : e + x;
}

// Estimators of KL(policy || ref) from x = logprob - ref_logprob (Schulman, "Approximating KL
// divergence", 2020): k1 = x, k2 = x^2 / 2, k3, abs = |x|.
RK_HD float kl_estimate(float x, int32_t estimator) {
  switch (estimator) {
    case kK2: return 0.5f * x * x;
    case kK3: return k3_estimate(x);
    case kAbs: return fabsf(x);
    default: return x;
  }
}

RK_HD float kl_estimate_slope(float x, int32_t estimator) {
  switch (estimator) {
    case kK2: return x;
    case kK3: return -expm1f(-x);
    case kAbs: return x > 0.0f ? 1.0f : (x < 0.0f ? -1.0f : x);
    default: return 1.0f;
  }
}

}  // namespace
}  // namespace rk
