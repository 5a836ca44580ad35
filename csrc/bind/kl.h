// Python signatures of kl_divergence and kl_penalty.
#pragma once
#include <tuple>

#include "tensor.h"

namespace rk {

// The fields of PairOptions in their order.
using Pair = std::tuple<double, double, double, double>;
inline PairOptions pair_options(const Pair& options) {
  return std::apply([](auto... x) { return PairOptions{x...}; }, options);
}

template <class Table>
void bind_kl(pybind11::module_& m, Table table) {
  m.def("kl_divergence", [table](InRows logits, InRows ref_logits, double temperature, bool reverse,
                                 const Pair& options, Out kl, Out stats, Out entropy, Exec exec) {
    const KlArgs args{logits.rows,
                      logits.cols,
                      logits.last,
                      logits,
                      ref_logits,
                      temperature,
                      reverse,
                      kl,
                      static_cast<float*>(stats.data),
                      exec,
                      pair_options(options),
                      entropy};
    return launch(exec, logits.rows * logits.cols * logits.last,
                  [&] { return table().kl_divergence(args); });
  });
  m.def("kl_divergence_backward",
        [table](InRows logits, InRows ref_logits, double temperature, bool reverse,
                const Pair& options, In stats, In grad_kl, OutRows grad_logits, Exec exec) {
          const KlBackwardArgs args{
              logits.rows, logits.cols, logits.last, logits,
              ref_logits,  temperature, reverse,     static_cast<const float*>(stats.data),
              grad_kl,     grad_logits, exec,        pair_options(options)};
          return launch(exec, logits.rows * logits.cols * logits.last,
                        [&] { return table().kl_divergence_backward(args); });
        });
  m.def("kl_penalty", [table](In logprobs, In ref_logprobs, int32_t estimator, Out out, Exec exec) {
    const KlPenaltyArgs args{
        logprobs.rows, logprobs.cols, logprobs, ref_logprobs, estimator, false, {}, out, exec};
    return launch(exec, logprobs.rows * logprobs.cols, [&] { return table().kl_penalty(args); });
  });
  m.def("kl_penalty_backward", [table](In logprobs, In ref_logprobs, int32_t estimator,
                                       bool straight_through, In grad, Out out, Exec exec) {
    const KlPenaltyArgs args{logprobs.rows,    logprobs.cols, logprobs, ref_logprobs, estimator,
                             straight_through, grad,          out,      exec};
    return launch(exec, logprobs.rows * logprobs.cols,
                  [&] { return table().kl_penalty_backward(args); });
  });
}

}  // namespace rk
