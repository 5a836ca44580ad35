// Terms of mismatch_weights: of a token, of a sequence from its tokens' sums, of the batch from its
// sequences. V is as in exp_math.h.
#pragma once
#include "policy_math.h"

namespace rk {
namespace {

// exp_parts for any x: inf and 0 where exp leaves the range of floats, denormals included.
template <class V>
RK_HD ExpParts<V> exp_whole(V x) {
  const ReducedExp<V> r = reduced_exp(clamp(x, V(-110.0f), V(90.0f)));
  // 2^n as two factors within the range of floats. Only the last product may round again.
  const V half = nearest(r.n, V(0.5f));
  const V s = scale2(V(1.0f), half);
  const V e = fma(s, r.m1, s) * scale2(V(1.0f), r.n - half);
  const V near = scale2(V(1.0f), clamp(r.n, V(-100.0f), V(100.0f)));
  const V em1 = select_less(abs(r.n), V(100.0f), fma(near, r.m1, near - V(1.0f)), e - V(1.0f));
  return {e, em1, select_less(abs(r.n), V(0.5f), r.mx, em1 - x)};
}

// A token that is in the mask: its log-ratio x and that clamped, exp of this with its parts, and
// what its log-probabilities count as. `missing` is 1 where there is no ratio; x is then 0.
template <class V>
struct MismatchToken {
  V x, near, old, rollout, missing;
  ExpParts<V> ratio;
};

template <class V>
RK_HD MismatchToken<V> mismatch_token(V old, V rollout, const MismatchParams& p) {
  const V zero(0.0f), one(1.0f), bound(kLogWeightBound), limit(p.clamp);
  const V x = clamp(old - rollout, -bound, bound);
  MismatchToken<V> t;
  t.missing = select_number(x, zero, select_number(old, one, zero));
  t.x = select_less(zero, t.missing, zero, x);
  t.near = clamp(t.x, -limit, limit);
  t.old = old;
  t.rollout = select_less(zero, t.missing, old, rollout);
  t.ratio = exp_whole(t.near);
  return t;
}

// w of logarithm y, truncated or masked. The logarithm decides; a NaN stays.
template <class V>
RK_HD V bounded_weight(V w, V y, int32_t mode, const MismatchParams& p) {
  const bool truncate = mode == kTruncate;
  const V zero(0.0f), low = truncate ? V(p.low) : zero, high = truncate ? V(p.high) : zero;
  return select_less(y, V(p.log_low), low, select_less(V(p.log_high), y, high, w));
}

// 1 where x is outside [low, high], else 0; NaN is not outside.
template <class V>
RK_HD V outside(V x, float low, float high) {
  const V zero(0.0f), one(1.0f);
  return select_less(x, V(low), one, select_less(V(high), x, one, zero));
}

// Sums over the unmasked tokens of a sequence, in the order in which kernels accumulate them. Those
// from kWeightOf on are of the weights of tokens, bounded: the level's only if it is kTokenWeight.
enum MismatchSum {
  kTokensOf,
  kMissingOf,
  kRejectedOf,
  kLogRatioOf,
  kNearOf,
  kOldOf,
  kRolloutOf,
  kK2Of,
  kK3Of,
  kRatioOf,
  kExcessOf,
  kExcessSquareOf,
  kWeightOf,
  kWeightSquareOf,
  kOffOf,
  kOffSquareOf,
  kLowOf,
  kHighOf,
  kMismatchSums
};
constexpr int kPlainSums = kWeightOf;

// The smallest and largest clamped log-ratio and weight; a NaN is skipped.
struct MismatchEnds {
  float least, most, least_weight, most_weight;
};
constexpr MismatchEnds kNoEnds{kUnbounded, -kUnbounded, kUnbounded, -kUnbounded};

struct MismatchSequence {
  double sums[kMismatchSums];
  MismatchEnds ends;
};

RK_HD void merge_ends(MismatchEnds& a, const MismatchEnds& b) {
  a.least = min(b.least, a.least), a.most = max(b.most, a.most);
  a.least_weight = min(b.least_weight, a.least_weight);
  a.most_weight = max(b.most_weight, a.most_weight);
}

// NaN is not outside, and inf is not outside an absent bound.
RK_HD bool is_outside(double x, float low, float high) {
  const float rounded = clamp(static_cast<float>(x), -kUnbounded, kUnbounded);
  return rounded < low || rounded > high;
}

// Whether a criterion rejects the sequence, which has a token.
RK_HD bool rejects_sequence(const MismatchSequence& q, const MismatchParams& p) {
  const double* s = q.sums;
  const double n = s[kTokensOf];
  return is_outside(s[kNearOf], p.sum_low, p.sum_high) ||
         is_outside(s[kNearOf] / n, p.mean_low, p.mean_high) || q.ends.least < p.extreme_low ||
         q.ends.most > p.extreme_high || is_outside(s[kK2Of], -kUnbounded, p.sum_k2) ||
         is_outside(s[kK2Of] / n, -kUnbounded, p.mean_k2) ||
         is_outside(s[kK3Of], -kUnbounded, p.sum_k3) ||
         is_outside(s[kK3Of] / n, -kUnbounded, p.mean_k3);
}

// Whether there is a criterion of sequences.
RK_HD bool judges_sequences(const MismatchParams& p) {
  const float low = max(max(p.extreme_low, p.sum_low), p.mean_low);
  const float high = min(min(p.extreme_high, p.sum_high), p.mean_high);
  const float estimates = min(min(p.sum_k2, p.mean_k2), min(p.sum_k3, p.mean_k3));
  return low > -kUnbounded || min(high, estimates) < kUnbounded;
}

// A sequence's weight: its logarithm, without bounds, and bounded.
struct UnitWeight {
  float y, raw, w;
};
RK_HD UnitWeight sequence_unit(const MismatchSequence& q, int32_t level, int32_t mode,
                               const MismatchParams& p) {
  const double* s = q.sums;
  const double n = s[kTokensOf];
  // The largest skips a NaN, but the sum has not.
  double y = 0.0;
  if (level == kSequenceWeight) y = s[kLogRatioOf];
  if (level == kGeometricWeight) y = s[kLogRatioOf] / n;
  if (level == kSequenceMaxWeight) y = q.ends.most + (s[kLogRatioOf] - s[kLogRatioOf]);
  UnitWeight unit;
  unit.y = static_cast<float>(y);
  if (level == kSequenceMeanWeight) {
    unit.raw = static_cast<float>(s[kRatioOf] / n);
    unit.y = clamp(logf(unit.raw), -p.clamp, p.clamp);
  } else {
    unit.y = clamp(unit.y, -p.clamp, p.clamp);
    unit.raw = exp_whole(unit.y).e;
  }
  unit.w = bounded_weight(unit.raw, unit.y, mode, p);
  return unit;
}

// Sums over the sequences with a token.
enum MismatchTotal {
  kSequences,
  kTokensIn,
  kMissingIn,
  kRejectedIn,
  kTouched,
  kLogRatioIn,
  kK3In,
  kExcessIn,
  kExcessSquareIn,
  kWeightIn,
  kWeightSquareIn,
  kOffIn,
  kOffSquareIn,
  kLowIn,
  kHighIn,
  kSeqWeight,
  kSeqOff,
  kSeqOffSquare,
  kSeqLow,
  kSeqHigh,
  kFar,
  kOldPpl,
  kOldLog,
  kRolloutPpl,
  kRolloutLog,
  kDifference,
  kAbsDifference,
  kPplRatio,
  kMismatchTotals
};

// Extremes over the sequences: of the weights of tokens, of the units' logarithms without bounds,
// of the sequences' mean weights, and of their differences of log-perplexities.
enum MismatchEnd { kWeightEnd, kRawEnd, kSeqEnd, kDifferenceEnd, kMismatchEnds };

struct MismatchTotals {
  double sums[kMismatchTotals];
  float least[kMismatchEnds], most[kMismatchEnds];

  RK_HD void clear() {
    for (double& x : sums) x = 0.0;
    for (int i = 0; i < kMismatchEnds; ++i) least[i] = kUnbounded, most[i] = -kUnbounded;
  }
  RK_HD void end(int i, float low, float high) {
    least[i] = min(low, least[i]), most[i] = max(high, most[i]);
  }
};

// What a sequence's tokens share: the weight, if the level is a sequence's, not yet normalised.
struct MismatchVerdict {
  float weight;
  bool rejected;
};

// Adds a sequence to the totals and judges it.
RK_HD MismatchVerdict add_sequence(const MismatchSequence& q, int32_t level, int32_t mode,
                                   const MismatchParams& p, MismatchTotals& total) {
  double* t = total.sums;
  const double* s = q.sums;
  const double n = s[kTokensOf];
  t[kMissingIn] += s[kMissingOf];
  if (!(n > 0.0)) return {0.0f, false};
  const bool rejected = rejects_sequence(q, p);
  t[kSequences] += 1.0;
  t[kTokensIn] += n;
  t[kRejectedIn] += rejected ? n : s[kRejectedOf];
  t[kTouched] += rejected || s[kRejectedOf] > 0.0 ? 1.0 : 0.0;
  t[kLogRatioIn] += s[kLogRatioOf];
  t[kK3In] += s[kK3Of];
  t[kExcessIn] += s[kExcessOf];
  t[kExcessSquareIn] += s[kExcessSquareOf];

  double mean = s[kWeightOf] / n, off = s[kOffOf] / n;
  float raw_mean = static_cast<float>(s[kRatioOf] / n);
  UnitWeight unit{0.0f, 1.0f, 1.0f};
  if (level == kTokenWeight) {
    t[kWeightIn] += s[kWeightOf];
    t[kWeightSquareIn] += s[kWeightSquareOf];
    t[kOffIn] += s[kOffOf];
    t[kOffSquareIn] += s[kOffSquareOf];
    t[kLowIn] += s[kLowOf];
    t[kHighIn] += s[kHighOf];
    total.end(kWeightEnd, q.ends.least_weight, q.ends.most_weight);
    total.end(kRawEnd, q.ends.least, q.ends.most);
  } else {
    unit = sequence_unit(q, level, mode, p);
    mean = unit.w, off = mean - 1.0, raw_mean = unit.raw;
    t[kWeightIn] += n * mean;
    t[kWeightSquareIn] += n * mean * mean;
    t[kOffIn] += n * off;
    t[kOffSquareIn] += n * off * off;
    t[kLowIn] += unit.y < p.count_log_low ? 1.0 : 0.0;
    t[kHighIn] += unit.y > p.count_log_high ? 1.0 : 0.0;
    total.end(kWeightEnd, unit.w, unit.w);
    total.end(kRawEnd, unit.raw, unit.raw);
  }
  t[kSeqWeight] += mean;
  t[kSeqOff] += off;
  t[kSeqOffSquare] += off * off;
  t[kSeqLow] += is_outside(raw_mean, p.count_low, kUnbounded) ? 1.0 : 0.0;
  t[kSeqHigh] += is_outside(raw_mean, -kUnbounded, p.count_high) ? 1.0 : 0.0;
  total.end(kSeqEnd, static_cast<float>(mean), static_cast<float>(mean));

  const double old = -s[kOldOf] / n, rollout = -s[kRolloutOf] / n;
  const double difference = -s[kLogRatioOf] / n, limit = p.clamp;
  // A NaN passes both comparisons.
  const double x = s[kLogRatioOf];
  t[kFar] += expm1(2.0 * (x < -limit ? -limit : (x > limit ? limit : x)));
  t[kOldPpl] += exp(old);
  t[kOldLog] += old;
  t[kRolloutPpl] += exp(rollout);
  t[kRolloutLog] += rollout;
  t[kDifference] += difference;
  t[kAbsDifference] += fabs(difference);
  t[kPplRatio] += exp(difference);
  const float rounded = static_cast<float>(difference);
  total.end(kDifferenceEnd, rounded, rounded);
  return {unit.w, rejected};
}

// The number that weights are divided by. A mean that is not above 1e-8 normalises nothing, as in
// verl.
RK_HD double norm_factor(const MismatchTotals& total, int32_t level, bool normalize) {
  const double* t = total.sums;
  const bool some = t[kSequences] > 0.0;
  if (!normalize || !some) return 1.0;
  const double mean =
      level == kTokenWeight ? t[kWeightIn] / t[kTokensIn] : t[kSeqWeight] / t[kSequences];
  return mean <= 1e-8 ? 1.0 : mean;
}

// The standard deviation from n values' mean and mean square of their distances from 1.
RK_HD double deviation(double off, double square, double n, double unbiased) {
  const double variance = n > 1.0 ? (square - off * off) * n / (n - unbiased) : 0.0;
  return variance < 0.0 ? 0.0 : sqrt(variance);
}

// `factor` is norm_factor's; `fault` is NaN if nothing in the batch can be trusted, else kNoFault.
RK_HD MismatchMetrics mismatch_metrics(const MismatchTotals& total, int32_t level, double factor,
                                       double fault) {
  const double* t = total.sums;
  const bool some = t[kSequences] > 0.0;
  const double n = some ? t[kTokensIn] : 1.0, sequences = some ? t[kSequences] : 1.0;
  const double units = level == kTokenWeight ? n : sequences;
  const auto number = [&](double x) { return static_cast<float>(x + fault); };
  const auto token = [&](int i) { return number(t[i] / n); };
  const auto sequence = [&](int i) { return number(t[i] / sequences); };
  // The ends have skipped a NaN, but the sum has not.
  const auto end = [&](float x, double sum) {
    return sum == sum ? number(some ? x : 0.0) : static_cast<float>(sum);
  };
  // Without weights there is no ratio that may be NaN.
  const double raw_sum = level == kNoWeight ? t[kTokensIn] : t[kLogRatioIn];
  const bool log_ends = level == kTokenWeight;
  const float raw_least = total.least[kRawEnd], raw_most = total.most[kRawEnd];
  const float least = total.least[kSeqEnd], most = total.most[kSeqEnd];
  const double square = t[kWeightSquareIn] / n, mean = t[kWeightIn] / n;
  MismatchMetrics m;
  m.weight_mean = token(kWeightIn);
  m.weight_std = number(deviation(t[kOffIn] / n, t[kOffSquareIn] / n, t[kTokensIn], 0.0));
  m.weight_min = end(total.least[kWeightEnd], t[kWeightIn]);
  m.weight_max = end(total.most[kWeightEnd], t[kWeightIn]);
  m.ess = number(square == 0.0 ? 0.0 : mean * mean / square);
  m.fraction_low = number(t[kLowIn] / units);
  m.fraction_high = number(t[kHighIn] / units);
  m.raw_min = end(log_ends ? exp_whole(raw_least).e : raw_least, raw_sum);
  m.raw_max = end(log_ends ? exp_whole(raw_most).e : raw_most, raw_sum);
  m.seq_weight_mean = sequence(kSeqWeight);
  m.seq_weight_std =
      number(deviation(t[kSeqOff] / sequences, t[kSeqOffSquare] / sequences, t[kSequences], 1.0));
  m.seq_weight_min = end(least, t[kSeqWeight]);
  m.seq_weight_max = end(most, t[kSeqWeight]);
  m.seq_max_deviation = end(max(fabsf(least - 1.0f), fabsf(most - 1.0f)), t[kSeqWeight]);
  m.seq_fraction_low = sequence(kSeqLow);
  m.seq_fraction_high = sequence(kSeqHigh);
  m.norm_factor = number(factor);
  m.kl = number(-t[kLogRatioIn] / n);
  m.k3_kl = token(kK3In);
  m.chi2_token = number((t[kExcessSquareIn] + 2.0 * t[kExcessIn]) / n);
  m.chi2_seq = sequence(kFar);
  m.training_ppl = sequence(kOldPpl);
  m.training_log_ppl = sequence(kOldLog);
  m.rollout_ppl = sequence(kRolloutPpl);
  m.rollout_log_ppl = sequence(kRolloutLog);
  m.log_ppl_diff = sequence(kDifference);
  m.log_ppl_abs_diff = sequence(kAbsDifference);
  m.log_ppl_diff_min = end(total.least[kDifferenceEnd], t[kDifference]);
  m.log_ppl_diff_max = end(total.most[kDifferenceEnd], t[kDifference]);
  m.ppl_ratio = sequence(kPplRatio);
  m.rejected = token(kRejectedIn);
  m.rejected_sequences = sequence(kTouched);
  m.missing = number(t[kMissingIn]);
  m.sequences = number(t[kSequences]);
  m.tokens = number(t[kTokensIn]);
  return m;
}

}  // namespace
}  // namespace rk
