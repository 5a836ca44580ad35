"""sequence_logprobs and preference_loss, forward + backward.

Both are plain torch, so the comparison shows the cost of their checks.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import rlhf_kernels as rk

from ..harness import Point, against, exact, points, sized
from ..harness.ragged import padded

SHAPES, PAIRS, BETA = {"64x2048": (64, 2048)}, {"4096": 4096}, 0.1
GPU_SHAPES, GPU_PAIRS = ({f"gpu-{k}": v for k, v in x.items()} for x in (SHAPES, PAIRS))


def eager_sequences(logprobs: Tensor, _: Tensor, weights: Tensor) -> Tensor:
    return (logprobs * weights).sum(-1)


@pytest.mark.parametrize("name", points(SHAPES, GPU_SHAPES))
def test_sequence_logprobs(point: Point, name: str) -> None:
    shape = point.size((4, 50), (SHAPES | GPU_SHAPES)[name])
    logprobs = (-5 * torch.rand(shape, device=point.device)).requires_grad_()
    mask = padded(shape, point.device)
    upstream = torch.randn(shape[0], device=point.device)
    point(
        op="sequence_logprobs",
        label=sized(logprobs.dtype, *shape),
        mode="forward+backward",
        inputs=(logprobs, mask, mask.float()),
        providers=against(eager_sequences, lambda x, mask, _: rk.sequence_logprobs(x, mask)),
        oracle=lambda: exact(lambda x: (x * mask.double()).sum(-1), [logprobs], [upstream]),
        # The log-probabilities are read once, the bool mask twice, the gradient is written.
        moved=10 * logprobs.numel(),
        upstream=(upstream,),
    )


def eager_dpo(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    margins = (chosen - ref_chosen) - (rejected - ref_rejected)
    return -F.logsigmoid(BETA * margins).mean()


@pytest.mark.parametrize("name", points(PAIRS, GPU_PAIRS))
def test_preference_loss(point: Point, name: str) -> None:
    pairs = point.size(8, (PAIRS | GPU_PAIRS)[name])
    references = [-100 * torch.rand(pairs, device=point.device) for _ in range(2)]
    policies = [(r + 5 * torch.randn_like(r)).requires_grad_() for r in references]
    wide = [r.double() for r in references]
    point(
        op="preference_loss",
        label=f"fp32 {pairs} pairs",
        mode="forward+backward",
        inputs=(*policies, *references),
        providers=against(eager_dpo, lambda *inputs: rk.preference_loss(*inputs, beta=BETA).loss),
        oracle=lambda: exact(lambda *leaves: eager_dpo(*leaves, *wide), policies),
        # Four tensors are read, two gradients are written.
        moved=24 * pairs,
    )
