// Python signatures of token_logprobs over a support.
#pragma once
#include "tensor.h"

namespace rk {

template <class Table>
void bind_support(pybind11::module_& m, Table table) {
  const auto fp32 = [](const Tensor& t) { return static_cast<float*>(t.data); };
  m.def("support_logprobs", [=](int64_t rows, int64_t cols, int64_t vocab, int64_t width,
                                Tensor logits, Tensor weight, Tensor bias, Tensor labels,
                                Tensor temperatures, int64_t entries, Tensor indptr, Tensor indices,
                                RowOptions options, Tensor logprobs, Tensor entropy, Tensor stats,
                                Tensor kept, Exec exec) {
    const SupportArgs args{rows,    cols,     vocab,   width,        logits,
                           weight,  bias,     labels,  temperatures, {entries, indptr, indices},
                           options, logprobs, entropy, fp32(stats),  fp32(kept),
                           exec};
    return without_gil([&] { return table().support_logprobs(args); });
  });
  m.def("support_backward", [=](int64_t rows, int64_t cols, int64_t vocab, Tensor labels,
                                Tensor temperatures, int64_t entries, Tensor indptr, Tensor indices,
                                RowOptions options, Tensor stats, Tensor kept, Tensor grad_logprobs,
                                Tensor grad_entropy, Tensor dz, Tensor grad_logits, Exec exec) {
    const SupportBackwardArgs args{rows,          cols,         vocab,
                                   labels,        temperatures, {entries, indptr, indices},
                                   options,       fp32(stats),  fp32(kept),
                                   grad_logprobs, grad_entropy, fp32(dz),
                                   grad_logits,   exec};
    return without_gil([&] { return table().support_backward(args); });
  });
  m.def("support_head_backward",
        [=](int64_t rows, int64_t cols, int64_t vocab, int64_t width, Tensor hidden, Tensor weight,
            int64_t entries, Tensor indptr, Tensor indices, Tensor dz, Tensor grad_hidden,
            Tensor grad_weight, Tensor grad_bias, Tensor starts, Tensor uses, Tensor order,
            Tensor owner, Exec exec) {
          const SupportHeadArgs args{rows,
                                     cols,
                                     vocab,
                                     width,
                                     hidden,
                                     weight,
                                     {entries, indptr, indices},
                                     fp32(dz),
                                     grad_hidden,
                                     grad_weight,
                                     grad_bias,
                                     static_cast<int64_t*>(starts.data),
                                     static_cast<SupportUse*>(uses.data),
                                     static_cast<const int64_t*>(order.data),
                                     static_cast<const int64_t*>(owner.data),
                                     exec};
          return without_gil([&] { return table().support_head_backward(args); });
        });
}

}  // namespace rk
