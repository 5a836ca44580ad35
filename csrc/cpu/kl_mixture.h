// The generalised Jensen-Shannon divergence beta KL(q || m) + (1 - beta) KL(p || m),
// m = (1 - beta) p + beta q, of policy p and reference q. Its terms need the sums of both rows, so
// a row is read a second time, from the cache.
#pragma once

namespace rk {
namespace {

// Constants of a row pair from its statistics.
struct PairStatistics {
  Vec m, ref_m, rate, lowest, scale;

  PairStatistics(const float* stats, double temperature) {
    const double inv_t = 1.0 / temperature;
    m = splat(stats[0]), ref_m = splat(stats[2]);
    rate = splat(static_cast<float>(inv_t * kLog2e));
    lowest = splat(static_cast<float>(kExpMin / inv_t));
    scale = splat(static_cast<float>(inv_t));
  }
  // exp(d / T) times a weight.
  Vec term(Vec d, Vec weight) const { return mul(exp_scaled(max(lowest, d), rate), weight); }
  // x, but exactly 0 where d is below the range of exp.
  Vec kept(Vec d, Vec x) const { return select_less(d, lowest, splat(0.0f), x); }
  Vec weighted(Vec d, Vec weight) const { return kept(d, term(d, weight)); }
  // log(p / q) of distances d of p and ref_d of q, finite where a probability is 0; log_ratio is
  // that of both sums.
  Vec log_of_ratio(Vec d, Vec ref_d, Vec log_ratio) const {
    return sub(mul(sub(max(lowest, d), max(lowest, ref_d)), scale), log_ratio);
  }
};

// The logarithm of the ratio of a row pair's sums.
inline Vec log_ratio_of(const float* stats) {
  return splat(
      static_cast<float>(log(static_cast<double>(stats[1])) - log(static_cast<double>(stats[3]))));
}
inline Vec inverse(float s) { return splat(static_cast<float>(1.0 / s)); }

// The divergence from a mixture over these columns, from statistics over all of them.
template <class E>
void mixture_row(const KlArgs& a, int64_t row) {
  const int64_t i = row / a.cols, j = row % a.cols;
  const auto *x = row_at<E>(a.logits, i, j), *y = row_at<E>(a.ref_logits, i, j);
  float* stats = a.stats + 5 * row;
  const PairLogits<true> of(a.options);
  const PairStatistics pair(stats, a.temperature);
  const Vec weight = inverse(stats[1]), ref_weight = inverse(stats[3]);
  const Vec log_ratio = log_ratio_of(stats);
  const Lanes beta(static_cast<float>(a.options.beta));
  const Lanes other(static_cast<float>(1.0 - a.options.beta));
  // Of a block in fp32, over blocks in double.
  double of_p = 0.0, of_q = 0.0;
  for (int64_t start = 0; start < a.vocab; start += kPairBlock) {
    const int64_t end = a.vocab - start < kPairBlock ? a.vocab : start + kPairBlock;
    Vec sum_p = splat(0.0f), sum_q = splat(0.0f);
    for (int64_t k = start; k < end; k += kLanes) {
      const int n = end - k < kLanes ? static_cast<int>(end - k) : kLanes;
      const Vec zx = n == kLanes ? E::load(x + k) : load_partial<E>(x + k, n, 0.0f);
      const Vec zy = n == kLanes ? E::load(y + k) : load_partial<E>(y + k, n, 0.0f);
      const Vec d = sub(of.own.values(zx), pair.m), ref_d = sub(of.ref.values(zy), pair.ref_m);
      const auto log_of = mixture_terms(Lanes(pair.log_of_ratio(d, ref_d, log_ratio)), beta, other);
      Vec term_p = mul(pair.weighted(d, weight), log_of.of_p.v);
      Vec term_q = mul(pair.weighted(ref_d, ref_weight), log_of.of_q.v);
      if (n < kLanes) {
        term_p = keep_first(term_p, n, 0.0f);
        term_q = keep_first(term_q, n, 0.0f);
      }
      sum_p = add(sum_p, term_p);
      sum_q = add(sum_q, term_q);
    }
    of_p += reduce_add(sum_p);
    of_q += reduce_add(sum_q);
  }
  const double value = a.options.beta * of_q + (1.0 - a.options.beta) * of_p;
  // No divergence is negative, but rounding may make it so. NaN stays.
  static_cast<float*>(a.kl.data)[row] = static_cast<float>(value < 0.0 ? 0.0 : value);
  stats[4] = static_cast<float>(of_p);
}

}  // namespace
}  // namespace rk
