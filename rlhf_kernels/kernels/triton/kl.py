"""kl_divergence: parts of both rows reduced in parallel, then combined in order.

P is the weighting distribution (policy for reverse, reference for forward), Q the other one:
KL = t / (T s_P) - (log s_P - log s_Q), where e = exp((x - m) / T), s = sum e and
t = sum e_P ((x_P - m_P) - (x_Q - m_Q)). The difference is taken element by element, so t is
accurate where the two rows are close. Parts are those of token_logprobs.

Options that are off are None, for which Triton compiles a variant: `pair` has the cap and the scale
of P's logits, then those of Q's.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.layout import as_rows, grid
from ...core.pair_options import PairOptions
from .. import kl as shared
from . import kl_mixture
from ._launch import kernel, launch, tile_count, warps_of
from ._math import LOG2E, scalar, tree_sum, tree_sums
from ._maxima import raised
from ._strided import alignment, in_units, strided, strided_rows, token_at
from ._tiles import load_blocks, tile_bounds, tops
from .kl_pairs import (
    distances,
    log_of_ratio,
    mixture_terms,
    packed,
    row_stats,
    scaled_blocks,
    shares,
    weight_of,
)
from .kl_penalty import penalty
from .logprobs import GROUP
from .logprobs_backward import LOWEST, ROWS

# Columns per program, 32 of each row per thread: two rows need as many registers as the single row
# of token_logprobs.
TILE = 4096
TINY = tl.constexpr(2.0**-126)
PARTS = 4
# Of the gradient, which has the same tiles, but for fp32 logits of a policy with a cap: with its
# derivative a block of whole tiles would be the only one of its multiprocessor, by its registers.
BACKWARD_WARPS = 8


@kernel(aligned=("p", "q"))
def partial_kernel(
    p,
    q,
    partials,
    own_sums,
    cols,
    tiles,
    vocab,
    temperature,
    pair,
    ALIGN: tl.constexpr,
    REVERSE: tl.constexpr,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """(m_P, s_P, m_Q, s_Q, t) of the parts of a tile; ALIGN is the unit of vocab and strides.

    With own_sums also the sum of e (x - m) of the policy, which is P with REVERSE.
    """
    pid = tl.program_id(0)
    row, tile = pid // tiles, pid % tiles
    first, count = tile_bounds(tile, vocab, ALIGN, TILE)
    cap_p, scale_p, cap_q, scale_q = pair
    x_p, x_q = token_at(p, row, cols, ALIGN) + first, token_at(q, row, cols, ALIGN) + first
    z_p = load_blocks(x_p, count, (temperature, cap_p), TILE, PARTS)
    z_q = load_blocks(x_q, count, (temperature, cap_q), TILE, PARTS)
    z_p, z_q = scaled_blocks(z_p, scale_p), scaled_blocks(z_q, scale_q)
    m_p, base_p = tops(z_p)
    m_q, base_q = tops(z_q)
    rate2 = 1.0 / temperature * LOG2E
    s_p, s_q, t = tl.zeros_like(z_p[0]), tl.zeros_like(z_p[0]), tl.zeros_like(z_p[0])
    own = tl.zeros_like(z_p[0])
    for k in tl.static_range(len(z_p)):
        d_p, d_q = z_p[k] - base_p, z_q[k] - base_q
        log2_e = d_p * rate2
        e = tl.exp2(log2_e)
        s_p += e
        s_q += tl.exp2(d_q * rate2)
        if own_sums is not None:
            d = d_p if REVERSE else d_q
            own = tl.fma(tl.exp2(d * rate2), tl.where(d * rate2 < LOWEST * LOG2E, 0.0, d), own)
        # A term with a weight below the normal floats is 0, even where Q's logit is -inf.
        t = tl.fma(e, tl.where(log2_e < LOWEST * LOG2E, 0.0, d_p - d_q), t)
    out = partials + (pid.to(tl.int64) * PARTS + tl.arange(0, PARTS)) * 5
    tl.store(out, m_p)
    tl.store(out + 1, tree_sums(s_p))
    tl.store(out + 2, m_q)
    tl.store(out + 3, tree_sums(s_q))
    tl.store(out + 4, tree_sums(t))
    if own_sums is not None:
        tl.store(own_sums + pid.to(tl.int64) * PARTS + tl.arange(0, PARTS), tree_sums(own))


@triton.jit
def rebased(m, s, base, rate):
    """(m - base, exp(rate (m - base))): moves sums around m to the reference point `base`.

    In fp64, unlike that of _maxima: what is near is subtracted from t.
    """
    # Empty sums have no reference point; their distance is 0.
    shift = tl.where(s == 0.0, 0.0, m.to(tl.float64) - base.to(tl.float64))
    return shift, weight_of(shift.to(tl.float32), rate).to(tl.float64)


@triton.jit
def combine_pairs(partials, parts, rate, GROUP: tl.constexpr):
    """(m_P, s_P, m_Q, s_Q, t) of a row from those of its parts, in order; all sums are fp64."""
    m_p = tl.full((), float("-inf"), tl.float32)
    m_q = tl.full((), float("-inf"), tl.float32)
    s_p = tl.full((), 0.0, tl.float64)
    s_q = tl.full((), 0.0, tl.float64)
    t = tl.full((), 0.0, tl.float64)
    for start in range(0, parts, GROUP):
        part = start + tl.arange(0, GROUP)
        inside = part < parts
        at = partials + part.to(tl.int64) * 5
        part_mp = tl.load(at, mask=inside, other=float("-inf"))
        part_sp = tl.load(at + 1, mask=inside, other=0.0).to(tl.float64)
        part_mq = tl.load(at + 2, mask=inside, other=float("-inf"))
        part_sq = tl.load(at + 3, mask=inside, other=0.0).to(tl.float64)
        part_t = tl.load(at + 4, mask=inside, other=0.0).to(tl.float64)
        top_p, base_p = raised(m_p, tl.max(part_mp, axis=0))
        top_q, base_q = raised(m_q, tl.max(part_mq, axis=0))
        shift_p, weight_p = rebased(part_mp, part_sp, base_p, rate)
        shift_q, weight_q = rebased(part_mq, part_sq, base_q, rate)
        before_p, kept_p = rebased(m_p, s_p, base_p, rate)
        before_q, kept_q = rebased(m_q, s_q, base_q, rate)
        # Every x - m changes with m. A weight that underflows makes even an infinite term 0.
        moved = weight_p * (part_t + part_sp * (shift_p - shift_q))
        kept = kept_p * (t + s_p * (before_p - before_q))
        moved = tree_sum(tl.where(weight_p == 0.0, 0.0, moved), GROUP)
        t = tl.where(kept_p == 0.0, 0.0, kept) + moved
        s_p = kept_p * s_p + tree_sum(weight_p * part_sp, GROUP)
        s_q = kept_q * s_q + tree_sum(weight_q * part_sq, GROUP)
        m_p, m_q = top_p, top_q
    return m_p, s_p, m_q, s_q, t


@triton.jit
def combine_own(partials, own_sums, parts, m, rate, REVERSE: tl.constexpr, GROUP: tl.constexpr):
    """The sum of e (x - m) of the policy over a row from those of its parts, in order; fp64."""
    u = tl.full((), 0.0, tl.float64)
    for start in range(0, parts, GROUP):
        part = start + tl.arange(0, GROUP)
        inside = part < parts
        at = partials + part.to(tl.int64) * 5 + (0 if REVERSE else 2)
        part_m = tl.load(at, mask=inside, other=float("-inf"))
        part_s = tl.load(at + 1, mask=inside, other=0.0).to(tl.float64)
        part_u = tl.load(own_sums + part, mask=inside, other=0.0).to(tl.float64)
        shift, weight = rebased(part_m, part_s, m, rate)
        term = tl.where(weight == 0.0, 0.0, weight * (part_u + part_s * shift))
        u += tree_sum(term, GROUP)
    return u


@kernel
def combine_kernel(
    partials,
    own_sums,
    kl,
    stats,
    entropies,
    parts,
    temperature,
    REVERSE: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Divergence of one row and its statistics: m, s of the policy, of the reference, t / s_P."""
    row = tl.program_id(0).to(tl.int64)
    rate = 1.0 / scalar(temperature).to(tl.float64)
    of_row = partials + row * parts * 5
    m_p, s_p, m_q, s_q, t = combine_pairs(of_row, parts, rate.to(tl.float32), GROUP)
    value = t / s_p * rate - (tl.log(s_p) - tl.log(s_q))
    # A KL divergence is never negative (Gibbs), but rounding may make it so. NaN stays.
    value = tl.where(value < 0.0, 0.0, value)
    good = (m_p > float("-inf")) & (m_q > float("-inf"))
    value = tl.where(good, value, float("nan")).to(tl.float32)
    tl.store(kl + row, value)
    of_p, of_q = (0, 2) if REVERSE else (2, 0)
    out = stats + row * 5
    tl.store(out + of_p, m_p)
    tl.store(out + of_p + 1, s_p.to(tl.float32))
    tl.store(out + of_q, m_q)
    tl.store(out + of_q + 1, s_q.to(tl.float32))
    # The mean difference, not the divergence: the gradient does not need the logarithms, whose
    # difference loses digits by cancellation.
    tl.store(out + 4, tl.where(value == value, (t / s_p).to(tl.float32), value))
    if entropies is not None:
        m, s = (m_p, s_p) if REVERSE else (m_q, s_q)
        sums = own_sums + row * parts
        u = combine_own(of_row, sums, parts, m, rate.to(tl.float32), REVERSE, GROUP)
        entropy = (tl.log(s) - u / s * rate).to(tl.float32)
        tl.store(entropies + row, tl.where(m > float("-inf"), entropy, float("nan")))


@kernel
def coefficients_kernel(
    stats,
    grad,
    coefficients,
    rows,
    cols,
    temperature,
    beta,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Coefficients of the backward pass, [rows, 4]: m of the policy, m of the reference, a, b.

    Reverse: dz = e a (x - m - (y - m') - b) / T. Forward: dz = e a - e' b. a and b are 0 for a row
    without gradient. With beta [rows, 5]: dz = e a (log(p / m) - b), and log(s / s').
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = row < rows
    g = tl.load(token_at(grad, row, cols), mask=valid, other=0.0)
    m, s, ref_m, ref_s = row_stats(stats, row, valid)
    mean = tl.load(stats + row.to(tl.int64) * 5 + 4, mask=valid, other=0.0).to(tl.float64)
    # An infinite reverse divergence has a NaN gradient, as differences to its mean are NaN. An
    # infinite forward divergence has a finite gradient.
    poison = mean - mean
    if not REVERSE:
        poison = tl.where(mean == mean, 0.0, mean)
    upstream = g.to(tl.float64) / scalar(temperature).to(tl.float64)
    width = 4
    if beta is not None:
        upstream *= scalar(beta[1]).to(tl.float64)
        width = 5
    upstream += poison
    a, b = upstream / s, mean
    if not REVERSE:
        b = upstream / ref_s
    out = coefficients + row.to(tl.int64) * width
    tl.store(out, m, mask=valid)
    tl.store(out + 1, ref_m, mask=valid)
    tl.store(out + 2, tl.where(g == 0.0, 0.0, a).to(tl.float32), mask=valid)
    tl.store(out + 3, tl.where(g == 0.0, 0.0, b).to(tl.float32), mask=valid)
    if beta is not None:
        tl.store(out + 4, (tl.log(s) - tl.log(ref_s)).to(tl.float32), mask=valid)


@kernel(aligned=("logits", "ref_logits", "out"))
def backward_kernel(
    logits,
    ref_logits,
    coefficients,
    out,
    cols,
    tiles,
    vocab,
    temperature,
    pair,
    beta,
    ALIGN: tl.constexpr,
    REVERSE: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile of p (log p - log q - KL) g / T (reverse) or (p - q) g / T (forward).

    With beta of (1 - beta) p (log p - log m - KL(p || m)) g / T. `pair` has the policy's cap and
    scale first.
    """
    pid = tl.program_id(0)
    row, tile = pid // tiles, pid % tiles
    of_row = coefficients + row.to(tl.int64) * (4 if beta is None else 5)
    a, b = tl.load(of_row + 2), tl.load(of_row + 3)
    first, count = tile_bounds(tile, vocab, ALIGN, TILE)
    column = tl.arange(0, TILE)
    inside = column < count
    to = token_at(out, row, cols, ALIGN) + first + column
    if (a == 0.0) & (b == 0.0):
        tl.store(to, tl.zeros((TILE,), tl.float32).to(to.dtype.element_ty), mask=inside)
    else:
        m, ref_m = tl.load(of_row), tl.load(of_row + 1)
        x = token_at(logits, row, cols, ALIGN) + first
        y = token_at(ref_logits, row, cols, ALIGN) + first
        d, slope, ref_d = distances(x, y, column, inside, m, ref_m, temperature, pair)
        rate = 1.0 / temperature
        e = weight_of(d, rate)
        if beta is not None:
            log_ratio = log_of_ratio(d, ref_d, rate, tl.load(of_row + 4))
            excess = mixture_terms(log_ratio, beta)[0] - b
            dz = tl.where(e == 0.0, 0.0, e * a * excess)
        elif REVERSE:
            dz = tl.where(e == 0.0, 0.0, e * a * ((d - ref_d - b) * rate))
        else:
            ref_e = weight_of(ref_d, rate)
            # Selected, not multiplied: a and b are NaN for a row without a finite divergence.
            dz = tl.where(e == 0.0, 0.0, e * a) - tl.where(ref_e == 0.0, 0.0, ref_e * b)
        if pair[0] is not None:
            # A logit far beyond the cap: what is below the normal floats counts as zero.
            capped = dz * slope
            dz = tl.where((dz == 0.0) | (tl.abs(capped) < TINY), 0.0, capped)
        tl.store(to, dz.to(to.dtype.element_ty), mask=inside)


def _forward(
    logits: Tensor,
    ref_logits: Tensor,
    options: PairOptions,
    kl: Tensor,
    stats: Tensor,
    entropies: Tensor | None,
) -> None:
    (rows, cols), vocab = grid(kl.shape), logits.shape[-1]
    tiles = tile_count(vocab, TILE)
    x, y = as_rows(logits), as_rows(ref_logits)
    own_cap, own_scale, ref_cap, ref_scale = packed(options)
    p, q, pair = x, y, (own_cap, own_scale, ref_cap, ref_scale)
    if not options.reverse:
        p, q, pair = y, x, (ref_cap, ref_scale, own_cap, own_scale)
    partials = kl.new_empty(rows * cols * tiles * PARTS * 5)
    own_sums = None if entropies is None else kl.new_empty(rows * cols * tiles * PARTS)
    of_p, of_q = strided_rows(p), strided_rows(q)
    align = alignment(vocab, of_p, of_q)
    tensors = (in_units(of_p, align), in_units(of_q, align), partials, own_sums)
    sizes, scale = (cols, tiles, vocab // align), float(options.temperature)
    # Only the entropy's sums depend on it.
    tile = {"ALIGN": align, "REVERSE": options.reverse or entropies is None, "TILE": TILE}
    tile |= {"PARTS": PARTS, "warps": warps_of(32 * PARTS)}
    if tiles:
        launch(partial_kernel, rows * cols * tiles, p, *tensors, *sizes, scale, pair, **tile)
    parts = tiles * PARTS
    results = (partials, own_sums, kl, stats, entropies, parts, scale)
    of_row = {"REVERSE": options.reverse, "GROUP": GROUP, "warps": 1}
    launch(combine_kernel, rows * cols, p, *results, **of_row)
    if options.beta > 0:
        kl_mixture.mixture(kl, stats, logits, ref_logits, options)


def _backward(
    out: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    stats: Tensor,
    grad: Tensor,
    options: PairOptions,
) -> None:
    (rows, cols), vocab = grid(logits.shape[:-1]), logits.shape[-1]
    logits, ref_logits = as_rows(logits), as_rows(ref_logits)
    scale, beta = float(options.temperature), shares(options)
    coefficients = stats.new_empty(rows * cols * (4 if beta is None else 5))
    launch(
        coefficients_kernel,
        tile_count(rows * cols, ROWS),
        logits,
        stats,
        strided(grad, torch.float32),
        coefficients,
        rows * cols,
        cols,
        scale,
        beta,
        REVERSE=options.reverse,
        BLOCK=ROWS,
        warps=2,
    )
    x, y, to = strided_rows(logits), strided_rows(ref_logits), strided_rows(out)
    own, *_ = pair = packed(options)
    tile = TILE if own is None or logits.dtype != torch.float32 else TILE // 2
    tiles, align = tile_count(vocab, tile), alignment(vocab, x, y, to)
    launch(
        backward_kernel,
        rows * cols * tiles,
        logits,
        in_units(x, align),
        in_units(y, align),
        coefficients,
        in_units(to, align),
        cols,
        tiles,
        vocab // align,
        scale,
        pair,
        beta,
        ALIGN=align,
        REVERSE=options.reverse,
        TILE=tile,
        warps=BACKWARD_WARPS,
    )


LAUNCHERS: shared.Launchers = shared.launchers(_forward, _backward, penalty)
