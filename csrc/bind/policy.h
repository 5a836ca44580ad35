// Python signature of policy_loss. codes and params are PolicyLossConfig's.
#pragma once
#include "tensor.h"

namespace rk {

inline PolicyConfig policy_config(const pybind11::sequence& codes,
                                  const pybind11::sequence& params) {
  if (codes.size() != 8 || params.size() != 16)
    throw pybind11::value_error("policy_loss: codes and params are not those of PolicyLossConfig");
  const auto code = [&](int i) { return codes[i].cast<int32_t>(); };
  const auto param = [&](int i) { return params[i].cast<float>(); };
  return {code(0),  code(1),  code(2),   code(3),   code(4),   code(5),   code(6),   code(7),
          param(0), param(1), param(2),  param(3),  param(4),  param(5),  param(6),  param(7),
          param(8), param(9), param(10), param(11), param(12), param(13), param(14), param(15)};
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
                          static_cast<float*>(metrics.data),
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
