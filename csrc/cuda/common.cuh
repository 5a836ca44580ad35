// What all CUDA kernels share: launching, element types, 16-byte loads, reductions in fixed order.
//
// Bits must not depend on the batch or on the layout of a tensor. So work is cut into tiles by the
// vocabulary (or the length) alone, a thread owns the same columns whether or not they can be
// loaded 16 bytes at a time, and every reduction is a tree over thread indices.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include <stdexcept>
#include <string>
#include <type_traits>

#include "../abi.h"
#include "../policy_math.h"
#include "kernels.h"

// The tests' emulator defines it otherwise: a launch is the one CUDA construct that is not C++.
#ifndef RK_LAUNCH
#define RK_LAUNCH(kernel, blocks, threads, stream, ...) \
  (kernel)<<<blocks, threads, 0, stream>>>(__VA_ARGS__)
#endif

namespace rk::cuda {
namespace {

constexpr int kWarp = 32;
constexpr float kLog2e = 1.44269504f, kLn2 = 0.69314718f;
// exp of anything less is below the normal floats and counts as zero.
constexpr float kLowest = -87.0f;
// Temperatures and all other options are smaller.

inline void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::string message = std::string("rlhf_kernels: CUDA error: ") + cudaGetErrorString(error);
  if (error == cudaErrorNoKernelImageForDevice)
    message += "; rebuild with RLHF_KERNELS_CUDA_ARCHS naming this device's compute capability";
  throw std::runtime_error(message);
}

// Makes a call's device current, and the one before current again.
class OnDevice {
 public:
  explicit OnDevice(const Exec& exec) {
    check(cudaGetDevice(&before_));
    if (before_ != exec.device) check(cudaSetDevice(exec.device));
    changed_ = before_ != exec.device;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

inline int64_t ceil_div(int64_t size, int64_t part) { return (size + part - 1) / part; }

// Grids are one-dimensional: 2^31 - 1 blocks are more than memory holds rows.
inline unsigned grid_size(int64_t blocks) {
  if (blocks > 0x7fffffff)
    throw std::runtime_error(
        "rlhf_kernels: too many rows for one launch: " + std::to_string(blocks) + " blocks");
  return static_cast<unsigned>(blocks);
}

// RK_ENQUEUE(exec, blocks, threads, kernel, arguments): on the call's stream, errors thrown. A
// shard of the vocabulary may be empty: then there are no blocks.
#define RK_ENQUEUE(exec, blocks, threads, kernel, ...)                \
  do {                                                                \
    if ((blocks) == 0) break;                                         \
    RK_LAUNCH(kernel, ::rk::cuda::grid_size(blocks), threads,         \
              static_cast<cudaStream_t>((exec).stream), __VA_ARGS__); \
    ::rk::cuda::check(cudaGetLastError());                            \
  } while (0)

// The larger; NaN if either is.
__device__ __forceinline__ float max_nan(float a, float b) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
#else
  return a > b || a != a ? a : b;
#endif
}
// The smaller; likewise.
__device__ __forceinline__ float min_nan(float a, float b) { return -max_nan(-a, -b); }

// ---- Elements -----------------------------------------------------------------------------------

// A 32-bit register holds one element of 4 bytes or two of 2, the first in its lower half.
// `larger` works element by element and gives NaN only if both are NaN; `larger_nan` and
// `smaller_nan` give NaN if either is.
template <class E>
constexpr int kPerWord = 4 / sizeof(typename E::Storage);

struct F32 {
  using Storage = float;
  static constexpr int32_t kDType = kFloat32;
  static constexpr float kLeast = -3.40282347e38f;
  static __device__ __forceinline__ float get(float x) { return x; }
  static __device__ __forceinline__ float put(float x) { return x; }
  static __device__ __forceinline__ uint32_t word(const float (&x)[1]) {
    return __float_as_uint(x[0]);
  }
  static __device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
    return __float_as_uint(fmaxf(__uint_as_float(a), __uint_as_float(b)));
  }
  static __device__ __forceinline__ uint32_t larger_nan(uint32_t a, uint32_t b) {
    return __float_as_uint(max_nan(__uint_as_float(a), __uint_as_float(b)));
  }
  static __device__ __forceinline__ uint32_t smaller_nan(uint32_t a, uint32_t b) {
    return __float_as_uint(min_nan(__uint_as_float(a), __uint_as_float(b)));
  }
};

// An instruction on both halves of a register, and its form for the emulator.
#if defined(__CUDA_ARCH__)
#define RK_HALVES(operation, kind, a, b, emulated)            \
  uint32_t y;                                                 \
  asm(operation " %0, %1, %2;" : "=r"(y) : kind(a), kind(b)); \
  return y
#else
#define RK_HALVES(operation, kind, a, b, emulated) return emulated
#endif
// f applied to each half.
template <class E, class F>
__device__ __forceinline__ uint32_t by_halves(uint32_t a, uint32_t b, const F& f) {
  const auto half = [&](int shift) {
    return static_cast<uint32_t>(E::put(
        f(E::get(static_cast<uint16_t>(a >> shift)), E::get(static_cast<uint16_t>(b >> shift)))));
  };
  return half(0) | half(16) << 16;
}

// As bits: the compiler keeps two to a register.
struct BF16 {
  using Storage = uint16_t;
  static constexpr int32_t kDType = kBFloat16;
  static constexpr float kLeast = -3.38953139e38f;
  static __device__ __forceinline__ float get(Storage x) {
    return __uint_as_float(static_cast<uint32_t>(x) << 16);
  }
  static __device__ __forceinline__ Storage put(float x) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(x));
  }
  static __device__ __forceinline__ uint32_t word(const float (&x)[2]) {
    RK_HALVES("cvt.rn.bf16x2.f32", "f", x[1], x[0], put(x[0]) | uint32_t{put(x[1])} << 16);
  }
  static __device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
    RK_HALVES("max.bf16x2", "r", a, b, by_halves<BF16>(a, b, fmaxf));
  }
  static __device__ __forceinline__ uint32_t larger_nan(uint32_t a, uint32_t b) {
    RK_HALVES("max.NaN.bf16x2", "r", a, b, by_halves<BF16>(a, b, max_nan));
  }
  static __device__ __forceinline__ uint32_t smaller_nan(uint32_t a, uint32_t b) {
    RK_HALVES("min.NaN.bf16x2", "r", a, b, by_halves<BF16>(a, b, min_nan));
  }
};
struct F16 {
  using Storage = uint16_t;
  static constexpr int32_t kDType = kFloat16;
  static constexpr float kLeast = -65504.0f;
  static __device__ __forceinline__ float get(Storage x) {
    return __half2float(__ushort_as_half(x));
  }
  static __device__ __forceinline__ Storage put(float x) {
    return __half_as_ushort(__float2half_rn(x));
  }
  static __device__ __forceinline__ uint32_t word(const float (&x)[2]) {
    RK_HALVES("cvt.rn.f16x2.f32", "f", x[1], x[0], put(x[0]) | uint32_t{put(x[1])} << 16);
  }
  static __device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b) {
    RK_HALVES("max.f16x2", "r", a, b, by_halves<F16>(a, b, fmaxf));
  }
  static __device__ __forceinline__ uint32_t larger_nan(uint32_t a, uint32_t b) {
    RK_HALVES("max.NaN.f16x2", "r", a, b, by_halves<F16>(a, b, max_nan));
  }
  static __device__ __forceinline__ uint32_t smaller_nan(uint32_t a, uint32_t b) {
    RK_HALVES("min.NaN.f16x2", "r", a, b, by_halves<F16>(a, b, min_nan));
  }
};

inline int64_t element_size(int32_t dtype) {
  switch (dtype) {
    case kInt64:
    case kFloat64: return 8;
    case kFloat32:
    case kInt32: return 4;
    case kBool: return 1;
    default: return 2;
  }
}

// f(E{}) for the element type of a floating dtype.
template <class F>
void for_dtype(int32_t dtype, const F& f) {
  switch (dtype) {
    case kBFloat16: return f(BF16{});
    case kFloat16: return f(F16{});
    default: return f(F32{});
  }
}

// f(E{}, O{}) for the element types of logits and of their gradient: alike, or bf16 from fp32.
template <class F>
void for_gradient(int32_t logits, int32_t gradient, const F& f) {
  if (logits == gradient)
    for_dtype(logits, [&](auto element) { f(element, element); });
  else if (logits == kFloat32 && gradient == kBFloat16)
    f(F32{}, BF16{});
  else
    throw std::runtime_error("rlhf_kernels: no kernel for a gradient of this dtype");
}

// f(std::true_type{}) or f(std::false_type{}): an option that is a template parameter.
template <class F>
void for_flag(bool flag, const F& f) {
  flag ? f(std::true_type{}) : f(std::false_type{});
}

// ---- Tokens -------------------------------------------------------------------------------------

// Element offset of token `row` of the grid [rows, cols] of `t`.
__device__ __forceinline__ int64_t token_at(const Tensor& t, int64_t row, int64_t cols) {
  // A 64-bit division takes a hundred instructions.
  if (((row | cols) >> 32) == 0) {
    const uint32_t r = static_cast<uint32_t>(row), c = static_cast<uint32_t>(cols);
    return (r / c) * t.stride0 + (r % c) * t.stride1;
  }
  return row / cols * t.stride0 + row % cols * t.stride1;
}

// Whether the tokens of the grid lie at equal distances, one row behind the other.
inline bool evenly_spaced(const Tensor& t, int64_t rows, int64_t cols) {
  return !t.given || rows <= 1 || t.stride0 == cols * t.stride1;
}

// As token_at; without its division where the host has found the tokens evenly spaced.
template <bool kEven>
__device__ __forceinline__ int64_t token_at(const Tensor& t, int64_t row, int64_t cols) {
  return kEven ? row * t.stride1 : token_at(t, row, cols);
}

// A number of any floating dtype as fp32.
__device__ __forceinline__ float load_float(const Tensor& t, int64_t at) {
  switch (t.dtype) {
    case kFloat32: return static_cast<const float*>(t.data)[at];
    case kBFloat16: return BF16::get(static_cast<const uint16_t*>(t.data)[at]);
    case kFloat16: return F16::get(static_cast<const uint16_t*>(t.data)[at]);
    default: return static_cast<float>(static_cast<const double*>(t.data)[at]);
  }
}

__device__ __forceinline__ void store_float(const Tensor& t, int64_t at, float x) {
  switch (t.dtype) {
    case kFloat32: static_cast<float*>(t.data)[at] = x; break;
    case kBFloat16: static_cast<uint16_t*>(t.data)[at] = BF16::put(x); break;
    case kFloat16: static_cast<uint16_t*>(t.data)[at] = F16::put(x); break;
    default: static_cast<double*>(t.data)[at] = x;
  }
}

// An integer of any dtype that abi_types.h has.
__device__ __forceinline__ int64_t load_integer(const Tensor& t, int64_t at) {
  switch (t.dtype) {
    case kInt64: return static_cast<const int64_t*>(t.data)[at];
    case kInt32: return static_cast<const int32_t*>(t.data)[at];
    default: return static_cast<const uint8_t*>(t.data)[at];
  }
}

// ---- 16-byte loads and stores -------------------------------------------------------------------

template <class E>
constexpr int kWidth = 16 / sizeof(typename E::Storage);

// 16 bytes of elements, in registers.
template <class E>
struct Pack {
  uint32_t words[4];

  __device__ __forceinline__ float get(int i) const {
    if constexpr (sizeof(typename E::Storage) == 4)
      return __uint_as_float(words[i]);
    else
      return E::get(static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16)));
  }
  __device__ __forceinline__ void set(int i, typename E::Storage x) {
    if constexpr (sizeof(typename E::Storage) == 4) {
      words[i] = __float_as_uint(x);
    } else {
      const int shift = i % 2 * 16;
      words[i / 2] = (words[i / 2] & ~(0xffffu << shift)) | (static_cast<uint32_t>(x) << shift);
    }
  }
  __device__ __forceinline__ typename E::Storage item(int i) const {
    if constexpr (sizeof(typename E::Storage) == 4)
      return __uint_as_float(words[i]);
    else
      return static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
  }
  __device__ __forceinline__ void load(const void* p) {
    const uint4 v = *static_cast<const uint4*>(p);
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
  }
  __device__ __forceinline__ void store(void* p) const {
#if defined(__CUDA_ARCH__)
    // The compiler splits an assignment into four stores of 4 bytes on some architectures.
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(words[0]), "r"(words[1]),
                 "r"(words[2]), "r"(words[3])
                 : "memory");
#else
    *static_cast<uint4*>(p) = make_uint4(words[0], words[1], words[2], words[3]);
#endif
  }
};

// Bytes by which `p` lies behind a multiple of 16.
__device__ __forceinline__ uint32_t misaligned(const void* p) {
  return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(p)) & 15;
}

// ---- Arithmetic ---------------------------------------------------------------------------------

// 2^x, within 2 units in the last place; 0 below the normal floats.
__device__ __forceinline__ float exp2_fast(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return x < -126.0f ? 0.0f : exp2f(x);
#endif
}

// 1 / x, within a unit in the last place; 0 below the normal floats.
__device__ __forceinline__ float reciprocal_fast(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

// tanh(u) and its slope, without cancellation at either end.
struct TanhParts {
  float value, slope;
};
__device__ __forceinline__ TanhParts tanh_parts(float u) {
  const ExpParts<float> p = exp_parts(-2.0f * min(40.0f, abs(u)));
  const float r = 1.0f / (1.0f + p.e);
  // A NaN passes both comparisons.
  const float value = u < 0.0f ? p.em1 * r : (u >= 0.0f ? -p.em1 * r : u);
  return {value, u == u ? 4.0f * p.e * r * r : u};
}

struct Sum {
  template <class T>
  __device__ __forceinline__ T operator()(T a, T b) const {
    return a + b;
  }
};
// The larger; a NaN only if both are.
struct Max {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};
struct MaxNan {
  __device__ __forceinline__ float operator()(float a, float b) const { return max_nan(a, b); }
};

// A warp's reduction, in every lane; all lanes take part.
template <class T, class Op>
__device__ __forceinline__ T warp_reduce(T x, Op op) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    x = op(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

// A block's reduction, in every thread. `shared` holds one T per warp; a barrier must come before
// its next use.
template <int kThreads, class T, class Op>
__device__ __forceinline__ T block_reduce(T x, Op op, T* shared) {
  constexpr int kWarps = kThreads / kWarp;
  x = warp_reduce(x, op);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  __syncthreads();
  x = shared[0];
#pragma unroll
  for (int w = 1; w < kWarps; ++w) x = op(x, shared[w]);
  return x;
}

}  // namespace
}  // namespace rk::cuda
