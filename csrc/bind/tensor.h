// Shared by the extension modules: conversion of tensors from Python and of a status to Python.
#pragma once
#include <pybind11/pybind11.h>

#include <string>
#include <utility>

#include "../abi.h"
#include "dlpack.h"

namespace rk {

// What native code is given of a tensor of torch. An input that does not lie as a kernel reads it
// is copied, and the copy lives until the call returns; an output must lie so.
enum class Layout { kGrid, kRows };
template <Layout kLayout, bool kInput>
struct Argument : Tensor {
  // The tokens as a grid, and the size of the dimension after them: the vocabulary of kRows.
  int64_t rows = 0, cols = 0, last = 1;
};
using In = Argument<Layout::kGrid, true>;
using InRows = Argument<Layout::kRows, true>;
using Out = Argument<Layout::kGrid, false>;
using OutRows = Argument<Layout::kRows, false>;

// Work of this many elements takes microseconds at most: less than other threads would gain from
// the GIL.
constexpr int64_t kShortWork = 1 << 14;

// Runs a kernel over so many elements. On a GPU always without the GIL, as torch's own operators:
// a launch waits where the stream's queue is full, and what is in it may be a function of the host
// that needs the GIL.
template <class F>
inline std::pair<int, long long> launch(const Exec& exec, int64_t elements, const F& kernel) {
  Status status;
  if (exec.threads > 0 && elements <= kShortWork) {
    status = kernel();
  } else {
    pybind11::gil_scoped_release release;
    status = kernel();
  }
  return {status.code, status.position};
}

// Tokens of a loss: of padded sequences, or packed with offsets.
inline int64_t tokens_of(int64_t sequences, int64_t cols, const Tensor& offsets) {
  return offsets.given ? cols : sequences * cols;
}

// What a torch.Tensor is, without torch's headers: by torch's DLPack interface where it has one,
// which takes a tenth of the time, else by the tensor's attributes. Needs the GIL.
class TensorView {
 public:
  static constexpr int kMaxDims = 64;

  explicit TensorView(pybind11::handle tensor) : tensor_(tensor) {
    if (!read_view()) read_attributes();
    for (int i = 0; i < dims_; ++i) numel_ *= shape_[i];
  }
  // `shape_` may point into the object.
  TensorView(const TensorView&) = delete;

  int dims() const { return dims_; }
  // From the end: 1 is the last dimension.
  int64_t size(int from_end) const { return shape_[dims_ - from_end]; }
  int64_t stride(int from_end) const { return strides_[dims_ - from_end]; }

  // The product of the sizes before the last `trailing`.
  int64_t count(int trailing) const {
    int64_t product = 1;
    for (int i = 0; i < dims_ - trailing; ++i) product *= shape_[i];
    return product;
  }

  bool contiguous() const {
    int64_t expected = 1;
    for (int i = dims_ - 1; i >= 0 && numel_ > 0; --i) {
      if (shape_[i] == 1) continue;
      if (strides_[i] != expected) return false;
      expected *= shape_[i];
    }
    return true;
  }

  // The stride of the dimensions before the last `trailing` as one; false where they are not one.
  bool leading(int trailing, int64_t* stride) const {
    bool found = false;
    int64_t expected = 0;
    *stride = 0;
    for (int i = dims_ - trailing - 1; i >= 0; --i) {
      if (shape_[i] == 1) continue;
      if (!found) {
        *stride = strides_[i];
      } else if (strides_[i] != expected) {
        return false;
      }
      found = true;
      expected = strides_[i] * shape_[i];
    }
    return true;
  }

  bool negative() const { return call(names().is_neg).ptr() == Py_True; }
  pybind11::object resolve_neg() const { return call(names().resolve_neg); }
  pybind11::object contiguous_copy() const { return call(names().contiguous); }

  // Dtype and address; a tensor without memory is refused.
  void describe(Tensor* value) const {
    value->given = true;
    value->dtype = dtype_ >= 0 ? dtype_ : dtype_by_attribute();
    value->data = dtype_ >= 0 ? data_ : address_by_attribute();
    if (value->data == nullptr && numel_ > 0)
      throw pybind11::value_error("tensor has no memory (fake or meta tensor)");
  }

  // torch's types of tensors, and its dtypes by their codes in abi_types.h.
  static void learn_torch(const pybind11::type& tensor, const pybind11::type& parameter,
                          const pybind11::dict& dtypes) {
    dlpack::learn(tensor, parameter);
    for (const auto& [dtype, code] : dtypes) {
      const auto i = code.template cast<size_t>();
      if (i >= kDtypes) throw pybind11::value_error("dtype code beyond those of abi_types.h");
      known_dtypes()[i] = dtype.inc_ref().ptr();
    }
  }

 private:
  static constexpr size_t kDtypes = kFloat64 + 1;

  struct Names {
    PyObject* shape = PyUnicode_InternFromString("shape");
    PyObject* stride = PyUnicode_InternFromString("stride");
    PyObject* dtype = PyUnicode_InternFromString("dtype");
    PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
    PyObject* is_neg = PyUnicode_InternFromString("is_neg");
    PyObject* resolve_neg = PyUnicode_InternFromString("resolve_neg");
    PyObject* contiguous = PyUnicode_InternFromString("contiguous");
  };
  // Interning keeps the GIL, so that no other thread can wait here for it.
  static const Names& names() {
    static const Names found;
    return found;
  }
  static PyObject** known_dtypes() {
    static PyObject* found[kDtypes] = {};
    return found;
  }

  bool read_view() {
    dlpack::View view;
    if (!dlpack::view(tensor_, &view)) return false;
    dtype_ = dlpack::dtype_of(view);
    data_ = static_cast<char*>(view.data) + view.byte_offset;
    dims_ = view.dims;
    shape_ = view.shape;
    strides_ = view.strides;
    return true;
  }
  void read_attributes() {
    const auto shape = owned(PyObject_GetAttr(tensor_.ptr(), names().shape));
    const auto strides = call(names().stride);
    dims_ = integers(shape, own_shape_);
    if (integers(strides, own_strides_) != dims_)
      throw pybind11::value_error("strides of no shape");
    shape_ = own_shape_;
    strides_ = own_strides_;
  }
  int32_t dtype_by_attribute() const {
    return code_of(owned(PyObject_GetAttr(tensor_.ptr(), names().dtype)));
  }
  void* address_by_attribute() const {
    void* const found = PyLong_AsVoidPtr(call(names().data_ptr).ptr());
    if (found == nullptr && PyErr_Occurred()) throw pybind11::error_already_set();
    return found;
  }

  static pybind11::object owned(PyObject* result) {
    if (result == nullptr) throw pybind11::error_already_set();
    return pybind11::reinterpret_steal<pybind11::object>(result);
  }
  pybind11::object call(PyObject* method) const {
    PyObject* self[] = {tensor_.ptr()};
    return owned(PyObject_VectorcallMethod(method, self, 1, nullptr));
  }
  static int integers(const pybind11::object& tuple, int64_t* out) {
    if (!PyTuple_Check(tuple.ptr())) throw pybind11::type_error("expected a Tensor");
    const auto count = PyTuple_GET_SIZE(tuple.ptr());
    if (count > kMaxDims) throw pybind11::value_error("tensor of more than 64 dimensions");
    for (Py_ssize_t i = 0; i < count; ++i) {
      out[i] = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple.ptr(), i));
      if (out[i] == -1 && PyErr_Occurred()) throw pybind11::error_already_set();
    }
    return static_cast<int>(count);
  }
  static int32_t code_of(const pybind11::object& dtype) {
    for (size_t i = 0; i < kDtypes; ++i)
      if (known_dtypes()[i] == dtype.ptr()) return static_cast<int32_t>(i);
    throw pybind11::type_error("no kernel takes a tensor of " + std::string(pybind11::str(dtype)));
  }

  pybind11::handle tensor_;
  int dims_ = 0;
  int32_t dtype_ = -1;
  void* data_ = nullptr;
  int64_t numel_ = 1;
  const int64_t *shape_ = nullptr, *strides_ = nullptr;
  int64_t own_shape_[kMaxDims], own_strides_[kMaxDims];
};

// Strides of tokens [...] as a grid: the last dimension is cols, the others are rows; 0 for one
// that is not there. False where that takes a copy.
inline bool grid_strides(const TensorView& t, Tensor* value) {
  const int dims = t.dims();
  if (t.contiguous()) {
    value->stride0 = dims > 1 ? t.size(1) : 0;
    value->stride1 = dims > 0 ? 1 : 0;
    return true;
  }
  value->stride1 = t.stride(1);
  return t.leading(1, &value->stride0);
}

// The same of rows [..., V], with unit stride over V: their strides are those of the grid before.
inline bool row_strides(const TensorView& t, Tensor* value) {
  if (t.dims() == 0) throw pybind11::value_error("rows of no dimension");
  if (t.stride(1) != 1 && t.size(1) > 1) return false;
  value->stride1 = t.dims() > 1 ? t.stride(2) : 0;
  return t.leading(2, &value->stride0);
}

template <Layout kLayout, bool kInput>
inline bool describe(const TensorView& t, Argument<kLayout, kInput>* value) {
  constexpr bool kOfRows = kLayout == Layout::kRows;
  if (kOfRows ? !row_strides(t, value) : !grid_strides(t, value)) return false;
  constexpr int kTrailing = kOfRows ? 2 : 1;
  value->rows = t.count(kTrailing);
  value->cols = t.dims() >= kTrailing ? t.size(kTrailing) : 1;
  if (kOfRows) value->last = t.size(1);
  t.describe(value);
  return true;
}

}  // namespace rk

namespace pybind11::detail {

template <rk::Layout kLayout, bool kInput>
struct type_caster<rk::Argument<kLayout, kInput>> {
  using Value = rk::Argument<kLayout, kInput>;
  PYBIND11_TYPE_CASTER(Value, const_name("torch.Tensor | None"));

  bool load(handle source, bool) {
    value = Value{};
    if (source.is_none()) return true;
    const rk::TensorView tensor(source);
    const bool negative = tensor.negative();
    if (!negative && rk::describe(tensor, &value)) return true;
    if (!kInput) throw value_error("a result's memory is not as the kernel writes it");
    copy_ = negative ? tensor.resolve_neg() : tensor.contiguous_copy();
    const rk::TensorView plain(copy_);
    if (rk::describe(plain, &value)) return true;
    copy_ = plain.contiguous_copy();
    return rk::describe(rk::TensorView(copy_), &value);
  }

 private:
  object copy_;
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
      value.threads = 0;
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

// From the tuple RowOptions of rlhf_kernels/core/row_options.py. Kernels use neither `entropy` (2),
// as the entropy tensor is given or not, nor what lies beyond `ignore_index` (3).
template <>
struct type_caster<rk::RowOptions> {
  PYBIND11_TYPE_CASTER(rk::RowOptions, const_name("RowOptions"));

  bool load(handle source, bool) {
    if (!PyTuple_Check(source.ptr()) || PyTuple_GET_SIZE(source.ptr()) < 4) return false;
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
