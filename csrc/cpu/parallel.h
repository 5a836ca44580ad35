// Work is cut into items whose boundaries do not depend on the thread count, so neither do results.
#pragma once
#ifdef _OPENMP
#include <omp.h>
#endif
#include <stdint.h>

namespace rk {
namespace {

template <class F>
inline void parallel_for(int64_t items, [[maybe_unused]] int32_t threads, const F& body) {
#ifdef _OPENMP
  if (threads > 1 && items > 1) {
    const int32_t team = items < threads ? static_cast<int32_t>(items) : threads;
    // Dynamic schedule: rows differ in cost (ignored ones are free), and other work shares the
    // cores. With many items a thread takes several neighbours, as long runs of memory read faster.
    const int64_t chunk = items / (16 * team) > 1 ? items / (16 * team) : 1;
#pragma omp parallel for schedule(dynamic, chunk) num_threads(team)
    for (int64_t i = 0; i < items; ++i) body(i);
    return;
  }
#endif
  for (int64_t i = 0; i < items; ++i) body(i);
}

// Whether the caller is one of a team already, whose work is not to be shared out again.
inline bool in_team() {
#ifdef _OPENMP
  return omp_in_parallel() != 0;
#else
  return false;
#endif
}

}  // namespace
}  // namespace rk
