// A vector of floats as wide as the instruction set of this translation unit, with only the
// operations that the kernels need. Partial loads and stores (n < kLanes) use the same arithmetic
// as full ones, so an element's value does not depend on where its row ends.
#pragma once
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "vec_elements.h"

namespace rk {
namespace {

#if defined(__AVX512F__)

constexpr int kLanes = 16;
using Vec = __m512;

inline Vec splat(float x) { return _mm512_set1_ps(x); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec fms(Vec a, Vec b, Vec c) { return _mm512_fmsub_ps(a, b, c); }
// Keeps a NaN in b but not in a. Callers pass the data as b where NaN must survive.
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
inline Vec abs(Vec a) { return _mm512_abs_ps(a); }
// where(a < b, yes, no)
inline Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
}
// x * 2^n for integral n in [-126, 127]
inline Vec scale2(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }
// floor(log2 x) of normal x > 0
inline Vec exponent(Vec x) { return _mm512_getexp_ps(x); }

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
inline Vec load_bf16(const uint16_t* p) {
  const __m512i w = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(w, 16));
}
inline Vec load_half(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline __m256i pack_bf16(Vec x) {
  const __m512i u = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  r = _mm512_mask_mov_epi32(r, nan, _mm512_or_si512(u, _mm512_set1_epi32(0x400000)));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
}
inline void store_bf16(uint16_t* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), pack_bf16(x));
}
inline void store_half(uint16_t* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

#elif defined(__AVX2__)

constexpr int kLanes = 8;
using Vec = __m256;

inline Vec splat(float x) { return _mm256_set1_ps(x); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec fms(Vec a, Vec b, Vec c) { return _mm256_fmsub_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }
inline Vec abs(Vec a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline Vec select_less(Vec a, Vec b, Vec yes, Vec no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
inline Vec scale2(Vec x, Vec n) {
  const __m256i e =
      _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(x, _mm256_castsi256_ps(e));
}
inline Vec exponent(Vec x) {
  const __m256i e = _mm256_srai_epi32(_mm256_castps_si256(x), 23);
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(e, _mm256_set1_epi32(127)));
}

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
inline Vec load_bf16(const uint16_t* p) {
  const __m256i w = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(w, 16));
}
inline Vec load_half(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store_bf16(uint16_t* p, Vec x) {
  const __m256i u = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  r = _mm256_blendv_epi8(r, _mm256_or_si256(u, _mm256_set1_epi32(0x400000)), nan);
  r = _mm256_srli_epi32(r, 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline void store_half(uint16_t* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

#else

// GCC and Clang vectors of 128 bits: SSE2 on x86, NEON on Arm.
constexpr int kLanes = 4;
using Vec = float __attribute__((vector_size(16)));
using VecI = int32_t __attribute__((vector_size(16)));

inline Vec splat(float x) { return Vec{x, x, x, x}; }
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec sub(Vec a, Vec b) { return a - b; }
inline Vec mul(Vec a, Vec b) { return a * b; }
inline Vec div(Vec a, Vec b) { return a / b; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec fms(Vec a, Vec b, Vec c) { return a * b - c; }
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }
inline Vec abs(Vec a) { return reinterpret_cast<Vec>(reinterpret_cast<VecI>(a) & 0x7fffffff); }
inline Vec select_less(Vec a, Vec b, Vec yes, Vec no) { return a < b ? yes : no; }
inline Vec scale2(Vec x, Vec n) {
  return x * reinterpret_cast<Vec>((__builtin_convertvector(n, VecI) + 127) << 23);
}
inline Vec exponent(Vec x) {
  return __builtin_convertvector((reinterpret_cast<VecI>(x) >> 23) - 127, Vec);
}

inline Vec load(const float* p) {
  Vec x;
  memcpy(&x, p, sizeof x);
  return x;
}
inline void store(float* p, Vec x) { memcpy(p, &x, sizeof x); }
inline Vec load_bf16(const uint16_t* p) {
  return Vec{bf16_to_float(p[0]), bf16_to_float(p[1]), bf16_to_float(p[2]), bf16_to_float(p[3])};
}
inline Vec load_half(const uint16_t* p) {
  return Vec{half_to_float(p[0]), half_to_float(p[1]), half_to_float(p[2]), half_to_float(p[3])};
}
inline void store_bf16(uint16_t* p, Vec x) {
  for (int i = 0; i < kLanes; ++i) p[i] = float_to_bf16(x[i]);
}
inline void store_half(uint16_t* p, Vec x) {
  for (int i = 0; i < kLanes; ++i) p[i] = float_to_half(x[i]);
}

#endif

// Element types: each defines how its elements are read and written. All arithmetic is fp32.
struct F32 {
  using Storage = float;
  static Vec load(const float* p) { return rk::load(p); }
  static void store(float* p, Vec x) { rk::store(p, x); }
  static float get(const float* p) { return *p; }
  static void set(float* p, float x) { *p = x; }
};
struct BF16 {
  using Storage = uint16_t;
  static Vec load(const uint16_t* p) { return load_bf16(p); }
  static void store(uint16_t* p, Vec x) { store_bf16(p, x); }
  static float get(const uint16_t* p) { return bf16_to_float(*p); }
  static void set(uint16_t* p, float x) { *p = float_to_bf16(x); }
};
struct F16 {
  using Storage = uint16_t;
  static Vec load(const uint16_t* p) { return load_half(p); }
  static void store(uint16_t* p, Vec x) { store_half(p, x); }
  static float get(const uint16_t* p) { return half_to_float(*p); }
  static void set(uint16_t* p, float x) { *p = float_to_half(x); }
};

template <class E>
inline Vec load_partial(const typename E::Storage* p, int n, float fill) {
  float buffer[kLanes];
  for (int i = 0; i < kLanes; ++i) buffer[i] = i < n ? E::get(p + i) : fill;
  return load(buffer);
}

template <class E>
inline void store_partial(typename E::Storage* p, Vec x, int n) {
  float buffer[kLanes];
  store(buffer, x);
  for (int i = 0; i < n; ++i) E::set(p + i, buffer[i]);
}

// x where keep is 1, else 0, selected by bits. Compilers turn a conditional on floats into a
// branch, which masks mispredict, or do not vectorise the loop.
inline float keep_or_zero(uint8_t keep, float x) {
  uint32_t a;
  memcpy(&a, &x, 4);
  a &= -static_cast<uint32_t>(keep);
  memcpy(&x, &a, 4);
  return x;
}

// Stores the lanes whose byte in `keep` is not 0 contiguously at p, where kLanes may be written.
// Returns their number.
inline int compress(float* p, Vec x, const uint8_t* keep) {
#if defined(__AVX512F__)
  const __m128i flags = _mm_loadu_si128(reinterpret_cast<const __m128i*>(keep));
  const __mmask16 mask = _mm_test_epi8_mask(flags, flags);
  store(p, _mm512_maskz_compress_ps(mask, x));
  return __builtin_popcount(mask);
#else
  float lanes[kLanes];
  store(lanes, x);
  int count = 0;
  for (int i = 0; i < kLanes; ++i) {
    p[count] = lanes[i];
    count += keep[i] != 0;
  }
  return count;
#endif
}

// The inverse of compress: kept lanes come from p, where kLanes may be read; the others are 0.
inline int expand(const float* p, const uint8_t* keep, float* out) {
#if defined(__AVX512F__)
  const __m128i flags = _mm_loadu_si128(reinterpret_cast<const __m128i*>(keep));
  const __mmask16 mask = _mm_test_epi8_mask(flags, flags);
  store(out, _mm512_maskz_expand_ps(mask, load(p)));
  return __builtin_popcount(mask);
#else
  int count = 0;
  for (int i = 0; i < kLanes; ++i) {
    out[i] = keep_or_zero(keep[i] != 0, p[count]);
    count += keep[i] != 0;
  }
  return count;
#endif
}

// Prefetches the cache lines of `vectors` vectors at p. Never faults: p may be past the end.
template <class E, int vectors>
inline void prefetch(const typename E::Storage* p) {
  constexpr int kBytes = vectors * kLanes * static_cast<int>(sizeof(*p));
  for (int b = 0; b < kBytes; b += 64) __builtin_prefetch(reinterpret_cast<const char*>(p) + b);
}

// Calls f(E{}) with the element type of a floating dtype.
template <class F>
inline auto for_dtype(int32_t dtype, const F& f) {
  switch (dtype) {
    case kBFloat16: return f(BF16{});
    case kFloat16: return f(F16{});
    default: return f(F32{});
  }
}

// Prefetches upcoming lines of a stream that is now at p into the L2 cache, which can have more
// outstanding misses than L1. kStore: the lines will be written.
template <class E, int vectors, bool kStore = false>
inline void prefetch_ahead(const typename E::Storage* p) {
  constexpr int kAhead = 2048, kBytes = vectors * kLanes * static_cast<int>(sizeof(*p));
  for (int b = 0; b < kBytes; b += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(p) + kAhead + b, kStore, 2);
}

// The first n lanes of x; the other lanes are `fill`.
inline Vec keep_first(Vec x, int n, float fill) {
  float buffer[kLanes];
  store(buffer, x);
  for (int i = n; i < kLanes; ++i) buffer[i] = fill;
  return load(buffer);
}

// Reductions over lanes, in a fixed order.
inline float reduce_max(Vec x) {
  float v[kLanes];
  store(v, x);
  float r = v[0];
  for (int i = 1; i < kLanes; ++i) r = v[i] > r ? v[i] : r;
  return r;
}
// The sum in double, by four interleaved accumulators (vectors of doubles where available).
inline double reduce_add(Vec x) {
  float v[kLanes];
  store(v, x);
  double s[4] = {};
  for (int i = 0; i < kLanes; i += 4)
    for (int j = 0; j < 4; ++j) s[j] += v[i + j];
  return (s[0] + s[1]) + (s[2] + s[3]);
}

constexpr float kLog2e = 1.44269504088896341f;
// exp(kExpMin) is the smallest normal float; kernels treat exp of smaller arguments as zero.
constexpr float kExpMin = -87.3365447f;

// exp(d * rate / log2e) for d * rate in [-126, 0]; NaN for NaN. Computed as 2^n times a degree-5
// minimax polynomial of the fraction (relative error 9.2e-8); its constant term is 1, so exp(0) is
// exactly 1. `rate` is log2(e) / temperature, so the temperature costs no instruction.
inline Vec exp_scaled(Vec d, Vec rate) {
  const Vec magic = splat(12582912.0f);  // 1.5 * 2^23 rounds to the nearest integer
  const Vec n = sub(fma(d, rate, magic), magic);
  const Vec f = fms(d, rate, n);
  Vec p = splat(0.001326469937339425f);
  p = fma(p, f, splat(0.009671509265899658f));
  p = fma(p, f, splat(0.05550733953714371f));
  p = fma(p, f, splat(0.24022242426872253f));
  p = fma(p, f, splat(0.6931470036506653f));
  p = fma(p, f, splat(1.0f));
  return scale2(p, n);
}

// tanh, with relative error below 2e-7, and its derivative. With e = exp(-2|x|), tanh is an odd
// polynomial below 0.625 and (1 - e) / (1 + e) above. The derivative 1 - tanh^2 is
// 4 e / (1 + e)^2, which is accurate where tanh is close to 1.
struct TanhSlope {
  Vec value, slope;
};
inline TanhSlope tanh_slope(Vec x) {
  const Vec a = abs(x);
  const Vec z = mul(x, x);
  Vec p = splat(-5.70498872745e-3f);
  p = fma(p, z, splat(2.06390887954e-2f));
  p = fma(p, z, splat(-5.37397155531e-2f));
  p = fma(p, z, splat(1.33314422036e-1f));
  p = fma(p, z, splat(-3.33332819422e-1f));
  const Vec small = fma(mul(p, z), x, x);
  // Clamped to the range of exp_scaled; tanh(x) is 1 in fp32 for x > 40. max keeps a NaN in its
  // second argument.
  const Vec e = exp_scaled(max(splat(-80.0f), mul(splat(-2.0f), a)), splat(kLog2e));
  const Vec one = splat(1.0f), inverse = div(one, add(one, e));
  const Vec big = mul(sub(one, e), inverse);
  const Vec signed_big = select_less(x, splat(0.0f), sub(splat(0.0f), big), big);
  return {select_less(a, splat(0.625f), small, signed_big),
          mul(mul(splat(4.0f), e), mul(inverse, inverse))};
}

inline Vec tanh(Vec x) { return tanh_slope(x).value; }

}  // namespace
}  // namespace rk
