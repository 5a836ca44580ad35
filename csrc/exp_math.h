// Exponentials that keep their digits, and the estimates of a KL divergence from them. V is float
// (CUDA and scalar code) or a vector of floats (cpu/tokens.h) with + - * /, unary -, a constructor
// from float and overloads of the float functions below. max and min return a NaN in their second
// argument.
#pragma once
#include "math.h"

namespace rk {
namespace {

RK_HD float select_less(float a, float b, float yes, float no) { return a < b ? yes : no; }
RK_HD float max(float a, float b) { return a > b ? a : b; }
RK_HD float min(float a, float b) { return a < b ? a : b; }
RK_HD float abs(float a) { return fabsf(a); }
RK_HD float fma(float a, float b, float c) {
#if defined(__CUDACC__) || defined(__FMA__)
  return fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
// x * 2^n for integral n in [-126, 127]
RK_HD float scale2(float x, float n) {
#if defined(__CUDA_ARCH__)
  return x * __int_as_float((static_cast<int>(n) + 127) << 23);
#else
  return ldexpf(x, static_cast<int>(n));
#endif
}

template <class V>
RK_HD V clamp(V x, V low, V high) {
  return min(high, max(low, x));
}

// The integer nearest to x * factor.
template <class V>
RK_HD_INLINE V nearest(V x, V factor) {
  const V magic(12582912.0f);  // 1.5 * 2^23
  return fma(x, factor, magic) - magic;
}

// x = n ln 2 + f with integral n, as parts of exp(f): m1 = exp(f) - 1 and mx = exp(f) - 1 - f.
template <class V>
struct ReducedExp {
  V n, m1, mx;
};

// exp(f) = 1 + f + f^2 q(f), with q a minimax polynomial of degree 5 (relative error 1e-8).
template <class V>
RK_HD_INLINE ReducedExp<V> reduced_exp(V x) {
  const V n = nearest(x, V(1.44269504f));
  // ln 2 in two parts; the first has so few bits that its product with n is exact.
  const V f = fma(n, V(2.12194440e-4f), fma(n, V(-0.693359375f), x));
  V q(1.9899517e-4f);
  q = fma(q, f, V(1.3933830e-3f));
  q = fma(q, f, V(8.3332984e-3f));
  q = fma(q, f, V(4.1666463e-2f));
  q = fma(q, f, V(1.6666667e-1f));
  q = fma(q, f, V(0.5f));
  const V mx = f * f * q;
  return {n, f + mx, mx};
}

// exp(x), exp(x) - 1 and exp(x) - 1 - x for |x| <= 80; NaN for NaN; exactly 1, 0, 0 at x = 0.
// exp is within 1.5 units in the last place. The other two are as accurate for |x| < ln(2) / 2, and
// never worse than torch.expm1(x) - x.
template <class V>
struct ExpParts {
  V e, em1, em1mx;
};

template <class V>
RK_HD ExpParts<V> exp_parts(V x) {
  const ReducedExp<V> r = reduced_exp(x);
  const V s = scale2(V(1.0f), r.n);
  const V em1 = fma(s, r.m1, s - V(1.0f));
  // n is 0 exactly where |n| < 1.
  return {fma(s, r.m1, s), em1, select_less(abs(r.n), V(0.5f), r.mx, em1 - x)};
}

// Estimate of the KL divergence and its slope, from x = logprob - ref_logprob.
struct KlPenalty {
  float value, slope;
};
RK_HD KlPenalty kl_penalty_term(float x, int32_t estimator) {
  // kl_estimate is inaccurate for small |x|, exp_parts for large |x|.
  if (estimator != kK3 || abs(x) > 80.0f)
    return {kl_estimate(x, estimator), kl_estimate_slope(x, estimator)};
  const ExpParts<float> p = exp_parts(-x);
  return {p.em1mx, -p.em1};
}

}  // namespace
}  // namespace rk
