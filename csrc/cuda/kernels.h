// The CUDA kernels' host functions. No CUDA type here: the module is compiled without nvcc.
//
// Each enqueues its work on the stream of `exec` and returns; it throws std::runtime_error if the
// device refuses. The <name>_scratch functions say how many bytes of scratch it needs.
#pragma once
#include "../abi.h"

namespace rk::cuda {

int64_t token_logprobs_scratch(int64_t tokens, int64_t vocab, int64_t element_size);
int64_t token_logprobs_backward_scratch(int64_t tokens);
Status token_logprobs(const LogprobsArgs& a);
Status token_logprobs_backward(const LogprobsBackwardArgs& a);
// With the scratch of token_logprobs.
Status many_logprobs(const ManyLabelsArgs& a);
int64_t many_logprobs_backward_scratch(int64_t tokens, int64_t count);
Status many_logprobs_backward(const ManyLabelsBackwardArgs& a);

int64_t support_logprobs_scratch();
Status support_logprobs(const SupportArgs& a);
Status support_backward(const SupportBackwardArgs& a);
Status support_head_backward(const SupportHeadArgs& a);

int64_t kl_divergence_scratch(int64_t tokens, int64_t vocab, int64_t element_size);
int64_t kl_divergence_backward_scratch(int64_t tokens);
Status kl_divergence(const KlArgs& a);
Status kl_divergence_backward(const KlBackwardArgs& a);
Status kl_penalty(const KlPenaltyArgs& a);
Status kl_penalty_backward(const KlPenaltyArgs& a);

int64_t policy_loss_scratch(int64_t sequences, int64_t cols, bool packed);
Status policy_loss(const PolicyArgs& a);
Status loss_backward(const LossBackwardArgs& a);
Status scale(const ScaleArgs& a);

int64_t policy_rows_scratch(int64_t tokens, int64_t vocab);
// Whether policy_rows takes less time than the kernels that it stands for.
bool policy_rows_suits(int64_t vocab, const RowOptions& options);
Status policy_rows(const PolicyRowsArgs& a);

int64_t value_loss_scratch(int64_t sequences, int64_t cols, bool packed);
Status value_loss(const ValueArgs& a);

int64_t mismatch_weights_scratch(int64_t sequences, int64_t cols, bool packed);
Status mismatch_weights(const MismatchArgs& a);

int64_t gae_scratch(int64_t sequences, int64_t cols, bool packed, bool whiten);
Status gae(const GaeArgs& a);
int64_t general_gae_scratch(int64_t sequences, int64_t cols, bool packed, bool whiten);
Status general_gae(const GeneralGaeArgs& a);
int64_t whiten_scratch(int64_t tokens);
Status whiten(const WhitenArgs& a);
// The same with scratch at another place, for a caller that is on the device already.
void enqueue_whitening(const WhitenArgs& a, void* scratch);
int64_t group_advantages_scratch(int64_t count, bool of_batch);
Status group_advantages(const GroupAdvantagesArgs& a);

// CUDA versions as 1000 * major + 10 * minor; the driver's is 0 where there is none.
int32_t driver_version();
int32_t runtime_version();

}  // namespace rk::cuda
