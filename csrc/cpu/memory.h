// Page faults of 4 KiB are most of the cost of filling a new buffer of logits' size: what is done
// to have fewer of them.
#pragma once
#include <stdint.h>

#include "../abi.h"

namespace rk {

// Whether a hypervisor takes back the pages that this machine frees: one of the virtio devices
// listed in the folder is a balloon that reports free pages.
bool freed_pages_leave(const char* devices);

// Asks for huge pages before the first write. Advice only: harmless where the memory is not fresh.
// Returns whether they were asked for. Not where the system has them off, and not where freed pages
// leave the machine: the next huge page is then often one that the hypervisor has to find anew,
// several times as slow as 4 KiB pages, which are seldom taken from what left.
bool advise_huge_pages(void* data, int64_t bytes);

// A large result, about to be written by threads in any order. Where there are no huge pages, its
// 4 KiB pages are made a block at a time just before they are written, not at a fault of each.
// Nothing is inline: a unit compiled for AVX-512 must not serve the others.
class FreshPages {
 public:
  // No data: nothing is to be prepared.
  FreshPages(void* data, int64_t bytes);

  // Called before bytes [begin, begin + bytes) are written.
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
