"""The generalised Jensen-Shannon divergence: the pass that needs the sums of both whole rows.

beta KL(q || m) + (1 - beta) KL(p || m), m = (1 - beta) p + beta q, of policy p and reference q.
"""

import triton.language as tl
from torch import Tensor

from ...core.layout import as_rows, grid
from ...core.pair_options import PairOptions
from ._launch import kernel, launch, tile_count
from ._math import scalar, tree_sum
from ._strided import alignment, in_units, strided_rows, token_at
from ._tiles import tile_bounds
from .kl_pairs import (
    distances,
    log_of_ratio,
    mixture_terms,
    packed,
    row_stats,
    shares,
    weight_of,
)
from .logprobs import GROUP
from .logprobs_backward import ROWS

TILE = 4096
WARPS = 8


@kernel
def constants_kernel(stats, constants, rows, BLOCK: tl.constexpr):
    """[rows, 5]: m of both, 1 / s of both, log(s / s')."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = row < rows
    m, s, ref_m, ref_s = row_stats(stats, row, valid)
    out = constants + row.to(tl.int64) * 5
    tl.store(out, m, mask=valid)
    tl.store(out + 1, ref_m, mask=valid)
    tl.store(out + 2, (1.0 / s).to(tl.float32), mask=valid)
    tl.store(out + 3, (1.0 / ref_s).to(tl.float32), mask=valid)
    tl.store(out + 4, (tl.log(s) - tl.log(ref_s)).to(tl.float32), mask=valid)


@kernel(aligned=("logits", "ref_logits"))
def mixture_kernel(
    logits,
    ref_logits,
    constants,
    partials,
    cols,
    tiles,
    vocab,
    temperature,
    pair,
    beta,
    ALIGN: tl.constexpr,
    TILE: tl.constexpr,
):
    """The sums of p log(p / m) and q log(q / m) over a tile."""
    pid = tl.program_id(0)
    row, tile = pid // tiles, pid % tiles
    first, count = tile_bounds(tile, vocab, ALIGN, TILE)
    column = tl.arange(0, TILE)
    inside = column < count
    of_row = constants + row.to(tl.int64) * 5
    x = token_at(logits, row, cols, ALIGN) + first
    y = token_at(ref_logits, row, cols, ALIGN) + first
    m, ref_m = tl.load(of_row), tl.load(of_row + 1)
    d, _, ref_d = distances(x, y, column, inside, m, ref_m, temperature, pair)
    rate = 1.0 / temperature
    log_ratio = log_of_ratio(d, ref_d, rate, tl.load(of_row + 4))
    of_p, of_q = mixture_terms(log_ratio, beta)
    p = weight_of(d, rate) * tl.load(of_row + 2)
    q = weight_of(ref_d, rate) * tl.load(of_row + 3)
    out = partials + pid.to(tl.int64) * 2
    tl.store(out, tree_sum(tl.where(inside, p * of_p, 0.0), TILE))
    tl.store(out + 1, tree_sum(tl.where(inside, q * of_q, 0.0), TILE))


@kernel
def mixture_combine_kernel(partials, kl, stats, tiles, beta, GROUP: tl.constexpr):
    """The divergence of one row, and KL(p || m) as the last of its statistics."""
    row = tl.program_id(0).to(tl.int64)
    of_p = tl.full((), 0.0, tl.float64)
    of_q = tl.full((), 0.0, tl.float64)
    for start in range(0, tiles, GROUP):
        tile = start + tl.arange(0, GROUP)
        inside = tile < tiles
        at = partials + (row * tiles + tile) * 2
        of_p += tree_sum(tl.load(at, mask=inside, other=0.0).to(tl.float64), GROUP)
        of_q += tree_sum(tl.load(at + 1, mask=inside, other=0.0).to(tl.float64), GROUP)
    value = scalar(beta[0]).to(tl.float64) * of_q + scalar(beta[1]).to(tl.float64) * of_p
    # Never negative, but rounding may make it so. NaN stays.
    tl.store(kl + row, tl.where(value < 0.0, 0.0, value).to(tl.float32))
    tl.store(stats + row * 5 + 4, of_p.to(tl.float32))


def mixture(
    kl: Tensor, stats: Tensor, logits: Tensor, ref_logits: Tensor, options: PairOptions
) -> None:
    """Overwrites kl, and the last of the statistics of both rows; of at least one token."""
    (rows, cols), vocab = grid(kl.shape), logits.shape[-1]
    tiles, beta = tile_count(vocab, TILE), shares(options)
    logits, ref_logits = as_rows(logits), as_rows(ref_logits)
    constants = kl.new_empty(rows * cols * 5)
    partials = kl.new_empty(rows * cols * tiles * 2)
    count = rows * cols
    programs = tile_count(count, ROWS)
    launch(constants_kernel, programs, logits, stats, constants, count, BLOCK=ROWS, warps=2)
    x, y = strided_rows(logits), strided_rows(ref_logits)
    align = alignment(vocab, x, y)
    if tiles:
        launch(
            mixture_kernel,
            count * tiles,
            logits,
            in_units(x, align),
            in_units(y, align),
            constants,
            partials,
            cols,
            tiles,
            vocab // align,
            float(options.temperature),
            packed(options),
            beta,
            ALIGN=align,
            TILE=TILE,
            warps=WARPS,
        )
    combined = (partials, kl, stats, tiles, beta)
    launch(mixture_combine_kernel, count, logits, *combined, GROUP=GROUP, warps=1)
