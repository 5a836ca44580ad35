"""OpenRLHF's corrections that drop by another statistic than the weight of a token.

They are functions of constants, for which PolicyLossConfig has no field: weights of the advantages.
"""

from typing import Any

import torch
from torch import Tensor

from ._patch import Unsupported


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    kept = mask != 0
    return torch.where(kept, x, 0).sum() / kept.sum().clamp(min=1)


def gates_by_another_statistic(loss: Any) -> bool:
    """Whether it drops by anything but the weight of a token."""
    if loss.is_correction_gating not in ("ratio", "binary_kl", "tv"):
        raise Unsupported(f"is_correction_gating={loss.is_correction_gating!r}")
    by_sequence: bool = loss.is_correction_level == "seq"
    return by_sequence or loss.is_correction_gating != "ratio"


def clipped(loss: Any, log_ratio: Tensor, advantages: Tensor) -> Tensor:
    """1.0 where ppo clips the ratio, also of tokens whose weight is 0: these have no advantage."""
    ratio = log_ratio.detach().clamp(-20, 20).exp()
    above = (advantages > 0) & (ratio > 1 + loss.clip_eps_high)
    found: Tensor = above | ((advantages < 0) & (ratio < 1 - loss.clip_eps_low))
    return found.float()


def gated_weights(loss: Any, old: Tensor, rollout: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """exp(old - rollout), 0 where OpenRLHF's gate drops; and the fraction that it drops.

    The fraction is of tokens, or of sequences where the gate is of these.
    """
    low, high = loss.is_correction_threshold
    by_sequence, kept = loss.is_correction_level == "seq", mask != 0
    old, rollout = torch.where(kept, old, 0), torch.where(kept, rollout, 0)

    def of_unit(x: Tensor) -> Tensor:
        if not by_sequence:
            return x
        return torch.where(kept, x, 0).sum(-1, keepdim=True) / kept.sum(-1, keepdim=True)

    difference = old - rollout
    if loss.is_correction_gating == "ratio":
        statistic = of_unit(difference).exp()
    else:
        # Away from 0 and 1, where the logarithms of the binary KL are infinite.
        p, q = (x.exp().clamp(1e-6, 1 - 1e-6) for x in (rollout, old))
        if loss.is_correction_gating == "tv":
            divergence = (p - q).abs()
        else:
            divergence = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        statistic = of_unit(divergence)
    passes = (statistic >= low) & (statistic <= high)
    dropped = (~passes).float()
    fraction = dropped.mean() if by_sequence else masked_mean(dropped, mask)
    return torch.where(passes, difference.exp(), 0), fraction
