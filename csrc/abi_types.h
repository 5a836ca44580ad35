// What every argument struct is made of: dtype codes, strided views, where a call runs, and status.
#pragma once
#include <stdint.h>

// A function of host and device. RK_HD_INLINE: always inlined, so that a compiler contracts
// products and sums of its callers as if its body stood there.
#if defined(__CUDACC__)
#define RK_HD __host__ __device__ __forceinline__
#define RK_HD_INLINE RK_HD
#else
#define RK_HD inline
#define RK_HD_INLINE inline __attribute__((always_inline))
#endif

namespace rk {

enum DType : int32_t {
  kFloat32 = 0,
  kBFloat16 = 1,
  kFloat16 = 2,
  kInt64 = 3,
  kInt32 = 4,
  kBool = 5,
  kFloat64 = 6
};

// A tensor of tokens [rows, cols]. Logits have the vocabulary as a third dimension of stride 1.
struct Tensor {
  void* data = nullptr;
  int32_t dtype = kFloat32;
  int64_t stride0 = 0;
  int64_t stride1 = 0;
  bool given = false;
};

// Where a call runs. CPU: `threads`. CUDA: `stream` (a cudaStream_t) of `device`, and `scratch`,
// whose size in bytes the operation's <name>_scratch function returns.
struct Exec {
  int32_t threads = 1;
  int32_t device = 0;
  void* stream = nullptr;
  void* scratch = nullptr;
};

// Errors that a kernel found in the data. `position` is the flat row-major index of the first one.
enum StatusCode : int32_t {
  kOk = 0,
  kLabelOutOfRange = 1,
  kBadTemperature = 2,
  kBadOffsets = 3,
  kOutOfMemory = 4,
  // For a support, `position` is the index of the entry in indptr or in indices.
  kBadIndptr = 5,
  kIndexOutOfRange = 6,
  kIndexRepeated = 7
};
struct Status {
  int32_t code = kOk;
  int64_t position = -1;
};

}  // namespace rk
