"""Inputs of policy losses that exercise every term, for the parity tests and the benchmarks."""

from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_kernels.testing import generator, random_mask


class Batch(NamedTuple):
    """Inputs of a policy loss, [B, T]; advantages are [B, T] or [B]."""

    logprobs: Tensor
    old: Tensor
    advantages: Tensor
    mask: Tensor
    ref: Tensor
    rollout: Tensor
    entropy: Tensor


def make_batch(
    rows: int = 5, cols: int = 13, *, seed: int = 0, per_sequence: bool = False
) -> Batch:
    """Ratios on both sides of every bound; a mask with gaps inside rows and a last row of zeros.

    Masked values are finite, because trainers multiply by the mask and would keep NaN.
    """
    g = generator(seed)

    def noise(scale: float, *shape: int) -> Tensor:
        return scale * torch.randn(*(shape or (rows, cols)), generator=g)

    old = -3 * torch.rand(rows, cols, generator=g)
    # Whole sequences drift too, so that sequence ratios reach their bounds for both signs of A.
    drift = torch.linspace(-0.6, 0.6, rows)[torch.randperm(rows, generator=g)].unsqueeze(-1)
    advantages = noise(1.0, rows) if per_sequence else noise(1.0)
    return Batch(
        (old + drift + noise(0.7)).requires_grad_(),
        old,
        advantages,
        random_mask(rows, cols, seed=seed),
        old + noise(0.5),
        old + noise(0.2),
        torch.rand(rows, cols, generator=g).requires_grad_(),
    )
