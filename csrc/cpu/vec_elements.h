// Single elements of any floating dtype, from and to float. Rounding is to the nearest, ties to
// even.
#pragma once
#include <stdint.h>
#include <string.h>

#include "../abi.h"

namespace rk {
namespace {

inline float bf16_to_float(uint16_t h) {
  const uint32_t u = static_cast<uint32_t>(h) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

inline uint16_t float_to_bf16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40u);
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

inline float half_to_float(uint16_t h) {
  // Shift the 15 value bits into a float and scale by 2^112: exact, denormals included.
  uint32_t u = static_cast<uint32_t>(h & 0x7fffu) << 13;
  if ((h & 0x7c00u) == 0x7c00u) {
    u |= 0x7f800000u;
  } else {
    float f;
    memcpy(&f, &u, 4);
    f *= 0x1p112f;
    memcpy(&u, &f, 4);
  }
  u |= static_cast<uint32_t>(h & 0x8000u) << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

inline uint16_t float_to_half(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  const uint16_t sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return sign | 0x7e00u;
  if (u >= 0x477ff000u) return sign | 0x7c00u;  // rounds to 65536 or more
  if (u < 0x38800000u) {
    // Denormal half: adding 0.5 puts the value, rounded to even, into the low bits.
    float a;
    memcpy(&a, &u, 4);
    a += 0.5f;
    memcpy(&u, &a, 4);
    return sign | static_cast<uint16_t>(u - 0x3f000000u);
  }
  return sign | static_cast<uint16_t>((u - 0x38000000u + 0xfffu + ((u >> 13) & 1u)) >> 13);
}

// Reads one element of any floating dtype; for the few places that need single values.
inline float load_scalar(const void* data, int32_t dtype, int64_t index) {
  switch (dtype) {
    case kBFloat16: return bf16_to_float(static_cast<const uint16_t*>(data)[index]);
    case kFloat16: return half_to_float(static_cast<const uint16_t*>(data)[index]);
    default: return static_cast<const float*>(data)[index];
  }
}

}  // namespace
}  // namespace rk
