"""value_loss: the clipped loss of the critic, forward and backward."""

import pytest
import torch
from torch import Tensor

import rlhf_kernels as rk

from ..harness import Point, against, exact, points, sized
from ..harness.peers import peer
from ..harness.ragged import padded
from .policy import FULL_SHAPES, GPU_SHAPES, HOST_SHAPES, MOVED, SHAPES, mode_of

CLIP = 0.2


def squares(values: Tensor, old: Tensor, returns: Tensor) -> tuple[Tensor, Tensor]:
    """Squared errors of the values, and of the values clipped to the old ones."""
    clipped = values.clamp(old - CLIP, old + CLIP)
    return (values - returns) ** 2, (clipped - returns) ** 2


def eager(
    values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, weights: Tensor, *_: Tensor
) -> tuple[Tensor, ...]:
    """The loss and the clip fraction that trainers log."""
    count = weights.sum()
    plain, clipped = squares(values, old, returns)
    loss = 0.5 * (torch.maximum(plain, clipped) * weights).sum() / count
    return loss, ((clipped > plain) * weights).sum() / count


def ours(*given: Tensor) -> tuple[Tensor, ...]:
    result = rk.value_loss(*given[:3], mask=given[3], clip_range=CLIP)
    return result.loss, result.metrics.tensor


@pytest.mark.parametrize("name", points(HOST_SHAPES | SHAPES, GPU_SHAPES, FULL_SHAPES))
def test_value_loss(point: Point, name: str) -> None:
    shape = point.size((4, 50), (HOST_SHAPES | SHAPES | FULL_SHAPES | GPU_SHAPES)[name])
    old = torch.randn(shape, device=point.device)
    change = 0.2 * torch.randn_like(old)
    # No value is so near a branch that rounding decides it; the oracle could not check it.
    change.masked_fill_((change.abs() - CLIP).abs() < 1e-4, 0)
    mode = mode_of(name)
    backward = mode != "forward"
    values = (old + change).requires_grad_(backward)
    returns = old + torch.randn_like(old)
    middle = old + (change + change.clamp(-CLIP, CLIP)) / 2
    returns += torch.where((returns - middle).abs() < 1e-4, 0.1, 0.0)
    mask = padded(shape, point.device)

    def loss(values: Tensor) -> Tensor:
        wide = squares(*(t[mask].double() for t in (values, old, returns)))
        return 0.5 * torch.maximum(*wide).mean()

    verl = peer("verl.trainer.ppo.core_algos", "compute_value_loss")
    point(
        op="value_loss",
        label=sized(old.dtype, *shape),
        mode=mode,
        inputs=(values, old, returns, mask, mask.float(), mask.long()),
        providers=against(
            eager, ours, others={"verl": verl and (lambda v, o, r, *m: verl(v, r, o, m[-1], CLIP))}
        ),
        oracle=lambda: exact(loss, [values], gradient=backward),
        moved=MOVED[mode] * values.numel(),
        outputs=1,
    )
