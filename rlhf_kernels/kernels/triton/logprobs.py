"""token_logprobs: tiles of the vocabulary reduced in parallel, then combined in order.

A program reads TILE columns of one row once and keeps them in registers. Each of its warps computes
the maximum m of its part of them, and the sums of e = exp((x - m) / T) and e (x - m) / T. A second
kernel combines the parts of each row. Parts depend only on the vocabulary and the dtype, so a row's
bits do not depend on its batch, and a few rows fill the device as well as many.
"""

import torch
import triton.language as tl
from torch import Tensor

from ...core import sentinels
from ...core.layout import as_rows, grid
from ...core.row_options import RowOptions
from .. import logprobs as shared
from . import logprobs_many
from . import logprobs_results as results
from ._launch import kernel, launch, tile_count, warps_of
from ._math import LOG2E, good_temperature, scalar, tree_sums
from ._maxima import combine_parts
from ._rows import packed, row_temperature, with_options
from ._strided import alignment, in_units, strided, strided_rows, token_at
from ._tiles import LEAST, load_blocks, tile_bounds, tops
from .logprobs_backward import backward

# Columns per program, 64 per thread: all 16-byte loads of a tile are in flight at once.
TILE = 8192
PARTS = 4
# Parts that the combining kernel takes at a time, 2^18 columns.
GROUP = 128
ELSEWHERE = tl.constexpr(sentinels.ELSEWHERE)
SHARD_IGNORED = tl.constexpr(sentinels.SHARD_IGNORED)


@kernel(aligned=("logits",))
def partial_kernel(
    logits,
    labels,
    temperatures,
    partials,
    squares,
    cols,
    tiles,
    vocab,
    row_options,
    ignore_index,
    ALIGN: tl.constexpr,
    ENTROPY: tl.constexpr,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """(m, s, t) of the parts of a tile, and the sums of e e in `squares` if that is given.

    vocab and strides are counted in units of ALIGN.
    """
    pid = tl.program_id(0)
    row, tile = pid // tiles, pid % tiles
    label = tl.load(token_at(labels, row, cols))
    if label != ignore_index:
        temperature = row_temperature(row_options, temperatures, row, cols)
        first, count = tile_bounds(tile, vocab, ALIGN, TILE)
        x = token_at(logits, row, cols, ALIGN) + first
        z = load_blocks(x, count, row_options, TILE, PARTS)
        m, base = tops(z)
        rate = 1.0 / temperature
        s, t = tl.zeros_like(z[0]), tl.zeros_like(z[0])
        q = tl.zeros_like(z[0])
        for k in tl.static_range(len(z)):
            d = z[k] - base
            if ENTROPY:
                # Where d is -inf, e is 0, and e d must not be NaN. A NaN stays.
                d = tl.maximum(d, LEAST, propagate_nan=tl.PropagateNan.ALL)
            e = tl.exp2(d * (rate * LOG2E))
            s += e
            if ENTROPY:
                t = tl.fma(e, d, t)
            if squares is not None:
                q = tl.fma(e, e, q)
        out = partials + (pid.to(tl.int64) * PARTS + tl.arange(0, PARTS)) * 3
        tl.store(out, m)
        tl.store(out + 1, tree_sums(s))
        if ENTROPY:
            tl.store(out + 2, tree_sums(t) * rate)
        if squares is not None:
            tl.store(squares + pid.to(tl.int64) * PARTS + tl.arange(0, PARTS), tree_sums(q))


@kernel
def combine_kernel(
    logits,
    labels,
    temperatures,
    partials,
    logprobs,
    entropies,
    stats,
    cols,
    parts,
    vocab,
    row_options,
    ignore_index,
    GROUP: tl.constexpr,
):
    """Log-probability, entropy and statistics of one row from its parts, in fp64."""
    row = tl.program_id(0)
    label = tl.load(token_at(labels, row, cols)).to(tl.int64)
    logprob, entropy = 0.0, 0.0
    m, s, mean = 0.0, 1.0, 0.0
    if label != ignore_index:
        temperature = row_temperature(row_options, temperatures, row, cols)
        rate = 1.0 / scalar(temperature).to(tl.float64)
        of_row = partials + row.to(tl.int64) * parts * 3
        wanted = entropies is not None
        row_m, row_s, row_t = combine_parts(of_row, parts, rate.to(tl.float32), wanted, GROUP)
        known = (label >= 0) & (label < vocab)
        shard = tl.full((), 0, tl.int64) + ignore_index == SHARD_IGNORED
        z = tl.load(token_at(logits, row, cols) + label, mask=known, other=0.0).to(tl.float32)
        z, _ = with_options(z, row_options)
        # A label outside the vocabulary, a bad temperature or a row of only -inf gives NaN.
        good = known | ((label == ELSEWHERE) & shard)
        good = good & good_temperature(temperature) & (row_m > float("-inf"))
        poison = tl.where(good, 0.0, float("nan"))
        log_s = tl.log(row_s)
        logprob = ((z - row_m).to(tl.float64) * rate - log_s).to(tl.float32) + poison
        # NaN if another vocabulary shard owns the label; the statistics are valid.
        logprob = tl.where(known, logprob, float("nan"))
        mean = (row_t / row_s).to(tl.float32) + poison
        entropy = (log_s - row_t / row_s).to(tl.float32) + poison
        # A NaN among only -inf must not make a vocabulary shard look empty.
        m = tl.where((row_m == float("-inf")) & (row_s != row_s), float("nan"), row_m)
        s = row_s.to(tl.float32) + poison
    tl.store(logprobs + row, logprob)
    if entropies is not None:
        tl.store(entropies + row, entropy)
    out = stats + row.to(tl.int64) * 3
    tl.store(out, m)
    tl.store(out + 1, s)
    tl.store(out + 2, mean)


def _forward(
    logits: Tensor,
    labels: Tensor,
    temperatures: Tensor | None,
    options: RowOptions,
    many: shared.ManyLabels | None,
    logprobs: Tensor,
    entropies: Tensor | None,
    stats: Tensor | None,
    collisions: Tensor | None,
    ids: Tensor | None,
) -> None:
    assert stats is not None  # on a device they are always wanted
    (rows, cols), vocab = grid(labels.shape), logits.shape[-1]
    logits, tiles = as_rows(logits), tile_count(vocab, TILE)
    partials = logprobs.new_empty(rows * cols * tiles * PARTS * 3)
    squares = None if collisions is None else logprobs.new_empty(rows * cols * tiles * PARTS)
    x = strided_rows(logits)
    align = alignment(vocab, x)
    tokens, of_rows = (strided(labels), strided(temperatures, torch.float32)), packed(options)
    # A vocabulary shard may be empty.
    if tiles > 0:
        launch(
            partial_kernel,
            rows * cols * tiles,
            logits,
            in_units(x, align),
            *tokens,
            partials,
            squares,
            cols,
            tiles,
            vocab // align,
            of_rows,
            options.ignore_index,
            ALIGN=align,
            ENTROPY=options.entropy,
            TILE=TILE,
            PARTS=PARTS,
            warps=warps_of(32 * PARTS),
        )
    launch(
        combine_kernel,
        rows * cols,
        logits,
        x,
        *tokens,
        partials,
        logprobs,
        entropies,
        stats,
        cols,
        tiles * PARTS,
        vocab,
        of_rows,
        options.ignore_index,
        GROUP=GROUP,
        warps=1,
    )
    if collisions is not None and squares is not None:
        results.collision(
            collisions, logits, tokens, partials, squares, stats, cols, options, GROUP
        )
    if ids is not None:
        sizes = {"TILE": TILE, "PARTS": PARTS, "GROUP": GROUP}
        results.argmax(ids, logits, x, tokens[0], partials, cols, options, **sizes)
    if many is not None:
        logprobs_many.forward(many, x, tokens, partials, stats, cols, options, GROUP)


LAUNCHERS: shared.Launchers = shared.launchers(_forward, backward, on_device=True)
