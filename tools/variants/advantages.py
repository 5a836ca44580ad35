"""Advantage estimators; results without a gradient."""

import torch
from torch import Tensor

from tools.variants import Family, Variant

# Six sequences, three to a prompt.
GROUPS = 3


def tensors() -> dict[str, Tensor]:
    """Rewards of 6 sequences and of their 12 tokens; values, cuts, lengths."""
    g = torch.Generator().manual_seed(4)
    mask = torch.rand(6, 12, generator=g) < 0.85
    mask[:, 0] = True
    dones = torch.rand(6, 12, generator=g) < 0.15
    return {
        "rewards": torch.randn(6, generator=g) + 1.5,
        "greedy": torch.randn(6, generator=g),
        "components": torch.randn(6, 2, generator=g),
        "lengths": torch.tensor([5, 9, 1, 7, 3, 12]),
        "step_rewards": torch.randn(6, 12, generator=g),
        "values": torch.randn(6, 12, generator=g),
        "mask": mask,
        "dones": dones,
        "bootstrap": torch.randn(6, 12, generator=g),
        "logprobs": -2 * torch.rand(6, 12, generator=g) - 0.01,
        "ref": -2 * torch.rand(6, 12, generator=g) - 0.01,
        "collision": 0.1 + 0.5 * torch.rand(6, 12, generator=g),
        "lams": torch.tensor([0.9, 0.95, 0.5, 1.0, 0.7, 0.99]),
    }


def grouped(x: Tensor) -> Tensor:
    return x.view(-1, GROUPS)


def mean_of(x: Tensor) -> Tensor:
    """Of the group, [6]."""
    return grouped(x).mean(1).repeat_interleave(GROUPS)


def std_of(x: Tensor) -> Tensor:
    return grouped(x).std(1).repeat_interleave(GROUPS)


def others(x: Tensor) -> list[Tensor]:
    """The other members of each one's group."""
    rows = [list(range(i // GROUPS * GROUPS, i // GROUPS * GROUPS + GROUPS)) for i in range(6)]
    return [x[[j for j in members if j != i]] for i, members in enumerate(rows)]


def grpo(x: Tensor, eps: float = 1e-6) -> Tensor:
    return (x - mean_of(x)) / (std_of(x) + eps)


def loo_std(x: Tensor) -> Tensor:
    """NeMo-RL: mean and unbiased deviation of the others."""
    return torch.stack(
        [(r - o.mean()) / (o.std() + 1e-6) for r, o in zip(x, others(x), strict=True)]
    )


def pass_at_k(x: Tensor) -> Tensor:
    found = torch.zeros_like(x)
    for i, group in enumerate(grouped(x)):
        first, second = group.topk(2)[0]
        found[i * GROUPS + group.argmax()] = (first - second) / (group.std() + 1e-6)
    return found


def opo(t) -> Tensor:
    r, n = grouped(t.rewards), grouped(t.lengths).double()
    return (r - (r * n).sum(1, keepdim=True) / n.sum(1, keepdim=True)).view(-1)


def scan(t, lam, gamma=0.99, cuts=None, next_values=None) -> Tensor:
    """GAE step by step over the kept tokens; `cuts` end an episode.

    next_values: the value after each cut and after the last kept token; 0 if None.
    """
    found = torch.zeros_like(t.values)
    for b in range(6):
        a, following = 0.0, 0.0
        rate = float(lam[b]) if isinstance(lam, Tensor) else lam
        last = int(t.mask[b].nonzero().max())
        for i in reversed(range(12)):
            if not t.mask[b, i]:
                continue
            if i == last or (cuts is not None and cuts[b, i]):
                a, following = 0.0, 0.0 if next_values is None else next_values[b, i]
            delta = t.step_rewards[b, i] + gamma * following - t.values[b, i]
            a = delta + gamma * rate * a
            following, found[b, i] = t.values[b, i], a
    return found


def returns_to_go(t, gamma: float) -> Tensor:
    found = torch.zeros_like(t.step_rewards)
    for b in range(6):
        total = 0.0
        for i in reversed(range(12)):
            if t.mask[b, i]:
                total = t.step_rewards[b, i] + gamma * total
                found[b, i] = total
    return found


def whitened(x: Tensor, m: Tensor) -> Tensor:
    kept = x[m]
    variance = kept.var()
    return torch.where(m, (x - kept.mean()) / torch.sqrt(variance + 1e-8), 0)


def otb(t) -> Tensor:
    """verl's optimal token baseline over the kept tokens, counted from the front."""
    g = returns_to_go(t, 1.0)
    w = torch.where(t.mask, 1 - 2 * torch.exp(t.logprobs) + t.collision, 0).cumsum(1)
    place = t.mask.long().cumsum(1)
    found = torch.zeros_like(g)
    for b in range(6):
        mates = [j for j in range(6) if j // GROUPS == b // GROUPS]
        for i in range(12):
            if not t.mask[b, i]:
                continue
            at = [
                (j, k) for j in mates for k in range(12)
                if t.mask[j, k] and place[j, k] == place[b, i]
            ]  # fmt: skip
            top = sum(g[j, k] * w[j, k] for j, k in at)
            below = sum(w[j, k] for j, k in at) + 1e-8
            found[b, i] = g[b, i] - (top / below if len(at) > 1 else 0.0)
    return found


GROUP = "rk.group_advantages(rewards, 3{})"
GAE = "rk.gae(step_rewards, values, mask, gamma=0.99, {})"

VARIANTS = (
    Variant("GRPO", "all", GROUP.format(""), lambda t: grpo(t.rewards)),
    Variant("Dr. GRPO", "TRL, verl, OpenRLHF", GROUP.format(", scale='none'"),
            lambda t: t.rewards - mean_of(t.rewards)),
    Variant("scaled by the batch's rewards", "TRL (scale_rewards='batch')",
            GROUP.format(", scale='none'") + " / (rewards.std() + 1e-4)",
            lambda t: (t.rewards - mean_of(t.rewards)) / (t.rewards.std() + 1e-4)),
    Variant("REINFORCE++-baseline", "OpenRLHF, verl", GROUP.format(", scale='batch'"),
            lambda t: (t.rewards - mean_of(t.rewards))
            / ((t.rewards - mean_of(t.rewards)).std() + 1e-6)),
    Variant("RLOO", "TRL, verl, OpenRLHF, NeMo-RL",
            GROUP.format(", baseline='leave-one-out', scale='none'"),
            lambda t: t.rewards - torch.stack([o.mean() for o in others(t.rewards)])),
    Variant("leave-one-out mean and deviation", "NeMo-RL",
            GROUP.format(", baseline='leave-one-out', scale='leave-one-out'"),
            lambda t: loo_std(t.rewards)),
    Variant("ReMax", "verl",
            GROUP.format(", baseline='greedy', scale='none', greedy_rewards=greedy"),
            lambda t: t.rewards - t.greedy),
    Variant("MaxRL", "SkyRL, prime-rl", GROUP.format(", scale='mean'"),
            lambda t: torch.where(
                mean_of(t.rewards) > 0,
                (t.rewards - mean_of(t.rewards)) / (mean_of(t.rewards) + 1e-6), 0)),
    Variant("OPO", "verl", GROUP.format(", baseline='length-mean', scale='none', lengths=lengths"),
            opo),
    Variant("pass@k", "verl (grpo_passk)", GROUP.format(", baseline='pass@k'"),
            lambda t: pass_at_k(t.rewards)),
    Variant("OPMD", "trinity",
            GROUP.format(", baseline='log-mean-exp', scale='none', tau=0.7"),
            lambda t: t.rewards - 0.7 * mean_of(torch.exp(t.rewards / 0.7)).log()),
    Variant("flash_reinforce", "OpenRLHF", GROUP.format(", baseline='batch-mean', scale='none'"),
            lambda t: t.rewards - t.rewards.mean()),
    Variant("GDPO, normalize_then_sum", "TRL, verl", "rk.group_advantages(components, 3)",
            lambda t: sum(grpo(c) for c in t.components.unbind(1)),
            note="verl then whitens: `baseline='none', scale='batch'` of the result."),
    Variant("GPG", "verl", "rk.group_advantages(rewards, 3, scale='none') * (6 / used)",
            lambda t: (t.rewards - mean_of(t.rewards)) * 6 / (t.rewards != 0).sum(),
            where=(("used", "(rewards != 0).sum()"),)),
    Variant("REINFORCE++", "OpenRLHF, verl",
            "rk.whiten(rk.discounted_returns(step_rewards, mask, gamma=0.98), mask)",
            lambda t: whitened(returns_to_go(t, 0.98), t.mask)),
    Variant("optimal token baseline (OTB, TIR-OTB)", "verl",
            "rk.optimal_token_baseline(step_rewards, logprobs, collision, 3, mask)", otb,
            note="`importance_weights=` for the corrected form."),
    Variant("GAE", "all", GAE.format("lam=0.95"), lambda t: scan(t, 0.95)),
    Variant("decoupled lambda, the values'", "NeMo-RL (VC-PPO, VAPO)",
            GAE.format("lam=0.95, value_lam=1.0") + ".returns",
            lambda t: torch.where(t.mask, scan(t, 1.0) + t.values, 0)),
    Variant("lambda by the length of a sequence", "NeMo-RL (VAPO)", GAE.format("lam=lams"),
            lambda t: scan(t, t.lams)),
    Variant("episodes inside a row", "torchrl, CleanRL, gymnasium",
            GAE.format("lam=0.95, terminated=dones"), lambda t: scan(t, 0.95, cuts=t.dones)),
    Variant("truncation with a bootstrap value", "torchrl, Stable-Baselines3",
            GAE.format("lam=0.95, truncated=dones, bootstrap_values=bootstrap"),
            lambda t: scan(t, 0.95, cuts=t.dones, next_values=t.bootstrap)),
    Variant("distillation: the teacher's log-ratio", "TRL, verl, prime-rl, tinker",
            "rk.kl_penalty(ref, logprobs, mask)",
            lambda t: torch.where(t.mask, t.ref - t.logprobs, 0)),
    Variant("GiGPO, hierarchical groups, turns", "trinity, ROLL, SkyRL", GROUP.format(""),
            lambda t: grpo(t.rewards),
            note="The same call with the ids of states or turns as groups."),
    Variant("V-trace, Retrace", "torchrl",
            note="no: off-policy actor-critic, which no trainer of language models has."),
)  # fmt: skip

FAMILY = Family("Advantages", tensors, (), VARIANTS)
