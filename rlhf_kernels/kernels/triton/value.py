"""value_loss: one read of every token gives its error, the gradient and the partial sums.

Launches value_kernel and combine_kernel, after statistics_kernel if the aggregation needs the
number of tokens of each sequence. The backward pass is that of policy_loss.
"""

import triton.language as tl

from ...config.metrics import VALUE_METRICS
from .. import losses
from ..losses import ValueResults, ValueTokens
from . import _tokens as t
from ._launch import kernel, launch
from ._math import scalar
from ._strided import strided
from ._tokens import (
    TOKENS,
    UNROLL,
    column_sums,
    inverse,
    join4,
    join8,
    load_kept,
    loss_scale,
    opening_slots,
    own_tile,
    pick,
    sequence_total,
    token_index,
)
from .policy_math import SEQ_MEAN_TOKEN_MEAN, value_term

# Positions of the metrics.
_metric = VALUE_METRICS.index
M_LOSS, M_CLIP_FRAC = tl.constexpr(_metric("loss")), tl.constexpr(_metric("clip_frac"))
M_VALUE_MEAN = tl.constexpr(_metric("value_mean"))
M_RETURN_MEAN = tl.constexpr(_metric("return_mean"))
M_EXPLAINED_VARIANCE = tl.constexpr(_metric("explained_variance"))
M_TOKENS = tl.constexpr(_metric("tokens"))
# The sums of a tile. The means of returns and errors are stored in place of their sums.
_SUMS = ("loss", "clipped", "value", "count", "return", "error")
S_LOSS, S_CLIPPED, S_VALUE, S_COUNT, S_RETURN, S_ERROR = (
    tl.constexpr(_SUMS.index(name)) for name in _SUMS
)
# How many of them are stored as they are: those before the first mean.
STORED = tl.constexpr(_SUMS.index("return"))
# Rows of the scratch [ROWS, slots] after the statistics.
_ROWS = ("loss", "clipped", "value", "count", "return_mean", "error_mean", "return_m2", "error_m2")
_STATISTICS = 4
LOSS, CLIPPED, VALUE, COUNT, RETURN_MEAN, ERROR_MEAN, RETURN_M2, ERROR_M2, TILE_INDEX = (
    tl.constexpr(_STATISTICS + i) for i in range(len(_ROWS) + 1)
)
ROWS = _STATISTICS + len(_ROWS) + 1
# Two units in the last place of a float near 1.
MEAN_ROUNDINGS = tl.constexpr(2.0**-22)


@kernel
def value_kernel(
    batch,
    mask,
    values,
    old,
    returns,
    grad,
    partials,
    clip_range,
    CLIP: tl.constexpr,
    SEQUENCE_MEAN: tl.constexpr,
    TILE: tl.constexpr,
):
    """Gradient (without 1 / divisor) and partial sums of one tile."""
    pid, slots = tl.program_id(0), tl.num_programs(0)
    s, k, length, at, i, inside, kept = own_tile(batch, mask, TILE)
    v = load_kept(values, s, at, i, kept)
    target = load_kept(returns, s, at, i, kept)
    zero = tl.zeros_like(v)
    before = zero
    if CLIP:
        before = load_kept(old, s, at, i, kept)
    # At masked tokens v and target are 0, and therefore all terms.
    term, slope, clipped = value_term(v, before, target, clip_range, CLIP)
    weight = scalar(1.0)
    if SEQUENCE_MEAN:
        tokens = sequence_total(partials + TOKENS * slots, k, length, TILE)
        weight = inverse(tl.where(tokens > 1.0, tokens, 1.0)).to(tl.float32)
    if grad is not None:
        to = token_index(batch, s, at + i)
        tl.store(grad + to, slope * weight, mask=inside)
    error = target - v
    count = tl.where(kept, 1.0, 0.0)
    sums = column_sums(join8(term, clipped, v, count, target, error, zero, zero), TILE, 8)
    n = tl.maximum(pick(sums, S_COUNT, 8), 1.0)
    target_mean, error_mean = pick(sums, S_RETURN, 8) / n, pick(sums, S_ERROR, 8) / n
    # Deviations are taken from the rounded mean; subtracting their own mean corrects for this.
    target_off = tl.where(kept, target - target_mean, 0.0)
    error_off = tl.where(kept, error - error_mean, 0.0)
    square, error_square = target_off * target_off, error_off * error_off
    off = column_sums(join4(target_off, error_off, square, error_square), TILE, 4)
    off_mean, error_off_mean = pick(off, 0, 4) / n, pick(off, 1, 4) / n
    out = partials + pid
    column = tl.arange(0, 8)
    sums *= tl.where(column == S_LOSS, weight, 1.0)
    tl.store(out + (LOSS + column) * slots, sums, mask=column < STORED)
    tl.store(out + RETURN_MEAN * slots, target_mean + off_mean)
    tl.store(out + ERROR_MEAN * slots, error_mean + error_off_mean)
    tl.store(out + RETURN_M2 * slots, pick(off, 2, 4) - n * off_mean * off_mean)
    tl.store(out + ERROR_M2 * slots, pick(off, 3, 4) - n * error_off_mean * error_off_mean)
    tl.store(out + TILE_INDEX * slots, k.to(tl.float32))


@kernel
def combine_kernel(
    batch,
    normalizer,
    partials,
    loss,
    metrics,
    scale,
    slots,
    divisor,
    COUNT_SEQUENCES: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Loss, metrics and 1 / divisor from the partial sums of all slots, in fp64."""
    terms = tl.zeros((GROUP,), tl.float64)
    clipped, values, counts = tl.zeros_like(terms), tl.zeros_like(terms), tl.zeros_like(terms)
    targets, errors = tl.zeros_like(terms), tl.zeros_like(terms)
    found = tl.zeros((GROUP,), tl.int32)
    last = tl.full((), -1, tl.int32)
    for start in range(0, slots, UNROLL * GROUP):
        for j in tl.static_range(UNROLL):
            slot = start + j * GROUP + tl.arange(0, GROUP)
            inside = slot < slots
            at = partials + slot
            n = tl.load(at + COUNT * slots, mask=inside, other=0.0).to(tl.float64)
            terms += tl.load(at + LOSS * slots, mask=inside, other=0.0).to(tl.float64)
            clipped += tl.load(at + CLIPPED * slots, mask=inside, other=0.0).to(tl.float64)
            values += tl.load(at + VALUE * slots, mask=inside, other=0.0).to(tl.float64)
            counts += n
            targets += n * tl.load(at + RETURN_MEAN * slots, mask=inside, other=0.0).to(tl.float64)
            errors += n * tl.load(at + ERROR_MEAN * slots, mask=inside, other=0.0).to(tl.float64)
            if COUNT_SEQUENCES:
                opens, last = opening_slots(
                    partials + COUNT * slots, partials + TILE_INDEX * slots, slot, slots, last
                )
                found += opens
    zero = tl.zeros_like(terms)
    sums = column_sums(join8(terms, clipped, values, counts, targets, errors, zero, zero), GROUP, 8)
    tokens = pick(sums, S_COUNT, 8)
    share = inverse(tl.where(tokens > 1.0, tokens, 1.0))
    target_mean, error_mean = pick(sums, S_RETURN, 8) * share, pick(sums, S_ERROR, 8) * share
    # Squared deviations within tiles, plus those between the means of tiles.
    target_m2, error_m2 = zero, zero
    for start in range(0, slots, UNROLL * GROUP):
        for j in tl.static_range(UNROLL):
            slot = start + j * GROUP + tl.arange(0, GROUP)
            inside = slot < slots
            at = partials + slot
            n_slot = tl.load(at + COUNT * slots, mask=inside, other=0.0).to(tl.float64)
            target = tl.load(at + RETURN_MEAN * slots, mask=inside, other=0.0) - target_mean
            error = tl.load(at + ERROR_MEAN * slots, mask=inside, other=0.0) - error_mean
            target_m2 += n_slot * target * target
            error_m2 += n_slot * error * error
            target_m2 += tl.load(at + RETURN_M2 * slots, mask=inside, other=0.0).to(tl.float64)
            error_m2 += tl.load(at + ERROR_M2 * slots, mask=inside, other=0.0).to(tl.float64)
    squares = column_sums(join4(target_m2, error_m2, zero, zero), GROUP, 4)
    total, rest = pick(squares, 0, 4), pick(squares, 1, 4)
    # The variance of equal returns is the rounding error of their mean. An unmasked NaN stays NaN.
    rounding = MEAN_ROUNDINGS * target_mean
    varies = total > tokens * rounding * rounding
    explained = tl.where(varies, 1.0 - rest / tl.where(varies, total, 1.0), total - total)
    count = tokens
    if COUNT_SEQUENCES:
        count = tl.sum(found, axis=0).to(tl.float64)
    factor = loss_scale(batch, normalizer, divisor, count, GROUP)
    # NaN if the factor is NaN, else 0.
    fault = factor - factor
    value = (pick(sums, S_LOSS, 8) * factor).to(tl.float32)
    tl.store(scale, factor.to(tl.float32))
    tl.store(loss, value)
    tl.store(metrics + M_LOSS, value)
    tl.store(metrics + M_CLIP_FRAC, (pick(sums, S_CLIPPED, 8) * share + fault).to(tl.float32))
    tl.store(metrics + M_VALUE_MEAN, (pick(sums, S_VALUE, 8) * share + fault).to(tl.float32))
    tl.store(metrics + M_RETURN_MEAN, (target_mean + fault).to(tl.float32))
    tl.store(metrics + M_EXPLAINED_VARIANCE, (explained + fault).to(tl.float32))
    tl.store(metrics + M_TOKENS, (tokens + fault).to(tl.float32))


def value_loss(given: ValueTokens, grad: bool) -> ValueResults:
    values, cu_seqlens, clip_range = given.values, given.cu_seqlens, given.clip_range
    divisor = given.normalizer, given.divisor
    sweep = t.begin("value_loss", values, cu_seqlens, *divisor, len(VALUE_METRICS), ROWS)
    batch, slots, partials, loss, metrics, scale, *_ = sweep
    gradient = losses.gradient(values, grad)
    weights = strided(given.mask)
    sequence_mean = given.aggregation == SEQ_MEAN_TOKEN_MEAN.value
    tile = {"TILE": t.TILE, "warps": t.WARPS}
    if sequence_mean:
        counts = (batch, weights, None, None, None, None, partials, 0.0, 0.0)
        sums = {"RATIO": False, "WEIGHT": False, "GATED": False, "AGAINST_ROLLOUT": False}
        launch(t.statistics_kernel, slots, loss, *counts, **sums, **tile)
    launch(
        value_kernel,
        slots,
        loss,
        batch,
        weights,
        strided(values),
        strided(given.old_values),
        strided(given.returns),
        gradient,
        partials,
        float(clip_range),
        CLIP=clip_range > 0,
        SEQUENCE_MEAN=sequence_mean,
        **tile,
    )
    sweep.combine(combine_kernel, given.aggregation)
    return ValueResults(loss, metrics, gradient, scale)


LAUNCHERS: losses.Launchers = {"value_loss": value_loss}
