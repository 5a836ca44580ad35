// The contract between Python and native code: dtype codes, strided views and argument structs.
// No torch and no Python here, so one build serves every torch version, and the CUDA backend
// takes the same structs. Sizes and strides are in elements. A null `data` means "not given".
#pragma once
#include <stdint.h>

namespace rk {

enum DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kInt64 = 3, kInt32 = 4, kBool = 5 };

// A tensor of tokens [rows, cols]. For logits the vocabulary is a third dimension of stride 1.
struct Tensor {
  void* data = nullptr;
  int32_t dtype = kFloat32;
  int64_t stride0 = 0;
  int64_t stride1 = 0;
};

// What a kernel found in the data. `position` is the flat row-major index of the first offence.
enum StatusCode : int32_t { kOk = 0, kLabelOutOfRange = 1, kBadTemperature = 2 };
struct Status {
  int32_t code = kOk;
  int64_t position = -1;
};

// token_logprobs. `stats` is fp32 [rows, cols, 3], contiguous: row maximum m, s = sum exp((x-m)/T),
// entropy. `temperatures` (fp32) overrides `temperature`; softcap 0 means none.
struct LogprobsArgs {
  int64_t rows, cols, vocab;
  Tensor logits, labels, temperatures;
  double temperature, softcap;
  int64_t ignore_index;
  Tensor logprobs, entropy;
  float* stats;
  int32_t threads;
};

// Its gradient. `grad_logits` may be the memory of `logits`. A null upstream gradient means zero.
struct LogprobsBackwardArgs {
  int64_t rows, cols, vocab;
  Tensor logits, labels, temperatures;
  double temperature, softcap;
  int64_t ignore_index;
  const float* stats;
  Tensor grad_logprobs, grad_entropy;
  Tensor grad_logits;
  int32_t threads;
};

// kl_divergence over the whole vocabulary. `stats` is fp32 [rows, cols, 5], contiguous: m and s of the
// policy, m and s of the reference, the divergence. reverse = KL(policy || ref), else KL(ref || policy).
struct KlArgs {
  int64_t rows, cols, vocab;
  Tensor logits, ref_logits;
  double temperature;
  bool reverse;
  Tensor kl;
  float* stats;
  int32_t threads;
};

struct KlBackwardArgs {
  int64_t rows, cols, vocab;
  Tensor logits, ref_logits;
  double temperature;
  bool reverse;
  const float* stats;
  Tensor grad_kl, grad_logits;
  int32_t threads;
};

// kl_penalty per token from x = logprob - ref_logprob.
enum KlEstimator : int32_t { kK1 = 0, kK2 = 1, kK3 = 2, kAbs = 3 };
struct KlPenaltyArgs {
  int64_t rows, cols;
  Tensor logprobs, ref_logprobs;
  int32_t estimator;
  bool straight_through;  // backward only: the gradient of k2 whatever the estimator
  Tensor grad;            // backward only: upstream gradient
  Tensor out;
  int32_t threads;
};

}  // namespace rk
