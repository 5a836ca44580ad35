"""mismatch_weights: weights of tokens and of sequences, with the metrics that trainers log."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import rlhf_kernels as rk

from ..harness import Point, against, exact, points, sized
from ..harness.peers import peer
from ..harness.ragged import padded
from .policy import FULL_SHAPES, GPU_SHAPES, HOST_SHAPES, SHAPES

HIGH, CLAMP = 2.0, 20.0
LEVELS = ("token", "sequence")
Results = tuple[Tensor, ...]


def weights_of(level: str, x: Tensor, kept: Tensor) -> Tensor:
    """Truncated weights [B, T], without the mask, from log-ratios that are 0 outside it."""
    own = x if level == "token" else x.sum(-1, keepdim=True)
    return own.clamp(-CLAMP, CLAMP).exp().clamp(max=HIGH).expand_as(kept)


def eager(level: str) -> Callable[..., Results]:
    """The weights, and the least of the metrics that a trainer logs of them."""

    def run(old: Tensor, rollout: Tensor, mask: Tensor, kept: Tensor, *_: Tensor) -> Results:
        x = torch.where(mask, old - rollout, 0)
        count, length = kept.sum(), kept.sum(-1)
        w = weights_of(level, x, kept) * kept
        mean = w.sum() / count
        square = (w * w).sum() / count
        difference = -x.sum(-1) / length
        return (
            w,
            mean,
            (square - mean * mean).clamp(min=0).sqrt(),
            mean * mean / square,
            -x.sum() / count,
            ((x.exp() - x - 1) * kept).sum() / count,
            ((w >= HIGH) * kept).sum() / count,
            difference.exp().mean(),
            difference.abs().mean(),
        )

    return run


def ours(level: str) -> Callable[..., Results]:
    def run(old: Tensor, rollout: Tensor, mask: Tensor, *_: Tensor) -> Results:
        found = rk.mismatch_weights(
            old, rollout, mask, level=level, high=HIGH, log_ratio_clamp=CLAMP, missing="one"
        )
        return found.weights, found.metrics.tensor

    return run


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", points(HOST_SHAPES | SHAPES, GPU_SHAPES, FULL_SHAPES))
def test_mismatch_weights(point: Point, name: str, level: str) -> None:
    shape = point.size((4, 50), (HOST_SHAPES | SHAPES | FULL_SHAPES | GPU_SHAPES)[name])
    old = -torch.rand(shape, device=point.device)
    rollout = old + 0.02 * torch.randn_like(old)
    mask = padded(shape, point.device)

    def weights(old: Tensor, rollout: Tensor) -> Tensor:
        x = torch.where(mask, old - rollout, 0)
        return torch.where(mask, weights_of(level, x, mask), 0)

    helper = "verl.trainer.ppo.rollout_corr_helper"
    verl = peer(helper, "compute_rollout_correction_weights")
    off_policy = peer(helper, "compute_offpolicy_metrics")

    def of_verl(old: Tensor, rollout: Tensor, *masks: Tensor) -> Results:
        kept = masks[-1]
        found, _ = verl(old - rollout, kept, level, HIGH)
        off_policy(old, rollout, kept)
        return (found,)

    point(
        op="mismatch_weights",
        label=f"{sized(old.dtype, *shape)} {level}",
        mode="forward",
        inputs=(old, rollout, mask, mask.float(), mask.long()),
        providers=against(
            eager(level), ours(level), others={"verl": verl and off_policy and of_verl}
        ),
        oracle=lambda: exact(weights, [old, rollout], gradient=False),
        # Two tensors and the bool mask are read, the weights and a mask written.
        moved=14 * old.numel(),
        outputs=1,
    )
