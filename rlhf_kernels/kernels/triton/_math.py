"""Device functions shared by several kernels.

Bits must not depend on the memory layout of a tensor. Triton, however, derives the layout of a
block, and with it the order of a reduction, from the alignment that it may assume. Sums here are
therefore trees of pairs in index order, which give the same bits in any layout.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def scalar(x):
    """A number argument as an fp32 tensor. The interpreter passes numbers as Python floats."""
    return tl.full((), 0.0, tl.float32) + x


@triton.jit
def good_temperature(t):
    """2^-60 <= t <= 2^60: `good_temperature` of csrc/math.h."""
    return (t >= 8.673617379884035e-19) & (t <= 1.152921504606847e18)


@triton.jit
def tree_sum(x, N: tl.constexpr):
    """Sum of a block [N] as a tree, neighbours first; N is a power of two up to 2^20."""
    for _ in tl.static_range(20):
        if x.shape[0] > 1:
            x = tl.sum(tl.reshape(x, (x.shape[0] // 2, 2)), axis=1)
    return tl.sum(x, axis=0)


@triton.jit
def tree_sums(x):
    """Sums of the rows of a block [R, C], each as of `tree_sum`."""
    for _ in tl.static_range(20):
        if x.shape[1] > 1:
            x = tl.sum(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)), axis=2)
    return tl.reshape(x, (x.shape[0],))


@triton.jit
def power_of_two(n):
    """2^n for integral fp32 n in [-126, 127], exact on every device."""
    return ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exp_reduced(x):
    """(n, mx, m1) with exp(x) = 2^n (1 + m1), fp32; n is integral, and m1 at most 2^0.5 - 1.

    m1 - mx is x - n ln 2: for n = 0, mx is exp(x) - 1 - x.
    """
    n = tl.floor(x * 1.44269504 + 0.5)
    # ln 2 in two parts; the first has so few bits that its product with n is exact.
    f = n * 2.12194440e-4 + (n * -0.693359375 + x)
    q = 1.9899517e-4
    q = q * f + 1.3933830e-3
    q = q * f + 8.3332984e-3
    q = q * f + 4.1666463e-2
    q = q * f + 1.6666667e-1
    q = q * f + 0.5
    mx = f * f * q
    return n, mx, f + mx


@triton.jit
def exp_parts(x):
    """exp(x), exp(x) - 1 and exp(x) - 1 - x for |x| <= 80, fp32: `exp_parts` of csrc/exp_math.h.

    Exactly 1, 0, 0 at x = 0; NaN for NaN.
    """
    n, mx, m1 = exp_reduced(x)
    s = power_of_two(n)
    em1 = s * m1 + (s - 1.0)
    return s * m1 + s, em1, tl.where(tl.abs(n) < 0.5, mx, em1 - x)


@triton.jit
def tanh_parts(u):
    """tanh(u) and its slope, without cancellation at small or large |u|."""
    a = tl.where(tl.abs(u) > 40.0, 40.0, tl.abs(u))
    e, em1, _ = exp_parts(-2.0 * a)
    th = -em1 / (1.0 + e)
    slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
    # A NaN fails both comparisons and stays.
    th = tl.where(u < 0.0, -th, tl.where(u >= 0.0, th, u))
    return th, tl.where(u == u, slope, u)


@triton.jit
def label_gradient(logprob, distance, mean, g, h):
    """T times the gradient of the label's own logit, in fp64.

    1 - p is computed without cancellation, and log p + H as distance - mean, with
    distance = (z - m) / T.
    """
    p = tl.exp(logprob)
    # 1 - exp(logprob) by its series where it would cancel.
    rest = tl.where(logprob > -1.0e-4, -logprob * (1.0 + logprob * (0.5 + logprob / 6.0)), 1.0 - p)
    # p log p is 0 at p = 0, even where log p is -inf.
    bend = tl.where((h == 0.0) | (p == 0.0), 0.0, h * p * (distance - mean))
    return g * rest - bend
