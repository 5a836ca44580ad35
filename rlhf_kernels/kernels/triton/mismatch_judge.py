"""The program of mismatch_weights that judges the sequences and makes the metrics."""

import triton
import triton.language as tl

from ._launch import INTERPRETED, kernel
from ._tokens import bad_offsets, pick
from .mismatch_math import (
    GEOMETRIC,
    NONE,
    S_EXCESS,
    S_EXCESS2,
    S_HIGH,
    S_K2,
    S_K3,
    S_LOG_RATIO,
    S_LOW,
    S_MISSING,
    S_NEAR,
    S_OFF,
    S_OFF2,
    S_OLD,
    S_RATIO,
    S_REJECTED,
    S_ROLLOUT,
    S_TOKENS,
    S_WEIGHT,
    S_WEIGHT2,
    SEQUENCE,
    SEQUENCE_MAX,
    SEQUENCE_MEAN,
    SUMS,
    TOKEN,
    bounded_weight,
    exp_whole,
    is_outside,
)
from .policy_math import ABSENT, clamp, flag

# Rows of a block of sums of sequences; a power of two.
BLOCK = tl.constexpr(32)
# Sequences that the judging program takes at a time.
JUDGED = 16 if INTERPRETED else 32


@triton.jit
def row_of(block, i):
    """Row i of a block [BLOCK, N], exactly."""
    row = tl.arange(0, BLOCK)[:, None]
    return tl.sum(tl.where(row == i, block, 0.0), axis=0)


@triton.jit
def sequence_slots(batch, s, inside, TILE: tl.constexpr):
    """(first slot, number of slots) of the sequences s where `inside`."""
    offsets, _, cols = batch
    if offsets is not None:
        begin = tl.load(offsets + s, mask=inside, other=0).to(tl.int64)
        end = tl.load(offsets + s + 1, mask=inside, other=0).to(tl.int64)
        begin = tl.minimum(tl.maximum(begin, 0), cols)
        length = tl.maximum(tl.minimum(end, cols) - begin, 0)
        first = begin // TILE + s
    else:
        length = tl.where(inside, 0, 0).to(tl.int64) + cols
        first = s.to(tl.int64) * ((cols - 1) // TILE + 1)
    return first, tl.where(inside, (length + TILE - 1) // TILE, 0)


@triton.jit
def gathered(batch, partials, s, inside, slots, TILE: tl.constexpr):
    """Sums [BLOCK, N] in fp64 and the four ends of the sequences s, from their slots in order."""
    first, count = sequence_slots(batch, s, inside, TILE)
    row = tl.arange(0, BLOCK)[:, None]
    sums = tl.zeros((BLOCK, s.shape[0]), tl.float64)
    least = tl.full((s.shape[0],), ABSENT, tl.float32)
    most, least_weight, most_weight = -least, least, -least
    for k in range(0, tl.max(count, axis=0)):
        there = inside & (k < count)
        at = partials + first + k
        loaded = tl.load(at[None, :] + row * slots, mask=(row < SUMS) & there[None, :], other=0.0)
        sums += loaded.to(tl.float64)
        end = at + SUMS * slots
        least = tl.minimum(least, tl.load(end, mask=there, other=ABSENT))
        most = tl.maximum(most, tl.load(end + slots, mask=there, other=-ABSENT))
        least_weight = tl.minimum(least_weight, tl.load(end + 2 * slots, mask=there, other=ABSENT))
        most_weight = tl.maximum(most_weight, tl.load(end + 3 * slots, mask=there, other=-ABSENT))
    return sums, least, most, least_weight, most_weight


@triton.jit
def rejects(sums, n, least, most, p):
    """Whether a criterion rejects each sequence."""
    near, k2, k3 = row_of(sums, S_NEAR), row_of(sums, S_K2), row_of(sums, S_K3)
    found = is_outside(near.to(tl.float32), p.sum_low, p.sum_high)
    found |= is_outside((near / n).to(tl.float32), p.mean_low, p.mean_high)
    found |= (least < p.extreme_low) | (most > p.extreme_high)
    found |= is_outside(k2.to(tl.float32), -ABSENT, p.sum_k2)
    found |= is_outside((k2 / n).to(tl.float32), -ABSENT, p.mean_k2)
    found |= is_outside(k3.to(tl.float32), -ABSENT, p.sum_k3)
    found |= is_outside((k3 / n).to(tl.float32), -ABSENT, p.mean_k3)
    return found


@triton.jit
def sequence_unit(sums, n, most, p, LEVEL: tl.constexpr, MODE: tl.constexpr):
    """The logarithm of each sequence's weight, the weight without bounds, and bounded."""
    total = row_of(sums, S_LOG_RATIO)
    if LEVEL == SEQUENCE_MEAN:
        raw = (row_of(sums, S_RATIO) / n).to(tl.float32)
        y = tl.log(raw.to(tl.float64)).to(tl.float32)
        y = clamp(y, -p.clamp, p.clamp)
    else:
        y = total * 0.0
        if LEVEL == NONE:
            y = tl.zeros_like(total)
        elif LEVEL == SEQUENCE:
            y = total
        elif LEVEL == GEOMETRIC:
            y = total / n
        elif LEVEL == SEQUENCE_MAX:
            # The largest skips a NaN, but the sum has not.
            y = most.to(tl.float64) + (total - total)
        y = clamp(y.to(tl.float32), -p.clamp, p.clamp)
        raw, _, _ = exp_whole(y)
    return y, raw, bounded_weight(raw, y, p, MODE)


@triton.jit
def put(totals, i, x, inside):
    """Row i of the totals [BLOCK, N], plus x where `inside`."""
    row = tl.arange(0, BLOCK)[:, None]
    return totals + tl.where((row == i) & inside[None, :], x[None, :].to(tl.float64), 0.0)


@triton.jit
def deviation(off, square, n, unbiased):
    """The standard deviation from n values' mean and mean square of their distances from 1."""
    rest = tl.where(n - unbiased > 1.0, n - unbiased, 1.0)
    variance = tl.where(n > 1.0, (square - off * off) * n / rest, 0.0)
    return tl.sqrt(tl.where(variance < 0.0, 0.0, variance))


@triton.jit
def end_of(x, total, some):
    """An end, which has skipped a NaN; the total has not. 0 without any."""
    return tl.where(total == total, tl.where(some, x.to(tl.float64), 0.0), total)


# Rows of the totals over sequences: MismatchTotal of csrc/mismatch_math.h.
(
    SEQUENCES, TOKENS, MISSING, REJECTED, TOUCHED, LOG_RATIO, K3, EXCESS, EXCESS2, WEIGHT, WEIGHT2,
    OFF, OFF2, LOW, HIGH, SEQ_WEIGHT, SEQ_OFF, SEQ_OFF2, SEQ_LOW, SEQ_HIGH, FAR, OLD_PPL, OLD_LOG,
    ROLLOUT_PPL, ROLLOUT_LOG, DIFFERENCE, ABS_DIFFERENCE, PPL_RATIO,
) = (tl.constexpr(i) for i in range(28))  # fmt: skip


@triton.jit
def add_tokens(totals, sums, n, some, rejected):
    """Adds what is not of weights."""
    of_tokens = row_of(sums, S_REJECTED)
    totals = put(totals, MISSING, row_of(sums, S_MISSING), some | ~some)
    totals = put(totals, SEQUENCES, tl.full(n.shape, 1.0, tl.float64), some)
    totals = put(totals, TOKENS, n, some)
    totals = put(totals, REJECTED, tl.where(rejected, n, of_tokens), some)
    totals = put(totals, TOUCHED, flag(rejected | (of_tokens > 0.0)), some)
    total = row_of(sums, S_LOG_RATIO)
    totals = put(totals, LOG_RATIO, total, some)
    totals = put(totals, K3, row_of(sums, S_K3), some)
    totals = put(totals, EXCESS, row_of(sums, S_EXCESS), some)
    totals = put(totals, EXCESS2, row_of(sums, S_EXCESS2), some)
    old, rollout = -row_of(sums, S_OLD) / n, -row_of(sums, S_ROLLOUT) / n
    difference = -total / n
    totals = put(totals, OLD_PPL, tl.exp(old), some)
    totals = put(totals, OLD_LOG, old, some)
    totals = put(totals, ROLLOUT_PPL, tl.exp(rollout), some)
    totals = put(totals, ROLLOUT_LOG, rollout, some)
    totals = put(totals, DIFFERENCE, difference, some)
    totals = put(totals, ABS_DIFFERENCE, tl.abs(difference), some)
    return put(totals, PPL_RATIO, tl.exp(difference), some), difference


@triton.jit
def kept_low(x, some):
    return tl.where(some & (x == x), x, ABSENT)


@triton.jit
def kept_high(x, some):
    return tl.where(some & (x == x), x, -ABSENT)


@kernel
def judge_kernel(
    batch,
    partials,
    verdicts,
    metrics,
    slots,
    p,
    LEVEL: tl.constexpr,
    MODE: tl.constexpr,
    NORMALIZE: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
):
    """Verdicts [2, sequences] (weight, whether rejected), the batch's two behind them, metrics."""
    offsets, sequences, _ = batch
    totals = tl.zeros((BLOCK, GROUP), tl.float64)
    low = tl.full((GROUP,), ABSENT, tl.float32)
    high = -low
    raw_low, raw_high, seq_low, seq_high, diff_low, diff_high = low, high, low, high, low, high
    for start in range(0, sequences, GROUP):
        s = start + tl.arange(0, GROUP)
        inside = s < sequences
        sums, least, most, w_least, w_most = gathered(batch, partials, s, inside, slots, TILE)
        count = row_of(sums, S_TOKENS)
        some = inside & (count > 0.0)
        n = tl.where(some, count, 1.0)
        rejected = some & rejects(sums, n, least, most, p)
        totals, difference = add_tokens(totals, sums, n, some, rejected)
        raw_mean = (row_of(sums, S_RATIO) / n).to(tl.float32)
        if LEVEL == TOKEN:
            mean, off = row_of(sums, S_WEIGHT) / n, row_of(sums, S_OFF) / n
            totals = put(totals, WEIGHT, row_of(sums, S_WEIGHT), some)
            totals = put(totals, WEIGHT2, row_of(sums, S_WEIGHT2), some)
            totals = put(totals, OFF, row_of(sums, S_OFF), some)
            totals = put(totals, OFF2, row_of(sums, S_OFF2), some)
            totals = put(totals, LOW, row_of(sums, S_LOW), some)
            totals = put(totals, HIGH, row_of(sums, S_HIGH), some)
            unit = tl.full((GROUP,), 1.0, tl.float32)
            raw_least, raw_most = least, most
        else:
            y, raw, unit = sequence_unit(sums, n, most, p, LEVEL, MODE)
            mean = unit.to(tl.float64)
            off, raw_mean = mean - 1.0, raw
            totals = put(totals, WEIGHT, n * mean, some)
            totals = put(totals, WEIGHT2, n * mean * mean, some)
            totals = put(totals, OFF, n * off, some)
            totals = put(totals, OFF2, n * off * off, some)
            totals = put(totals, LOW, flag(y < p.count_log_low), some)
            totals = put(totals, HIGH, flag(y > p.count_log_high), some)
            w_least, w_most, raw_least, raw_most = unit, unit, raw, raw
        totals = put(totals, SEQ_WEIGHT, mean, some)
        totals = put(totals, SEQ_OFF, off, some)
        totals = put(totals, SEQ_OFF2, off * off, some)
        totals = put(totals, SEQ_LOW, flag(is_outside(raw_mean, p.count_low, ABSENT)), some)
        totals = put(totals, SEQ_HIGH, flag(is_outside(raw_mean, -ABSENT, p.count_high)), some)
        limit = tl.full((), 0.0, tl.float64) + p.clamp
        far = clamp(row_of(sums, S_LOG_RATIO), -limit, limit)
        totals = put(totals, FAR, tl.exp(2.0 * far) - 1.0, some)
        tl.store(verdicts + s, unit, mask=inside)
        tl.store(verdicts + sequences + s, flag(rejected), mask=inside)
        rounded, difference = mean.to(tl.float32), difference.to(tl.float32)
        low, high = (
            tl.minimum(low, kept_low(w_least, some)),
            tl.maximum(high, kept_high(w_most, some)),
        )
        raw_low = tl.minimum(raw_low, kept_low(raw_least, some))
        raw_high = tl.maximum(raw_high, kept_high(raw_most, some))
        seq_low = tl.minimum(seq_low, kept_low(rounded, some))
        seq_high = tl.maximum(seq_high, kept_high(rounded, some))
        diff_low = tl.minimum(diff_low, kept_low(difference, some))
        diff_high = tl.maximum(diff_high, kept_high(difference, some))
    total = tl.sum(totals, axis=1)
    tokens, count = pick(total, TOKENS, BLOCK), pick(total, SEQUENCES, BLOCK)
    some_tokens = count > 0.0
    n, seqs = tl.where(some_tokens, tokens, 1.0), tl.where(some_tokens, count, 1.0)
    units = seqs
    if LEVEL == TOKEN:
        units = n
    mean, square = pick(total, WEIGHT, BLOCK) / n, pick(total, WEIGHT2, BLOCK) / n
    seq_mean = pick(total, SEQ_WEIGHT, BLOCK) / seqs
    factor = tl.full((), 1.0, tl.float64)
    if NORMALIZE:
        norm = seq_mean
        if LEVEL == TOKEN:
            norm = mean
        # A mean that is not above this normalises nothing, as in verl.
        factor = tl.where((norm <= 1e-8) | (count == 0.0), 1.0, norm)
    fault = tl.full((), 0.0, tl.float64)
    if offsets is not None:
        fault = tl.where(bad_offsets(batch, GROUP) == 0, 0.0, float("nan"))
    tl.store(verdicts + 2 * sequences, (factor + fault).to(tl.float32))
    tl.store(verdicts + 2 * sequences + 1, tl.where(fault == fault, 0.0, 1.0))
    low, high = tl.min(low, axis=0), tl.max(high, axis=0)
    raw_low, raw_high = tl.min(raw_low, axis=0), tl.max(raw_high, axis=0)
    seq_low, seq_high = tl.min(seq_low, axis=0), tl.max(seq_high, axis=0)
    diff_low, diff_high = tl.min(diff_low, axis=0), tl.max(diff_high, axis=0)
    if LEVEL == TOKEN:
        raw_low, _, _ = exp_whole(raw_low)
        raw_high, _, _ = exp_whole(raw_high)
    log_total, weight_total = pick(total, LOG_RATIO, BLOCK), pick(total, WEIGHT, BLOCK)
    raw_total = log_total
    if LEVEL == NONE:
        # Without weights there is no ratio that may be NaN.
        raw_total = count
    seq_total = pick(total, SEQ_WEIGHT, BLOCK)
    distance = tl.maximum(tl.abs(seq_low - 1.0), tl.abs(seq_high - 1.0))
    off, off2 = pick(total, OFF, BLOCK) / n, pick(total, OFF2, BLOCK) / n
    seq_off, seq_off2 = pick(total, SEQ_OFF, BLOCK) / seqs, pick(total, SEQ_OFF2, BLOCK) / seqs
    excess, excess2 = pick(total, EXCESS, BLOCK), pick(total, EXCESS2, BLOCK)
    ess = tl.where(square == 0.0, 0.0, mean * mean / tl.where(square == 0.0, 1.0, square))
    values = (
        mean, deviation(off, off2, tokens, 0.0),
        end_of(low, weight_total, some_tokens), end_of(high, weight_total, some_tokens), ess,
        pick(total, LOW, BLOCK) / units, pick(total, HIGH, BLOCK) / units,
        end_of(raw_low, raw_total, some_tokens), end_of(raw_high, raw_total, some_tokens),
        seq_mean, deviation(seq_off, seq_off2, count, 1.0),
        end_of(seq_low, seq_total, some_tokens), end_of(seq_high, seq_total, some_tokens),
        end_of(distance, seq_total, some_tokens),
        pick(total, SEQ_LOW, BLOCK) / seqs, pick(total, SEQ_HIGH, BLOCK) / seqs, factor,
        -log_total / n, pick(total, K3, BLOCK) / n, (excess2 + 2.0 * excess) / n,
        pick(total, FAR, BLOCK) / seqs,
        pick(total, OLD_PPL, BLOCK) / seqs, pick(total, OLD_LOG, BLOCK) / seqs,
        pick(total, ROLLOUT_PPL, BLOCK) / seqs, pick(total, ROLLOUT_LOG, BLOCK) / seqs,
        pick(total, DIFFERENCE, BLOCK) / seqs, pick(total, ABS_DIFFERENCE, BLOCK) / seqs,
        end_of(diff_low, pick(total, DIFFERENCE, BLOCK), some_tokens),
        end_of(diff_high, pick(total, DIFFERENCE, BLOCK), some_tokens),
        pick(total, PPL_RATIO, BLOCK) / seqs,
        pick(total, REJECTED, BLOCK) / n, pick(total, TOUCHED, BLOCK) / seqs,
        pick(total, MISSING, BLOCK), count, tokens,
    )  # fmt: skip
    for i in tl.static_range(len(values)):
        tl.store(metrics + i, (values[i] + fault).to(tl.float32))
