"""GAE (padded and packed), whitening, ppo_advantages and group_advantages."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import rlhf_kernels as rk

from ..harness import Missing, Point, Provider, against, points, sized
from ..harness.peers import peer
from ..harness.ragged import described, offsets, padded, response_lengths
from .policy import HOST_SHAPES

GAMMA, LAM, KL_COEF = 0.99, 0.95, 0.05
TARGETS = {"eager": 100, "vectorized": 5, "compile": 5, "copy": 0.4}
SHAPES = {"512x4096": (512, 4096), "16x131072": (16, 131072)}
FULL_SHAPES = {"64x512": (64, 512), "8x32768": (8, 32768)}
GPU_SHAPES = {"gpu-8192x4096": (8192, 4096), "gpu-16x131072": (16, 131072)}
GPU_TARGETS, GPU_AT_MOST = {"copy": 0.75}, {"gpu-16x131072": {"median": 30e-6}}
# A longer loop on a GPU takes seconds per call, all of it launch overhead.
LONGEST_GPU_LOOP = 8192
# The oracle checks this many sequences of a large batch.
SAMPLED_SEQUENCES = 8
# Bytes per token: rewards, values and a bool mask are read, advantages and returns written.
GAE_BYTES = 17


def loop(rewards: Tensor, values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The implementation of most trainers: a Python loop over time that skips masked steps."""
    next_value = advantage = torch.zeros_like(values[:, 0])
    advantages = []
    for t in reversed(range(values.shape[1])):
        keep = weights[:, t]
        delta = rewards[:, t] + GAMMA * next_value - values[:, t]
        advantage = keep * (delta + GAMMA * LAM * advantage) + (1 - keep) * advantage
        next_value = keep * values[:, t] + (1 - keep) * next_value
        advantages.append(advantage)
    result = torch.stack(advantages[::-1], dim=1)
    return result, result + values


def _decayed_sums(x: Tensor, decay: float, chunk: int = 128) -> Tensor:
    """y_t = x_t + decay * y_{t+1} over the last dimension, by matrix products of chunks."""
    length = x.shape[-1]
    step = torch.arange(min(chunk, length), device=x.device)
    gap = step[:, None] - step
    matrix = torch.where(gap >= 0, decay ** gap.clamp(min=0).to(x.dtype), 0.0)
    if length <= chunk:
        return x @ matrix
    chunks = torch.nn.functional.pad(x, (0, -length % chunk)).unflatten(-1, (-1, chunk))
    y = chunks @ matrix
    # Each chunk receives the decayed sum of all later chunks.
    heads = _decayed_sums(y[..., 0], decay**chunk, chunk)
    behind = torch.nn.functional.pad(heads[..., 1:], (0, 1))
    y = y + behind.unsqueeze(-1) * decay ** (chunk - step).to(x.dtype)
    return y.flatten(-2)[..., :length]


def vectorized(rewards: Tensor, values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The fastest form in plain torch that we know; correct only for masks without gaps."""
    values = values * weights
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    delta = (rewards + GAMMA * following - values) * weights
    advantages = _decayed_sums(delta, GAMMA * LAM)
    return advantages, advantages + values


def whitened(x: Tensor, weights: Tensor) -> Tensor:
    count = weights.sum()
    mean = (x * weights).sum() / count
    variance = ((x - mean) ** 2 * weights).sum() / (count - 1)
    return (x - mean) * torch.rsqrt(variance + 1e-8)


def standardized(rewards: Tensor, size: int) -> Tensor:
    """Standardises each group of `size` consecutive rewards."""
    g = rewards.view(-1, size)
    return ((g - g.mean(1, keepdim=True)) / (g.std(1, keepdim=True) + 1e-6)).flatten()


def _scalar_gae(rewards: Tensor, values: Tensor, lengths: list[int]) -> tuple[Tensor, Tensor]:
    """The oracle: a loop of Python floats over each row; tokens of all rows in one tensor."""
    advantages: list[float] = []
    for r, v, n in zip(rewards.tolist(), values.tolist(), lengths, strict=True):
        advantage = next_value = 0.0
        row = []
        for t in reversed(range(n)):
            advantage = r[t] + GAMMA * next_value - v[t] + GAMMA * LAM * advantage
            next_value = v[t]
            row.append(advantage)
        advantages += row[::-1]
    flat = torch.tensor(advantages, dtype=torch.float64)
    kept = torch.arange(values.shape[1]) < torch.tensor(lengths)[:, None]
    return flat, flat + values.cpu().double()[kept]


def _batch(
    shape: tuple[int, int], device: torch.device, lengths: Tensor | None = None
) -> tuple[Tensor, ...]:
    """Rewards, values and the mask of `padded`."""
    rewards, values = (torch.randn(shape, device=device) for _ in range(2))
    return rewards, values, padded(shape, device, lengths)


def _loop(length: int, name: str) -> Provider | Missing:
    if name.startswith("gpu") and length > LONGEST_GPU_LOOP:
        return Missing(f"not run: a loop of {length} steps is seconds of small launches")
    return loop


def _sampled(mask: Tensor, name: str) -> Tensor:
    """Mask [B, T] of the tokens that the oracle checks: all, or sequences of a large batch."""
    chosen = torch.zeros_like(mask)
    every = max(1, len(mask) // SAMPLED_SEQUENCES) if name.startswith("gpu") else 1
    chosen[::every] = mask[::every]
    # Include the last sequence, because errors are likely at the end.
    chosen[-1] = mask[-1]
    return chosen


def _oracle(rewards: Tensor, values: Tensor, judged: Tensor) -> tuple[Tensor, Tensor]:
    rows = judged.any(1)
    return _scalar_gae(rewards[rows], values[rows], judged[rows].sum(1).tolist())


@pytest.mark.parametrize("name", points(HOST_SHAPES | SHAPES, GPU_SHAPES, FULL_SHAPES))
def test_gae(point: Point, name: str) -> None:
    shape = point.size((4, 300), (HOST_SHAPES | SHAPES | FULL_SHAPES | GPU_SHAPES)[name])
    rewards, values, mask = _batch(shape, point.device)
    judged = _sampled(mask, name)

    def plain(scan: Provider) -> Provider:
        return lambda r, v, mask, weights: scan(r, v, weights)

    point(
        op="gae",
        label=sized(values.dtype, *shape),
        mode="forward",
        inputs=(rewards, values, mask, mask.float()),
        providers=against(
            _loop(shape[1], name) and plain(loop),
            lambda r, v, mask, _: rk.gae(r, v, mask=mask, gamma=GAMMA, lam=LAM),
            vectorized=plain(vectorized),
        ),
        oracle=lambda: _oracle(rewards, values, judged),
        moved=GAE_BYTES * rewards.numel(),
        targets=TARGETS if name in SHAPES else GPU_TARGETS if name in GPU_SHAPES else {},
        at_most=GPU_AT_MOST.get(name, {}),
        select=lambda t: t[judged].cpu(),
    )


@pytest.mark.parametrize("name", points({"512": 512}, {"gpu-4096": 4096}))
def test_gae_packed(point: Point, name: str) -> None:
    shape = point.size((4, 300), (int(name.removeprefix("gpu-")), 8192))
    # Trainers pad such a batch, run the scan and pack the result.
    lengths = response_lengths(shape[0], shape[1], point.device)
    rewards, values, mask = _batch(shape, point.device, lengths)
    judged = _sampled(mask, name)
    judged_slots = judged[mask]
    slots = mask.flatten().nonzero().squeeze(1)

    def through_padding(scan: Provider) -> Provider:
        def padded(r: Tensor, v: Tensor, _: Tensor, slots: Tensor, weights: Tensor) -> Any:
            grids = (r.new_zeros(weights.numel()).index_copy(0, slots, x) for x in (r, v))
            results = scan(*(g.view(shape) for g in grids), weights)
            return tuple(x.reshape(-1)[slots] for x in results)

        return padded

    def ours(r: Tensor, v: Tensor, cu_seqlens: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        return rk.gae(r, v, cu_seqlens=cu_seqlens, gamma=GAMMA, lam=LAM)

    point(
        op="gae packed",
        label=f"fp32 {described(lengths, shape[1])}",
        mode="forward",
        inputs=(rewards[mask], values[mask], offsets(lengths), slots, mask.float()),
        providers=against(through_padding(loop), ours, vectorized=through_padding(vectorized)),
        oracle=lambda: _oracle(rewards, values, judged),
        # There is no mask to read.
        moved=(GAE_BYTES - 1) * len(slots),
        targets=GPU_TARGETS if name.startswith("gpu") else TARGETS,
        select=lambda t: t[judged_slots].cpu(),
    )


def _whitened(x: Tensor) -> Tensor:
    """The oracle for the kept tokens."""
    x = x.double()
    return (x - x.mean()) / (x.var() + 1e-8).sqrt()


@pytest.mark.gpu
def test_whiten(point: Point) -> None:
    shape = point.size((4, 300), (2048, 4096))
    _, x, mask = _batch(shape, point.device)
    x = x + 3
    point(
        op="whiten",
        label=sized(x.dtype, *shape),
        mode="forward",
        inputs=(x, mask, mask.float()),
        providers=against(
            lambda x, _, weights: whitened(x, weights), lambda x, mask, _: rk.whiten(x, mask=mask)
        ),
        oracle=lambda: (_whitened(x[mask]).cpu(),),
        # One read and one write; further passes for the statistics are part of the op's own cost.
        moved=(4 + 1 + 4) * x.numel(),
        select=lambda t: t[mask].cpu(),
    )


def test_ppo_advantages(point: Point) -> None:
    """Rewards shaped by the KL penalty, GAE and whitening: the advantage step of verl."""
    shape = point.size((4, 300), (512, 4096))
    logprobs, values, mask = _batch(shape, point.device)
    ref_logprobs = logprobs + 0.1 * torch.randn_like(logprobs)
    scores = torch.randn(shape[0], device=point.device)
    last = mask.sum(1, keepdim=True) - 1

    def shaped(scores: Tensor, new: Tensor, ref: Tensor, last: Tensor) -> Tensor:
        return (-KL_COEF * (new - ref)).scatter_add(1, last, scores.unsqueeze(1))

    # Inputs: scores, logprobs, reference logprobs, values, the mask in three dtypes, last step.
    def plain(scan: Provider) -> Provider:
        def advantages(*given: Tensor) -> tuple[Tensor, ...]:
            *rewarded, v, _, weights, _, last = given
            advantages, returns = scan(shaped(*rewarded, last), v, weights)
            return whitened(advantages, weights), returns

        return advantages

    scan = peer("verl.trainer.ppo.core_algos", "compute_gae_advantage_return")

    def verl(*given: Tensor) -> tuple[Tensor, ...]:
        *rewarded, v, _, _, response_mask, last = given
        return scan(shaped(*rewarded, last), v, response_mask, GAMMA, LAM)

    def ours(*given: Tensor) -> tuple[Tensor, ...]:
        options = {"kl_coef": KL_COEF, "gamma": GAMMA, "lam": LAM, "whiten": True}
        return rk.ppo_advantages(*given[:4], mask=given[4], **options)[:2]

    def oracle() -> tuple[Tensor, ...]:
        rewards = shaped(scores.double(), logprobs.double(), ref_logprobs.double(), last)
        advantages, returns = _scalar_gae(rewards, values, mask.sum(1).tolist())
        return _whitened(advantages), returns

    point(
        op="ppo_advantages",
        label=sized(values.dtype, *shape),
        mode="forward",
        inputs=(scores, logprobs, ref_logprobs, values, mask, mask.float(), mask.long(), last),
        providers=against(
            plain(loop), ours, vectorized=plain(vectorized), others={"verl": scan and verl}
        ),
        oracle=oracle,
        # Three tensors and the bool mask are read; rewards, advantages and returns are written.
        moved=25 * values.numel(),
        select=lambda t: t[mask].cpu(),
    )


def test_group_advantages(point: Point) -> None:
    groups, size = point.size((8, 4), (128, 8))
    rewards = torch.randn(groups * size, device=point.device)
    ids = np.repeat(np.arange(groups), size)
    ones = torch.ones(groups * size, 1, dtype=torch.long, device=point.device)

    def eager(r: Tensor) -> Tensor:
        return standardized(r, size)

    grpo = peer("verl.trainer.ppo.core_algos", "compute_grpo_outcome_advantage")
    # One reward column instead of one per token is the least work for verl.
    verl = grpo and (lambda r: grpo(r.clone().unsqueeze(1), ones, ids)[0].squeeze(1))
    point(
        op="group_advantages",
        label=f"fp32 {groups} groups of {size}",
        mode="forward",
        inputs=(rewards,),
        providers=against(eager, lambda r: rk.group_advantages(r, size), others={"verl": verl}),
        oracle=lambda: (eager(rewards.double()).cpu(),),
        moved=8 * rewards.numel(),
        select=lambda t: t.cpu(),
    )
