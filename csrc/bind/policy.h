// Python signature of policy_loss. codes and params are the encoded PolicyLossConfig.
#pragma once
#include <cstring>
#include <type_traits>

#include "tensor.h"

namespace rk {

// Fills a struct whose fields are all of type T from a sequence of the same length, in the order of
// the fields in abi.h.
template <class Fields, class T>
Fields fields_from(const pybind11::sequence& values) {
  static_assert(std::is_standard_layout_v<Fields> && std::is_trivially_copyable_v<Fields>);
  constexpr size_t kCount = sizeof(Fields) / sizeof(T);
  if (values.size() != kCount)
    throw pybind11::value_error("policy_loss: codes and params are not those of PolicyLossConfig");
  T numbers[kCount];
  for (size_t i = 0; i < kCount; ++i) numbers[i] = values[i].template cast<T>();
  Fields fields;
  std::memcpy(&fields, numbers, sizeof(fields));
  return fields;
}

inline PolicyConfig policy_config(const pybind11::sequence& codes,
                                  const pybind11::sequence& params) {
  return {fields_from<PolicyCodes, int32_t>(codes), fields_from<PolicyParams, float>(params)};
}

template <class Table>
void bind_policy(pybind11::module_& m, Table table) {
  m.def("policy_loss", [table](int64_t sequences, int64_t cols, Tensor offsets, Tensor mask,
                               Tensor logprobs, Tensor old_logprobs, Tensor advantages,
                               Tensor ref_logprobs, Tensor rollout_logprobs, Tensor entropy,
                               double divisor, Tensor normalizer, const pybind11::sequence& codes,
                               const pybind11::sequence& params, Tensor loss, Tensor metrics,
                               Tensor scale, Tensor grad_logprobs, Tensor grad_entropy, Exec exec) {
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
                          exec};
    return without_gil([&] { return table().policy_loss(args); });
  });
}

template <class Table>
void bind_loss_backward(pybind11::module_& m, Table table) {
  const auto fp32 = [](const Tensor& t) { return static_cast<const float*>(t.data); };
  m.def("loss_backward", [=](int64_t count, Tensor first, Tensor second, Tensor scale,
                             Tensor upstream, Tensor first_out, Tensor second_out, Exec exec) {
    const LossBackwardArgs args{count,    fp32(first), fp32(second), fp32(scale),
                                upstream, first_out,   second_out,   exec};
    return without_gil([&] { return table().loss_backward(args); });
  });
}

}  // namespace rk
