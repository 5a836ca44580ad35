"""Token terms of the policy and value losses: csrc/policy_math.h on blocks of tokens.

Comparisons are written so that NaN stays: a NaN fails them, and the failing branch keeps the value.
`c` is the PolicyParams of a PolicyLossConfig; kernels read its fields by name.
"""

from collections.abc import Iterator

import triton
import triton.language as tl

from ...config import enums
from ...config.policy_codes import UNBOUNDED
from ._math import exp_parts


def _codes(names: tuple[object, ...]) -> Iterator[tl.constexpr]:
    """The integer code of each name of a tuple in config/enums.py, as constants for kernels."""
    return (tl.constexpr(i) for i in range(len(names)))


# The codes of PolicyCodes, in the order of config/enums.py.
CLIP, PENALTY, REINFORCE, CISPO, SAPO = _codes(enums.OBJECTIVES)
TOKEN_RATIO, SEQUENCE_RATIO, SEQUENCE_TOKEN_RATIO, CLIPPED_SEQUENCE_RATIO = _codes(
    enums.RATIO_LEVELS
)
K1, K2, K3, ABS = _codes(enums.PLAIN_KL_ESTIMATORS)
NO_CORRECTION, TOKEN_CORRECTION, SEQUENCE_CORRECTION, GEOMETRIC_CORRECTION = _codes(
    enums.CORRECTION_CODES
)
NO_KL_WEIGHT, RATIO_KL_WEIGHT, DETACHED_RATIO_KL_WEIGHT, ONE_KL_WEIGHT = _codes(
    enums.KL_WEIGHT_CODES
)
NO_GATE, TV_GATE, BINARY_KL_GATE, RATIO_GATE, OPSM_GATE = _codes(enums.GATE_CODES)
OLD_ANCHOR, ROLLOUT_ANCHOR = _codes(enums.GATE_ANCHORS)
TRUNCATE, MASK = _codes(enums.CORRECTION_MODES)
TOKEN_MEAN, SEQ_MEAN_TOKEN_MEAN, SEQ_MEAN_TOKEN_SUM, CONSTANT = _codes(enums.AGGREGATIONS)
# Every exp(x) here clamps x to +-40: LOG_RATIO_BOUND of config/policy_codes.py.
BOUND = tl.constexpr(40.0)
# Stands for an absent upper bound, and its negative for a lower one.
ABSENT = tl.constexpr(UNBOUNDED)


@triton.jit
def clamp(x, low, high):
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def within(x, low, high, slope):
    """slope where x is in [low, high] or NaN; else 0."""
    return tl.where((x < low) | (x > high), 0.0, slope)


@triton.jit
def policy_ratio(x, c):
    """r, r - 1 and r - 1 - log r of the clamped log-ratio x."""
    return exp_parts(clamp(x, c.log_ratio_low, c.log_ratio_high))


@triton.jit
def clipped_log_ratio(x, a, low, high):
    """The log-ratio x of a token in the mean of a sequence that clips its tokens."""
    return tl.where(a > 0.0, tl.where(x > high, high, x), tl.where(x < low, low, x))


@triton.jit
def unclipped(x, a, low, high):
    """Whether that clip leaves x."""
    return ~tl.where(a > 0.0, x > high, x < low)


@triton.jit
def log_weight(old, rollout):
    """old - rollout, the logarithm of a token's weight: `log_weight` of csrc/policy_math.h.

    0 where it is NaN although old is a number. Infinities become large finite numbers.
    """
    x = clamp(old - rollout, -1.0e30, 1.0e30)
    return tl.where(x == x, x, tl.where(old == old, 0.0, old))


@triton.jit
def correction_weight(x, c, MODE: tl.constexpr):
    """w = exp(x) for x = log_weight (or its sum over the sequence), truncated or masked."""
    w, _, _ = exp_parts(clamp(x, -BOUND, BOUND))
    if MODE == TRUNCATE:
        w = clamp(w, c.correction_low, c.correction_high)
    else:
        w = within(w, c.correction_low, c.correction_high, w)
    return w


@triton.jit
def flag(condition):
    return tl.where(condition, 1.0, 0.0)


@triton.jit
def exceeds(bound, known, q_less_1, others, of_others):
    """Whether the divergence of `policy_gate` exceeds a bound: see csrc/policy_math.h."""
    quotient, _, _ = exp_parts(clamp((bound + known) / (0.0 - q_less_1), -BOUND, BOUND))
    return quotient * others < of_others


@triton.jit
def policy_gate(logprob, anchor, a, c, GATE: tl.constexpr, TWO_SIDED: tl.constexpr):
    """Whether the gate drops a token at its lower, and at its upper bound."""
    if GATE == RATIO_GATE:
        # An infinite log-ratio is not beyond a bound that is absent.
        x = clamp(logprob - anchor, -ABSENT, ABSENT)
        low, high = x < c.gate_low, x > c.gate_high
    else:
        if GATE == TV_GATE:
            p, _, _ = exp_parts(clamp(logprob, -BOUND, BOUND))
            q, _, _ = exp_parts(clamp(anchor, -BOUND, BOUND))
            low, high = p - q < c.gate_low, p - q > c.gate_high
        else:
            of_p = tl.where(logprob > 0.0, 0.0, logprob)
            of_q = tl.where(anchor > 0.0, 0.0, anchor)
            x = clamp(of_p - of_q, -BOUND, BOUND)
            _, p_less_1, _ = exp_parts(clamp(of_p, -BOUND, BOUND))
            q, q_less_1, _ = exp_parts(clamp(of_q, -BOUND, BOUND))
            known, others, of_others = q * x, 1.0e-8 - p_less_1, 1.0e-8 - q_less_1
            low = (x < 0.0) & exceeds(c.gate_low, known, q_less_1, others, of_others)
            high = (x > 0.0) & exceeds(c.gate_high, known, q_less_1, others, of_others)
        if not TWO_SIDED:
            low, high = low & (a < 0.0), high & (a > 0.0)
    return low, high


@triton.jit
def policy_objective(r, rm1, rm1mx, logprob, a, w, c, OBJECTIVE: tl.constexpr):
    """The objective of one token: (loss, direct, ratio, low, high, dual).

    direct is the part of d loss / d logprob that does not pass through the ratio; ratio is
    d loss / d log r. low, high and dual are 1 where that bound takes effect.
    """
    zero = tl.zeros_like(a)
    direct, ratio, low, high, dual = zero, zero, zero, zero, zero
    if OBJECTIVE == REINFORCE:
        direct = w * -a
        loss = w * (-a * logprob)
    elif OBJECTIVE == CISPO:
        weight = -a * clamp(r, c.clip_low, c.clip_high)
        direct = w * weight
        loss = w * (weight * logprob)
        low, high = flag(r < c.clip_low), flag(r > c.clip_high)
        # Broadcasts the flags to all tokens, for the ratio of a sequence too.
        low, high = low + zero, high + zero
    elif OBJECTIVE == PENALTY:
        pg = w * (-a * r)
        loss = pg + c.penalty_coef * rm1mx
        ratio = pg + c.penalty_coef * rm1
    elif OBJECTIVE == SAPO:
        tau = tl.where(a > 0.0, c.sapo_tau_pos, c.sapo_tau_neg)
        z = tau * (r - 1.0)
        # exp(-z), exactly 0 where it is below 1e-34; z >= -tau.
        e, _, _ = exp_parts(clamp(-z, -80.0, 80.0))
        u = tl.where(z > 80.0, 0.0, e)
        gate = 1.0 / (1.0 + u)
        loss = w * (-a * gate * (4.0 / tau))
        ratio = w * (-a * 4.0 * gate * (u * gate) * r)
    else:
        free = -a * r
        unclipped = -a * tl.where(r > c.delta, c.delta, r)
        clipped = -a * clamp(r, c.clip_low, c.clip_high)
        wins = clipped > unclipped
        loss = tl.where(wins, clipped, unclipped)
        slope = tl.where(wins | (r > c.delta), 0.0, free)
        bound = -a * c.dual_clip
        over = (a < 0.0) & (loss > bound)
        loss = w * tl.where(over, bound, loss)
        ratio = w * tl.where(over, 0.0, slope)
        low = flag((a < 0.0) & (r < c.clip_low))
        high = flag((a > 0.0) & (r > c.clip_high))
        dual = flag((a < 0.0) & ((r > c.dual_clip) | (r > c.delta)))
    return loss, direct, ratio, low, high, dual


@triton.jit
def policy_kl(x, c, ESTIMATOR: tl.constexpr, STRAIGHT: tl.constexpr):
    """The KL to the reference from x = logprob - ref: (loss term, its slope, k3 unclamped)."""
    z = clamp(x, c.kl_input_low, c.kl_input_high)
    _, _, k3 = exp_parts(-clamp(x, -BOUND, BOUND))
    value, slope = z, tl.full(x.shape, 1.0, tl.float32)
    if ESTIMATOR == K2:
        value, slope = 0.5 * z * z, z
    elif ESTIMATOR == ABS:
        value = tl.abs(z)
        slope = tl.where(z > 0.0, 1.0, tl.where(z < 0.0, -1.0, z))
    elif ESTIMATOR == K3:
        _, m1, value = exp_parts(-clamp(z, -BOUND, BOUND))
        slope = within(z, -BOUND, BOUND, -m1)
    slope = within(x, c.kl_input_low, c.kl_input_high, slope)
    slope = within(value, -c.kl_value_clamp, c.kl_value_clamp, slope)
    value = clamp(value, -c.kl_value_clamp, c.kl_value_clamp)
    if STRAIGHT:
        # The gradient of k2, as if without both clamps.
        slope = x
    return value, slope, k3


@triton.jit
def weigh_kl(kl, kl_slope, r, c, WEIGHT: tl.constexpr, CAPPED: tl.constexpr):
    """Value and slope of a KL term times its weight; the weight's slopes, by log r and directly."""
    through, direct = tl.zeros_like(kl), tl.zeros_like(kl)
    if WEIGHT == ONE_KL_WEIGHT:
        direct = kl
    elif WEIGHT != NO_KL_WEIGHT:
        w = r
        if CAPPED:
            w = tl.where(r > c.kl_weight_max, c.kl_weight_max, r)
        kl, kl_slope = kl * w, kl_slope * w
        if WEIGHT == RATIO_KL_WEIGHT:
            through = kl
            if CAPPED:
                through = tl.where(r > c.kl_weight_max, 0.0, kl)
    return kl, kl_slope, through, direct


@triton.jit
def value_term(value, old, target, clip_range, CLIPPED: tl.constexpr):
    """Half the squared error, its slope, and 1 where the error of the clipped value is larger."""
    error = value - target
    square = error * error
    slope, wins = error, tl.zeros_like(error)
    if CLIPPED:
        other = clamp(value, old - clip_range, old + clip_range) - target
        larger = other * other > square
        square = tl.where(larger, other * other, square)
        slope = tl.where(larger, 0.0, error)
        wins = flag(larger)
    return 0.5 * square, slope, wins
