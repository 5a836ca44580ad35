"""Reference of the value loss."""

import torch
from torch import Tensor

from ..core.sequences import token_weights
from ._common import compute


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    clip_range: float | None = None,
    aggregation: str = "token-mean",
    cu_seqlens: Tensor | None = None,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """0.5 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2), aggregated over the mask.

    Args:
        values: V, [B, T], or packed [N] with cu_seqlens.
        old_values: V_old, same shape; constant.
        returns: R, same shape; constant.
        mask: bool or integer, nonzero = keep. Values at masked tokens have no effect.
        clip_range: c, or None for the plain squared error.
        aggregation: as in PolicyLossConfig.
        cu_seqlens: [S + 1].
        normalizer: as in PolicyLossConfig.

    Returns:
        (loss, metrics in the order of VALUE_METRICS).
    """
    mask = mask != 0
    v = torch.where(mask, compute(values), 0)
    old = torch.where(mask, compute(old_values.detach()), 0)
    target = torch.where(mask, compute(returns.detach()), 0)
    term = (v - target) ** 2
    clipped_wins = torch.zeros_like(mask)
    if clip_range is not None:
        clipped = (v.clamp(old - clip_range, old + clip_range) - target) ** 2
        clipped_wins = clipped > term
        term = torch.where(clipped_wins, clipped, term)
    weight = token_weights(mask, aggregation, normalizer, v.dtype, cu_seqlens)
    loss = 0.5 * torch.where(mask, weight * term, 0).sum()

    with torch.no_grad():
        tokens = mask.sum().to(v.dtype)

        def mean(x: Tensor) -> Tensor:
            return torch.where(mask, x, 0).sum() / tokens.clamp(min=1)

        def variance(x: Tensor) -> Tensor:
            # Shifted by one of the values, so that equal values have a variance of exactly 0.
            shift = torch.where(mask, x, -torch.inf).max() if x.numel() else 0.0
            x = torch.where(mask, x - shift, 0)
            return mean((x - mean(x)) ** 2)

        total = variance(target)
        explained = torch.where(total == 0, 0, 1 - variance(target - v) / total)
        fraction = mean(clipped_wins.to(v.dtype))
        metrics = torch.stack([loss, fraction, mean(v), mean(target), explained, tokens])
    return loss, metrics
