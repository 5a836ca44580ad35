"""Reference of advantages, returns and whitening."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..core import tracing
from ._common import compute
from .kl import kl_estimate


def _pad(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Packed [N] as [S, T] padded with zeros, T the longest sequence; padded input unchanged.

    T is N in a traced call or on the meta device, where the lengths cannot be read.
    """
    if cu_seqlens is None:
        return x
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    if x.is_meta or tracing.active(x):
        longest = x.shape[0]
    else:
        longest = int(lengths.max()) if len(lengths) else 0
    steps = torch.arange(longest, device=x.device)
    inside = steps < lengths.unsqueeze(-1)
    index = torch.where(inside, starts.unsqueeze(-1) + steps, 0)
    # An empty packed tensor has no element 0 for the padding to index.
    zeros = x.new_zeros(inside.shape)
    return torch.where(inside, x[index], zeros) if x.numel() else zeros


def _pack(x: Tensor, cu_seqlens: Tensor | None, total: int) -> Tensor:
    """The inverse of `_pad`, for `total` tokens."""
    if cu_seqlens is None or total == 0:
        return x if cu_seqlens is None else x.new_zeros(0)
    tokens = torch.arange(total, device=x.device)
    ids = torch.searchsorted(cu_seqlens[1:].contiguous(), tokens, right=True)
    return x[ids, tokens - cu_seqlens[ids]]


def _rate(rate: float | Tensor, rewards: Tensor, cu_seqlens: Tensor | None) -> float | Tensor:
    """A rate as one factor per step of the padded `rewards`; a number stays a number.

    A tensor has one rate per sequence or one per token. A rate outside [0, 1] becomes NaN.
    """
    if not isinstance(rate, Tensor):
        return rate
    rate = torch.where((rate >= 0) & (rate <= 1), rate.to(rewards.dtype), torch.nan)
    if rate.dim() == 1 and rate.shape[0] == rewards.shape[0]:
        return rate.unsqueeze(-1).expand(rewards.shape)
    return _pad(rate, cu_seqlens)


class Cuts(NamedTuple):
    """Truncated steps: flags and the values of the states that follow, in the shape of tokens."""

    truncated: Tensor
    values: Tensor


def _scan(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    dones: Tensor | None,
    next_value: Tensor | float,
    next_advantage: Tensor | float,
    gamma: float | Tensor,
    lam: float | Tensor,
    masked: str,
    cuts: Cuts | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence A_t = r_t + gamma V_{t+1} - V_t + gamma lam A_{t+1}; returns (A, keep)."""
    keep = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask != 0
    rewards, values = torch.where(keep, rewards, 0), torch.where(keep, values, 0)
    # Steps of the recurrence. Padding after a packed sequence is never a step.
    exists = _pad(torch.ones_like(keep) if masked == "zero" else keep, cu_seqlens)
    done = _pad(torch.zeros_like(keep) if dones is None else dones != 0, cu_seqlens)
    rewards, values = _pad(rewards, cu_seqlens), _pad(values, cu_seqlens)
    gamma, lam = _rate(gamma, rewards, cu_seqlens), _rate(lam, rewards, cu_seqlens)
    decay = gamma * lam
    ends, after = done, None
    if cuts is not None:
        truncated = _pad(cuts.truncated != 0, cu_seqlens)
        after = torch.where(keep, compute(cuts.values), 0)
        after = torch.where(truncated & ~done, _pad(after, cu_seqlens), 0)
        ends = done | truncated
    next_value = rewards.new_zeros(rewards.shape[0]) + next_value
    next_advantage = rewards.new_zeros(rewards.shape[0]) + next_advantage

    def at(rate: float | Tensor, t: int) -> float | Tensor:
        return rate[:, t] if isinstance(rate, Tensor) else rate

    advantages = []
    for t in reversed(range(rewards.shape[1])):
        # A done step takes nothing from later steps. where, not a product: 0 * NaN is NaN.
        value_ahead = torch.where(ends[:, t], 0 if after is None else after[:, t], next_value)
        advantage_ahead = torch.where(ends[:, t], 0, next_advantage)
        delta = rewards[:, t] + at(gamma, t) * value_ahead - values[:, t]
        advantage = delta + at(decay, t) * advantage_ahead
        next_advantage = torch.where(exists[:, t], advantage, next_advantage)
        next_value = torch.where(exists[:, t], values[:, t], next_value)
        advantages.append(next_advantage)
    out = torch.stack(advantages[::-1], dim=1) if advantages else torch.zeros_like(rewards)
    return torch.where(keep, _pack(out, cu_seqlens, keep.shape[0]), 0), keep


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dones: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    masked: str = "carry",
    whiten: bool = False,
    cuts: Cuts | None = None,
    value_lam: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation; see `rlhf_kernels.gae`.

    `bootstrap_values` are those behind the end of each sequence.

    Returns:
        (advantages, returns), exactly 0 at masked positions.
    """
    rewards, values = compute(rewards), compute(values)
    bootstrap = 0.0 if bootstrap_values is None else compute(bootstrap_values)

    def advantages_of(lam: float | Tensor) -> tuple[Tensor, Tensor]:
        return _scan(
            rewards, values, mask, cu_seqlens, dones, bootstrap, 0.0, gamma, lam, masked, cuts
        )

    advantages, keep = advantages_of(lam)
    of_returns = advantages if value_lam is None else advantages_of(value_lam)[0]
    returns = torch.where(keep, of_returns + values, 0)
    return (_whiten(advantages, keep) if whiten else advantages), returns


def discounted_returns(
    rewards: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dones: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
    gamma: float = 1.0,
    masked: str = "carry",
) -> Tensor:
    """G_t = r_t + gamma G_{t+1}; see `rlhf_kernels.discounted_returns`."""
    rewards = compute(rewards)
    zeros = torch.zeros_like(rewards)
    bootstrap = 0.0 if bootstrap_values is None else compute(bootstrap_values)
    # The recurrence of gae with values of 0; the bootstrap value is G after the last step.
    return _scan(rewards, zeros, mask, cu_seqlens, dones, 0.0, bootstrap, gamma, 1.0, masked)[0]


def ppo_advantages(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor | None,
    values: Tensor,
    mask: Tensor | None,
    *,
    kl_coef: float = 0.0,
    kl_estimator: str = "k1",
    cu_seqlens: Tensor | None = None,
    dones: Tensor | None = None,
    bootstrap_values: Tensor | None = None,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 0.95,
    masked: str = "carry",
    whiten: bool = True,
    reward_clip: float | None = None,
    cuts: Cuts | None = None,
    value_lam: float | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Reward shaping, GAE and whitening; see `rlhf_kernels.ppo_advantages`.

    Returns:
        (advantages, returns, rewards), exactly 0 at masked positions.
    """
    keep = torch.ones_like(logprobs, dtype=torch.bool) if mask is None else mask != 0
    rewards = torch.zeros_like(compute(logprobs))
    if ref_logprobs is not None and kl_coef != 0:
        x = torch.where(keep, compute(logprobs) - compute(ref_logprobs), 0)
        rewards = torch.where(keep, -kl_coef * kl_estimate(x, kl_estimator), 0)
    scores = compute(scores)
    # A bound above the dtype's range clips nothing.
    if reward_clip is not None and reward_clip <= torch.finfo(scores.dtype).max:
        scores = scores.clamp(-reward_clip, reward_clip)
    # A kept token is its sequence's last one if the count of kept tokens up to it is the total.
    kept = _pad(keep, cu_seqlens)
    last = kept & (kept.cumsum(1) == kept.sum(1, keepdim=True))
    at_last = torch.where(last, scores.unsqueeze(-1), 0)
    rewards = rewards + _pack(at_last, cu_seqlens, keep.shape[0])
    advantages, returns = gae(
        rewards,
        values,
        mask=keep,
        cu_seqlens=cu_seqlens,
        dones=dones,
        bootstrap_values=bootstrap_values,
        gamma=gamma,
        lam=lam,
        masked=masked,
        whiten=whiten,
        cuts=cuts,
        value_lam=value_lam,
    )
    return advantages, returns, rewards


def whiten(
    x: Tensor,
    mask: Tensor | None = None,
    *,
    shift_mean: bool = True,
    unbiased: bool = True,
    eps: float = 1e-8,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) over the mask; see `rlhf_kernels.whiten`. Statistics in fp64."""
    keep = torch.ones_like(x, dtype=torch.bool) if mask is None else mask != 0
    d = x.double()
    count = keep.sum()
    mean = torch.where(keep, d, 0).sum() / count.clamp(min=1)
    centred = torch.where(keep, d - mean, 0)
    var = centred.square().sum() / (count - int(unbiased)).clamp(min=1)
    spread = (var + eps).sqrt()
    # spread is 0 for equal elements with eps = 0.
    out = torch.where(spread == 0, 0, centred / spread)
    if not shift_mean:
        out = out + mean
    return torch.where(keep, out, 0).to(compute(x).dtype)


# The parameter `whiten` of gae shadows the function.
_whiten = whiten
