"""group_advantages: one program per group; fp64 throughout.

Groups begin where the sorted ids change.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..advantages import Groups
from ._launch import kernel, launch, tile_count
from ._math import scalar, tree_sum
from ._strided import strided

# Rewards of a group that its program takes at a time.
BLOCK = 64
# Rewards that the program of the whole batch takes at a time.
BATCH_BLOCK = 1024
_BATCH_WARPS = 8


@triton.jit
def group_end(ids, begin, count, bits):
    """First position after the group of sorted ids that starts at `begin`."""
    own = tl.load(ids + begin)
    low, high = begin + 1, count + begin * 0
    for _ in range(bits):
        middle = tl.minimum((low + high) // 2, count - 1)
        same = (low < high) & (tl.load(ids + middle) == own)
        low = tl.where(same, middle + 1, low)
        high = tl.where(same | (low >= high), high, middle)
    return low


@triton.jit
def members(rewards, order, k, end):
    """(index, inside, fp64 reward) of sorted positions k of a group."""
    inside = k < end
    index = k.to(tl.int64)
    if order is not None:
        index = tl.load(order + k, mask=inside, other=0)
    pointer, _, stride = rewards
    return index, inside, tl.load(pointer + index * stride, mask=inside, other=0.0).to(tl.float64)


@kernel
def group_kernel(
    rewards,
    greedy,
    ids,
    order,
    out,
    count,
    size,
    bits,
    eps,
    BASELINE: tl.constexpr,
    SCALE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rewards of the group that starts at this program, if any, minus the baseline.

    With SCALE "group" also divides them by the standard deviation. Statistics are relative to the
    group's first reward, so equal rewards have a standard deviation of exactly 0.
    """
    if ids is None:
        begin = tl.program_id(0) * size
        end = tl.minimum(begin + size, count)
    else:
        begin = tl.program_id(0)
        before = tl.load(ids + tl.maximum(begin - 1, 0))
        end = begin
        if (begin == 0) | (before != tl.load(ids + begin)):
            end = group_end(ids, begin, count, bits)
    first = tl.full((), 0.0, tl.float64)
    if begin < end:
        first += tl.sum(members(rewards, order, begin + tl.arange(0, 1), end)[2], axis=0)
    n = tl.maximum(end - begin, 1).to(tl.float64)
    others = tl.maximum(n - 1.0, 1.0)
    mean, spread = tl.full((), 0.0, tl.float64), tl.full((), 0.0, tl.float64)
    if BASELINE == "mean" or BASELINE == "leave-one-out" or SCALE == "group":
        for start in range(begin, end, BLOCK):
            _, inside, r = members(rewards, order, start + tl.arange(0, BLOCK), end)
            mean += tree_sum(tl.where(inside, r - first, 0.0), BLOCK)
        mean /= n
        # Infinity becomes NaN: differences to it would depend on which reward comes first.
        mean += 0.0 * mean
        for start in range(begin, end, BLOCK):
            _, inside, r = members(rewards, order, start + tl.arange(0, BLOCK), end)
            d = tl.where(inside, r - first - mean, 0.0)
            spread += tree_sum(d * d, BLOCK)
        spread = tl.sqrt(spread / others)
    for start in range(begin, end, BLOCK):
        index, inside, r = members(rewards, order, start + tl.arange(0, BLOCK), end)
        if BASELINE == "mean":
            r = r - first - mean
        elif BASELINE == "leave-one-out":
            # r_i - mean of the others = n / (n - 1) * (r_i - mean of all)
            r = (r - first - mean) * (n / others)
        elif BASELINE == "greedy":
            pointer, _, stride = greedy
            r -= tl.load(pointer + index * stride, mask=inside, other=0.0).to(tl.float64)
        if SCALE == "group":
            r = tl.where(spread == 0.0, 0.0, r / (spread + scalar(eps).to(tl.float64)))
        tl.store(out + index, r.to(out.dtype.element_ty), mask=inside)


@kernel
def batch_kernel(work, out, count, eps, CENTRE: tl.constexpr, BLOCK: tl.constexpr):
    """Divides fp64 rewards, after the baseline, by their standard deviation; a single program."""
    first = tl.full((), 0.0, tl.float64)
    mean = tl.full((), 0.0, tl.float64)
    if CENTRE:
        # The other baselines already give a mean of zero.
        first = tl.load(work)
        sums = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, count, BLOCK):
            i = start + tl.arange(0, BLOCK)
            a = tl.load(work + i, mask=i < count, other=0.0)
            sums += tl.where(i < count, a - first, 0.0)
        mean = tree_sum(sums, BLOCK) / count
    squares = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        d = tl.load(work + i, mask=i < count, other=0.0) - first - mean
        squares += tl.where(i < count, d * d, 0.0)
    spread = tl.sqrt(tree_sum(squares, BLOCK) / tl.maximum(count - 1, 1))
    scale = spread + scalar(eps).to(tl.float64)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        d = tl.load(work + i, mask=i < count, other=0.0) - first - mean
        tl.store(out + i, tl.where(spread == 0.0, 0.0, d / scale).to(tl.float32), mask=i < count)


def groups(given: Groups, out: Tensor) -> None:
    """One launch, or two for scale "batch"."""
    rewards, baseline, eps = given.rewards, given.baseline, given.eps
    count = rewards.numel()
    programs = count if given.size == 0 else tile_count(count, given.size)
    batch = given.scale == "batch"
    work = torch.empty_like(out, dtype=torch.float64) if batch else out
    launch(
        group_kernel,
        programs,
        rewards,
        strided(rewards),
        strided(given.greedy_rewards),
        given.sorted_ids,
        given.order,
        work,
        count,
        given.size,
        count.bit_length(),
        eps,
        BASELINE=baseline,
        SCALE=given.scale,
        BLOCK=BLOCK,
        warps=1,
    )
    if batch:
        constants = {"CENTRE": baseline in ("none", "greedy"), "BLOCK": BATCH_BLOCK}
        constants["warps"] = _BATCH_WARPS
        launch(batch_kernel, 1, rewards, work, out, count, eps, **constants)
