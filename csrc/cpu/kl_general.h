// The divergence of a pair of rows with options: caps, a scale of the reference's logits, the
// policy's entropy, and the generalised Jensen-Shannon divergence
// beta KL(q || m) + (1 - beta) KL(p || m), m = (1 - beta) p + beta q, of policy p and reference q.
// Its terms need the sums of both rows, so it reads a row a second time, from the cache.
#pragma once

namespace rk {
namespace {

enum class Divergence { kReverse, kForward, kMixture };

// The divergence of a row pair and its statistics from its sums.
inline void store_divergence(const KlArgs& a, int64_t row, const PairSums& r) {
  const double inv_t = 1.0 / a.temperature;
  const float minus_inf = -__builtin_inff();
  double kl = __builtin_nan("");
  if (r.p.m != minus_inf && r.q.m != minus_inf) {
    kl = r.p.t / r.p.s * inv_t - (log(r.p.s) - log(r.q.s));
    // A KL divergence is never negative (Gibbs), but rounding may make it so. NaN stays.
    if (kl < 0.0) kl = 0.0;
  }
  static_cast<float*>(a.kl.data)[row] = static_cast<float>(kl);
  float* stats = a.stats + 5 * row;
  const RowSums& policy = a.reverse ? r.p : r.q;
  const RowSums& ref = a.reverse ? r.q : r.p;
  stats[0] = policy.m, stats[1] = static_cast<float>(policy.s);
  stats[2] = ref.m, stats[3] = static_cast<float>(ref.s);
  // The mean difference, not the divergence: the gradient does not need the logarithms, whose
  // difference loses digits by cancellation.
  stats[4] = static_cast<float>(kl != kl ? kl : r.p.t / r.p.s);
}

template <class Args>
inline PairLogit<true> own_logit(const Args& a) {
  return {static_cast<float>(a.options.softcap), 1.0f};
}
template <class Args>
inline PairLogit<true> ref_logit(const Args& a) {
  return {static_cast<float>(a.options.ref_softcap), static_cast<float>(a.options.ref_scale)};
}

// Constants of a row pair from its statistics.
struct PairStatistics {
  Vec m, ref_m, rate, lowest, scale, log_ratio;

  PairStatistics(const float* stats, double temperature) {
    const double inv_t = 1.0 / temperature;
    m = splat(stats[0]), ref_m = splat(stats[2]);
    rate = splat(static_cast<float>(inv_t * kLog2e));
    lowest = splat(static_cast<float>(kExpMin / inv_t));
    scale = splat(static_cast<float>(inv_t));
    log_ratio = splat(static_cast<float>(log(static_cast<double>(stats[1])) -
                                         log(static_cast<double>(stats[3]))));
  }
  // exp(d / T) times a weight, exactly 0 below the range of exp.
  Vec weighted(Vec d, Vec weight) const {
    const Vec e = exp_scaled(max(lowest, d), rate);
    return select_less(d, lowest, splat(0.0f), mul(e, weight));
  }
  // log(p / q) of distances d of p and ref_d of q, finite where a probability is 0.
  Vec log_of_ratio(Vec d, Vec ref_d) const {
    return sub(mul(sub(max(lowest, d), max(lowest, ref_d)), scale), log_ratio);
  }
};

inline Vec inverse(float s) { return splat(static_cast<float>(1.0 / s)); }

// The divergence from a mixture over these columns, from statistics over all of them.
template <class E>
void mixture_row(const KlArgs& a, int64_t row) {
  const int64_t i = row / a.cols, j = row % a.cols;
  const auto *x = row_at<E>(a.logits, i, j), *y = row_at<E>(a.ref_logits, i, j);
  float* stats = a.stats + 5 * row;
  const PairLogit<true> own = own_logit(a), ref = ref_logit(a);
  const PairStatistics pair(stats, a.temperature);
  const Vec weight = inverse(stats[1]), ref_weight = inverse(stats[3]);
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
      const Vec d = sub(own.values(zx), pair.m), ref_d = sub(ref.values(zy), pair.ref_m);
      const auto log_of = mixture_terms(Lanes(pair.log_of_ratio(d, ref_d)), beta, other);
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

template <class E>
void general_kl_row(const KlArgs& a, int64_t row) {
  const int64_t i = row / a.cols, j = row % a.cols;
  const auto *x = row_at<E>(a.logits, i, j), *y = row_at<E>(a.ref_logits, i, j);
  PairRow<true> of_row{1.0 / a.temperature, own_logit(a), ref_logit(a)};
  of_row.own_p = a.reverse;
  if (!a.reverse) {
    const auto* policy = x;
    x = y, y = policy;
    of_row.p = ref_logit(a), of_row.q = own_logit(a);
  }
  const PairSums r = pair_sums<E>(x, y, a.vocab, of_row);
  store_divergence(a, row, r);
  if (a.entropy.given) {
    const RowSums& policy = a.reverse ? r.p : r.q;
    const double h = log(policy.s) - r.u / policy.s * of_row.inv_t;
    static_cast<float*>(a.entropy.data)[row] =
        policy.m == -__builtin_inff() ? __builtin_nanf("") : static_cast<float>(h);
  }
  if (a.options.beta > 0.0) {
    if (r.p.m == -__builtin_inff() || r.q.m == -__builtin_inff()) return;  // NaN already
    mixture_row<E>(a, row);
  }
}

// As kl_backward_row, and of the mixture (1 - beta) p_j (log(p_j / m_j) - KL(p || m)) / T; times
// the slope of the policy's cap.
template <class E, Divergence kKind>
void general_backward_row(const KlBackwardArgs& a, int64_t row) {
  using S = typename E::Storage;
  const int64_t i = row / a.cols, j = row % a.cols;
  const float g = upstream_at(a.grad_kl, i, j);
  S* out = row_at<E>(a.grad_logits, i, j);
  if (g == 0.0f) {
    memset(out, 0, sizeof(S) * static_cast<size_t>(a.vocab));
    return;
  }
  const S *x = row_at<E>(a.logits, i, j), *y = row_at<E>(a.ref_logits, i, j);
  const float* stats = a.stats + 5 * row;
  const PairLogit<true> own = own_logit(a), ref = ref_logit(a);
  const PairStatistics pair(stats, a.temperature);
  const float mean = stats[4];
  // An infinite reverse divergence has a NaN gradient; an infinite forward one has a finite one.
  const float poison = kKind != Divergence::kForward || mean != mean ? mean - mean : 0.0f;
  const double kept = kKind == Divergence::kMixture ? 1.0 - a.options.beta : 1.0;
  const double scaled = g * kept / a.temperature;
  const Vec weight = splat(static_cast<float>(scaled / stats[1] + poison));
  const Vec ref_weight = splat(static_cast<float>(scaled / stats[3] + poison));
  const Vec zero = splat(0.0f), offset = splat(mean);
  const Lanes beta(static_cast<float>(a.options.beta));
  const Lanes other(static_cast<float>(1.0 - a.options.beta));
  const auto gradient = [&](Vec zx, Vec zy) {
    const Logits policy = own(zx);
    const Vec d = sub(policy.z, pair.m), ref_d = sub(ref.values(zy), pair.ref_m);
    const Vec p = mul(pair.weighted(d, weight), policy.slope);
    if constexpr (kKind == Divergence::kForward)
      return sub(p, mul(pair.weighted(ref_d, ref_weight), policy.slope));
    Vec excess = mul(sub(sub(d, ref_d), offset), pair.scale);
    if constexpr (kKind == Divergence::kMixture)
      excess = sub(mixture_terms(Lanes(pair.log_of_ratio(d, ref_d)), beta, other).of_p.v, offset);
    return select_less(d, pair.lowest, zero, mul(p, excess));
  };
  for (int64_t k = 0; k < a.vocab; k += kLanes) {
    if (a.vocab - k >= kLanes) {
      E::store(out + k, gradient(E::load(x + k), E::load(y + k)));
    } else {
      const int n = static_cast<int>(a.vocab - k);
      store_partial<E>(
          out + k, gradient(load_partial<E>(x + k, n, 0.0f), load_partial<E>(y + k, n, 0.0f)), n);
    }
  }
}

}  // namespace
}  // namespace rk
