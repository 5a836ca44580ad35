"""Pairs of rows of logits in kernels: their options, statistics, weights, and terms of a mixture.

`pair` is a tuple of the cap and the scale of one row's logits, then those of the other's; None for
what is off. `beta` is (beta, 1 - beta) of a mixture, or None: a kernel has numbers in fp32, where
the difference from 1 would lose the digits of a small share.
"""

import triton
import triton.language as tl

from ...core.pair_options import PairOptions
from ._math import LOG2E, exp_parts, scalar
from ._rows import with_options
from .logprobs_backward import LOWEST


def packed(options: PairOptions) -> tuple[float | None, ...]:
    """`pair` of the policy and the reference."""
    # float(): an int has another type and would compile another kernel.
    caps = (float(c) if c > 0 else None for c in (options.softcap, options.ref_softcap))
    own, ref = caps
    return own, None, ref, None if options.ref_scale == 1.0 else float(options.ref_scale)


def shares(options: PairOptions) -> tuple[float, float] | None:
    """`beta` of a kernel."""
    return (float(options.beta), 1.0 - options.beta) if options.beta > 0 else None


@triton.jit
def scaled(z, scale):
    """Logits times their scale."""
    if scale is not None:
        z = z * scale
    return z


@triton.jit
def scaled_blocks(blocks, scale):
    """The blocks of a tile, each times their scale."""
    found = ()
    for k in tl.static_range(len(blocks)):
        found += (scaled(blocks[k], scale),)  # type: ignore[assignment]
    return found


@triton.jit
def row_stats(stats, row, valid):
    """m and s of both rows of a pair, as kl_divergence keeps them; s is fp64."""
    at = stats + row.to(tl.int64) * 5
    m = tl.load(at, mask=valid, other=0.0)
    s = tl.load(at + 1, mask=valid, other=1.0).to(tl.float64)
    ref_m = tl.load(at + 2, mask=valid, other=0.0)
    ref_s = tl.load(at + 3, mask=valid, other=1.0).to(tl.float64)
    return m, s, ref_m, ref_s


@triton.jit
def distances(x, y, column, inside, m, ref_m, temperature, pair):
    """(distance to m, slope) of the policy's logits at x + column, and that to ref_m of those at y.

    `pair` has the options of the policy, then of the reference. Only what is `inside` is read.
    """
    cap, _, ref_cap, ref_scale = pair
    own = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
    own, slope = with_options(own, (temperature, cap))
    ref = tl.load(y + column, mask=inside, other=0.0).to(tl.float32)
    ref, _ = with_options(ref, (temperature, ref_cap))
    return own - m, slope, scaled(ref, ref_scale) - ref_m


@triton.jit
def weight_of(d, rate):
    """exp(rate d), or exactly 0 below the normal floats; a term with weight 0 is ignored."""
    return tl.where(d * rate < LOWEST, 0.0, tl.exp2(d * (rate * LOG2E)))


@triton.jit
def log_of_ratio(d, ref_d, rate, log_ratio):
    """log(p / q) from the distances of both; finite where a probability is 0."""
    lowest = LOWEST / rate
    # A NaN fails the comparison and stays.
    d, ref_d = tl.where(d < lowest, lowest, d), tl.where(ref_d < lowest, lowest, ref_d)
    return (d - ref_d) * rate - log_ratio


@triton.jit
def log_of_sum(v, total):
    """log(1 + v) for v in (-1, 0] and total = 1 + v: `log_of_sum` of csrc/kl_math.h."""
    bits = (total * 1.41421356).to(tl.int32, bitcast=True)
    n = ((bits >> 23) - 127).to(tl.float32)
    # The mantissa is within sqrt(0.5) and sqrt(2). Where it is the sum itself, v has more digits.
    mantissa = (total.to(tl.int32, bitcast=True) - (n.to(tl.int32) << 23)).to(
        tl.float32, bitcast=True
    )
    x = tl.where(n < -0.5, mantissa - 1.0, v)
    # The mantissa of a NaN is a number.
    x = tl.where(total == total, x, total)
    z = x * x
    q = x * 7.0376836292e-2 - 1.1514610310e-1
    q = q * x + 1.1676998740e-1
    q = q * x - 1.2420140846e-1
    q = q * x + 1.4249322787e-1
    q = q * x - 1.6668057665e-1
    q = q * x + 2.0000714765e-1
    q = q * x - 2.4999993993e-1
    q = q * x + 3.3333331174e-1
    q = n * -2.12194440e-4 + q * x * z
    return n * 0.693359375 + (x + (q - 0.5 * z))


@triton.jit
def mixture_terms(d, beta):
    """(log(p / m), log(q / m)) from d = log(p / q): `mixture_terms` of csrc/kl_math.h."""
    share, other = scalar(beta[0]), scalar(beta[1])
    # A NaN fails the comparison and stays.
    a = tl.where(tl.abs(d) > 80.0, -80.0, -tl.abs(d))
    smaller = d < 0.0
    c, rest = tl.where(smaller, other, share), tl.where(smaller, share, other)
    e, em1, _ = exp_parts(a)
    log_m = log_of_sum(c * em1, c * e + rest)
    return tl.where(smaller, d - log_m, -log_m), tl.where(smaller, -log_m, -log_m - d)
