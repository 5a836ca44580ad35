"""general_gae: a program walks a sequence from its end, block by block.

It carries the value behind a block and, in fp64, the advantage behind it, of which there are two
if the returns have a lam of their own. A block's steps are scanned in fp64 too. Blocks are counted
from the start of each sequence, so a sequence's bits depend neither on the batch nor on padding or
packing.

Launches: 1; packed 2, of which one checks the offsets. `whiten=True` adds 2. Every tensor is read
once. Few sequences fill only part of a device; `gae` without these options has no such limit.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from ..advantages import GeneralScan, ScanResults
from ._launch import INTERPRETED, kernel, launch
from ._math import scalar
from ._strided import strided
from .advantages_moments import merge_moments, store_moments, whiten_scan
from .advantages_scan import (
    CHECKED,
    CUT,
    address,
    before,
    check_offsets,
    compose,
    load_block,
    load_flags,
    load_tokens,
    offset_at,
    pick,
    score_of,
    sequence_at,
)

# Steps that a program scans at a time, in fp64: twice as many would not fit the registers.
BLOCK = 32 if INTERPRETED else 512
WARPS = 4


@kernel
def offsets_kernel(offsets, bad, sequences, total, CHECKED: tl.constexpr):
    """Stores whether cu_seqlens are bad."""
    check_offsets(offsets, bad, sequences, total, CHECKED)


@triton.jit
def checked(rate):
    """A rate in fp64; NaN outside [0, 1]."""
    rate = rate.to(tl.float64)
    return tl.where((rate >= 0.0) & (rate <= 1.0), rate, float("nan"))


@triton.jit
def rate_of(rates, number, sequence, PER_STEP: tl.constexpr):
    """The rate that a sequence keeps, in fp64; 0 if it has one per step."""
    rate = scalar(number).to(tl.float64)
    if rates is not None:
        rate = tl.full((), 0.0, tl.float64)
        if not PER_STEP:
            rate = checked(tl.load(sequence_at(rates, sequence)))
    return rate


@triton.jit
def rates_at(rates, rate, row, t, exists, PER_STEP: tl.constexpr):
    """The rates of the steps of a block."""
    found = tl.zeros(t.shape, tl.float64) + rate
    if PER_STEP:
        found = checked(tl.load(address(rates, row, t), mask=exists, other=0.0))
    return found


@triton.jit
def chain(difference, decay, ends, exists, x, CUTS: tl.constexpr, BLOCK: tl.constexpr):
    """(advantages of a block, advantage ahead of it) from the advantage x behind it."""
    i = tl.arange(0, BLOCK)
    a = tl.where(ends, CUT, decay)
    a, b = compose(tl.where(exists, a, 1.0), tl.where(exists, difference, -0.0), CUTS)
    advantages = tl.where(a < 0.0, b, tl.fma(a, tl.zeros((BLOCK,), tl.float64) + x, b))
    return advantages, before(pick(a, i, 0), pick(b, i, 0), x)


@kernel
def general_kernel(
    rewards,
    ref,
    values,
    mask,
    terminated,
    truncated,
    cut_values,
    bootstrap,
    scores,
    offsets,
    bad,
    gammas,
    lams,
    value_lams,
    numbers,
    sequences,
    cols,
    advantages,
    returns,
    shaped,
    partials,
    ESTIMATOR: tl.constexpr,
    CARRY: tl.constexpr,
    GAMMA_PER_STEP: tl.constexpr,
    LAM_PER_STEP: tl.constexpr,
    VALUE_LAM_PER_STEP: tl.constexpr,
    DECOUPLED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Results of one sequence; with `partials` also the moments of its advantages."""
    sequence = tl.program_id(0)
    gamma, lam, value_lam, kl_coef, clip = numbers
    i = tl.arange(0, BLOCK)
    n = tl.full((), 0.0, tl.float64)
    mean, m2 = n, n
    if offsets is None:
        row = sequence.to(tl.int64)
        begin = row * 0
        count = begin + cols
    else:
        begin = offset_at(offsets, sequence, cols)
        row = begin * 0
        count = tl.maximum(offset_at(offsets, sequence + 1, cols) - begin, 0)
        if tl.load(bad) != 0:
            # Sequences mean nothing: all tokens become NaN.
            count = row
            n, mean = n + 1.0, mean + float("nan")
            poison = tl.full((BLOCK,), float("nan"), tl.float32)
            for start in range(sequence * BLOCK, cols, sequences * BLOCK):
                at = start + i
                tl.store(advantages + at, poison, mask=at < cols)
                tl.store(returns + at, poison, mask=at < cols)
                if scores is not None:
                    tl.store(shaped + at, poison, mask=at < cols)
    own_gamma = rate_of(gammas, gamma, sequence, GAMMA_PER_STEP)
    own_lam = rate_of(lams, lam, sequence, LAM_PER_STEP)
    own_value_lam = rate_of(value_lams, value_lam, sequence, VALUE_LAM_PER_STEP)
    v_behind = tl.full((), 0.0, tl.float32)
    if bootstrap is not None:
        v_behind = tl.load(sequence_at(bootstrap, sequence)).to(tl.float32)
    x = tl.full((), 0.0, tl.float64)
    other = x
    scored = tl.full((), 0, tl.int32)
    blocks = ((count + BLOCK - 1) // BLOCK).to(tl.int32)
    for block in range(blocks):
        start = begin + (blocks - 1 - block).to(tl.int64) * BLOCK
        left = begin + count - start
        keep, exists, last, r, v, v_next = load_block(
            (rewards, ref, values, mask), (row, start, left), kl_coef, ESTIMATOR, CARRY, BLOCK
        )
        at = row * cols + start + i
        inside = i < left
        if scores is not None:
            final = tl.max(tl.where(keep, i, -1), axis=0)
            score = score_of(scores, sequence, clip)
            r = tl.where((i == final) & (scored == 0), r + score, r)
            scored = tl.maximum(scored, tl.max(keep.to(tl.int32), axis=0))
            tl.store(shaped + at, r, mask=inside)
        v_next = tl.where(i == last, v_behind, v_next)
        ends = i < 0
        if terminated is not None:
            ends = load_flags(terminated, row, start + i, exists)
            v_next = tl.where(ends, 0.0, v_next)
        if truncated is not None:
            cut = load_flags(truncated, row, start + i, exists) & (ends == 0)
            after = load_tokens(cut_values, row, start + i, cut & keep)
            v_next = tl.where(cut, after, v_next)
            ends = ends | cut
        g = rates_at(gammas, own_gamma, row, start + i, exists, GAMMA_PER_STEP)
        difference = tl.fma(v_next.to(tl.float64), g, r.to(tl.float64)) - v
        decay = g * rates_at(lams, own_lam, row, start + i, exists, LAM_PER_STEP)
        found, x = chain(difference, decay, ends, exists, x, True, BLOCK)
        of_returns = found
        if DECOUPLED:
            decay = g * rates_at(
                value_lams, own_value_lam, row, start + i, exists, VALUE_LAM_PER_STEP
            )
            of_returns, other = chain(difference, decay, ends, exists, other, True, BLOCK)
        if last >= 0:
            v_behind = pick(v, i, tl.min(tl.where(exists, i, BLOCK), axis=0))
        a = tl.where(keep, found, 0.0).to(tl.float32)
        tl.store(advantages + at, a, mask=inside)
        g_t = tl.where(keep, of_returns + v, 0.0).to(tl.float32)
        tl.store(returns + at, g_t, mask=inside)
        if partials is not None:
            n, mean, m2 = merge_moments(n, mean, m2, a, keep, BLOCK)
    if partials is not None:
        store_moments(partials, sequence, n, mean, m2)


def general(_: str, scan: GeneralScan, sequences: int, results: ScanResults) -> None:
    """One launch, two if packed; whitening adds two."""
    advantages, returns, shaped = results
    cols = returns.shape[-1]
    offsets = bad = None
    if scan.cu_seqlens is not None:
        offsets, bad = scan.cu_seqlens.contiguous(), returns.new_empty(1, dtype=torch.int32)
        launch(offsets_kernel, 1, returns, offsets, bad, sequences, cols, CHECKED=CHECKED, warps=1)
    penalty = scan.ref_logprobs is not None and scan.kl_coef != 0
    numbers = (scan.gamma, scan.lam, scan.value_lam, scan.kl_coef, scan.reward_clip or 0.0)
    of_gamma, of_lam, of_value_lam = scan.rates_per_step(sequences)
    constants: dict[str, Any] = {
        "ESTIMATOR": "reward" if scan.scores is None else scan.kl_estimator if penalty else "none",
        "CARRY": scan.masked == "carry" and scan.mask is not None,
        "GAMMA_PER_STEP": of_gamma,
        "LAM_PER_STEP": of_lam,
        "VALUE_LAM_PER_STEP": of_value_lam,
        "DECOUPLED": scan.decoupled,
    }
    kept = strided(scan.mask)
    partials = returns.new_empty(3 * sequences, dtype=torch.float64) if scan.whiten else None
    launch(
        general_kernel,
        sequences,
        returns,
        strided(scan.tokens),
        strided(scan.ref_logprobs if penalty else None),
        strided(scan.values),
        kept,
        strided(scan.terminated),
        strided(scan.truncated),
        strided(scan.cut_values),
        strided(scan.bootstrap_values),
        strided(scan.scores),
        offsets,
        bad,
        strided(scan.gammas),
        strided(scan.lams),
        strided(scan.value_lams),
        # float(): an int has another type and would compile another kernel.
        tuple(float(x) for x in numbers),
        sequences,
        cols,
        advantages,
        returns,
        shaped,
        partials,
        BLOCK=BLOCK,
        warps=WARPS,
        **constants,
    )
    if partials is not None:
        whiten_scan(advantages, kept, partials)
