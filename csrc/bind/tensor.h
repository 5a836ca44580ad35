// Shared by the extension modules: conversion of tensors from Python and of a status to Python.
#pragma once
#include <pybind11/pybind11.h>

#include <utility>

#include "../abi.h"

namespace rk {

template <class F>
inline std::pair<int, long long> without_gil(const F& kernel) {
  pybind11::gil_scoped_release release;
  const Status status = kernel();
  return {status.code, status.position};
}

}  // namespace rk

namespace pybind11::detail {

// From None, or from the tuple (data_ptr, dtype code, stride0, stride1) that
// rlhf_kernels.kernels.native builds.
template <>
struct type_caster<rk::Tensor> {
  PYBIND11_TYPE_CASTER(rk::Tensor, const_name("tuple[int, int, int, int] | None"));

  bool load(handle source, bool) {
    if (source.is_none()) {
      value = rk::Tensor{};
      return true;
    }
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 4) return false;
    const auto item = [&](int i) { return PyLong_AsLongLong(PyTuple_GET_ITEM(source.ptr(), i)); };
    value.given = true;
    value.data = PyLong_AsVoidPtr(PyTuple_GET_ITEM(source.ptr(), 0));
    value.dtype = static_cast<int32_t>(item(1));
    value.stride0 = item(2);
    value.stride1 = item(3);
    if (PyErr_Occurred()) {
      PyErr_Clear();
      return false;
    }
    return true;
  }
};

// From a number of threads, or from the tuple (device, stream, scratch address, scratch tensor) of
// rlhf_kernels.kernels.native.boundary. The tuple holds the tensor only to keep it alive.
template <>
struct type_caster<rk::Exec> {
  PYBIND11_TYPE_CASTER(rk::Exec, const_name("int | tuple[int, int, int, object]"));

  bool load(handle source, bool) {
    value = rk::Exec{};
    if (PyTuple_Check(source.ptr())) {
      if (PyTuple_GET_SIZE(source.ptr()) != 4) return false;
      value.device = static_cast<int32_t>(PyLong_AsLong(PyTuple_GET_ITEM(source.ptr(), 0)));
      value.stream = PyLong_AsVoidPtr(PyTuple_GET_ITEM(source.ptr(), 1));
      value.scratch = PyLong_AsVoidPtr(PyTuple_GET_ITEM(source.ptr(), 2));
    } else {
      value.threads = static_cast<int32_t>(PyLong_AsLong(source.ptr()));
    }
    if (PyErr_Occurred()) {
      PyErr_Clear();
      return false;
    }
    return true;
  }
};

// From the tuple RowOptions of rlhf_kernels/core/row_options.py. Its field `entropy` (2) is not
// used: the entropy tensor is given or not.
template <>
struct type_caster<rk::RowOptions> {
  PYBIND11_TYPE_CASTER(rk::RowOptions, const_name("RowOptions"));

  bool load(handle source, bool) {
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) != 4) return false;
    const auto item = [&](int i) { return PyTuple_GET_ITEM(source.ptr(), i); };
    value.temperature = PyFloat_AsDouble(item(0));
    value.softcap = PyFloat_AsDouble(item(1));
    value.ignore_index = PyLong_AsLongLong(item(3));
    if (PyErr_Occurred()) {
      PyErr_Clear();
      return false;
    }
    return true;
  }
};

}  // namespace pybind11::detail
