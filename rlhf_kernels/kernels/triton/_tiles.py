"""Tiles of rows of logits, read once and kept in registers.

A tile is a tuple of blocks [PARTS, COLS] of consecutive columns. A thread has one 16-byte load of
each block, and 32 threads have one row of it: a part of the tile. Sums first add up the blocks, in
order and within each thread; then one tree goes over the threads of a part. Parts keep their sums
apart, so that no warp waits for another one. A program has 32 * PARTS threads.
"""

import triton
import triton.language as tl

from ._rows import tile_with_options

# Bits of the loads of 32 threads.
PART_BITS = tl.constexpr(32 * 128)
# Below every distance of finite logits from their maximum.
LEAST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def tile_bounds(tile, size, UNIT: tl.constexpr, TILE: tl.constexpr):
    """(first element, number of elements) of a tile of `size` units; size may exceed 2^31."""
    first = tile.to(tl.int64) * TILE
    return first, tl.minimum(size.to(tl.int64) * UNIT - first, TILE).to(tl.int32)


@triton.jit
def load_blocks(x, count, row_options, TILE: tl.constexpr, PARTS: tl.constexpr):
    """The fp32 blocks of a tile of `count` columns from the address x, after the options of rows.

    -inf beyond the columns.
    """
    COLS: tl.constexpr = PART_BITS // x.dtype.element_ty.primitive_bitwidth
    column = tl.arange(0, PARTS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    blocks = ()
    for k in tl.static_range(TILE // (PARTS * COLS)):
        at = column + k * PARTS * COLS
        inside = at < count
        z = tl.load(x + at, mask=inside, other=float("-inf")).to(tl.float32)
        z = tile_with_options(z, inside, row_options)
        blocks += (z,)  # type: ignore[assignment]
    return blocks


@triton.jit
def tops(blocks):
    """(maximum m of each part, [PARTS]; m [PARTS, 1], or 0 for a part of only -inf)."""
    top = blocks[0]
    for k in tl.static_range(1, len(blocks)):
        top = tl.maximum(top, blocks[k])
    m = tl.max(top, axis=1)
    return m, tl.where(m == float("-inf"), 0.0, m)[:, None]
