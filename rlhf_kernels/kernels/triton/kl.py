"""kl_divergence: parts of both rows reduced in parallel, then combined in order; and kl_penalty.

P is the weighting distribution (policy for reverse, reference for forward), Q the other one:
KL = t / (T s_P) - (log s_P - log s_Q), where e = exp((x - m) / T), s = sum e and
t = sum e_P ((x_P - m_P) - (x_Q - m_Q)). The difference is taken element by element, so t is
accurate where the two rows are close. Parts are those of token_logprobs.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.layout import as_rows, grid
from .. import kl as shared
from ._launch import kernel, launch, tile_count, warps_of
from ._math import LOG2E, exp_parts, scalar, tree_sum, tree_sums
from ._maxima import raised
from ._strided import alignment, in_units, strided, strided_rows, token_at
from ._tiles import load_blocks, tile_bounds, tops
from .logprobs import GROUP
from .logprobs_backward import LOWEST, ROWS

# Columns per program, 32 of each row per thread: two rows need as many registers as the single row
# of token_logprobs.
TILE = 4096
PARTS = 4
# Of the gradient, which has the same tiles.
BACKWARD_WARPS = 8
# Tokens per program of kl_penalty.
TOKENS = 1024


@triton.jit
def weight_of(d, rate):
    """exp(rate d), or exactly 0 below the normal floats; a term with weight 0 is ignored."""
    return tl.where(d * rate < LOWEST, 0.0, tl.exp2(d * (rate * LOG2E)))


@kernel(aligned=("p", "q"))
def partial_kernel(
    p,
    q,
    partials,
    cols,
    tiles,
    vocab,
    temperature,
    ALIGN: tl.constexpr,
    TILE: tl.constexpr,
    PARTS: tl.constexpr,
):
    """(m_P, s_P, m_Q, s_Q, t) of the parts of a tile; ALIGN is the unit of vocab and strides."""
    pid = tl.program_id(0)
    row, tile = pid // tiles, pid % tiles
    first, count = tile_bounds(tile, vocab, ALIGN, TILE)
    row_options = (temperature, None)
    x_p, x_q = token_at(p, row, cols, ALIGN) + first, token_at(q, row, cols, ALIGN) + first
    z_p = load_blocks(x_p, count, row_options, TILE, PARTS)
    z_q = load_blocks(x_q, count, row_options, TILE, PARTS)
    m_p, base_p = tops(z_p)
    m_q, base_q = tops(z_q)
    rate2 = 1.0 / temperature * LOG2E
    s_p, s_q, t = tl.zeros_like(z_p[0]), tl.zeros_like(z_p[0]), tl.zeros_like(z_p[0])
    for k in tl.static_range(len(z_p)):
        d_p, d_q = z_p[k] - base_p, z_q[k] - base_q
        log2_e = d_p * rate2
        e = tl.exp2(log2_e)
        s_p += e
        s_q += tl.exp2(d_q * rate2)
        # A term with a weight below the normal floats is 0, even where Q's logit is -inf.
        t = tl.fma(e, tl.where(log2_e < LOWEST * LOG2E, 0.0, d_p - d_q), t)
    out = partials + (pid.to(tl.int64) * PARTS + tl.arange(0, PARTS)) * 5
    tl.store(out, m_p)
    tl.store(out + 1, tree_sums(s_p))
    tl.store(out + 2, m_q)
    tl.store(out + 3, tree_sums(s_q))
    tl.store(out + 4, tree_sums(t))


@triton.jit
def rebased(m, s, base, rate):
    """(m - base, exp(rate (m - base))): moves sums around m to the reference point `base`."""
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


@kernel
def combine_kernel(
    partials, kl, stats, parts, temperature, REVERSE: tl.constexpr, GROUP: tl.constexpr
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


@kernel
def coefficients_kernel(
    stats, grad, coefficients, rows, cols, temperature, REVERSE: tl.constexpr, BLOCK: tl.constexpr
):
    """Coefficients of the backward pass, [rows, 4]: m of the policy, m of the reference, a, b.

    Reverse: dz = e a (x - m - (y - m') - b) / T. Forward: dz = e a - e' b. a and b are 0 for a row
    without gradient.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = row < rows
    g = tl.load(token_at(grad, row, cols), mask=valid, other=0.0)
    at = stats + row.to(tl.int64) * 5
    m = tl.load(at, mask=valid, other=0.0)
    s = tl.load(at + 1, mask=valid, other=1.0).to(tl.float64)
    ref_m = tl.load(at + 2, mask=valid, other=0.0)
    ref_s = tl.load(at + 3, mask=valid, other=1.0).to(tl.float64)
    mean = tl.load(at + 4, mask=valid, other=0.0).to(tl.float64)
    # An infinite reverse divergence has a NaN gradient, as differences to its mean are NaN. An
    # infinite forward divergence has a finite gradient.
    poison = mean - mean
    if not REVERSE:
        poison = tl.where(mean == mean, 0.0, mean)
    scaled = g.to(tl.float64) / scalar(temperature).to(tl.float64) + poison
    a, b = scaled / s, mean
    if not REVERSE:
        b = scaled / ref_s
    out = coefficients + row.to(tl.int64) * 4
    tl.store(out, m, mask=valid)
    tl.store(out + 1, ref_m, mask=valid)
    tl.store(out + 2, tl.where(g == 0.0, 0.0, a).to(tl.float32), mask=valid)
    tl.store(out + 3, tl.where(g == 0.0, 0.0, b).to(tl.float32), mask=valid)


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
    ALIGN: tl.constexpr,
    REVERSE: tl.constexpr,
    TILE: tl.constexpr,
):
    """One tile of p (log p - log q - KL) g / T (reverse) or (p - q) g / T (forward)."""
    pid = tl.program_id(0)
    row, tile = pid // tiles, pid % tiles
    of_row = coefficients + row.to(tl.int64) * 4
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
        d = tl.load(x + column, mask=inside, other=0.0).to(tl.float32) - m
        ref_d = tl.load(y + column, mask=inside, other=0.0).to(tl.float32) - ref_m
        rate = 1.0 / temperature
        e = weight_of(d, rate)
        if REVERSE:
            dz = tl.where(e == 0.0, 0.0, e * a * ((d - ref_d - b) * rate))
        else:
            ref_e = weight_of(ref_d, rate)
            # Selected, not multiplied: a and b are NaN for a row without a finite divergence.
            dz = tl.where(e == 0.0, 0.0, e * a) - tl.where(ref_e == 0.0, 0.0, ref_e * b)
        tl.store(to, dz.to(to.dtype.element_ty), mask=inside)


@triton.jit
def k3_parts(x):
    """exp(-x) - 1 + x and its slope, for any x."""
    y = -x
    near = tl.where(y > 80.0, 80.0, tl.where(y < -80.0, -80.0, y))
    _, em1, em1mx = exp_parts(near)
    # Beyond the range of exp_parts, exp(y) = e^16 exp(y - 16); above y = 96 it is infinite.
    far = exp_parts(tl.where(y > 96.0, 80.0, tl.where(y > 80.0, y - 16.0, 0.0)))[0] * 8886110.5
    # At x = -inf the sum would be inf - inf = NaN.
    far_value = tl.where(far > 3.4e38, far, far + (x - 1.0))
    value = tl.where(y > 80.0, far_value, tl.where(y < -80.0, x - 1.0, em1mx))
    return value, tl.where(y > 80.0, -far, -em1)


@kernel
def penalty_kernel(
    logprobs, ref_logprobs, grad, out, tokens, cols, ESTIMATOR: tl.constexpr, BLOCK: tl.constexpr
):
    """The estimate of each token, or its slope times the upstream gradient; `out` is contiguous."""
    first, count = tile_bounds(tl.program_id(0), tokens, 1, BLOCK)
    inside = tl.arange(0, BLOCK) < count
    # Indices have the dtype of the token count: 32 bits up to 2^31 tokens.
    i = first.to(tokens.dtype) + tl.arange(0, BLOCK)
    x = tl.load(token_at(logprobs, i, cols), mask=inside, other=0.0)
    ref = tl.load(token_at(ref_logprobs, i, cols), mask=inside, other=0)
    x = x.to(tl.float32) - ref.to(tl.float32)
    if ESTIMATOR == "k1":
        value, slope = x, 1.0
    elif ESTIMATOR == "k2":
        value, slope = 0.5 * x * x, x
    elif ESTIMATOR == "k3":
        value, slope = k3_parts(x)
    else:
        # A NaN fails both comparisons and stays.
        value, slope = tl.abs(x), tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, x))
    if grad is not None:
        g = tl.load(token_at(grad, i, cols), mask=inside, other=0.0)
        # A zero upstream gradient gives 0, even where the slope is NaN.
        value = tl.where(g == 0.0, 0.0, g * slope)
    tl.store(out + first + tl.arange(0, BLOCK), value.to(out.dtype.element_ty), mask=inside)


def _forward(
    logits: Tensor,
    ref_logits: Tensor,
    temperature: float,
    reverse: bool,
    kl: Tensor,
    stats: Tensor,
) -> None:
    (rows, cols), vocab = grid(kl.shape), logits.shape[-1]
    tiles = tile_count(vocab, TILE)
    logits, ref_logits = as_rows(logits), as_rows(ref_logits)
    p, q = (logits, ref_logits) if reverse else (ref_logits, logits)
    partials = kl.new_empty(rows * cols * tiles * PARTS * 5)
    x, y = strided_rows(p), strided_rows(q)
    align = alignment(vocab, x, y)
    tensors = (in_units(x, align), in_units(y, align), partials)
    sizes, scale = (cols, tiles, vocab // align), float(temperature)
    tile = {"ALIGN": align, "TILE": TILE, "PARTS": PARTS, "warps": warps_of(32 * PARTS)}
    launch(partial_kernel, rows * cols * tiles, p, *tensors, *sizes, scale, **tile)
    parts, group = tiles * PARTS, {"REVERSE": reverse, "GROUP": GROUP, "warps": 1}
    launch(combine_kernel, rows * cols, p, partials, kl, stats, parts, scale, **group)


def _backward(
    out: Tensor,
    logits: Tensor,
    ref_logits: Tensor,
    stats: Tensor,
    grad: Tensor,
    temperature: float,
    reverse: bool,
) -> None:
    (rows, cols), vocab = grid(logits.shape[:-1]), logits.shape[-1]
    logits, ref_logits = as_rows(logits), as_rows(ref_logits)
    coefficients, scale = stats.new_empty(rows * cols * 4), float(temperature)
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
        REVERSE=reverse,
        BLOCK=ROWS,
        warps=2,
    )
    x, y, to = strided_rows(logits), strided_rows(ref_logits), strided_rows(out)
    tiles, align = tile_count(vocab, TILE), alignment(vocab, x, y, to)
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
        ALIGN=align,
        REVERSE=reverse,
        TILE=TILE,
        warps=BACKWARD_WARPS,
    )


def _penalty(
    logprobs: Tensor, ref_logprobs: Tensor, grad: Tensor | None, estimator: str, out: Tensor
) -> None:
    # With "+" the gradient is that of k2.
    straight = grad is not None and estimator.endswith("+")
    rows, cols = grid(out.shape)
    inputs = (strided(logprobs), strided(ref_logprobs), strided(grad, torch.float32))
    constants: dict[str, Any] = {"ESTIMATOR": "k2" if straight else estimator.removesuffix("+")}
    constants |= {"BLOCK": TOKENS, "warps": 4}
    programs = tile_count(rows * cols, TOKENS)
    launch(penalty_kernel, programs, logprobs, *inputs, out, rows * cols, cols, **constants)


LAUNCHERS = shared.launchers(_forward, _backward, _penalty)
