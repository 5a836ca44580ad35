#include "memory.h"

#include <stdio.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rk {
namespace {

// The first characters of a device's attribute; empty where it cannot be read.
struct Attribute {
  char text[16] = {};

  Attribute(const char* devices, int device, const char* name) {
    char path[256];
    const int length = snprintf(path, sizeof path, "%s/virtio%d/%s", devices, device, name);
    if (length < 0 || length >= static_cast<int>(sizeof path)) return;
    FILE* file = fopen(path, "r");
    if (!file) return;
    if (!fgets(text, sizeof text, file)) text[0] = '\0';
    fclose(file);
  }
};

}  // namespace

// Virtio 1.2, 5.5: the memory balloon is device type 5, free page reporting its feature bit 5. The
// kernel shows features as a line of 0 and 1, bit 0 first.
bool freed_pages_leave(const char* devices) {
  constexpr int kDevices = 64;
  for (int i = 0; i < kDevices; ++i) {
    unsigned type = 0;
    const Attribute device(devices, i, "device"), features(devices, i, "features");
    if (sscanf(device.text, "%x", &type) == 1 && type == 5 && features.text[5] == '1') return true;
  }
  return false;
}

void advise_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  static const bool pays = !freed_pages_leave("/sys/bus/virtio/devices");
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHuge - 1) & ~(kHuge - 1);
  const uintptr_t end =
      (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~(kHuge - 1);
  if (pays && end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

}  // namespace rk
