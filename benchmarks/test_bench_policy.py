"""policy_loss: PPO's clipped loss with its metrics, forward and backward."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import rlhf_kernels as rk

from .harness import Case, Settings, compiled, points
from .peers import peer, verl_actor_config

SHAPES = {"64x2048": (64, 2048), "2048x2048": (2048, 2048)}
FULL_SHAPES = {"64x512": (64, 512), "8x32768": (8, 32768)}
GPU_SHAPES = {f"gpu-{name}": shape for name, shape in SHAPES.items()}
TARGETS = {"64x2048": {"eager": 8, "compile": 1.5}, "2048x2048": {"copy": 0.5}}
# 10 µs of the host for each way.
GPU_AT_MOST = {"gpu-64x2048": {"host": 20e-6}}
CLIP = 0.2


def eager(
    logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, weights: Tensor
) -> tuple[Tensor, ...]:
    """The loss and the metrics that trainers log: clip fraction and approximate KL."""
    count = weights.sum()
    log_ratio = logprobs - old
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - CLIP, 1 + CLIP)
    loss = (torch.maximum(plain, clipped) * weights).sum() / count
    with torch.no_grad():
        clip_fraction = ((clipped > plain) * weights).sum() / count
        kl = (-log_ratio * weights).sum() / count
    return loss, clip_fraction, kl


def ours(
    logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, weights: Tensor
) -> tuple[Tensor, ...]:
    result = rk.policy_loss(
        logprobs, old, advantages, mask, config=rk.PolicyLossConfig.ppo(**OPTIONS)
    )
    return result.loss, result.metrics.values


# The same loss for all: clip 0.2 both ways, no dual clip.
OPTIONS = {"clip_low": CLIP, "clip_high": CLIP}


@pytest.mark.parametrize("name", points(SHAPES, GPU_SHAPES, FULL_SHAPES))
def test_policy_loss(run: Callable[[Case], None], settings: Settings, name: str) -> None:
    device = settings.device
    shape = (4, 50) if settings.quick else (SHAPES | FULL_SHAPES | GPU_SHAPES)[name]
    old = -torch.rand(shape, device=device) * 5
    log_ratio = 0.2 * torch.randn_like(old)
    # None so near a clip bound that rounding decides its branch: the oracle could not judge it.
    near = (log_ratio.exp() - 1).abs().sub(CLIP).abs() < 1e-4
    logprobs = (old + log_ratio.masked_fill(near, 0)).requires_grad_()
    advantages = torch.randn_like(old) + 0.5
    lengths = torch.randint(shape[1] // 2, shape[1] + 1, (shape[0], 1), device=device)
    mask = torch.arange(shape[1], device=device) < lengths
    response_mask = mask.long()

    def oracle() -> tuple[Tensor, ...]:
        x = logprobs.detach()[mask].double() - old[mask].double()
        a, ratio = advantages[mask].double(), x.exp()
        use_plain = ratio * a <= ratio.clamp(1 - CLIP, 1 + CLIP) * a
        loss = -torch.where(use_plain, ratio * a, ratio.clamp(1 - CLIP, 1 + CLIP) * a).mean()
        gradient = torch.zeros(shape, dtype=torch.float64, device=device)
        gradient[mask] = torch.where(use_plain, -ratio * a, 0.0) / mask.sum()
        return loss, gradient

    verl = peer("verl.trainer.ppo.core_algos", "compute_policy_loss_vanilla")
    config = verl_actor_config()

    def vanilla(
        logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, weights: Tensor
    ) -> tuple[Tensor, ...]:
        # Its metrics are Python floats: that is part of what it costs.
        loss, _ = verl(old, logprobs, advantages, response_mask, "token-mean", config=config)
        return (loss,)

    run(
        Case(
            op="policy_loss",
            label=f"fp32 {shape[0]}×{shape[1]}",
            mode="forward+backward",
            inputs=(logprobs, old, advantages, mask, mask.float()),
            providers={
                "eager": eager,
                "compile": compiled(eager),
                "verl": verl and config and vanilla,
                "ours": ours,
            },
            oracle=oracle,
            # Three tensors and the bool mask in, the gradient out.
            moved=17 * logprobs.numel(),
            targets=TARGETS.get(name, {}),
            at_most=GPU_AT_MOST.get(name, {}),
            outputs=1,
        )
    )
