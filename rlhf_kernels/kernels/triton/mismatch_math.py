"""Formulas of mismatch_weights on blocks: csrc/mismatch_math.h, and what its kernels share."""

import triton
import triton.language as tl

from ...config import enums
from ._math import exp_reduced, power_of_two
from .policy_math import ABSENT, TRUNCATE, clamp

NONE, TOKEN, SEQUENCE, GEOMETRIC, SEQUENCE_MEAN, SEQUENCE_MAX = (
    tl.constexpr(i) for i in range(len(enums.MISMATCH_CODES))
)
# Rows of the scratch [ROWS, slots], as csrc/mismatch_math.h has them: MismatchSum, MismatchEnds.
(
    S_TOKENS, S_MISSING, S_REJECTED, S_LOG_RATIO, S_NEAR, S_OLD, S_ROLLOUT, S_K2, S_K3, S_RATIO,
    S_EXCESS, S_EXCESS2, S_WEIGHT, S_WEIGHT2, S_OFF, S_OFF2, S_LOW, S_HIGH,
) = (tl.constexpr(i) for i in range(18))  # fmt: skip
SUMS, ENDS = tl.constexpr(18), tl.constexpr(4)
BOUND = tl.constexpr(1.0e30)


@triton.jit
def exp_whole(x):
    """exp(x), exp(x) - 1 and exp(x) - 1 - x for any fp32 x; inf and 0 beyond the floats."""
    n, mx, m1 = exp_reduced(clamp(x, -110.0, 90.0))
    # 2^n as two factors within the range of floats. Only the last product may round again.
    half = tl.floor(n * 0.5)
    s = power_of_two(half)
    e = (s * m1 + s) * power_of_two(n - half)
    near = power_of_two(clamp(n, -100.0, 100.0))
    em1 = tl.where(tl.abs(n) < 100.0, near * m1 + (near - 1.0), e - 1.0)
    return e, em1, tl.where(tl.abs(n) < 0.5, mx, em1 - x)


@triton.jit
def is_outside(x, low, high):
    """NaN is not outside, and inf is not outside an absent bound."""
    x = clamp(x, -ABSENT, ABSENT)
    return (x < low) | (x > high)


@triton.jit
def bounded_weight(w, y, p, MODE: tl.constexpr):
    """w of logarithm y, truncated or masked. The logarithm decides; a NaN stays."""
    if MODE == TRUNCATE:
        w = tl.where(y > p.log_high, p.high, w)
        w = tl.where(y < p.log_low, p.low, w)
    else:
        w = tl.where((y < p.log_low) | (y > p.log_high), 0.0, w)
    return w
