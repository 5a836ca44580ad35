// Token terms of the policy and value losses, and metrics from their sums. V is as in exp_math.h.
#pragma once
#include "exp_math.h"

namespace rk {
namespace {

// An absent bound: UNBOUNDED of config/policy_codes.py.
constexpr float kUnbounded = 3.0e38f;

// Every exp(x) here clamps x to +-40: LOG_RATIO_BOUND of config/policy_codes.py.
constexpr float kLogRatioBound = 40.0f;

template <class V>
RK_HD V saturated(V x) {
  return clamp(x, V(-kLogRatioBound), V(kLogRatioBound));
}

// The ratio of a token or a sequence; `log` is its clamped logarithm.
template <class V>
struct Ratio {
  V r, em1, em1mx, log;
};

template <class V>
RK_HD Ratio<V> policy_ratio(V x, const PolicyConfig& c) {
  const V log = clamp(x, V(c.log_ratio_low), V(c.log_ratio_high));
  const ExpParts<V> p = exp_parts(log);
  return {p.e, p.em1, p.em1mx, log};
}

// 0 where x is outside the clamp of the log-ratio, else slope.
template <class V>
RK_HD V inside_clamp(V x, V slope, const PolicyConfig& c) {
  const V above = select_less(x, V(c.log_ratio_low), V(0.0f), slope);
  return select_less(V(c.log_ratio_high), x, V(0.0f), above);
}

// yes where x is not NaN, else no.
template <class V>
RK_HD V select_number(V x, V yes, V no) {
  return select_less(x, V(1.0f), yes, select_less(V(0.0f), x, yes, no));
}

// old - rollout, the logarithm of a token's weight; 0 where it is NaN although old is a number.
// Infinities become large finite numbers, so that a sequence may hold both signs.
constexpr float kLogWeightBound = 1.0e30f;
template <class V>
RK_HD V log_weight(V old, V rollout) {
  const V bound(kLogWeightBound);
  const V x = clamp(old - rollout, -bound, bound);
  return select_number(x, x, select_number(old, V(0.0f), old));
}

// w = exp(x) for x = log_weight (or its sum over the sequence), truncated or masked.
template <class V>
RK_HD V correction_weight(V x, const PolicyConfig& c) {
  const V low(c.correction_low), high(c.correction_high), zero(0.0f);
  const V w = exp_parts(saturated(x)).e;
  if (c.correction_mode == kTruncate) return clamp(w, low, high);
  return select_less(w, low, zero, select_less(high, w, zero, w));
}

// Whether w is a sequence's, not a token's.
RK_HD bool corrects_by_sequence(const PolicyConfig& c) {
  return c.correction_level >= kSequenceCorrection;
}

// Whether each token's log-ratio is clipped before the mean of its sequence. clip_low and clip_high
// are then bounds of log-ratios.
RK_HD bool clips_tokens(const PolicyConfig& c) { return c.ratio_level == kClippedSequenceRatio; }

// Whether the tokens of a sequence share the slope of its ratio.
RK_HD bool pools_slopes(const PolicyConfig& c) {
  return c.ratio_level == kSequenceRatio || clips_tokens(c);
}

// Whether a loss takes options that only the kernels for all options know.
RK_HD bool has_further_options(const PolicyConfig& c) {
  return c.gate != kNoGate || c.kl_weight > kRatioKlWeight || c.kl_weight_capped || clips_tokens(c);
}

// The log-ratio x of a token in the mean of a sequence that clips its tokens.
template <class V>
RK_HD V clipped_log_ratio(V x, V a, float clip_low, float clip_high) {
  const V low(clip_low), high(clip_high);
  return select_less(V(0.0f), a, select_less(high, x, high, x), select_less(x, low, low, x));
}

// share, or 0 where the clip has cut x.
template <class V>
RK_HD V unclipped_share(V x, V a, V share, const PolicyConfig& c) {
  const V low(c.clip_low), high(c.clip_high), zero(0.0f);
  return select_less(zero, a, select_less(high, x, zero, share), select_less(x, low, zero, share));
}

// 1 where the clip of a token's log-ratio takes effect, at its lower and at its upper bound.
template <class V>
struct TokenClip {
  V low, high;
};
template <class V>
RK_HD TokenClip<V> token_clip(V x, V a, const PolicyConfig& c) {
  const V zero(0.0f), one(1.0f), low(c.clip_low), high(c.clip_high), most(kUnbounded);
  // An infinite log-ratio is not beyond a bound that is absent.
  x = clamp(x, -most, most);
  return {select_less(a, zero, select_less(x, low, one, zero), zero),
          select_less(zero, a, select_less(high, x, one, zero), zero)};
}

// Where a gate drops a token from the objective: 1 at its lower and at its upper bound, else 0.
template <class V>
struct GateTerm {
  V low, high;
};

// What the others' probability counts as at least, in the binary divergence.
constexpr float kLeastOther = 1.0e-8f;

// `distance`: the mean of anchor - logprob over the token's sequence, for a gate by sequences.
template <class V>
RK_HD GateTerm<V> policy_gate(V logprob, V anchor, V a, V distance, const PolicyConfig& c) {
  const V zero(0.0f), one(1.0f), low(c.gate_low), high(c.gate_high), least(kLeastOther);
  if (c.gate == kOpsmGate)
    return {select_less(a, zero, select_less(low, distance, one, zero), zero), zero};
  if (c.gate == kRatioGate) {
    // An infinite log-ratio is not beyond a bound that is absent.
    const V most(kUnbounded), x = clamp(logprob - anchor, -most, most);
    return {select_less(x, low, one, zero), select_less(high, x, one, zero)};
  }
  GateTerm<V> t;
  if (c.gate == kTvGate) {
    const V moved = exp_parts(saturated(logprob)).e - exp_parts(saturated(anchor)).e;
    t = {select_less(moved, low, one, zero), select_less(high, moved, one, zero)};
  } else {
    const V of_p = min(zero, logprob), of_q = min(zero, anchor);
    const V x = saturated(of_p - of_q);
    const ExpParts<V> p = exp_parts(saturated(of_p)), q = exp_parts(saturated(of_q));
    // The divergence -q x + (1 - q) log((1 - q) / (1 - p)) exceeds a bound where the quotient
    // exceeds exp((bound + q x) / (1 - q)).
    const V of_others = least - q.em1, others = least - p.em1, known = q.e * x;
    const auto exceeds = [&](V bound) {
      // Of a certain token 1 - q is 0 here, not -0, which would turn the sign round.
      const V quotient = exp_parts(saturated((bound + known) / (zero - q.em1))).e;
      return select_less(quotient * others, of_others, one, zero);
    };
    t = {select_less(x, zero, exceeds(low), zero), select_less(zero, x, exceeds(high), zero)};
  }
  if (c.gate_two_sided) return t;
  return {select_less(a, zero, t.low, zero), select_less(zero, a, t.high, zero)};
}

// Whether a gate compares with the rollout.
RK_HD bool gates_against_rollout(const PolicyConfig& c, bool rollout_given) {
  return c.gate_against == kRolloutAnchor && rollout_given;
}

// What a gate compares with: old, also where a rollout is missing.
template <class V>
RK_HD V gate_anchor(V old, V rollout, bool against_rollout) {
  return against_rollout ? select_number(rollout, rollout, old) : old;
}

// With the gate of `c`: changes w and the logprob of the objective of a token that is dropped.
template <class V>
RK_HD GateTerm<V> drop_token(V& logprob, V& w, V old, V rollout, bool rollout_given, V a,
                             V distance, const PolicyConfig& c) {
  const V zero(0.0f);
  const V anchor = gate_anchor(old, rollout, gates_against_rollout(c, rollout_given));
  const GateTerm<V> t = policy_gate(logprob, anchor, a, distance, c);
  const V dropped = t.low + t.high;
  w = select_less(zero, dropped, zero, w);
  // 0 times the logarithm of 0 would be NaN.
  logprob = select_less(zero, dropped, zero, logprob);
  return t;
}

// The objective of one token. `direct` is the part of d loss / d logprob that does not pass through
// the ratio; `ratio` is d loss / d log r. low, high and dual are 1 where that bound takes effect.
template <class V>
struct PolicyTerm {
  V loss, direct, ratio, low, high, dual;
};

template <int kObjective, class V>
RK_HD PolicyTerm<V> policy_objective(const Ratio<V>& x, V logprob, V a, V w,
                                     const PolicyConfig& c) {
  const V zero(0.0f), one(1.0f), low(c.clip_low), high(c.clip_high);
  PolicyTerm<V> t{zero, zero, zero, zero, zero, zero};
  if constexpr (kObjective == kReinforce) {
    t.direct = w * -a;
    t.loss = w * (-a * logprob);
  } else if constexpr (kObjective == kCispo) {
    const V weight = -a * clamp(x.r, low, high);
    t.direct = w * weight;
    t.loss = w * (weight * logprob);
    t.low = select_less(x.r, low, one, zero);
    t.high = select_less(high, x.r, one, zero);
  } else if constexpr (kObjective == kPenalty) {
    const V beta(c.penalty_coef);
    const V pg = w * (-a * x.r);
    t.loss = pg + beta * x.em1mx;
    t.ratio = pg + beta * x.em1;
  } else if constexpr (kObjective == kSapo) {
    const V tau = select_less(zero, a, V(c.sapo_tau_pos), V(c.sapo_tau_neg));
    const V z = tau * (x.r - one);
    // exp(-z), exactly 0 where it is below 1e-34; z >= -tau.
    const V u = select_less(V(80.0f), z, zero, exp_parts(clamp(-z, V(-80.0f), V(80.0f))).e);
    const V gate = one / (one + u);
    t.loss = w * (-a * gate * (V(4.0f) / tau));
    t.ratio = w * (-a * V(4.0f) * gate * (u * gate) * x.r);
  } else {
    // Skipped without delta and dual clip, where these terms have no effect.
    const bool bounded = min(c.delta, c.dual_clip) < kUnbounded;
    const V delta(c.delta);
    const V free = -a * x.r, clipped = -a * clamp(x.r, low, high);
    const V unclipped = bounded ? -a * min(delta, x.r) : free;
    V loss = select_less(unclipped, clipped, clipped, unclipped);
    V slope = bounded ? select_less(delta, x.r, zero, free) : free;
    slope = select_less(unclipped, clipped, zero, slope);
    t.low = select_less(a, zero, select_less(x.r, low, one, zero), zero);
    t.high = select_less(zero, a, select_less(high, x.r, one, zero), zero);
    if (bounded) {
      const V bound = -a * V(c.dual_clip);
      const V over = select_less(a, zero, select_less(bound, loss, one, zero), zero);
      loss = select_less(zero, over, bound, loss);
      slope = select_less(zero, over, zero, slope);
      const V top = min(V(c.dual_clip), delta);
      t.dual = select_less(a, zero, select_less(top, x.r, one, zero), zero);
    }
    t.loss = w * loss;
    t.ratio = w * slope;
  }
  return t;
}

// The KL to the reference from x = logprob - ref: the loss term, its slope, and k3 without clamps.
template <class V>
struct KlTerm {
  V value, slope, k3;
};

template <class V>
RK_HD V within(V x, V low, V high, V slope) {
  return select_less(x, low, V(0.0f), select_less(high, x, V(0.0f), slope));
}

template <class V>
RK_HD KlTerm<V> policy_kl(V x, const PolicyConfig& c) {
  const V zero(0.0f), one(1.0f), bound(kLogRatioBound);
  const V in_low(c.kl_input_low), in_high(c.kl_input_high);
  const V z = clamp(x, in_low, in_high);
  const ExpParts<V> plain = exp_parts(-saturated(x));
  V value = z, slope = one;
  if (c.kl_estimator == kK2) {
    value = V(0.5f) * z * z;
    slope = z;
  } else if (c.kl_estimator == kAbs) {
    value = abs(z);
    slope = select_less(zero, z, one, select_less(z, zero, -one, z));
  } else if (c.kl_estimator == kK3) {
    ExpParts<V> p = plain;
    if (c.kl_input_low > -kLogRatioBound || c.kl_input_high < kLogRatioBound)
      p = exp_parts(-saturated(z));
    value = p.em1mx;
    slope = within(z, -bound, bound, -p.em1);
  }
  slope = within(x, in_low, in_high, slope);
  const V limit(c.kl_value_clamp);
  slope = within(value, -limit, limit, slope);
  value = clamp(value, -limit, limit);
  // The gradient of k2, as if without both clamps.
  if (c.kl_straight_through) slope = x;
  return {value, slope, plain.em1mx};
}

// What the slope of the weight of a KL term adds: through the log-ratio, and directly.
template <class V>
struct KlWeightSlopes {
  V ratio, direct;
};

// Multiplies value and slope of k by the weight of `c` for a token with the ratio r.
template <class V>
RK_HD KlWeightSlopes<V> weigh_kl(KlTerm<V>& k, V r, const PolicyConfig& c) {
  const V zero(0.0f), most(c.kl_weight_max);
  if (c.kl_weight == kNoKlWeight) return {zero, zero};
  if (c.kl_weight == kOneKlWeight) return {zero, k.value};
  const V w = min(most, r);
  k.value = k.value * w;
  k.slope = k.slope * w;
  if (c.kl_weight == kDetachedRatioKlWeight) return {zero, zero};
  return {select_less(most, r, zero, k.value), zero};
}

// Half the squared error, its slope, and 1 where the error of the clipped value is larger.
template <class V>
struct ValueTerm {
  V loss, slope, clipped;
};

template <class V>
RK_HD ValueTerm<V> value_term(V value, V old, V target, V range, bool clip) {
  const V zero(0.0f), half(0.5f);
  const V error = value - target;
  const V square = error * error;
  if (!clip) return {half * square, error, zero};
  const V other = clamp(value, old - range, old + range) - target;
  const V other_square = other * other;
  return {half * select_less(square, other_square, other_square, square),
          select_less(square, other_square, zero, error),
          select_less(square, other_square, V(1.0f), zero)};
}

// Sums over the unmasked tokens, whose number is `tokens`. pg, kl and bonus (entropy bonus) are the
// terms of the loss, weighted and divided by the divisor. Without rollout log-probabilities `w` is
// `tokens`.
struct PolicySums {
  double pg, kl, bonus;
  double low, high, dual, r, rr, x, k3, x_ref, k3_ref, entropy, w, tokens;
  double gate_low, gate_high;
  float r_min, r_max;
};

// The `fault` of a loss with a valid divisor: -0.0, since adding it changes no bit of any number.
constexpr double kNoFault = -0.0;

// `fault` is NaN for an invalid divisor. It is added to all metrics that do not use the divisor.
RK_HD PolicyMetrics policy_metrics(const PolicyConfig& c, const PolicySums& s, double fault) {
  const double n = s.tokens > 1.0 ? s.tokens : 1.0;
  const bool some = s.tokens > 0.0;
  // A term with coefficient 0 is skipped, since it may be infinite.
  double loss = s.pg;
  if (c.kl_coef != 0.0f) loss += static_cast<double>(c.kl_coef) * s.kl;
  if (c.entropy_coef != 0.0f) loss -= static_cast<double>(c.entropy_coef) * s.bonus;
  // Minimum and maximum may have skipped a NaN, but the sum has not.
  const double lost = s.r - s.r + fault;
  const auto mean = [&](double sum) { return static_cast<float>(sum / n + fault); };
  PolicyMetrics m;
  m.loss = static_cast<float>(loss);
  m.pg_loss = static_cast<float>(s.pg);
  m.kl_loss = static_cast<float>(s.kl);
  m.entropy_loss = static_cast<float>(s.bonus);
  m.clip_frac_low = mean(s.low);
  m.clip_frac_high = mean(s.high);
  m.dual_clip_frac = mean(s.dual);
  m.gate_frac_low = mean(s.gate_low);
  m.gate_frac_high = mean(s.gate_high);
  m.ratio_mean = mean(s.r);
  m.ratio_min = static_cast<float>((some ? s.r_min : 0.0) + lost);
  m.ratio_max = static_cast<float>((some ? s.r_max : 0.0) + lost);
  m.k1_old = mean(-s.x);
  m.k3_old = mean(s.k3);
  m.k1_ref = mean(s.x_ref);
  m.k3_ref = mean(s.k3_ref);
  m.entropy = mean(s.entropy);
  m.ess = static_cast<float>((some ? s.r * s.r / (n * s.rr) : 0.0) + fault);
  m.correction_mean = mean(s.w);
  m.tokens = static_cast<float>(s.tokens + fault);
  return m;
}

// Over the unmasked tokens: the loss, sums, and the sums of squared deviations of returns and of
// errors (return - value).
struct ValueTotals {
  double loss, clipped, value, return_mean, return_m2, error_m2, tokens;
};

// 2^-22, two units in the last place of a float near 1.
constexpr double kMeanRoundings = 2.384185791015625e-7;

RK_HD ValueMetrics value_metrics(const ValueTotals& s, double fault) {
  const double n = s.tokens > 1.0 ? s.tokens : 1.0;
  // The variance of equal returns is the rounding error of their mean. An unmasked NaN stays NaN.
  const double rounding = kMeanRoundings * s.return_mean;
  const double explained = s.return_m2 > n * rounding * rounding ? 1.0 - s.error_m2 / s.return_m2
                                                                 : s.return_m2 - s.return_m2;
  ValueMetrics m;
  m.loss = static_cast<float>(s.loss);
  m.clip_frac = static_cast<float>(s.clipped / n + fault);
  m.value_mean = static_cast<float>(s.value / n + fault);
  m.return_mean = static_cast<float>(s.return_mean + fault);
  m.explained_variance = static_cast<float>(explained + fault);
  m.tokens = static_cast<float>(s.tokens + fault);
  return m;
}

}  // namespace
}  // namespace rk
