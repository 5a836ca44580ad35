// What can be asked of CUDA without starting it.
#include "common.cuh"

namespace rk::cuda {

int32_t driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

int32_t runtime_version() {
  int version = 0;
  return cudaRuntimeGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace rk::cuda
