"""Reference of group advantages and of the optimal token baseline.

Baselines and scales that no kernel has are computed here on every backend.
"""

import torch
from torch import Tensor

from ._common import compute
from .advantages import _pack, _pad


def _numbered(ids: Tensor) -> Tensor:
    """Arbitrary ids [B] renumbered from 0; no shape depends on the values of the ids."""
    ids, order = ids.long().sort(stable=True)
    change = torch.ones_like(ids)
    change[1:] = ids[1:] != ids[:-1]
    return torch.zeros_like(ids).scatter(0, order, change.cumsum(0) - 1)


class _Groups:
    """Rewards [B] in fp64 and their groups. B slots hold any number of groups; others are empty."""

    def __init__(self, rewards: Tensor, groups: int | Tensor) -> None:
        self.r = rewards.double()
        self.index = torch.arange(len(self.r), device=self.r.device)
        self.of = _numbered(groups) if isinstance(groups, Tensor) else self.index // groups
        self.count = torch.zeros_like(self.index).index_add(0, self.of, torch.ones_like(self.index))
        first = self.least(self.index)
        self.first = self.r[first.clamp(max=max(len(self.r) - 1, 0))][self.of]
        #: Rewards relative to the first of their group.
        self.shifted = self.r - self.first

    def least(self, x: Tensor) -> Tensor:
        """The least entry of x [B] in each group, in one slot per group."""
        return torch.zeros_like(x).scatter_reduce(0, self.of, x, "amin", include_self=False)

    def total(self, x: Tensor) -> Tensor:
        """The sum of x [B] over each group, in one slot per group."""
        return x.new_zeros(len(self.count)).index_add(0, self.of, x)

    def mean(self, x: Tensor) -> Tensor:
        """The mean of x [B] over the group of each reward."""
        return (self.total(x) / self.count)[self.of]

    @property
    def size(self) -> Tensor:
        """The number of rewards in the group of each."""
        return self.count[self.of]


def _runner_up(g: _Groups) -> Tensor:
    """By how much the best reward of a group exceeds the second best; 0 for all others."""
    best = -g.least(-g.shifted)[g.of]
    # Equal ones at the top exceed nothing; one of them must count as the second best.
    place = torch.where(g.shifted == best, g.index, len(g.index))
    winner = g.index == g.least(place)[g.of]
    second = -g.least(torch.where(winner, torch.inf, -g.shifted))[g.of]
    margin = torch.where(g.size > 1, best - second, 0)
    return torch.where(best.isnan(), best, torch.where(winner, margin, 0))


def _log_mean_exp(g: _Groups, tau: float) -> Tensor:
    """tau log mean exp(r / tau) over the group of each reward, relative to its first reward."""
    best = -g.least(-g.shifted)[g.of]
    return best + tau * g.mean(((g.shifted - best) / tau).exp()).log()


def _spread_of_others(g: _Groups, centred: Tensor) -> Tensor:
    """The unbiased standard deviation of the other rewards in the group; 0 if they are equal."""
    n = g.size
    rest = g.total(centred.square())[g.of] - centred.square() * (n / (n - 1).clamp(min=1))
    spread = (rest.clamp(min=0) / (n - 2).clamp(min=1)).sqrt()
    # Exactly 0, which a difference of sums is not: all others are the least or all the greatest.
    low, high = g.least(g.shifted)[g.of], -g.least(-g.shifted)[g.of]
    lows, highs = (g.total((g.shifted == x).double())[g.of] for x in (low, high))
    one_above = (lows == n - 1) & (g.shifted == high)
    one_below = (highs == n - 1) & (g.shifted == low)
    return torch.where((lows == n) | one_above | one_below | (n < 3), 0, spread)


def group_advantages(
    rewards: Tensor,
    groups: int | Tensor,
    *,
    baseline: str = "mean",
    scale: str = "group",
    greedy_rewards: Tensor | None = None,
    lengths: Tensor | None = None,
    tau: float = 1.0,
    eps: float = 1e-6,
) -> Tensor:
    """Rewards [B] relative to their group; see `rlhf_kernels.group_advantages`.

    Statistics are fp64 and use differences to the group's first reward. A common offset therefore
    costs no precision, and equal rewards have a standard deviation of exactly zero.
    """
    if baseline not in ("none", "greedy") or scale not in ("none", "batch"):
        # Differences of infinite rewards would depend on which of a group comes first.
        rewards = torch.where(rewards.isfinite(), rewards, torch.nan)
    g = _Groups(rewards, groups)
    r = g.r
    centred = g.shifted - g.mean(g.shifted)
    if baseline == "mean":
        a = centred
    elif baseline == "leave-one-out":
        # r_i - mean of the others = n / (n - 1) * (r_i - mean of all)
        a = centred * (g.count / (g.count - 1).clamp(min=1))[g.of]
    elif baseline == "greedy":
        assert greedy_rewards is not None
        a = r - greedy_rewards.double()
    elif baseline == "length-mean":
        assert lengths is not None
        weights = lengths.double()
        a = g.shifted - (g.total(weights * g.shifted) / g.total(weights))[g.of]
    elif baseline == "log-mean-exp":
        a = g.shifted - _log_mean_exp(g, tau)
    elif baseline == "pass@k":
        a = _runner_up(g)
    elif baseline == "batch-mean" and len(r):
        a = r - r[0]
        a = a - a.mean()
    else:
        a = r
    if scale == "group":
        # Of rewards, whatever the baseline.
        std = (g.total(centred.square()) / (g.count - 1).clamp(min=1)).sqrt()[g.of]
        a = torch.where(std == 0, 0, a / (std + eps))
    elif scale == "leave-one-out":
        std = _spread_of_others(g, centred)
        a = torch.where(std == 0, a, a / (std + eps))
    elif scale == "mean":
        mean = g.first + (g.shifted - centred)
        a = torch.where(mean <= 0, 0, a / (mean + eps))
    elif scale == "batch":
        if baseline not in ("mean", "leave-one-out", "batch-mean") and len(a):
            # The other baselines already give a mean of zero.
            a = a - a[0]
            a = a - a.mean()
        std = (a.square().sum() / max(len(a) - 1, 1)).sqrt()
        a = torch.where(std == 0, 0, a / (std + eps))
    return a.to(compute(rewards).dtype)


def optimal_token_baseline(
    rewards: Tensor,
    logprobs: Tensor,
    collision: Tensor,
    groups: int | Tensor,
    mask: Tensor | None,
    *,
    importance_weights: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    zero_tail: bool = True,
    eps: float = 1e-8,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns) in fp64; see `rlhf_kernels.optimal_token_baseline`."""
    keep = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask != 0
    energy = 1 - 2 * logprobs.double().exp() + collision.double()
    if importance_weights is not None:
        energy = energy * importance_weights.double().square()
    kept = _pad(keep, cu_seqlens)
    energy = _pad(torch.where(keep, energy, 0), cu_seqlens).cumsum(1)
    returns = _pad(torch.where(keep, rewards.double(), 0), cu_seqlens).flip(1).cumsum(1).flip(1)
    rows, cols = kept.shape
    sequences = torch.arange(rows, device=keep.device)
    group = _numbered(groups) if isinstance(groups, Tensor) else sequences // groups
    # A slot for each group and place among the kept tokens of a sequence.
    place = (kept.cumsum(1) - 1).clamp(min=0)
    slot = (group.unsqueeze(-1) * cols + place).reshape(-1)

    def total(x: Tensor) -> Tensor:
        x = torch.where(kept, x, 0).reshape(-1)
        return x.new_zeros(rows * cols).index_add(0, slot, x)[slot].view(rows, cols)

    best = total(returns * energy) / (total(energy) + eps)
    if zero_tail:
        best = torch.where(total(kept.double()) > 1, best, 0)
    else:
        # Of sequences that have a token.
        some = kept.any(1).double() if cols else kept.new_zeros(rows, dtype=torch.float64)
        members = some.new_zeros(rows).index_add(0, group, some)[group]
        best = torch.where(members.unsqueeze(-1) > 1, best, 0)
    advantages, returns = (torch.where(kept, x, 0) for x in (returns - best, returns))
    total_tokens = rewards.shape[0]
    return _pack(advantages, cu_seqlens, total_tokens), _pack(returns, cu_seqlens, total_tokens)
