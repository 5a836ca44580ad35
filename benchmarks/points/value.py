"""value_loss: the clipped loss of the critic, forward and backward."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import rlhf_kernels as rk

from ..harness import Case, Settings, compiled, points
from ..harness.peers import peer
from ..harness.ragged import padded
from .policy import FULL_SHAPES, GPU_SHAPES, SHAPES

CLIP = 0.2


def eager(
    values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, weights: Tensor, *_: Tensor
) -> tuple[Tensor, ...]:
    """The loss and the clip fraction, as trainers log it."""
    count = weights.sum()
    plain = (values - returns) ** 2
    clipped = (values.clamp(old - CLIP, old + CLIP) - returns) ** 2
    loss = 0.5 * (torch.maximum(plain, clipped) * weights).sum() / count
    with torch.no_grad():
        clip_fraction = ((clipped > plain) * weights).sum() / count
    return loss, clip_fraction


def ours(
    values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, weights: Tensor, *_: Tensor
) -> tuple[Tensor, ...]:
    result = rk.value_loss(values, old, returns, mask=mask, clip_range=CLIP)
    return result.loss, result.metrics.tensor


@pytest.mark.parametrize("name", points(SHAPES, GPU_SHAPES, FULL_SHAPES))
def test_value_loss(run: Callable[[Case], None], settings: Settings, name: str) -> None:
    device = settings.device
    shape = (4, 50) if settings.quick else (SHAPES | FULL_SHAPES | GPU_SHAPES)[name]
    old = torch.randn(shape, device=device)
    change = 0.2 * torch.randn_like(old)
    # None so near a branch that rounding decides it: the oracle could not judge it.
    change.masked_fill_((change.abs() - CLIP).abs() < 1e-4, 0)
    values = (old + change).requires_grad_()
    returns = old + torch.randn_like(old)
    middle = old + (change + change.clamp(-CLIP, CLIP)) / 2
    returns += torch.where((returns - middle).abs() < 1e-4, 0.1, 0.0)
    mask = padded(shape, device)

    def oracle() -> tuple[Tensor, ...]:
        v, o, r = (t.detach()[mask].double() for t in (values, old, returns))
        clipped = v.clamp(o - CLIP, o + CLIP)
        use_plain = (v - r) ** 2 >= (clipped - r) ** 2
        loss = 0.5 * torch.maximum((v - r) ** 2, (clipped - r) ** 2).mean()
        gradient = torch.zeros(shape, dtype=torch.float64, device=device)
        gradient[mask] = torch.where(use_plain, v - r, 0.0) / mask.sum()
        return loss, gradient

    verl = peer("verl.trainer.ppo.core_algos", "compute_value_loss")

    def verl_loss(
        values: Tensor, old: Tensor, returns: Tensor, *masks: Tensor
    ) -> tuple[Tensor, ...]:
        return verl(values, returns, old, masks[-1], CLIP)

    run(
        Case(
            op="value_loss",
            label=f"fp32 {shape[0]}×{shape[1]}",
            mode="forward+backward",
            inputs=(values, old, returns, mask, mask.float(), mask.long()),
            providers={
                "eager": eager,
                "compile": compiled(eager),
                "verl": verl and verl_loss,
                "ours": ours,
            },
            oracle=oracle,
            # Three tensors and the bool mask in, the gradient out.
            moved=17 * values.numel(),
            outputs=1,
        )
    )
