// The part of DLPack 1's C exchange interface that reads a tensor in place. torch.Tensor has it as
// __dlpack_c_exchange_api__ from torch 2.10 on; earlier versions do not.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>

#include "../abi.h"

namespace rk::dlpack {

// Both structs are laid out as DLPack 1 says. `shape` and `strides` belong to the tensor.
struct View {
  void* data;
  int32_t device_type, device_id;
  int32_t dims;
  uint8_t kind, bits;
  uint16_t lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct Exchange {
  uint32_t major, minor;
  const Exchange* older;
  void* other_functions[3];
  // Returns 0, or -1 with a Python exception set. `tensor` must be of the type that has the table.
  int (*view)(void* tensor, View* out);
  void* current_stream;
};

// The table of a tensor type, or null where it has none that we can read.
inline const Exchange* exchange_of(pybind11::handle tensor_type) {
  const auto capsule =
      pybind11::getattr(tensor_type, "__dlpack_c_exchange_api__", pybind11::none());
  if (!PyCapsule_IsValid(capsule.ptr(), "dlpack_exchange_api")) return nullptr;
  const auto* found =
      static_cast<const Exchange*>(PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api"));
  return found->major == 1 && found->view != nullptr ? found : nullptr;
}

// The code in abi.h of a view's dtype, or -1 where no kernel takes it.
inline int32_t dtype_of(const View& v) {
  constexpr uint8_t kInt = 0, kFloat = 2, kBFloat = 4, kBool = 6;
  if (v.lanes != 1) return -1;
  switch (v.kind) {
    case kFloat:
      return v.bits == 32 ? kFloat32 : v.bits == 16 ? kFloat16 : v.bits == 64 ? kFloat64 : -1;
    case kBFloat: return v.bits == 16 ? kBFloat16 : -1;
    case kInt: return v.bits == 64 ? kInt64 : v.bits == 32 ? kInt32 : -1;
    case kBool: return v.bits == 8 ? rk::kBool : -1;
    default: return -1;
  }
}

}  // namespace rk::dlpack
