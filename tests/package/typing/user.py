"""A script as a user writes it, for type checkers; test_typing.py also runs it."""

import torch
from torch import Tensor

import rlhf_kernels as rk


def step(hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor) -> dict[str, float]:
    """One update, from rewards to metrics."""
    old: rk.TokenLogprobs = rk.linear_token_logprobs(hidden, weight, labels, mask=mask)
    new = rk.token_logprobs(hidden @ weight.T, labels, mask=mask, entropy=True)
    entropy: Tensor = new.entropy
    nothing: None = old.entropy
    assert nothing is None
    more = rk.linear_token_logprobs(hidden, weight, labels, entropy=True, lse=True)
    total: Tensor = more.logprobs + more.entropy + more.lse.square()
    advantages = rk.group_advantages(torch.ones(2), 2, baseline="leave-one-out", scale="none")
    config = rk.PolicyLossConfig.grpo(kl_coef=0.0, aggregation="seq-mean-token-mean")
    theirs = (
        rk.PolicyLossConfig.trl("cispo", epsilon_high=5.0, kl_estimator="k3+"),
        rk.PolicyLossConfig.verl(use_kl_loss=True, kl_loss_type="low_var_kl+", clip_high=0.28),
        rk.PolicyLossConfig.openrlhf("gspo", delta=2.0),
        rk.PolicyLossConfig.nemo_rl(ratio_clip_c=3.0, entropy_coef=0.01),
        rk.PolicyLossConfig.skyrl("dual_clip", use_kl_loss=False, clip_high=0.28),
        rk.PolicyLossConfig.prime_rl("ipo", ipo_threshold=0.2),
        rk.PolicyLossConfig.areal(use_decoupled_loss=True, rejection_sampling={"upper": 2.0}),
        rk.PolicyLossConfig.slime("gspo", eps_clip=3e-4, eps_clip_high=4e-4),
        rk.PolicyLossConfig.tinker("dro", beta=0.05),
    )
    assert isinstance(theirs[0], rk.PolicyLossConfig)
    own = rk.PolicyLossConfig(objective="cispo", kl_estimator="k3+", aggregation="token-mean")
    policy = rk.policy_loss(
        new.logprobs, old.logprobs, advantages, mask=mask, entropy=entropy, config=config
    )
    head: rk.Head = rk.Head(weight)
    fused = rk.linear_policy_loss(
        hidden, labels=labels, old_logprobs=None, advantages=advantages, mask=mask, config=own,
        **head.arguments(),
    )  # fmt: skip
    again = rk.linear_token_logprobs(hidden, labels=labels, **head.arguments())
    third = rk.linear_token_logprobs(hidden, labels=labels, entropy=True, **head.arguments())
    total = total + again.logprobs + third.logprobs + third.entropy
    kl = rk.kl_penalty(new.logprobs, old.logprobs, mask=mask, estimator="k2")
    gae = rk.gae(kl.detach(), kl.detach(), mask=mask, masked="zero")
    value = rk.value_loss(kl, gae.returns, gae.returns, mask=mask, aggregation="token-mean")
    (policy.loss + fused.loss + value.loss + total.sum()).backward()  # type: ignore[no-untyped-call, unused-ignore]
    names: list[str] = [name for name in policy.metrics if "kl" in name]
    some: Tensor = policy.metrics["tokens"] + sum(value.metrics.values())
    assert names and some.dim() == 0
    sums = rk.sequence_logprobs(new.logprobs, mask)
    pairs: rk.PreferenceLoss = rk.preference_loss(sums, sums.detach(), loss=("cpo", "simpo"))
    unpaired = rk.kto_loss(sums, sums.detach(), mask[:, 0], kl=kl.mean(), beta=0.2)
    assert pairs.chosen_rewards.dim() == unpaired.rewards.dim() == 1
    with rk.use_backend("reference"):
        rk.kl_divergence(hidden, hidden.detach(), direction="forward", mask=mask)
    return policy.metrics.as_dict()


if __name__ == "__main__":
    torch.manual_seed(0)
    states, head = torch.randn(2, 3, 4, requires_grad=True), torch.randn(5, 4)
    kept = torch.ones(2, 3, dtype=torch.bool)
    print(step(states, head, torch.zeros(2, 3, dtype=torch.int64), kept)["tokens"])
