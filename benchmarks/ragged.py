"""Lengths of the sequences in a packed batch."""

import math

import torch
from torch import Tensor

LEAST, SIGMA = 16, 1.0


def response_lengths(count: int, longest: int, device: torch.device) -> Tensor:
    """Lengths [count] as of responses in reinforcement learning of reasoning: long-tailed.

    Log-normal with median `longest` / 4 and σ = 1 of the logarithm, clipped to [16, `longest`]:
    about one response in twelve is cut off at the longest, the mean is 0.35 of it.
    """
    drawn = (math.log(longest / 4) + SIGMA * torch.randn(count, device=device)).exp()
    return drawn.round().long().clamp(LEAST, longest)


def described(lengths: Tensor, longest: int) -> str:
    """For a point's label."""
    return f"{len(lengths)} log-normal sequences of up to {longest}, {int(lengths.sum())} tokens"


def offsets(lengths: Tensor) -> Tensor:
    """cu_seqlens [count + 1], int32."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
