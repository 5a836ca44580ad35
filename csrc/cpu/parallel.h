// Work is cut into items whose boundaries never depend on the thread count, so results do not
// either.
#pragma once
#include <stdint.h>

namespace rk {
namespace {

template <class F>
inline void parallel_for(int64_t items, [[maybe_unused]] int32_t threads, const F& body) {
#ifdef _OPENMP
  if (threads > 1 && items > 1) {
    const int32_t team = items < threads ? static_cast<int32_t>(items) : threads;
    // Dynamic: rows differ in cost (ignored ones are free) and cores are shared with other work.
    // Several neighbours at a time where there are many: memory is read faster in long runs.
    const int64_t chunk = items / (16 * team) > 1 ? items / (16 * team) : 1;
#pragma omp parallel for schedule(dynamic, chunk) num_threads(team)
    for (int64_t i = 0; i < items; ++i) body(i);
    return;
  }
#endif
  for (int64_t i = 0; i < items; ++i) body(i);
}

}  // namespace
}  // namespace rk
