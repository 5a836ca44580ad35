// Python signature of policy_loss. codes and params are the encoded PolicyLossConfig.
#pragma once
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>

#include "tensor.h"

namespace rk {

// Fills a struct whose fields are all of type T from a tuple or list of the same length, in the
// order of the fields in abi_losses.h.
template <class Fields, class T>
Fields fields_from(pybind11::handle values) {
  static_assert(std::is_standard_layout_v<Fields> && std::is_trivially_copyable_v<Fields>);
  constexpr Py_ssize_t kCount = sizeof(Fields) / sizeof(T);
  if (!PyTuple_Check(values.ptr()) && !PyList_Check(values.ptr()))
    throw pybind11::type_error("codes and params must be tuples or lists");
  if (PySequence_Fast_GET_SIZE(values.ptr()) != kCount)
    throw pybind11::value_error("codes or params: expected " + std::to_string(kCount) +
                                " numbers, got " +
                                std::to_string(PySequence_Fast_GET_SIZE(values.ptr())));
  T numbers[kCount];
  for (Py_ssize_t i = 0; i < kCount; ++i) {
    PyObject* const item = PySequence_Fast_GET_ITEM(values.ptr(), i);
    if constexpr (std::is_integral_v<T>) {
      numbers[i] = static_cast<T>(PyLong_AsLong(item));
    } else {
      numbers[i] = static_cast<T>(PyFloat_AsDouble(item));
    }
  }
  if (PyErr_Occurred()) throw pybind11::error_already_set();
  Fields fields;
  std::memcpy(&fields, numbers, sizeof(fields));
  return fields;
}

inline PolicyConfig policy_config(pybind11::handle codes, pybind11::handle params) {
  return {fields_from<PolicyCodes, int32_t>(codes), fields_from<PolicyParams, float>(params)};
}

template <class Table>
void bind_policy(pybind11::module_& m, Table table) {
  m.def("policy_loss",
        [table](int64_t sequences, int64_t cols, In offsets, In mask, In logprobs, In old_logprobs,
                In advantages, bool advantage_per_sequence, In ref_logprobs, In rollout_logprobs,
                In entropy, In weights, bool weight_per_sequence, double divisor, In normalizer,
                const pybind11::object& codes, const pybind11::object& params, Out loss,
                Out metrics, Out scale, Out grad_logprobs, Out grad_entropy, Exec exec) {
          // One after another, each for all tokens of its row.
          if (advantage_per_sequence) advantages.stride0 = std::exchange(advantages.stride1, 0);
          if (weight_per_sequence) weights.stride0 = std::exchange(weights.stride1, 0);
          const PolicyArgs args{{sequences, cols, offsets, mask},
                                logprobs,
                                old_logprobs,
                                advantages,
                                ref_logprobs,
                                rollout_logprobs,
                                entropy,
                                divisor,
                                normalizer,
                                policy_config(codes, params),
                                static_cast<float*>(loss.data),
                                static_cast<PolicyMetrics*>(metrics.data),
                                static_cast<float*>(scale.data),
                                grad_logprobs,
                                grad_entropy,
                                weights,
                                exec};
          return launch(exec, tokens_of(sequences, cols, offsets),
                        [&] { return table().policy_loss(args); });
        });
}

template <class Table>
void bind_policy_rows(pybind11::module_& m, Table table) {
  m.def("policy_rows",
        [table](InRows logits, In labels, In temperatures, RowOptions options, In old_logprobs,
                In advantages, In ref_logprobs, In rollout_logprobs, In weights,
                const pybind11::object& codes, const pybind11::object& params, Out logprobs,
                Out entropy, OutRows grad_logits, Exec exec) {
          const int64_t tokens = labels.rows * labels.cols;
          const PolicyRowsArgs args{
              tokens,       logits.last,      logits,       labels,
              temperatures, options,          old_logprobs, advantages,
              ref_logprobs, rollout_logprobs, weights,      policy_config(codes, params),
              logprobs,     entropy,          grad_logits,  exec};
          return launch(exec, tokens * logits.last, [&] { return table().policy_rows(args); });
        });
}

template <class Table>
void bind_loss_backward(pybind11::module_& m, Table table) {
  const auto fp32 = [](const Tensor& t) { return static_cast<const float*>(t.data); };
  m.def("loss_backward", [=](int64_t count, In first, In second, In scale, In upstream,
                             Out first_out, Out second_out, Exec exec) {
    const LossBackwardArgs args{count,    fp32(first), fp32(second), fp32(scale),
                                upstream, first_out,   second_out,   exec};
    return launch(exec, count, [&] { return table().loss_backward(args); });
  });
  m.def("scale", [=](int64_t count, Out values, In factor, Exec exec) {
    const ScaleArgs args{count, values, factor, exec};
    return launch(exec, count, [&] { return table().scale(args); });
  });
}

}  // namespace rk
