"""Whitening: moments of tiles, combined in order, then applied.

A tile's moments are taken around its own mean in fp32. Tiles are combined in fp64 by Chan's
formula. A common offset therefore costs no precision, and equal elements have a variance of exactly
zero.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.layout import grid
from ..advantages import WHITEN_EPS, Whitening
from ._launch import kernel, launch, tile_count
from ._math import scalar, tree_sum
from ._strided import Strided, strided

# Tokens per program, 16 per thread.
TILE = 4096
WARPS = 8
# Partials that the combining program takes at a time.
GROUP = 1024


@triton.jit
def store_moments(partials, slot, count, mean, m2):
    at = partials + slot.to(tl.int64) * 3
    tl.store(at, count)
    tl.store(at + 1, mean)
    tl.store(at + 2, m2)


@triton.jit
def total(x, N: tl.constexpr):
    """fp64 sum of a block [N], N up to 2^15; halves first, which are in registers of a thread."""
    for _ in tl.static_range(8):
        if x.shape[0] > 128:
            x = tl.sum(tl.reshape(x, (2, x.shape[0] // 2)), axis=0)
    return tree_sum(x, N).to(tl.float64)


@triton.jit
def tile_moments(x, keep, N: tl.constexpr):
    """(n, mean, sum of squared differences to it), fp64, over the kept elements of a block [N]."""
    count = tl.sum(keep.to(tl.int32), axis=0).to(tl.float64)
    n = tl.maximum(count, 1.0)
    centre = (total(tl.where(keep, x, 0.0), N) / n).to(tl.float32)
    # Centred twice: the first centre has the rounding error of a sum of large numbers.
    centre += (total(tl.where(keep, x - centre, 0.0), N) / n).to(tl.float32)
    d = tl.where(keep, x - centre, 0.0)
    rest = total(d, N) / n
    m2 = total(d * d, N) - rest * rest * n
    return count, centre.to(tl.float64) + rest, tl.where(m2 < 0.0, 0.0, m2)


@triton.jit
def merge_moments(count, mean, m2, x, keep, N: tl.constexpr):
    """The moments of the union with the kept elements of a block (Chan)."""
    more, block_mean, block_m2 = tile_moments(x, keep, N)
    share = more / tl.maximum(count + more, 1.0)
    d = block_mean - mean
    return count + more, mean + d * share, m2 + block_m2 + d * d * (count * share)


@triton.jit
def tile_positions(slot, cols, TILE: tl.constexpr):
    """(rows, columns) of the elements of one tile of a grid in flat order.

    Only the first position takes a 64-bit division. One per token would take longer than the memory
    accesses.
    """
    begin = slot.to(tl.int64) * TILE
    row, column = begin // cols, begin % cols
    i = tl.arange(0, TILE)
    # Positions counted from the second row of the tile, negative in the first. If rows are longer
    # than a tile, the tile has no third row.
    past_first = i - tl.minimum(cols - column, TILE).to(tl.int32)
    width = tl.minimum(begin * 0 + cols, TILE).to(tl.int32)
    rows = row + tl.where(past_first < 0, 0, past_first // width + 1)
    return rows, tl.where(past_first < 0, column + i, (past_first % width).to(tl.int64))


@triton.jit
def element_at(x, row, column):
    """Addresses of elements of a grid."""
    pointer, stride0, stride1 = x
    return pointer + row * stride0 + column * stride1


@triton.jit
def tile_elements(slot, x, mask, count, cols, TILE: tl.constexpr):
    """(index, inside, fp32 value, keep) of the elements of one tile of a grid in flat order."""
    i = slot.to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = i < count
    row, column = tile_positions(slot, cols, TILE)
    keep = inside
    if mask is not None:
        keep = inside & (tl.load(element_at(mask, row, column), mask=inside, other=0) != 0)
    value = tl.load(element_at(x, row, column), mask=inside, other=0.0).to(tl.float32)
    return i, inside, value, keep


@kernel
def moments_kernel(x, mask, partials, count, cols, TILE: tl.constexpr):
    """(n, mean, M2) of one tile."""
    slot = tl.program_id(0)
    _, _, value, keep = tile_elements(slot, x, mask, count, cols, TILE)
    n, mean, m2 = tile_moments(value, keep, TILE)
    store_moments(partials, slot, n, mean, m2)


@kernel
def combine_kernel(partials, stats, slots, correction, eps, GROUP: tl.constexpr):
    """Mean and 1 / sqrt(variance + eps) of all elements, fp64, from the moments of the tiles."""
    counts, sums = tl.zeros((GROUP,), tl.float64), tl.zeros((GROUP,), tl.float64)
    for start in range(0, slots, GROUP):
        i = start + tl.arange(0, GROUP)
        at = partials + i.to(tl.int64) * 3
        n = tl.load(at, mask=i < slots, other=0.0)
        counts += n
        sums += n * tl.load(at + 1, mask=i < slots, other=0.0)
    count = tree_sum(counts, GROUP)
    mean = tree_sum(sums, GROUP) / tl.maximum(count, 1.0)
    squares = tl.zeros((GROUP,), tl.float64)
    for start in range(0, slots, GROUP):
        i = start + tl.arange(0, GROUP)
        at = partials + i.to(tl.int64) * 3
        n = tl.load(at, mask=i < slots, other=0.0)
        d = tl.load(at + 1, mask=i < slots, other=0.0) - mean
        squares += tl.load(at + 2, mask=i < slots, other=0.0) + n * d * d
    divisor = tl.maximum(count - correction, 1.0)
    spread = tl.sqrt(tree_sum(squares, GROUP) / divisor + scalar(eps).to(tl.float64))
    tl.store(stats, mean)
    # Equal elements with eps = 0 would give 0 / 0; the result is 0.
    tl.store(stats + 1, tl.where(spread == 0.0, 0.0, 1.0 / spread))


@kernel
def apply_kernel(
    x, mask, stats, out, count, cols, SHIFT: tl.constexpr, INPLACE: tl.constexpr, TILE: tl.constexpr
):
    """(x - mean) * scale, plus the mean unless SHIFT; masked elements are 0, or x if INPLACE."""
    slot = tl.program_id(0)
    i, inside, value, keep = tile_elements(slot, x, mask, count, cols, TILE)
    mean = tl.load(stats)
    scale = tl.load(stats + 1).to(tl.float32)
    high = mean.to(tl.float32)
    low = (mean - high.to(tl.float64)).to(tl.float32)
    y = (value - high - low) * scale
    if SHIFT == 0:
        y += high
    # In place, masked entries already hold 0, or NaN if the whole result is NaN.
    hidden = 0.0
    if INPLACE:
        hidden = value
    tl.store(out + i, tl.where(keep, y, hidden), mask=inside)


def apply_moments(
    x: Strided,
    mask: Strided | None,
    partials: Tensor,
    out: Tensor,
    *,
    shift_mean: bool,
    unbiased: bool,
    eps: float,
) -> None:
    """Two launches: whitens x by the moments of its tiles into `out` (contiguous; may be x)."""
    stats, count, group = partials.new_empty(2), out.numel(), {"GROUP": GROUP, "warps": WARPS}
    slots = partials.shape[0] // 3
    launch(combine_kernel, 1, out, partials, stats, slots, int(unbiased), float(eps), **group)
    launch(
        apply_kernel,
        tile_count(count, TILE),
        out,
        x,
        mask,
        stats,
        out,
        count,
        grid(out.shape)[1],
        SHIFT=shift_mean,
        INPLACE=out is x[0],
        TILE=TILE,
        warps=WARPS,
    )


def whiten_scan(advantages: Tensor | None, mask: Strided | None, partials: Tensor) -> None:
    """Two launches: whitens the advantages of a scan in place by the moments of its tiles."""
    assert advantages is not None  # only scans with values are whitened
    rules: dict[str, Any] = {"shift_mean": True, "unbiased": True, "eps": WHITEN_EPS}
    apply_moments(strided(advantages), mask, partials, advantages, **rules)


def whiten(given: Whitening, out: Tensor) -> None:
    """Three launches; x and mask are read twice."""
    x, mask, shift_mean, unbiased, eps = given
    tiles, count, cols = tile_count(x.numel(), TILE), x.numel(), grid(x.shape)[1]
    partials = torch.empty(3 * tiles, dtype=torch.float64, device=x.device)
    tensors, tile = (strided(x), strided(mask)), {"TILE": TILE, "warps": WARPS}
    launch(moments_kernel, tiles, x, *tensors, partials, count, cols, **tile)
    apply_moments(*tensors, partials, out, shift_mean=shift_mean, unbiased=unbiased, eps=eps)
