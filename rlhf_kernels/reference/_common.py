"""Shared by the references: the compute dtype, and the options of rows of logits."""

import torch
from torch import Tensor

from ..core import temperature_rules


def compute(t: Tensor) -> Tensor:
    """`t` in the compute dtype of the references: fp64 stays, everything else becomes fp32."""
    return t if t.dtype is torch.float64 else t.float()


def clamped(x: Tensor, low: float, high: float) -> Tensor:
    """x.clamp(low, high) with gradient 1 at NaN; torch's gradient of 0 would hide the NaN."""
    return torch.where(x.isnan(), x, x.clamp(low, high))


def with_options(logits: Tensor, *, softcap: float | None = None) -> Tensor:
    """Logits after the options, before division by the temperature.

    Args:
        logits: any shape.
        softcap: c in c * tanh(logits / c), or None.
    """
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def per_row(temperature: float | Tensor, keep: Tensor) -> float | Tensor:
    """The temperature as a divisor of rows [..., V].

    The temperature of an ignored token is replaced by 1. A bad temperature that was not validated
    makes its row NaN.
    """
    if not isinstance(temperature, Tensor):
        return temperature
    t = torch.where(keep, compute(temperature), 1)
    return torch.where(temperature_rules.bad(t), torch.nan, t).unsqueeze(-1)


def distances(z: Tensor, temperature: float | Tensor) -> Tensor:
    """(z - max z) / temperature, subtracted before the division rounds.

    Contiguous, because the order of a sum over V depends on the layout.
    """
    return (z - z.detach().amax(-1, keepdim=True)).contiguous() / temperature
