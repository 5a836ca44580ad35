// The recurrence of the scans, A_t = delta_t + d A_{t+1}, as a suffix scan (Hillis and Steele,
// 1986) over vectors of doubles. The steps of one vector take log2(lanes) multiply-adds, with d,
// d^2 and d^4; one more multiply-add carries in the advantage of the next step. The scan uses
// doubles because a chain of 10^5 additions in fp32 is inaccurate.
#pragma once

namespace rk {
namespace {

// A vector of doubles, with only the operations needed here. Lane 0 is the earliest step.
#if defined(__AVX512F__)

constexpr int kDoubles = 8;
using Doubles = __m512d;

inline Doubles splat(double x) { return _mm512_set1_pd(x); }
inline Doubles load(const double* p) { return _mm512_loadu_pd(p); }
inline Doubles load_doubles(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
inline void store(float* p, Doubles x) { _mm256_storeu_ps(p, _mm512_cvtpd_ps(x)); }
inline Doubles add(Doubles a, Doubles b) { return _mm512_add_pd(a, b); }
inline Doubles sub(Doubles a, Doubles b) { return _mm512_sub_pd(a, b); }
inline Doubles fma(Doubles a, Doubles b, Doubles c) { return _mm512_fmadd_pd(a, b, c); }
inline double first(Doubles x) { return _mm512_cvtsd_f64(x); }
// The vector of steps that begins n steps into x; `after` holds the steps that follow x.
template <int n>
inline Doubles later(Doubles x, Doubles after) {
  return _mm512_castsi512_pd(
      _mm512_alignr_epi64(_mm512_castpd_si512(after), _mm512_castpd_si512(x), n));
}

#elif defined(__AVX2__)

constexpr int kDoubles = 4;
using Doubles = __m256d;

inline Doubles splat(double x) { return _mm256_set1_pd(x); }
inline Doubles load(const double* p) { return _mm256_loadu_pd(p); }
inline Doubles load_doubles(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
inline void store(float* p, Doubles x) { _mm_storeu_ps(p, _mm256_cvtpd_ps(x)); }
inline Doubles add(Doubles a, Doubles b) { return _mm256_add_pd(a, b); }
inline Doubles sub(Doubles a, Doubles b) { return _mm256_sub_pd(a, b); }
inline Doubles fma(Doubles a, Doubles b, Doubles c) { return _mm256_fmadd_pd(a, b, c); }
inline double first(Doubles x) { return _mm256_cvtsd_f64(x); }
template <int n>
inline Doubles later(Doubles x, Doubles after) {
  const Doubles two = _mm256_permute2f128_pd(x, after, 0x21);
  return n == 2 ? two : _mm256_shuffle_pd(x, two, 0x5);
}

#else

// Two vectors of 128 bits.
constexpr int kDoubles = 4;
using Pair = double __attribute__((vector_size(16)));
struct Doubles {
  Pair low, high;
};

inline Doubles splat(double x) { return {Pair{x, x}, Pair{x, x}}; }
inline Doubles load(const double* p) { return {Pair{p[0], p[1]}, Pair{p[2], p[3]}}; }
inline Doubles load_doubles(const float* p) { return {Pair{p[0], p[1]}, Pair{p[2], p[3]}}; }
inline void store(float* p, Doubles x) {
  for (int i = 0; i < 2; ++i) p[i] = static_cast<float>(x.low[i]);
  for (int i = 0; i < 2; ++i) p[2 + i] = static_cast<float>(x.high[i]);
}
inline Doubles add(Doubles a, Doubles b) { return {a.low + b.low, a.high + b.high}; }
inline Doubles sub(Doubles a, Doubles b) { return {a.low - b.low, a.high - b.high}; }
inline Doubles fma(Doubles a, Doubles b, Doubles c) {
  return {a.low * b.low + c.low, a.high * b.high + c.high};
}
inline double first(Doubles x) { return x.low[0]; }
template <int n>
inline Doubles later(Doubles x, Doubles after) {
  if (n == 2) return {x.high, after.low};
  return {Pair{x.low[1], x.high[0]}, Pair{x.high[1], after.low[0]}};
}

#endif

namespace scan {

inline double multiply_add(double a, double b, double c) {
#if defined(__FMA__)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

// The multipliers of a recurrence with the factor d.
struct Factors {
  double gamma, all;
  // d^(lanes), ..., d^2, d: lane by lane, the factor of the advantage that follows the vector.
  double powers[kDoubles];

  Factors(double gamma_, double d) : gamma(gamma_) {
    powers[kDoubles - 1] = d;
    for (int k = kDoubles - 2; k >= 0; --k) powers[k] = powers[k + 1] * d;
    all = powers[0];
  }
  double power(int n) const { return powers[kDoubles - n]; }
};

// Advantage and value of the step that follows.
struct Next {
  double advantage;
  float value;
};

// A vector of steps.
struct Steps {
  Doubles advantage, value;
};

// The suffix scan with one factor: A_t = x_t + d A_{t+1}, last vector first.
struct Chain {
  const Doubles one, two, four, powers;
  const double all;
  // The advantage that follows the next vector.
  double advantage;

  Chain(const Factors& f, double behind)
      : one(splat(f.power(1))),
        two(splat(f.power(2))),
        four(splat(f.power(4))),
        powers(load(f.powers)),
        all(f.all),
        advantage(behind) {}

  Doubles steps(Doubles x) {
    const Doubles zero = splat(0.0);
    x = fma(one, later<1>(x, zero), x);
    x = fma(two, later<2>(x, zero), x);
    if constexpr (kDoubles > 4) x = fma(four, later<4>(x, zero), x);
    const Doubles found = fma(powers, splat(advantage), x);
    advantage = multiply_add(all, advantage, first(x));
    return found;
  }
};

template <bool kValues>
struct Recurrence {
  const Doubles gamma;
  Chain chain;
  // The value that follows the next vector.
  Doubles value;

  Recurrence(const Factors& f, const Next& next)
      : gamma(splat(f.gamma)),
        chain(f, next.advantage),
        value(splat(static_cast<double>(next.value))) {}

  // Rewards, with values the temporal differences; `own` receives the values.
  Doubles differences(const float* rewards, const float* values, Doubles& own) {
    Doubles x = load_doubles(rewards);
    if (kValues) {
      own = load_doubles(values);
      x = sub(fma(gamma, later<1>(own, value), x), own);
      value = own;
    }
    return x;
  }
  Steps steps(const float* rewards, const float* values) {
    Steps s;
    s.advantage = chain.steps(differences(rewards, values, s.value));
    return s;
  }
};

template <bool kValues>
inline void store_steps(const Steps& s, float* advantages, float* returns) {
  if (kValues) {
    store(advantages, s.advantage);
    store(returns, add(s.advantage, s.value));
  } else {
    store(returns, s.advantage);
  }
}

// The recurrence over n steps, last step first. Afterwards `next` describes the first step of the
// full vectors. The first n % kDoubles steps do not fill a vector. Their results are already right,
// as a step does not depend on earlier ones, but the caller must pass these steps again, in a full
// vector together with the steps before them.
template <bool kValues>
inline void recur(const Factors& f, const float* rewards, const float* values, int64_t n,
                  Next& next, float* advantages, float* returns) {
  Recurrence<kValues> recurrence(f, next);
  int64_t k = n - kDoubles;
  for (; k >= 0; k -= kDoubles)
    store_steps<kValues>(recurrence.steps(rewards + k, kValues ? values + k : nullptr),
                         kValues ? advantages + k : nullptr, returns + k);
  const int64_t rest = k + kDoubles;
  if (rest < n) next = {recurrence.chain.advantage, kValues ? values[rest] : 0.0f};
  if (rest > 0) {
    float r[kDoubles] = {}, v[kDoubles] = {}, x[kDoubles], y[kDoubles];
    const size_t bytes = sizeof(float) * static_cast<size_t>(rest);
    memcpy(r + kDoubles - rest, rewards, bytes);
    if (kValues) memcpy(v + kDoubles - rest, values, bytes);
    store_steps<kValues>(recurrence.steps(r, v), x, y);
    if (kValues) memcpy(advantages, x + kDoubles - rest, bytes);
    memcpy(returns, y + kDoubles - rest, bytes);
  }
}

}  // namespace scan
}  // namespace
}  // namespace rk
