// Python signature of value_loss.
#pragma once
#include "tensor.h"

namespace rk {

template <class Table>
void bind_value(pybind11::module_& m, Table table) {
  m.def("value_loss",
        [table](int64_t sequences, int64_t cols, In offsets, In mask, In values, In old_values,
                In returns, double divisor, In normalizer, int32_t aggregation, double clip_range,
                Out loss, Out metrics, Out scale, Out grad_values, Exec exec) {
          const ValueArgs args{{sequences, cols, offsets, mask},
                               values,
                               old_values,
                               returns,
                               divisor,
                               normalizer,
                               aggregation,
                               static_cast<float>(clip_range),
                               static_cast<float*>(loss.data),
                               static_cast<ValueMetrics*>(metrics.data),
                               static_cast<float*>(scale.data),
                               grad_values,
                               exec};
          return launch(exec, tokens_of(sequences, cols, offsets),
                        [&] { return table().value_loss(args); });
        });
}

}  // namespace rk
