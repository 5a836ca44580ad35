// Huge pages for large fresh outputs. Page faults of 4 KiB are most of the cost of filling a new
// buffer of logits' size.
#pragma once
#include <stdint.h>

#include "../abi.h"

namespace rk {

// Whether a hypervisor takes back the pages that this machine frees: one of the virtio devices
// listed in the folder is a balloon that reports free pages.
bool freed_pages_leave(const char* devices);

// Asks for huge pages before the first write. Advice only: harmless where the memory is not fresh
// or the system has huge pages off. Where freed pages leave the machine, the next huge page is
// often one that the hypervisor has to find anew, several times as slow as 4 KiB pages, which are
// seldom taken from what left: nothing is asked for.
void advise_huge_pages(void* data, int64_t bytes);

namespace {

inline int64_t dtype_size(int32_t dtype) {
  return dtype == kFloat32 || dtype == kInt32 ? 4 : dtype == kInt64 ? 8 : dtype == kBool ? 1 : 2;
}

}  // namespace
}  // namespace rk
