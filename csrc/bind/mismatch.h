// Python signature of mismatch_weights. params are the numbers of MismatchParams in their order.
#pragma once
#include "policy.h"
#include "tensor.h"

namespace rk {

template <class Table>
void bind_mismatch(pybind11::module_& m, Table table) {
  m.def("mismatch_weights",
        [table](int64_t sequences, int64_t cols, In offsets, In mask, In old_logprobs,
                In rollout_logprobs, int32_t level, int32_t mode, bool drop, bool normalize,
                const pybind11::object& params, Out weights, Out kept, Out metrics, Exec exec) {
          const MismatchArgs args{{sequences, cols, offsets, mask},
                                  old_logprobs,
                                  rollout_logprobs,
                                  level,
                                  mode,
                                  drop,
                                  normalize,
                                  fields_from<MismatchParams, float>(params),
                                  weights,
                                  kept,
                                  static_cast<MismatchMetrics*>(metrics.data),
                                  exec};
          return launch(exec, tokens_of(sequences, cols, offsets),
                        [&] { return table().mismatch_weights(args); });
        });
}

}  // namespace rk
