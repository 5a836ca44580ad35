// Large fresh outputs: ask the kernel for huge pages before the first write. Page faults of 4 KiB
// are most of the cost of filling a new buffer of logits' size. Advice only: harmless where the
// memory is not fresh or the system has huge pages off.
#pragma once
#include <stdint.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rk {
namespace {

inline void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t end =
      (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(kHuge - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

inline int64_t dtype_size(int32_t dtype) {
  return dtype == kFloat32 || dtype == kInt32 ? 4 : dtype == kInt64 ? 8 : dtype == kBool ? 1 : 2;
}

}  // namespace
}  // namespace rk
