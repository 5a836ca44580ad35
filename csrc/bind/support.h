// Python signatures of token_logprobs over a support.
#pragma once
#include "tensor.h"

namespace rk {

template <class Table>
void bind_support(pybind11::module_& m, Table table) {
  const auto fp32 = [](const Tensor& t) { return static_cast<float*>(t.data); };
  m.def("support_logprobs", [=](int64_t rows, int64_t cols, int64_t vocab, int64_t width,
                                InRows logits, InRows weight, In bias, In labels, In temperatures,
                                int64_t entries, In indptr, In indices, RowOptions options,
                                Out logprobs, Out entropy, Out stats, Out kept, Exec exec) {
    const SupportArgs args{rows,    cols,     vocab,   width,        logits,
                           weight,  bias,     labels,  temperatures, {entries, indptr, indices},
                           options, logprobs, entropy, fp32(stats),  fp32(kept),
                           exec};
    return launch(exec, rows * cols + entries * (weight.given ? width : 1),
                  [&] { return table().support_logprobs(args); });
  });
  m.def("support_backward",
        [=](int64_t rows, int64_t cols, int64_t vocab, In labels, In temperatures, int64_t entries,
            In indptr, In indices, RowOptions options, In stats, In kept, In grad_logprobs,
            In grad_entropy, Out dz, OutRows grad_logits, Exec exec) {
          const SupportBackwardArgs args{rows,          cols,         vocab,
                                         labels,        temperatures, {entries, indptr, indices},
                                         options,       fp32(stats),  fp32(kept),
                                         grad_logprobs, grad_entropy, fp32(dz),
                                         grad_logits,   exec};
          return launch(exec, rows * cols * vocab + entries,
                        [&] { return table().support_backward(args); });
        });
  m.def("support_head_backward",
        [=](int64_t rows, int64_t cols, int64_t vocab, int64_t width, InRows hidden, InRows weight,
            int64_t entries, In indptr, In indices, In dz, OutRows grad_hidden, OutRows grad_weight,
            Out grad_bias, Out starts, Out uses, In order, In owner, Exec exec) {
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
          return launch(exec, entries * width + vocab,
                        [&] { return table().support_head_backward(args); });
        });
}

}  // namespace rk
