// Python signatures of the scans, whitening and group advantages.
#pragma once
#include "tensor.h"

namespace rk {

template <class Table>
void bind_advantages(pybind11::module_& m, Table table) {
  const auto fp32 = [](const Tensor& t) { return static_cast<float*>(t.data); };
  const auto int64 = [](const Tensor& t) { return static_cast<int64_t*>(t.data); };
  m.def("gae", [=](In offsets, In rewards, In values, In mask, In dones, In bootstrap, In scores,
                   In logprobs, In ref_logprobs, double kl_coef, int32_t kl_estimator,
                   double reward_clip, double gamma, double lam, bool carry, bool whiten,
                   Out advantages, Out returns, Out shaped, double whiten_eps, Exec exec) {
    const int64_t sequences = offsets.given ? offsets.cols - 1 : returns.rows;
    const GaeArgs args{returns.rows,  returns.cols, sequences,  offsets,      rewards,
                       values,        mask,         dones,      bootstrap,    scores,
                       logprobs,      ref_logprobs, kl_coef,    kl_estimator, reward_clip,
                       gamma,         lam,          carry,      whiten,       fp32(advantages),
                       fp32(returns), fp32(shaped), whiten_eps, exec};
    return launch(exec, returns.rows * returns.cols, [&] { return table().gae(args); });
  });
  m.def("general_gae", [=](In offsets, In rewards, In values, In mask, In terminated, In truncated,
                           In cut_values, In bootstrap, In scores, In logprobs, In ref_logprobs,
                           double kl_coef, int32_t kl_estimator, double reward_clip, In gammas,
                           double gamma, bool gamma_per_step, In lams, double lam,
                           bool lam_per_step, In value_lams, double value_lam,
                           bool value_lam_per_step, bool decoupled, bool carry, bool whiten,
                           Out advantages, Out returns, Out shaped, double whiten_eps, Exec exec) {
    const int64_t sequences = offsets.given ? offsets.cols - 1 : returns.rows;
    const GaeArgs gae{returns.rows,  returns.cols, sequences,  offsets,      rewards,
                      values,        mask,         terminated, bootstrap,    scores,
                      logprobs,      ref_logprobs, kl_coef,    kl_estimator, reward_clip,
                      gamma,         lam,          carry,      whiten,       fp32(advantages),
                      fp32(returns), fp32(shaped), whiten_eps, exec};
    const GeneralGaeArgs args{
        gae,          truncated,          cut_values, gammas,   lams, value_lams, gamma_per_step,
        lam_per_step, value_lam_per_step, decoupled,  value_lam};
    return launch(exec, returns.rows * returns.cols, [&] { return table().general_gae(args); });
  });
  m.def(
      "whiten", [=](In x, In mask, bool shift_mean, bool unbiased, double eps, Out out, Exec exec) {
        const WhitenArgs args{x.rows, x.cols, x, mask, shift_mean, unbiased, eps, fp32(out), exec};
        return launch(exec, x.rows * x.cols, [&] { return table().whiten(args); });
      });
  m.def("group_advantages", [=](int64_t count, In rewards, In greedy, In order, In sorted_ids,
                                int64_t group_size, int32_t baseline, int32_t scale, double eps,
                                Out out, Exec exec) {
    const GroupAdvantagesArgs args{count,      rewards,  greedy, int64(order), int64(sorted_ids),
                                   group_size, baseline, scale,  eps,          fp32(out),
                                   exec};
    return launch(exec, count, [&] { return table().group_advantages(args); });
  });
}

}  // namespace rk
