"""sequence_logprobs and dpo_loss, forward + backward: plain torch, so the peers show its checks."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import rlhf_kernels as rk

from ..harness import Case, Settings, compiled, points
from ..harness.ragged import padded

SHAPES = {"64x2048": (64, 2048)}
GPU_SHAPES = {f"gpu-{name}": shape for name, shape in SHAPES.items()}
PAIRS, BETA = {"4096": 4096}, 0.1
GPU_PAIRS = {f"gpu-{name}": pairs for name, pairs in PAIRS.items()}


def eager_sequences(logprobs: Tensor, _: Tensor, weights: Tensor) -> Tensor:
    return (logprobs * weights).sum(-1)


@pytest.mark.parametrize("name", points(SHAPES, GPU_SHAPES))
def test_sequence_logprobs(run: Callable[[Case], None], settings: Settings, name: str) -> None:
    shape = (4, 50) if settings.quick else (SHAPES | GPU_SHAPES)[name]
    logprobs = (-5 * torch.rand(shape, device=settings.device)).requires_grad_()
    mask = padded(shape, settings.device)
    upstream = torch.randn(shape[0], device=settings.device)

    def oracle() -> tuple[Tensor, ...]:
        kept = mask.double()
        return (logprobs.detach() * kept).sum(-1), upstream.double().unsqueeze(-1) * kept

    run(
        Case(
            op="sequence_logprobs",
            label=f"fp32 {shape[0]}×{shape[1]}",
            mode="forward+backward",
            inputs=(logprobs, mask, mask.float()),
            providers={
                "eager": eager_sequences,
                "compile": compiled(eager_sequences),
                "ours": lambda logprobs, mask, _: rk.sequence_logprobs(logprobs, mask),
            },
            oracle=oracle,
            # The log-probabilities once, the bool mask in both ways, the gradient out.
            moved=10 * logprobs.numel(),
            upstream=(upstream,),
        )
    )


def eager_dpo(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    margins = (chosen - ref_chosen) - (rejected - ref_rejected)
    return -F.logsigmoid(BETA * margins).mean()


@pytest.mark.parametrize("name", points(PAIRS, GPU_PAIRS))
def test_dpo_loss(run: Callable[[Case], None], settings: Settings, name: str) -> None:
    pairs = 8 if settings.quick else (PAIRS | GPU_PAIRS)[name]
    references = [-100 * torch.rand(pairs, device=settings.device) for _ in range(2)]
    policies = [(r + 5 * torch.randn_like(r)).requires_grad_() for r in references]

    def oracle() -> tuple[Tensor, ...]:
        wide = [p.detach().double().requires_grad_() for p in policies]
        loss = eager_dpo(*wide, *(r.double() for r in references))
        return loss.detach(), *torch.autograd.grad(loss, wide)

    run(
        Case(
            op="dpo_loss",
            label=f"fp32 {pairs} pairs",
            mode="forward+backward",
            inputs=(*policies, *references),
            providers={
                "eager": eager_dpo,
                "compile": compiled(eager_dpo),
                "ours": lambda *inputs: rk.dpo_loss(*inputs, beta=BETA).loss,
            },
            oracle=oracle,
            # Four tensors in, two gradients out.
            moved=24 * pairs,
        )
    )
