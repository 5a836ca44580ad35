// The part of DLPack 1's C exchange interface that reads a tensor in place. torch.Tensor has it as
// __dlpack_c_exchange_api__ in torch 2.13. Where a tensor lacks it, its Python attributes are read.
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

// torch as rlhf_kernels/kernels/native/boundary.py tells of it. `exchange` is null where this torch
// has no such interface.
struct Torch {
  PyTypeObject *tensor = nullptr, *parameter = nullptr;
  const Exchange* exchange = nullptr;
};
inline Torch& torch() {
  static Torch found;
  return found;
}

inline void learn(pybind11::type tensor, pybind11::type parameter) {
  torch().tensor = reinterpret_cast<PyTypeObject*>(tensor.inc_ref().ptr());
  torch().parameter = reinterpret_cast<PyTypeObject*>(parameter.inc_ref().ptr());
  torch().exchange = nullptr;
  constexpr auto kName = "dlpack_exchange_api";
  const auto table = pybind11::getattr(tensor, "__dlpack_c_exchange_api__", pybind11::none());
  if (!PyCapsule_IsValid(table.ptr(), kName)) return;
  const auto* found = static_cast<const Exchange*>(PyCapsule_GetPointer(table.ptr(), kName));
  if (found->major == 1 && found->view != nullptr) torch().exchange = found;
}

// False where torch does not have the interface, or does not describe this object by it: a fake or
// sparse tensor, say. Needs the GIL.
inline bool view(pybind11::handle object, View* out) {
  if (torch().exchange == nullptr || !PyObject_TypeCheck(object.ptr(), torch().tensor))
    return false;
  if (torch().exchange->view(object.ptr(), out) == 0) return true;
  PyErr_Clear();
  return false;
}

enum Kind : uint8_t { kInt = 0, kUInt = 1, kFloat = 2, kBFloat = 4, kTruth = 6 };

// The code in abi_types.h of a view's dtype, or -1 where no kernel takes it.
inline int32_t dtype_of(const View& v) {
  if (v.lanes != 1) return -1;
  switch (v.kind) {
    case kFloat:
      return v.bits == 32 ? kFloat32 : v.bits == 16 ? kFloat16 : v.bits == 64 ? kFloat64 : -1;
    case kBFloat: return v.bits == 16 ? kBFloat16 : -1;
    case kInt: return v.bits == 64 ? kInt64 : v.bits == 32 ? kInt32 : -1;
    case kTruth: return v.bits == 8 ? kBool : -1;
    default: return -1;
  }
}

}  // namespace rk::dlpack
