"""The gradient of token_logprobs: coefficients of each row, then tiles of the vocabulary."""

import torch
import triton.language as tl
from torch import Tensor

from ...core.layout import as_rows, as_upstream, grid
from ...core.row_options import RowOptions
from ..logprobs import ManyLabels
from . import logprobs_many
from ._launch import kernel, launch, tile_count
from ._math import LOG2E, label_gradient
from ._rows import packed, row_temperature, with_options
from ._strided import alignment, in_units, strided, strided_rows, token_at
from ._tiles import tile_bounds

# Columns per program: less than in the forward pass, since a column needs more registers and there
# is no reduction.
TILE = 4096
WARPS = 8
# Rows per program of kernels over rows only.
ROWS = 64
# exp of a smaller number is below the normal floats and counts as zero.
LOWEST = tl.constexpr(-87.0)
TINY = tl.constexpr(2.0**-126)


@kernel
def coefficients_kernel(
    logits,
    labels,
    temperatures,
    stats,
    grad_logprobs,
    grad_entropy,
    grad_lse,
    grad_collision,
    collisions,
    coefficients,
    squares,
    rows,
    cols,
    vocab,
    row_options,
    ignore_index,
    BLOCK: tl.constexpr,
):
    """Coefficients of the backward pass, [rows, 5]: m, 1 / T, a0, a1, gradient at the label.

    A separate kernel does the fp64 work once per row, and reads the label's logit before the
    gradient may overwrite it. a0 and a1 are 0 for a row without gradient.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = row < rows
    label = tl.load(token_at(labels, row, cols), mask=valid, other=0).to(tl.int64)
    g, h = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    if grad_logprobs is not None:
        g = tl.load(token_at(grad_logprobs, row, cols), mask=valid, other=0)
    if grad_entropy is not None:
        h = tl.load(token_at(grad_entropy, row, cols), mask=valid, other=0)
    t = row_temperature(row_options, temperatures, row, cols, valid)
    if temperatures is None:
        t = tl.full((BLOCK,), 0.0, tl.float32) + t
    skip = (label == ignore_index) | ((g == 0.0) & (h == 0.0))
    if grad_lse is not None:
        of_lse = tl.load(token_at(grad_lse, row, cols), mask=valid, other=0)
        skip = skip & ((label == ignore_index) | (of_lse == 0.0))
    if grad_collision is not None:
        of_collision = tl.load(token_at(grad_collision, row, cols), mask=valid, other=0)
        skip = skip & ((label == ignore_index) | (of_collision == 0.0))
    rate = 1.0 / t.to(tl.float64)
    of_row = row.to(tl.int64)
    m = tl.load(stats + of_row * 3, mask=valid, other=0.0)
    s = tl.load(stats + of_row * 3 + 1, mask=valid, other=1.0).to(tl.float64)
    mean = tl.load(stats + of_row * 3 + 2, mask=valid, other=0.0).to(tl.float64)
    known = (label >= 0) & (label < vocab) & valid & (skip == 0)
    z = tl.load(token_at(logits, row, cols) + label, mask=known, other=0.0).to(tl.float32)
    z, slope = with_options(z, row_options)
    # dz = e (a0 + a1 log2 e): the entropy term is linear in log p.
    a0 = (-g + h * mean) / s * rate
    if grad_lse is not None:
        a0 = (of_lse.to(tl.float64) - g + h * mean) / s * rate
    a1 = -h / s * rate / LOG2E
    if grad_collision is not None:
        collision = tl.load(collisions + of_row, mask=valid, other=0.0).to(tl.float64)
        slope_of_squares = 2.0 * of_collision.to(tl.float64) / s * rate
        a0 -= tl.where(of_collision == 0.0, 0.0, slope_of_squares * collision)
        a2 = tl.where(of_collision == 0.0, 0.0, slope_of_squares / s)
    if grad_lse is not None:
        # a0 may cancel to 0 beside a gradient at the label. TINY keeps the row from being taken
        # for one without a gradient.
        a0 = tl.where((of_lse != 0.0) & (a0 == 0.0) & (a1 == 0.0), TINY, a0)
    distance = (z - m).to(tl.float64) * rate
    logprob = distance - tl.log(s)
    own = label_gradient(logprob, distance, mean, g, h) * rate * slope
    if grad_lse is not None:
        own += of_lse * tl.exp(logprob) * rate * slope
    if grad_collision is not None:
        p = tl.exp(logprob)
        further = 2.0 * of_collision * p * (p - collision) * rate * slope
        own += tl.where(of_collision == 0.0, 0.0, further)
        tl.store(squares + of_row, tl.where(skip, 0.0, a2).to(tl.float32), mask=valid)
    out = coefficients + of_row * 5
    tl.store(out, m, mask=valid)
    tl.store(out + 1, rate.to(tl.float32), mask=valid)
    tl.store(out + 2, tl.where(skip, 0.0, a0).to(tl.float32), mask=valid)
    tl.store(out + 3, tl.where(skip, 0.0, a1).to(tl.float32), mask=valid)
    tl.store(out + 4, tl.where(skip, 0.0, own).to(tl.float32), mask=valid)


@kernel(aligned=("logits", "out"))
def backward_kernel(
    logits,
    labels,
    coefficients,
    squares,
    out,
    cols,
    tiles,
    vocab,
    row_options,
    ALIGN: tl.constexpr,
    ENTROPY: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile of dz = p (-g - h (log p + H)) / T, plus g / T at the label."""
    pid = tl.program_id(0)
    row, tile = pid // tiles, pid % tiles
    of_row = coefficients + row.to(tl.int64) * 5
    a0, a1 = tl.load(of_row + 2), tl.load(of_row + 3)
    a2 = 0.0
    if squares is not None:
        a2 = tl.load(squares + row)
    first, count = tile_bounds(tile, vocab, ALIGN, TILE)
    column = tl.arange(0, TILE)
    inside = column < count
    to = token_at(out, row, cols, ALIGN) + first + column
    if (a0 == 0.0) & (a1 == 0.0) & (a2 == 0.0):
        tl.store(to, tl.zeros((TILE,), tl.float32).to(to.dtype.element_ty), mask=inside)
    else:
        m, rate, own = tl.load(of_row), tl.load(of_row + 1), tl.load(of_row + 4)
        label = tl.load(token_at(labels, row, cols))
        x = token_at(logits, row, cols, ALIGN) + first
        z = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
        z, slope = with_options(z, row_options)
        d = z - m
        log2_e = d * (rate * LOG2E)
        e = tl.exp2(log2_e)
        dz = e * a0
        if ENTROPY:
            dz = e * (a0 + a1 * log2_e)
        if squares is not None:
            dz += e * (a2 * e)
        dz *= slope
        # Exactly zero, even at -inf, where e d is NaN.
        dz = tl.where(d * rate < LOWEST, 0.0, dz)
        # The label as a 32-bit column of this tile; -1 if it is in another tile.
        here = label.to(tl.int64) - first
        here = tl.where((here >= 0) & (here < count), here, -1).to(tl.int32)
        dz = tl.where(column == here, own, dz)
        tl.store(to, dz.to(to.dtype.element_ty), mask=inside)


def backward(
    out: Tensor,
    logits: Tensor,
    labels: Tensor,
    temperatures: Tensor | None,
    stats: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    options: RowOptions,
    grad_lse: Tensor | None,
    grad_collision: Tensor | None,
    collision: Tensor | None,
    many: ManyLabels | None,
) -> None:
    (rows, cols), vocab = grid(labels.shape), logits.shape[-1]
    logits, tokens, of_rows = as_rows(logits), strided(labels), packed(options)
    g, h = strided(as_upstream(grad_logprobs)), strided(as_upstream(grad_entropy))
    of_lse = strided(as_upstream(grad_lse))
    squares = None if grad_collision is None else stats.new_empty(rows * cols)
    of_collision, rates = strided(as_upstream(grad_collision)), strided(temperatures, torch.float32)
    coefficients, x = stats.new_empty(rows * cols * 5), strided_rows(logits)
    upstream = (g, h, of_lse, of_collision, collision)
    at_labels = None
    if many is not None:
        of_row = (tokens, rates, stats, *upstream)
        at_labels = logprobs_many.gradients(many, x, of_row, cols, options)
    launch(
        coefficients_kernel,
        tile_count(rows * cols, ROWS),
        logits,
        x,
        tokens,
        rates,
        stats,
        *upstream,
        coefficients,
        squares,
        rows * cols,
        cols,
        vocab,
        of_rows,
        options.ignore_index,
        BLOCK=ROWS,
        warps=2,
    )
    tiles, to = tile_count(vocab, TILE), strided_rows(out)
    align = alignment(vocab, x, to)
    launch(
        backward_kernel,
        rows * cols * tiles,
        logits,
        in_units(x, align),
        tokens,
        coefficients,
        squares,
        in_units(to, align),
        cols,
        tiles,
        vocab // align,
        of_rows,
        ALIGN=align,
        ENTROPY=h is not None,
        TILE=TILE,
        warps=WARPS,
    )
    if many is not None and at_labels is not None:
        logprobs_many.scatter(many, at_labels, to, tokens, cols, vocab)
