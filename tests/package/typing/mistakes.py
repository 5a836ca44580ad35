"""Mistakes that a type checker must find: one on every line that says so. Never run."""

import torch

import rlhf_kernels as rk

x, labels = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
keep = torch.ones(2, 3)

rk.value_loss(x, x, x, mask=keep, aggregation="tokenmean")  # wrong
rk.PolicyLossConfig(aggregation="tokenmean")  # wrong
rk.PolicyLossConfig.dapo(aggregation="tokenmean")  # wrong
rk.PolicyLossConfig.ppo(clip_hihg=0.3)  # wrong
rk.PolicyLossConfig.trl("dappo")  # wrong
rk.PolicyLossConfig.trl(vllm_importance_sampling_mode="token_clip")  # wrong
rk.PolicyLossConfig.trl(clip_lwo=0.3)  # wrong
rk.PolicyLossConfig.verl(loss_agg_mode="tokenmean")  # wrong
rk.PolicyLossConfig.verl(rollout_is="tokens")  # wrong
rk.PolicyLossConfig.openrlhf(kl_estimator="k3+")  # wrong
rk.PolicyLossConfig.nemo_rl(reference_policy_kl_type="k4")  # wrong
rk.PolicyLossConfig.skyrl("dppo", dppo_type="tv")  # wrong
rk.PolicyLossConfig.prime_rl("custom")  # wrong
rk.PolicyLossConfig.areal(rejection_sampling={"metric": "k3"})  # wrong
rk.PolicyLossConfig.slime(kl_loss_type="kl")  # wrong
rk.PolicyLossConfig.tinker("stable_reinforce")  # wrong
rk.kl_penalty(x, x, estimator="k4")  # wrong
rk.kl_divergence(x, x, direction="backward")  # wrong
rk.group_advantages(labels, 2, baseline="loo")  # wrong
rk.group_advantages(labels, 2, scale="std")  # wrong
rk.gae(x, x, masked="skip")  # wrong
rk.mismatch_weights(x, x, keep, preset="tiss")  # wrong
rk.mismatch_weights(x, x, keep, level="seq")  # wrong
rk.mismatch_weights(x, x, keep, reject={"seq_mean_k5": 0.1})  # wrong
rk.preference_loss(x, x, x, x, loss="sigmod")  # wrong
rk.preference_loss(x, x, x, x, loss=["sigmoid", "itpo"])  # wrong
rk.preference_loss(x, x, f_divergence="js")  # wrong
rk.kto_loss(x, x, x)  # wrong
rk.use_backend("gpu")  # wrong
rk.supports("gaee")  # wrong
rk.policy_loss(x, x, x, keep, x)  # wrong
rk.policy_loss(x, x, x)  # wrong
rk.token_logprobs(x, labels).entropy.sum()  # wrong
rk.linear_token_logprobs(x, labels=labels, **rk.Head(x).arguments()).entropy.sum()  # wrong
rk.policy_loss(x, x, x, mask=keep).metrics["tokens"] = x  # wrong
