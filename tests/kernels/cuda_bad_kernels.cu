// Sums of gathered rows. The first kernel is as it should be; each of the others has a fault that
// test_cuda_sass.py must find in its machine code. None runs.
#include <stdint.h>

constexpr int kThreads = 256, kRows = 4;

__device__ __forceinline__ int column() { return (blockIdx.x * kThreads + threadIdx.x) * 4; }
__device__ __forceinline__ void add(float4& sum, const float4& x) {
  sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
}
__device__ __forceinline__ void store(float* p, const float4& x) {
  asm volatile("st.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(p), "f"(x.x), "f"(x.y), "f"(x.z),
               "f"(x.w)
               : "memory");
}
// All loads of one kind in flight.
__device__ __forceinline__ float4 sum_of_rows(const float* source, const int* rows, int width) {
  int of[kRows];
  float4 x[kRows], sum = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
  for (int k = 0; k < kRows; ++k) of[k] = rows[k];
#pragma unroll
  for (int k = 0; k < kRows; ++k)
    x[k] = *reinterpret_cast<const float4*>(source + int64_t{of[k]} * width + column());
#pragma unroll
  for (int k = 0; k < kRows; ++k) add(sum, x[k]);
  return sum;
}

__global__ void __launch_bounds__(kThreads)
    good_kernel(const float* source, const int* rows, float* out, int width) {
  store(out + column(), sum_of_rows(source, rows, width));
}

// A column at a time.
__global__ void __launch_bounds__(kThreads)
    splitting_kernel(const float* source, const int* rows, float* out, int width) {
  const float4 sum = sum_of_rows(source, rows, width);
  float* own = out + column();
  own[0] = sum.x, own[1] = sum.y, own[2] = sum.z, own[3] = sum.w;
}

// Each row's number is found at the one before.
__global__ void __launch_bounds__(kThreads)
    waiting_kernel(const float* source, const int* rows, float* out, int width) {
  float4 sum = {0.0f, 0.0f, 0.0f, 0.0f};
  int of = 0;
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    of = rows[of];
    add(sum, *reinterpret_cast<const float4*>(source + int64_t{of} * width + column()));
  }
  store(out + column(), sum);
}

// Rounds a division for every column.
__global__ void __launch_bounds__(kThreads)
    dividing_kernel(const float* source, const int* rows, float* out, int width) {
  float4 x = sum_of_rows(source, rows, width);
  const float by = static_cast<float>(width);
  store(out + column(), {x.x / by, x.y / by, x.z / by, x.w / by});
}

// So many blocks leave 24 registers to a thread.
__global__ void __launch_bounds__(kThreads, 8)
    spilling_kernel(const float* source, const int* rows, float* out, int width) {
  float4 x[kRows * 4];
#pragma unroll
  for (int k = 0; k < kRows * 4; ++k)
    x[k] = *reinterpret_cast<const float4*>(source + int64_t{rows[k]} * width + column());
  __syncthreads();
#pragma unroll
  for (int k = 0; k < kRows * 4; ++k) store(out + int64_t{rows[k]} * width + column(), x[k]);
}
