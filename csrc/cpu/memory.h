// Page faults of 4 KiB are most of the cost of filling a new buffer of logits. The functions here
// reduce their number.
#pragma once
#include <stdint.h>

#include "../abi.h"

namespace rk {

// Whether a hypervisor takes back the pages that this machine frees. It does if a virtio device
// listed in the folder `devices` is a memory balloon with free page reporting.
bool freed_pages_leave(const char* devices);

// Asks for huge pages before the first write, and returns whether it did. This is only advice and
// harmless for memory in use. Does nothing if huge pages are disabled, or if freed pages leave the
// machine: the hypervisor must then often find memory for a new huge page, which is several times
// slower than 4 KiB pages, as those rarely come from returned memory.
bool advise_huge_pages(void* data, int64_t bytes);

// A large result that threads are about to write in any order. Without huge pages, its 4 KiB pages
// are populated block by block just before they are written, instead of by one fault per page.
// Nothing here is inline, because code compiled for AVX-512 must not be linked into other units.
class FreshPages {
 public:
  // `data` may be null; prepare then does nothing.
  FreshPages(void* data, int64_t bytes);

  // Call before writing bytes [begin, begin + bytes).
  void prepare(int64_t begin, int64_t bytes) const;

 private:
  char* data_;
  int64_t bytes_;
};

namespace {

inline int64_t dtype_size(int32_t dtype) {
  return dtype == kFloat32 || dtype == kInt32 ? 4 : dtype == kInt64 ? 8 : dtype == kBool ? 1 : 2;
}

}  // namespace
}  // namespace rk
