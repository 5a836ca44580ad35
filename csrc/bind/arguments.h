// A look at the arguments of a call that finds most of them good, so that they need no check one by
// one.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>

#include "dlpack.h"

namespace rk {

inline bool is_of_kind(const dlpack::View& v, char kind) {
  const bool integer = v.kind == dlpack::kInt;
  switch (kind) {
    case 'f':
    case 'r':
      return v.lanes == 1 && ((v.kind == dlpack::kFloat && (v.bits == 32 || v.bits == 16)) ||
                              (v.kind == dlpack::kBFloat && v.bits == 16));
    case 'l': return v.lanes == 1 && integer && (v.bits == 64 || v.bits == 32);
    case 'm':
      return v.lanes == 1 &&
             (integer || v.kind == dlpack::kTruth || (v.kind == dlpack::kUInt && v.bits == 8));
    default: return false;
  }
}

// Whether all tensors are strided torch.Tensors of one shape and device, each of the kind that its
// letter says: `f` floating, of a dtype that kernels take; `l` labels, of 32 or 64 bits; `m` a
// mask, bool or integer; `r` rows of logits, which have a dimension more. A capital allows None,
// but not for the first. False also where this torch does not tell, or for a tensor without memory,
// as torch.func.functionalize makes them.
inline bool plain(const pybind11::str& kinds, const pybind11::args& tensors) {
  Py_ssize_t count = 0;
  const char* const letters = PyUnicode_AsUTF8AndSize(kinds.ptr(), &count);
  if (letters == nullptr) throw pybind11::error_already_set();
  if (static_cast<size_t>(count) != tensors.size() || count == 0) return false;
  dlpack::View first;
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* const t = PyTuple_GET_ITEM(tensors.ptr(), i);
    const bool optional = letters[i] >= 'A' && letters[i] <= 'Z';
    if (t == Py_None && optional && i > 0) continue;
    if (Py_TYPE(t) != dlpack::torch().tensor && Py_TYPE(t) != dlpack::torch().parameter)
      return false;
    dlpack::View v;
    const char kind = optional ? static_cast<char>(letters[i] - 'A' + 'a') : letters[i];
    if (!dlpack::view(t, &v) || !is_of_kind(v, kind)) return false;
    if (kind == 'r' && --v.dims < 0) return false;
    if (i == 0) first = v;
    if (v.dims != first.dims || !std::equal(v.shape, v.shape + v.dims, first.shape)) return false;
    if (v.device_type != first.device_type || v.device_id != first.device_id) return false;
    const bool empty = std::find(v.shape, v.shape + v.dims, 0) != v.shape + v.dims;
    if (v.data == nullptr && !empty) return false;
  }
  return true;
}

}  // namespace rk
