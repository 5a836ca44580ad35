#include "memory.h"

#include <stdio.h>
#include <string.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace rk {
namespace {

// The first line of a file in sysfs, truncated to the buffer; empty if the file cannot be read.
struct Line {
  char text[64] = {};

  explicit Line(const char* path) {
    FILE* file = fopen(path, "r");
    if (!file) return;
    if (!fgets(text, sizeof text, file)) text[0] = '\0';
    fclose(file);
  }
};

Line virtio_line(const char* devices, int device, const char* name) {
  char path[256];
  const int length = snprintf(path, sizeof path, "%s/virtio%d/%s", devices, device, name);
  return Line(length > 0 && length < static_cast<int>(sizeof path) ? path : "");
}

constexpr int64_t kBlock = 256 * 1024;

// Populates the pages that begin in a block and lie completely in the data.
void populate([[maybe_unused]] char* block, [[maybe_unused]] char* data_end) {
#if defined(__linux__)
  // MADV_POPULATE_WRITE, since Linux 5.14. Older kernels refuse it; headers may not define it.
  constexpr int kPopulateWrite = 23;
  static const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(block) + page - 1) & ~(page - 1);
  const uintptr_t last = reinterpret_cast<uintptr_t>(data_end) & ~(page - 1);
  const uintptr_t end = begin + kBlock < last ? begin + kBlock : last;
  if (end <= begin) return;
  // One resident page means that the memory is not fresh; populating would only visit every page.
  unsigned char resident = 0;
  const uintptr_t middle = (begin + (end - begin) / 2) & ~(page - 1);
  if (mincore(reinterpret_cast<void*>(middle), page, &resident) == 0 && resident & 1) return;
  madvise(reinterpret_cast<void*>(begin), end - begin, kPopulateWrite);
#endif
}

}  // namespace

// Virtio 1.2, section 5.5: the memory balloon is device type 5, and free page reporting is its
// feature bit 5. sysfs lists features as a line of 0 and 1, bit 0 first.
bool freed_pages_leave(const char* devices) {
  constexpr int kDevices = 64;
  for (int i = 0; i < kDevices; ++i) {
    unsigned type = 0;
    if (sscanf(virtio_line(devices, i, "device").text, "%x", &type) == 1 && type == 5 &&
        virtio_line(devices, i, "features").text[5] == '1')
      return true;
  }
  return false;
}

#if defined(__linux__) && defined(MADV_HUGEPAGE)

bool advise_huge_pages(void* data, int64_t bytes) {
  static const bool pays =
      !strstr(Line("/sys/kernel/mm/transparent_hugepage/enabled").text, "[never]") &&
      !freed_pages_leave("/sys/bus/virtio/devices");
  if (!pays) return false;
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t end =
      (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(kHuge - 1);
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
  return true;
}

#else

bool advise_huge_pages(void*, int64_t) { return false; }

#endif

FreshPages::FreshPages(void* data, int64_t bytes) : data_(static_cast<char*>(data)), bytes_(bytes) {
  // Smaller buffers come from memory that the process already holds.
  constexpr int64_t kSmallest = 4 << 20;
  if (data && (bytes < kSmallest || advise_huge_pages(data, bytes))) data_ = nullptr;
}

void FreshPages::prepare(int64_t begin, int64_t bytes) const {
  if (!data_) return;
  // The writer of a block's first byte populates the block.
  for (int64_t at = (begin + kBlock - 1) / kBlock * kBlock; at < begin + bytes; at += kBlock)
    populate(data_ + at, data_ + bytes_);
}

}  // namespace rk
