// The extension `_cuda`: takes tensors, returns a status. Importing it needs no driver and does
// not initialise CUDA.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "bind/advantages.h"
#include "bind/kl.h"
#include "bind/logprobs.h"
#include "bind/mismatch.h"
#include "bind/policy.h"
#include "bind/support.h"
#include "bind/value.h"
#include "cuda/kernels.h"

namespace rk {
namespace {

struct Kernels {
  decltype(&cuda::token_logprobs) token_logprobs = cuda::token_logprobs;
  decltype(&cuda::token_logprobs_backward) token_logprobs_backward = cuda::token_logprobs_backward;
  decltype(&cuda::many_logprobs) many_logprobs = cuda::many_logprobs;
  decltype(&cuda::many_logprobs_backward) many_logprobs_backward = cuda::many_logprobs_backward;
  decltype(&cuda::support_logprobs) support_logprobs = cuda::support_logprobs;
  decltype(&cuda::support_backward) support_backward = cuda::support_backward;
  decltype(&cuda::support_head_backward) support_head_backward = cuda::support_head_backward;
  decltype(&cuda::kl_divergence) kl_divergence = cuda::kl_divergence;
  decltype(&cuda::kl_divergence_backward) kl_divergence_backward = cuda::kl_divergence_backward;
  decltype(&cuda::kl_penalty) kl_penalty = cuda::kl_penalty;
  decltype(&cuda::kl_penalty_backward) kl_penalty_backward = cuda::kl_penalty_backward;
  decltype(&cuda::policy_loss) policy_loss = cuda::policy_loss;
  decltype(&cuda::policy_rows) policy_rows = cuda::policy_rows;
  decltype(&cuda::loss_backward) loss_backward = cuda::loss_backward;
  decltype(&cuda::scale) scale = cuda::scale;
  decltype(&cuda::value_loss) value_loss = cuda::value_loss;
  decltype(&cuda::mismatch_weights) mismatch_weights = cuda::mismatch_weights;
  decltype(&cuda::gae) gae = cuda::gae;
  decltype(&cuda::general_gae) general_gae = cuda::general_gae;
  decltype(&cuda::whiten) whiten = cuda::whiten;
  decltype(&cuda::group_advantages) group_advantages = cuda::group_advantages;
};

// For example "sm_90 compute_90": machine code for one architecture, and PTX that later GPUs
// compile.
std::vector<std::string> architectures() {
  std::istringstream words(RK_CUDA_ARCHITECTURES);
  std::vector<std::string> found;
  for (std::string word; words >> word;) found.push_back(word);
  return found;
}

}  // namespace
}  // namespace rk

// Tests also build the kernels for an emulator, under another module name, so that both can be
// loaded in one process.
#ifdef RK_EMULATED
#define RK_MODULE _cuda_emulated
#else
#define RK_MODULE _cuda
#endif

PYBIND11_MODULE(RK_MODULE, m) {
  using namespace rk;
  m.doc() =
      "CUDA kernels of rlhf_kernels. Does not check its arguments: call it through "
      "rlhf_kernels.kernels.native.";
  m.attr("architectures") = architectures();
  // GPU kernels report bad data by NaN results, not by a status.
  m.def("learn_torch", &TensorView::learn_torch,
        "Takes torch's types of tensors, and the code in abi_types.h of each of its dtypes.");
  m.attr("gpu") = true;
  m.def("driver_version", &cuda::driver_version, "1000 * major + 10 * minor; 0 without a driver.");
  m.def("runtime_version", &cuda::runtime_version, "The CUDA version that this is built with.");
#ifdef RK_EMULATED
  m.attr("emulated") = true;
#else
  m.attr("emulated") = false;
#endif
  const auto table = [] { return Kernels{}; };
  bind_logprobs(m, table);
  m.def("token_logprobs_scratch", &cuda::token_logprobs_scratch);
  m.def("token_logprobs_backward_scratch", &cuda::token_logprobs_backward_scratch);
  m.def("many_logprobs_backward_scratch", &cuda::many_logprobs_backward_scratch);
  bind_support(m, table);
  m.def("support_logprobs_scratch", &cuda::support_logprobs_scratch);
  bind_kl(m, table);
  m.def("kl_divergence_scratch", &cuda::kl_divergence_scratch);
  m.def("kl_divergence_backward_scratch", &cuda::kl_divergence_backward_scratch);
  bind_policy(m, table);
  bind_loss_backward(m, table);
  m.def("policy_loss_scratch", &cuda::policy_loss_scratch);
  bind_policy_rows(m, table);
  m.def("policy_rows_scratch", &cuda::policy_rows_scratch);
  m.def("policy_rows_suits", &cuda::policy_rows_suits,
        "Whether policy_rows takes less time than the kernels that it stands for.");
  bind_value(m, table);
  m.def("value_loss_scratch", &cuda::value_loss_scratch);
  bind_mismatch(m, table);
  m.def("mismatch_weights_scratch", &cuda::mismatch_weights_scratch);
  bind_advantages(m, table);
  m.def("gae_scratch", &cuda::gae_scratch);
  m.def("general_gae_scratch", &cuda::general_gae_scratch);
  m.def("whiten_scratch", &cuda::whiten_scratch);
  m.def("group_advantages_scratch", &cuda::group_advantages_scratch);
}
