"""What the references share: the dtype they compute in, and options of rows of logits."""

import torch
from torch import Tensor

from ..core import temperature_rules


def compute(t: Tensor) -> Tensor:
    """`t` in the dtype that references compute in: fp64 stays, everything else becomes fp32."""
    return t if t.dtype is torch.float64 else t.float()


def clamped(x: Tensor, low: float, high: float) -> Tensor:
    """x.clamp(low, high) with a slope of 1 at NaN, where torch's is 0 and would hide it."""
    return torch.where(x.isnan(), x, x.clamp(low, high))


def with_options(logits: Tensor, *, softcap: float | None = None) -> Tensor:
    """Logits as the options make them, before the temperature divides them.

    Args:
        logits: any shape.
        softcap: c in c * tanh(logits / c), or None.
    """
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def per_row(temperature: float | Tensor, keep: Tensor) -> float | Tensor:
    """The temperature as a divisor of rows [..., V].

    One that belongs to an ignored token does not matter; one that is refused, where data was not
    looked at, makes its row NaN.
    """
    if not isinstance(temperature, Tensor):
        return temperature
    t = torch.where(keep, compute(temperature), 1)
    return torch.where(temperature_rules.bad(t), torch.nan, t).unsqueeze(-1)


def distances(z: Tensor, temperature: float | Tensor) -> Tensor:
    """(z - max z) / temperature: the distance is taken where nothing has been rounded yet.

    Contiguous, as the order of a sum over V depends on the layout.
    """
    return (z - z.detach().amax(-1, keepdim=True)).contiguous() / temperature
