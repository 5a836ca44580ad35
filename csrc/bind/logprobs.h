// Python signatures of token_logprobs. `table()` returns the kernels of the backend in use.
#pragma once
#include "tensor.h"

namespace rk {

template <class Table>
void bind_logprobs(pybind11::module_& m, Table table) {
  m.def("token_logprobs",
        [table](InRows logits, In labels, In temperatures, RowOptions options, Out logprobs,
                Out entropy, Out stats, Out collision, Out argmax, Exec exec) {
          const LogprobsArgs args{
              labels.rows,  labels.cols, logits.last, logits,  labels,
              temperatures, options,     logprobs,    entropy, static_cast<float*>(stats.data),
              collision,    argmax,      exec};
          return launch(exec, labels.rows * labels.cols * logits.last,
                        [&] { return table().token_logprobs(args); });
        });
  m.def("token_logprobs_backward",
        [table](InRows logits, In labels, In temperatures, RowOptions options, In stats,
                In grad_logprobs, In grad_entropy, In grad_lse, In grad_collision, In collision,
                OutRows grad_logits, Exec exec) {
          const LogprobsBackwardArgs args{
              labels.rows,    labels.cols,  logits.last, logits,
              labels,         temperatures, options,     static_cast<const float*>(stats.data),
              grad_logprobs,  grad_entropy, grad_logits, grad_lse,
              grad_collision, collision,    exec};
          return launch(exec, labels.rows * labels.cols * logits.last,
                        [&] { return table().token_logprobs_backward(args); });
        });
  m.def("many_logprobs", [table](InRows logits, In tokens, In temperatures, RowOptions options,
                                 Out logprobs, Out entropy, Out stats, Out collision, Out argmax,
                                 InRows labels, int64_t ignore_index, Out of_labels, Exec exec) {
    const LogprobsArgs rows{
        tokens.rows,  tokens.cols, logits.last, logits,  tokens,
        temperatures, options,     logprobs,    entropy, static_cast<float*>(stats.data),
        collision,    argmax,      exec};
    const ManyLabelsArgs args{rows, labels.last, ignore_index, labels,
                              static_cast<float*>(of_labels.data)};
    return launch(exec, tokens.rows * tokens.cols * (logits.last + labels.last),
                  [&] { return table().many_logprobs(args); });
  });
  m.def("many_logprobs_backward", [table](InRows logits, In tokens, In temperatures,
                                          RowOptions options, In stats, In grad_logprobs,
                                          In grad_entropy, In grad_lse, In grad_collision,
                                          In collision, OutRows grad_logits, InRows labels,
                                          int64_t ignore_index, InRows grad_of_labels, Exec exec) {
    const LogprobsBackwardArgs rows{
        tokens.rows,    tokens.cols,  logits.last, logits,
        tokens,         temperatures, options,     static_cast<const float*>(stats.data),
        grad_logprobs,  grad_entropy, grad_logits, grad_lse,
        grad_collision, collision,    exec};
    const ManyLabelsBackwardArgs args{rows, labels.last, ignore_index, labels, grad_of_labels};
    return launch(exec, tokens.rows * tokens.cols * (logits.last + labels.last),
                  [&] { return table().many_logprobs_backward(args); });
  });
}

}  // namespace rk
