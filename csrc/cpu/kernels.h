// One table of kernels per instruction set; module_cpu.cpp picks one at import.
#pragma once
#include "../abi.h"

namespace rk {

struct Kernels {
  const char* isa;
  Status (*token_logprobs)(const LogprobsArgs&);
  Status (*token_logprobs_backward)(const LogprobsBackwardArgs&);
  Status (*many_logprobs)(const ManyLabelsArgs&);
  Status (*many_logprobs_backward)(const ManyLabelsBackwardArgs&);
  Status (*support_logprobs)(const SupportArgs&);
  Status (*support_backward)(const SupportBackwardArgs&);
  Status (*support_head_backward)(const SupportHeadArgs&);
  Status (*kl_divergence)(const KlArgs&);
  Status (*kl_divergence_backward)(const KlBackwardArgs&);
  Status (*kl_penalty)(const KlPenaltyArgs&);
  Status (*kl_penalty_backward)(const KlPenaltyArgs&);
  Status (*policy_loss)(const PolicyArgs&);
  Status (*value_loss)(const ValueArgs&);
  Status (*mismatch_weights)(const MismatchArgs&);
  Status (*gae)(const GaeArgs&);
  Status (*general_gae)(const GeneralGaeArgs&);
  Status (*whiten)(const WhitenArgs&);
  Status (*group_advantages)(const GroupAdvantagesArgs&);
};

extern const Kernels kernels_baseline;
#ifdef RK_HAVE_X86_LEVELS
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

}  // namespace rk
