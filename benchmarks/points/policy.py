"""policy_loss: the clipped loss with metrics, padded and packed, forward and backward."""

import pytest
import torch
from torch import Tensor

import rlhf_kernels as rk

from ..harness import Point, against, exact, points, sized
from ..harness.peers import peer, verl_actor_config
from ..harness.ragged import described, offsets, padded, response_lengths

# With so few tokens, the host time of a call dominates; also without gradients.
HOST_SHAPES = {"4x16": (4, 16), "4x16-forward": (4, 16)}
SHAPES = {"64x2048": (64, 2048), "2048x2048": (2048, 2048)}
FULL_SHAPES = {"64x512": (64, 512), "8x32768": (8, 32768)}
GPU_SHAPES = {f"gpu-{name}": shape for name, shape in SHAPES.items()}
TARGETS = {"64x2048": {"eager": 8, "compile": 1.5}, "2048x2048": {"copy": 0.5}}
# The host may take 10 µs for forward and 10 µs for backward.
GPU_AT_MOST = {"gpu-64x2048": {"host": 20e-6}}
CLIP = 0.2
# Bytes of a token by mode: three tensors and the bool mask are read, the gradient is written.
MOVED = {"forward": 13, "forward+backward": 17}
# All providers compute the same loss: clip 0.2 on both sides, no dual clip. Created once, as usual.
OPTIONS = {"clip_low": CLIP, "clip_high": CLIP}
CONFIG, GRPO = rk.PolicyLossConfig.ppo(**OPTIONS), rk.PolicyLossConfig.grpo(kl_coef=0.0, **OPTIONS)
# The maximum length of a packed sequence.
LONGEST = 8192


def mode_of(name: str) -> str:
    """The mode of a point, of a shape's name."""
    return "forward" if name.endswith("-forward") else "forward+backward"


def terms(logprobs: Tensor, old: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each token: the log-ratio, the clipped loss, and whether clipping was active."""
    log_ratio = logprobs - old
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - CLIP, 1 + CLIP)
    return log_ratio, torch.maximum(plain, clipped), clipped > plain


def eager(
    logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, weights: Tensor, *_: Tensor
) -> tuple[Tensor, ...]:
    """The loss and the metrics that trainers log: clip fraction and approximate KL."""
    count = weights.sum()
    log_ratio, losses, is_clipped = terms(logprobs, old, advantages)
    loss = (losses * weights).sum() / count
    with torch.no_grad():
        kl = (-log_ratio * weights).sum() / count
    return loss, (is_clipped * weights).sum() / count, kl


def ours(*given: Tensor) -> tuple[Tensor, ...]:
    result = rk.policy_loss(*given[:3], mask=given[3], config=CONFIG)
    return result.loss, result.metrics.tensor


def _steps(old: Tensor) -> Tensor:
    """New log-probabilities; no ratio is so near a clip bound that rounding decides its branch."""
    log_ratio = 0.2 * torch.randn_like(old)
    near = (log_ratio.exp() - 1).abs().sub(CLIP).abs() < 1e-4
    return (old + log_ratio.masked_fill(near, 0)).requires_grad_()


def _exact(logprobs: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
    """The fp64 loss of each token; no token may lie on a clip bound, see `_steps`."""
    return terms(logprobs.double(), old.double(), advantages.double())[1]


@pytest.mark.parametrize("name", points(HOST_SHAPES | SHAPES, GPU_SHAPES, FULL_SHAPES))
def test_policy_loss(point: Point, name: str) -> None:
    shape = point.size((4, 50), (HOST_SHAPES | SHAPES | FULL_SHAPES | GPU_SHAPES)[name])
    mode = mode_of(name)
    backward = mode != "forward"
    old = -torch.rand(shape, device=point.device) * 5
    logprobs = _steps(old).requires_grad_(backward)
    advantages = torch.randn_like(old) + 0.5
    mask = padded(shape, point.device)
    verl = peer("verl.trainer.ppo.core_algos", "compute_policy_loss_vanilla")
    config = verl_actor_config()

    def vanilla(new: Tensor, old: Tensor, advantages: Tensor, *masks: Tensor) -> Tensor:
        # verl's metrics are Python floats, and this is part of its cost.
        return verl(old, new, advantages, masks[-1], "token-mean", config=config)[0]

    point(
        op="policy_loss",
        label=sized(old.dtype, *shape),
        mode=mode,
        inputs=(logprobs, old, advantages, mask, mask.float(), mask.long()),
        providers=against(eager, ours, others={"verl": verl and config and vanilla}),
        oracle=lambda: exact(
            lambda x: _exact(x, old, advantages)[mask].mean(), [logprobs], gradient=backward
        ),
        moved=MOVED[mode] * logprobs.numel(),
        targets=TARGETS.get(name, {}),
        at_most=GPU_AT_MOST.get(name, {}),
        outputs=1,
    )


def eager_packed(
    logprobs: Tensor,
    old: Tensor,
    advantages: Tensor,
    owners: Tensor,
    cu_seqlens: Tensor,
    *_: Tensor,
) -> tuple[Tensor, ...]:
    """GRPO's mean over sequences of token means; `owners` [N] is the sequence of each token."""
    log_ratio, losses, is_clipped = terms(logprobs, old, advantages[owners])
    sums = torch.zeros_like(advantages).index_add(0, owners, losses)
    loss = (sums / cu_seqlens.diff()).mean()
    with torch.no_grad():
        return loss, is_clipped.float().mean(), -log_ratio.mean()


def ours_packed(*given: Tensor) -> tuple[Tensor, ...]:
    *tensors, _, cu_seqlens, mask = given[:6]
    result = rk.policy_loss(*tensors, mask=mask, cu_seqlens=cu_seqlens, config=GRPO)
    return result.loss, result.metrics.tensor


@pytest.mark.parametrize("name", points((), (), {"256": 256}))
def test_policy_loss_packed(point: Point, name: str) -> None:
    device = point.device
    count, longest = point.size((4, 50), (int(name), LONGEST))
    lengths = response_lengths(count, longest, device)
    owners = torch.arange(count, device=device).repeat_interleave(lengths)
    old = -torch.rand(len(owners), device=device) * 5
    logprobs = _steps(old)
    advantages = torch.randn(count, device=device)
    grid = padded((count, longest), device, lengths)
    slots = grid.flatten().nonzero().squeeze(1)
    mask = torch.ones_like(owners, dtype=torch.bool)

    def loss(logprobs: Tensor) -> Tensor:
        losses = _exact(logprobs, old, advantages[owners]).split(lengths.tolist())
        return torch.stack([x.mean() for x in losses]).mean()

    verl = peer("verl.trainer.ppo.core_algos", "compute_policy_loss_vanilla")
    config = verl_actor_config()

    def vanilla(*given: Tensor) -> Tensor:
        # verl supports only padded tensors.
        logprobs, old, advantages, *_, slots, kept = given
        empty = torch.zeros(kept.numel(), device=kept.device)
        grids = (empty.index_copy(0, slots, x).view(kept.shape) for x in (old, logprobs))
        grids = (*grids, advantages.unsqueeze(1).expand(kept.shape))
        return verl(*grids, kept, "seq-mean-token-mean", config=config)[0]

    tensors = (logprobs, old, advantages, owners, offsets(lengths), mask, slots, grid.long())
    point(
        op="policy_loss packed",
        label=f"fp32 {described(lengths, longest)}",
        mode="forward+backward",
        inputs=tensors,
        providers=against(eager_packed, ours_packed, others={"verl": verl and config and vanilla}),
        oracle=lambda: exact(loss, [logprobs]),
        # Two tensors and the bool mask are read, the gradient is written.
        moved=13 * len(owners),
        outputs=1,
    )
