"""policy_loss: the clipped loss with its metrics, padded and packed, forward and backward."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import rlhf_kernels as rk

from ..harness import Case, Settings, compiled, points
from ..harness.peers import peer, verl_actor_config
from ..harness.ragged import described, offsets, padded, response_lengths

SHAPES = {"64x2048": (64, 2048), "2048x2048": (2048, 2048)}
FULL_SHAPES = {"64x512": (64, 512), "8x32768": (8, 32768)}
GPU_SHAPES = {f"gpu-{name}": shape for name, shape in SHAPES.items()}
TARGETS = {"64x2048": {"eager": 8, "compile": 1.5}, "2048x2048": {"copy": 0.5}}
# 10 µs of the host for each way.
GPU_AT_MOST = {"gpu-64x2048": {"host": 20e-6}}
CLIP = 0.2
# The same loss for all: clip 0.2 both ways, no dual clip. Made once, as verl's and a trainer's are.
OPTIONS = {"clip_low": CLIP, "clip_high": CLIP}
CONFIG, GRPO = rk.PolicyLossConfig.ppo(**OPTIONS), rk.PolicyLossConfig.grpo(kl_coef=0.0, **OPTIONS)
# Longest of the packed sequences.
LONGEST = 8192


def eager(
    logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, weights: Tensor, *_: Tensor
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
    logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, weights: Tensor, *_: Tensor
) -> tuple[Tensor, ...]:
    result = rk.policy_loss(logprobs, old, advantages, mask=mask, config=CONFIG)
    return result.loss, result.metrics.tensor


def _log_ratios(old: Tensor) -> Tensor:
    """None so near a clip bound that rounding decides its branch: no oracle could judge it."""
    log_ratio = 0.2 * torch.randn_like(old)
    near = (log_ratio.exp() - 1).abs().sub(CLIP).abs() < 1e-4
    return log_ratio.masked_fill(near, 0)


def _exact(logprobs: Tensor, old: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """Loss of each token and its derivative, in fp64."""
    x, a = logprobs.detach().double() - old.double(), advantages.double()
    ratio = x.exp()
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    use_plain = ratio * a <= clipped * a
    return -torch.where(use_plain, ratio, clipped) * a, torch.where(use_plain, -ratio * a, 0.0)


@pytest.mark.parametrize("name", points(SHAPES, GPU_SHAPES, FULL_SHAPES))
def test_policy_loss(run: Callable[[Case], None], settings: Settings, name: str) -> None:
    device = settings.device
    shape = (4, 50) if settings.quick else (SHAPES | FULL_SHAPES | GPU_SHAPES)[name]
    old = -torch.rand(shape, device=device) * 5
    logprobs = (old + _log_ratios(old)).requires_grad_()
    advantages = torch.randn_like(old) + 0.5
    mask = padded(shape, device)

    def oracle() -> tuple[Tensor, ...]:
        losses, slopes = _exact(logprobs[mask], old[mask], advantages[mask])
        gradient = torch.zeros(shape, dtype=torch.float64, device=device)
        gradient[mask] = slopes / len(slopes)
        return losses.mean(), gradient

    verl = peer("verl.trainer.ppo.core_algos", "compute_policy_loss_vanilla")
    config = verl_actor_config()

    def vanilla(
        logprobs: Tensor, old: Tensor, advantages: Tensor, *masks: Tensor
    ) -> tuple[Tensor, ...]:
        # Its metrics are Python floats: that is part of what it costs.
        loss, _ = verl(old, logprobs, advantages, masks[-1], "token-mean", config=config)
        return (loss,)

    run(
        Case(
            op="policy_loss",
            label=f"fp32 {shape[0]}×{shape[1]}",
            mode="forward+backward",
            inputs=(logprobs, old, advantages, mask, mask.float(), mask.long()),
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


def eager_packed(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    owners: Tensor,
    cu_seqlens: Tensor,
    *_: Tensor,
) -> tuple[Tensor, ...]:
    """GRPO's mean over sequences of the mean over tokens; `owners` [N]: each token's sequence."""
    a = advantages[owners]
    log_ratio = logprobs - old
    ratio = log_ratio.exp()
    plain = -a * ratio
    clipped = -a * ratio.clamp(1 - CLIP, 1 + CLIP)
    sums = torch.zeros_like(advantages).index_add(0, owners, torch.maximum(plain, clipped))
    loss = (sums / cu_seqlens.diff()).mean()
    with torch.no_grad():
        clip_fraction, kl = (clipped > plain).float().mean(), -log_ratio.mean()
    return loss, clip_fraction, kl


@pytest.mark.parametrize("name", points((), (), {"256": 256}))
def test_policy_loss_packed(run: Callable[[Case], None], settings: Settings, name: str) -> None:
    device = settings.device
    count, longest = (4, 50) if settings.quick else (int(name), LONGEST)
    lengths = response_lengths(count, longest, device)
    owners = torch.arange(count, device=device).repeat_interleave(lengths)
    old = -torch.rand(len(owners), device=device) * 5
    logprobs = (old + _log_ratios(old)).requires_grad_()
    advantages = torch.randn(count, device=device)
    grid = padded((count, longest), device, lengths)
    slots = grid.flatten().nonzero().squeeze(1)

    def oracle() -> tuple[Tensor, ...]:
        losses, slopes = _exact(logprobs, old, advantages[owners])
        means = [x.mean() for x in losses.split(lengths.tolist())]
        return torch.stack(means).mean(), slopes / (lengths[owners] * count)

    def ours_packed(*given: Tensor) -> tuple[Tensor, ...]:
        logprobs, old, advantages, _, cu_seqlens, mask, *_ = given
        result = rk.policy_loss(
            logprobs, old, advantages, mask=mask, cu_seqlens=cu_seqlens, config=GRPO
        )
        return result.loss, result.metrics.tensor

    verl = peer("verl.trainer.ppo.core_algos", "compute_policy_loss_vanilla")
    config = verl_actor_config()

    def vanilla(*given: Tensor) -> tuple[Tensor, ...]:
        # It takes padded tensors alone.
        logprobs, old, advantages, *_, slots, response_mask = given
        shape = response_mask.shape
        grids = (
            x.new_zeros(response_mask.numel()).index_copy(0, slots, x).view(shape)
            for x in (old, logprobs)
        )
        loss, _ = verl(
            *grids, advantages.unsqueeze(1).expand(shape), response_mask,
            "seq-mean-token-mean", config=config,
        )  # fmt: skip
        return (loss,)

    mask = torch.ones_like(owners, dtype=torch.bool)
    run(
        Case(
            op="policy_loss packed",
            label=f"fp32 {described(lengths, longest)}",
            mode="forward+backward",
            inputs=(
                *(logprobs, old, advantages, owners, offsets(lengths), mask),
                *(slots, grid.long()),
            ),
            providers={
                "eager": eager_packed,
                "compile": compiled(eager_packed),
                "verl": verl and config and vanilla,
                "ours": ours_packed,
            },
            oracle=oracle,
            # Two tensors and the bool mask in, the gradient out.
            moved=13 * len(owners),
            outputs=1,
        )
    )
