// One table of kernels per instruction set; module_cpu.cpp picks one at import.
#pragma once
#include "../abi.h"

namespace rk {

struct Kernels {
  const char* isa;
  Status (*token_logprobs)(const LogprobsArgs&);
  Status (*token_logprobs_backward)(const LogprobsBackwardArgs&);
};

extern const Kernels kernels_baseline;
#ifdef RK_HAVE_X86_LEVELS
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace rk
