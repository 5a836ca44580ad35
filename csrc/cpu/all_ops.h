// Included once by each isa_*.cpp, which the build compiles with the flags of its instruction set.
// All kernels are in an anonymous namespace, so that no AVX-512 inline function is shared with
// another translation unit. Standard headers come first, in the same order in every unit.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "kernels.h"
#include "memory.h"
#include "parallel.h"
#include "vec.h"
#include "../advantages_math.h"
#include "../exp_math.h"
#include "../kl_math.h"
#include "../math.h"
#include "../mismatch_math.h"
#include "../policy_math.h"

#include "tokens.h"
#include "rows.h"
#include "logprobs.h"
#include "logprobs_many.h"
#include "support.h"
#include "kl_sums.h"
#include "kl_mixture.h"
#include "kl.h"
#include "policy.h"
#include "value.h"
#include "mismatch.h"
#include "advantages_recurrence.h"
#include "advantages_scan.h"
#include "advantages_general.h"
#include "advantages.h"

namespace rk {

#define RK_CONCAT_(a, b) a##b
#define RK_CONCAT(a, b) RK_CONCAT_(a, b)
#define RK_STRING_(a) #a
#define RK_STRING(a) RK_STRING_(a)

const Kernels RK_CONCAT(kernels_, RK_ISA) = {
    RK_STRING(RK_ISA),
    token_logprobs,
    token_logprobs_backward,
    many_logprobs,
    many_logprobs_backward,
    support_logprobs,
    support_backward,
    support_head_backward,
    kl_divergence,
    kl_divergence_backward,
    kl_penalty,
    kl_penalty_backward,
    policy_loss,
    value_loss,
    mismatch_weights,
    gae,
    general_gae,
    whiten,
    group_advantages,
};

}  // namespace rk
