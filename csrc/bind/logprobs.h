// Python signatures of token_logprobs. `table()` returns the kernels of the backend in use.
#pragma once
#include "tensor.h"

namespace rk {

template <class Table>
void bind_logprobs(pybind11::module_& m, Table table) {
  m.def("token_logprobs", [table](int64_t rows, int64_t cols, int64_t vocab, Tensor logits,
                                  Tensor labels, Tensor temperatures, RowOptions options,
                                  Tensor logprobs, Tensor entropy, Tensor stats, Exec exec) {
    const LogprobsArgs args{
        rows,         cols,    vocab,    logits,  labels,
        temperatures, options, logprobs, entropy, static_cast<float*>(stats.data),
        exec};
    return without_gil([&] { return table().token_logprobs(args); });
  });
  m.def("token_logprobs_backward",
        [table](int64_t rows, int64_t cols, int64_t vocab, Tensor logits, Tensor labels,
                Tensor temperatures, RowOptions options, Tensor stats, Tensor grad_logprobs,
                Tensor grad_entropy, Tensor grad_logits, Exec exec) {
          const LogprobsBackwardArgs args{
              rows,          cols,         vocab,       logits,
              labels,        temperatures, options,     static_cast<const float*>(stats.data),
              grad_logprobs, grad_entropy, grad_logits, exec};
          return without_gil([&] { return table().token_logprobs_backward(args); });
        });
}

}  // namespace rk
