"""Sums of exponentials around a maximum, and how sums around two maxima are merged."""

import triton
import triton.language as tl

from ._math import LOG2E, tree_sum


@triton.jit
def raised(m, top):
    """(the larger of m and top; the same, or 0 for -inf: what distances are taken from).

    This maximum may lose a NaN, but the sums have it too.
    """
    top = tl.where(m > top, m, top)
    return top, tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def rebased(m, s, base, rate):
    """((m - base) rate, its exponential): moves sums around m to the reference point `base`."""
    # Only -inf has no reference point and a sum of 0; its distance is 0.
    shift = tl.where(s == 0.0, 0.0, (m - base) * rate)
    return shift, tl.exp2(shift * LOG2E).to(tl.float64)


@triton.jit
def merged(m, s, t, top, part_m, part_s, part_t, rate, ENTROPY: tl.constexpr, N: tl.constexpr):
    """(m, s, t) of a row, of which [N] more parts have the maximum `top`; s and t are fp64.

    N = 1: a part is a number, not a block.
    """
    top, base = raised(m, top)
    shift, weight = rebased(part_m, part_s, base, rate)
    before, kept = rebased(m, s, base, rate)
    if ENTROPY:
        # Logits masked with the lowest float may have distance -inf and weight 0.
        moved = tl.where(weight == 0.0, 0.0, weight * (part_t + part_s * shift))
        moved = moved if N == 1 else tree_sum(moved, N)
        t = tl.where(kept == 0.0, 0.0, kept * (t + s * before)) + moved
    more = weight * part_s
    more = more if N == 1 else tree_sum(more, N)
    return top, kept * s + more, t


@triton.jit
def combine_parts(partials, parts, rate, ENTROPY: tl.constexpr, GROUP: tl.constexpr):
    """(m, s, t) of a row from those of its parts, in order; s and t are fp64."""
    m = tl.full((), float("-inf"), tl.float32)
    s = tl.full((), 0.0, tl.float64)
    t = tl.full((), 0.0, tl.float64)
    for start in range(0, parts, GROUP):
        part = start + tl.arange(0, GROUP)
        inside = part < parts
        at = partials + part.to(tl.int64) * 3
        part_m = tl.load(at, mask=inside, other=float("-inf"))
        part_s = tl.load(at + 1, mask=inside, other=0.0).to(tl.float64)
        part_t = part_s
        if ENTROPY:
            part_t = tl.load(at + 2, mask=inside, other=0.0).to(tl.float64)
        top = tl.max(part_m, axis=0)
        m, s, t = merged(m, s, t, top, part_m, part_s, part_t, rate, ENTROPY, GROUP)
    return m, s, t
