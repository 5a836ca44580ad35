"""Random lengths of the sequences in a packed or padded batch."""

import math

import torch
from torch import Tensor

LEAST, SIGMA = 16, 1.0


def response_lengths(count: int, longest: int, device: torch.device) -> Tensor:
    """Random lengths [count] with a long tail, as of responses in RL of reasoning models.

    Log-normal with median `longest` / 4 and σ = 1 of the logarithm, clipped to [16, `longest`].
    About one response in twelve is truncated; the mean length is 0.35 * `longest`.
    """
    drawn = (math.log(longest / 4) + SIGMA * torch.randn(count, device=device)).exp()
    return drawn.round().long().clamp(LEAST, longest)


def padded(shape: tuple[int, int], device: torch.device, lengths: Tensor | None = None) -> Tensor:
    """Bool mask [B, T] of sequences of `lengths`; by default random ones of at least T / 2."""
    if lengths is None:
        lengths = torch.randint(shape[1] // 2, shape[1] + 1, shape[:1], device=device)
    return torch.arange(shape[1], device=device) < lengths[:, None]


def described(lengths: Tensor, longest: int) -> str:
    """A description of the lengths for a point's label."""
    return f"{len(lengths)} log-normal sequences of up to {longest}, {int(lengths.sum())} tokens"


def offsets(lengths: Tensor) -> Tensor:
    """cu_seqlens [count + 1], int32."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
