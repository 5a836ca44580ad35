// See cuda_runtime.h.
#pragma once
#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "cuda_runtime.h"

struct __half {
  unsigned short bits;
};
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short x) { return {x}; }
#if defined(__F16C__)
inline float __half2float(__half x) { return _cvtsh_ss(x.bits); }
inline __half __float2half_rn(float x) { return {_cvtss_sh(x, 0)}; }
#elif defined(__ARM_FP16_FORMAT_IEEE)
inline float __half2float(__half x) {
  __fp16 y;
  memcpy(&y, &x, 2);
  return y;
}
inline __half __float2half_rn(float x) {
  const __fp16 y = x;
  __half z;
  memcpy(&z, &y, 2);
  return z;
}
#else
#error "needs a CPU that converts to and from 16-bit floats"
#endif
