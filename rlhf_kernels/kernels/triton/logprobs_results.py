"""Further results of token_logprobs from what its forward pass leaves of a row's parts."""

import triton
import triton.language as tl
from torch import Tensor

from ...core.row_options import RowOptions
from ._launch import kernel, launch
from ._math import scalar, tree_sum
from ._maxima import rebased
from ._rows import order_slack, packed, row_temperature
from ._strided import Strided, token_at


@kernel
def collision_kernel(
    labels,
    temperatures,
    partials,
    squares,
    stats,
    collisions,
    cols,
    parts,
    row_options,
    ignore_index,
    GROUP: tl.constexpr,
):
    """The sum of the squared probabilities of one row from those of its parts, in fp64."""
    row = tl.program_id(0)
    collision = 0.0
    if tl.load(token_at(labels, row, cols)) != ignore_index:
        temperature = row_temperature(row_options, temperatures, row, cols)
        rate = (1.0 / scalar(temperature).to(tl.float64)).to(tl.float32)
        m = tl.load(stats + row.to(tl.int64) * 3)
        s = tl.load(stats + row.to(tl.int64) * 3 + 1).to(tl.float64)
        total = tl.full((), 0.0, tl.float64)
        for start in range(0, parts, GROUP):
            part = start + tl.arange(0, GROUP)
            inside = part < parts
            at = row.to(tl.int64) * parts + part
            part_m = tl.load(partials + at * 3, mask=inside, other=0.0)
            q = tl.load(squares + at, mask=inside, other=0.0).to(tl.float64)
            _, weight = rebased(part_m, q, m, rate)
            total += tree_sum(weight * weight * q, GROUP)
        collision = (total / (s * s)).to(tl.float32)
    tl.store(collisions + row, collision)


@triton.jit
def order_of(x):
    """A logit's place in their order as int32, NaN above all and both zeros the same."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(x != x, 0x7FFFFFFF, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))


@kernel
def argmax_kernel(
    logits,
    labels,
    partials,
    ids,
    cols,
    parts,
    vocab,
    slack,
    ignore_index,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The first of the largest logits of one row; the first NaN if there is one.

    Only tiles that may hold it are read: those with the row's maximum, or a NaN in their sums.
    Under a cap the maxima of tiles are in the order of the logits but for `slack`.
    """
    row = tl.program_id(0)
    found = tl.full((), -1, tl.int64)
    if tl.load(token_at(labels, row, cols)) != ignore_index:
        of_row = partials + row.to(tl.int64) * parts * 3
        top = tl.full((), float("-inf"), tl.float32)
        for start in range(0, parts, GROUP):
            part = start + tl.arange(0, GROUP)
            own_m = tl.load(of_row + part.to(tl.int64) * 3, mask=part < parts, other=float("-inf"))
            top = tl.maximum(top, tl.max(own_m, axis=0))
        top -= slack
        best = tl.full((), -0x7FFFFFFF - 1, tl.int32)
        column = tl.arange(0, TILE)
        # A name has one type in a loop.
        for begin in range(0, parts, PARTS):
            of_parts = of_row + (begin + tl.arange(0, PARTS)).to(tl.int64) * 3
            part_m, part_s = tl.load(of_parts), tl.load(of_parts + 1)
            out = (part_m < top) & (part_s == part_s)
            if tl.min(out.to(tl.int32), axis=0) == 0:
                first = (tl.full((), 0, tl.int64) + begin // PARTS) * TILE
                count = tl.minimum(vocab - first, TILE).to(tl.int32)
                x = tl.load(
                    token_at(logits, row, cols) + first + column, mask=column < count, other=0.0
                )
                order = tl.where(column < count, order_of(x.to(tl.float32)), -0x7FFFFFFF - 1)
                own = tl.max(order, axis=0)
                hit = tl.min(tl.where(order == own, column, TILE), axis=0)
                found = tl.where(own > best, first + hit, found)
                best = tl.maximum(best, own)
    tl.store(ids + row, found)


def collision(
    out: Tensor,
    logits: Tensor,
    tokens: tuple[Strided, Strided | None],
    partials: Tensor,
    squares: Tensor,
    stats: Tensor,
    cols: int,
    options: RowOptions,
    group: int,
) -> None:
    """Writes the sums of the squared probabilities of all tokens to `out`.

    Args:
        out: fp32 [..., cols].
        logits: of the rows; names the device.
        tokens: labels and temperatures as a kernel takes them.
        partials: fp32, three values for each part of a row.
        squares: fp32, one for each part.
        stats: of the whole rows, fp32 [..., cols, 3].
        cols: tokens of a row of labels.
        options: temperature and label to skip.
        group: parts that are loaded together.
    """
    parts, of_rows = squares.numel() // max(out.numel(), 1), packed(options)
    launch(
        collision_kernel,
        out.numel(),
        logits,
        *tokens,
        partials,
        squares,
        stats,
        out,
        cols,
        parts,
        of_rows,
        options.ignore_index,
        GROUP=group,
        warps=1,
    )


def argmax(
    out: Tensor,
    logits: Tensor,
    x: Strided,
    labels: Strided,
    partials: Tensor,
    cols: int,
    options: RowOptions,
    **sizes: int,
) -> None:
    """Writes the most likely tokens to `out`, int64 [..., cols].

    Args:
        out, logits, partials, cols, options: as of `collision`.
        x, labels: logits and labels as a kernel takes them.
        sizes: TILE, PARTS and GROUP of the forward pass.
    """
    parts = partials.numel() // 3 // max(out.numel(), 1)
    launch(
        argmax_kernel,
        out.numel(),
        logits,
        x,
        labels,
        partials,
        out,
        cols,
        parts,
        logits.shape[-1],
        order_slack(options),
        options.ignore_index,
        **sizes,
        warps=4,
    )
