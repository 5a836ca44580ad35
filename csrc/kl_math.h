// Terms of the generalised Jensen-Shannon divergence. V is as in exp_math.h; it also has
// exponent(x), the integral floor(log2 x) of normal x > 0.
#pragma once
#include <string.h>

#include "exp_math.h"

namespace rk {
namespace {

RK_HD float exponent(float x) {
#if defined(__CUDA_ARCH__)
  return static_cast<float>((__float_as_int(x) >> 23) - 127);
#else
  int32_t bits;
  memcpy(&bits, &x, 4);
  return static_cast<float>((bits >> 23) - 127);
#endif
}

// log(1 + v) for v in (-1, 0] and `sum` = 1 + v, rounded on its own, so that neither end loses
// digits. Cephes' polynomial; within 2 units in the last place.
template <class V>
RK_HD_INLINE V log_of_sum(V v, V sum) {
  const V n = exponent(sum * V(1.41421356f));
  // The mantissa is within sqrt(0.5) and sqrt(2). Where it is the sum itself, v has more digits.
  const V x = select_less(n, V(-0.5f), scale2(sum, -n) - V(1.0f), v);
  const V z = x * x;
  V q(7.0376836292e-2f);
  q = fma(q, x, V(-1.1514610310e-1f));
  q = fma(q, x, V(1.1676998740e-1f));
  q = fma(q, x, V(-1.2420140846e-1f));
  q = fma(q, x, V(1.4249322787e-1f));
  q = fma(q, x, V(-1.6668057665e-1f));
  q = fma(q, x, V(2.0000714765e-1f));
  q = fma(q, x, V(-2.4999993993e-1f));
  q = fma(q, x, V(3.3333331174e-1f));
  q = fma(n, V(-2.12194440e-4f), q * x * z);
  return fma(n, V(0.693359375f), x + fma(V(-0.5f), z, q));
}

// With m = (1 - beta) p + beta q: log(p / m) and log(q / m).
template <class V>
struct MixtureTerms {
  V of_p, of_q;
};

// From d = log(p / q); `other` is 1 - beta. The mixture is taken relative to the larger of p and q,
// so nothing overflows, and the terms are as accurate as d where it is small.
template <class V>
RK_HD_INLINE MixtureTerms<V> mixture_terms(V d, V beta, V other) {
  const V zero(0.0f), a = -min(V(80.0f), abs(d));
  // Of the smaller one, and of the larger one.
  const V c = select_less(d, zero, other, beta), rest = select_less(d, zero, beta, other);
  const ExpParts<V> p = exp_parts(a);
  const V log_m = log_of_sum(c * p.em1, fma(c, p.e, rest));
  // log of m over the larger one is log_m.
  return {select_less(d, zero, d - log_m, -log_m), select_less(d, zero, -log_m, -log_m - d)};
}

}  // namespace
}  // namespace rk
