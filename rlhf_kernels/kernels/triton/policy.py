"""policy_loss: one read of every token gives its terms, their gradient and the partial sums.

The gradient lacks its common factor 1 / divisor, which is known only after the last token;
`loss_backward` multiplies by it and by the upstream gradient. Launches:

    statistics  sums of each sequence, if a ratio, a correction or the aggregation needs them
    policy      the sweep: gradient and partial sums of each tile
    pooled      adds the slope of a sequence's ratio to the gradient of its tokens (GSPO)
    combine     partial sums in order, without atomics: loss, metrics and scale

That is two launches for token-level losses, three with sequence sums, four if the gradient passes
through a sequence's ratio. The backward pass is one launch.
"""

import triton
import triton.language as tl
from torch import Tensor

from ...config.metrics import POLICY_METRICS
from .. import losses
from ..rows import LossResults, PolicyTokens
from . import _tokens as t
from ._launch import kernel, launch
from ._math import scalar
from ._strided import Strided, strided
from ._tokens import (
    DISTANCE,
    LOG_RATIO,
    LOG_WEIGHT,
    TOKENS,
    column_sums,
    inverse,
    join8,
    load_kept,
    own_tile,
    sequence_total,
    token_index,
)
from .policy_backward import scale_into
from .policy_combine import (
    FIRST,
    GATES,
    R_MAX,
    R_MIN,
    ROWS,
    SLOPE,
    SUMS,
    TILE_INDEX,
    combine_kernel,
)
from .policy_math import (
    ABSENT,
    CLIPPED_SEQUENCE_RATIO,
    GEOMETRIC_CORRECTION,
    NO_CORRECTION,
    NO_GATE,
    NO_KL_WEIGHT,
    ONE_KL_WEIGHT,
    OPSM_GATE,
    PENALTY,
    RATIO_KL_WEIGHT,
    ROLLOUT_ANCHOR,
    SEQ_MEAN_TOKEN_MEAN,
    SEQUENCE_CORRECTION,
    SEQUENCE_RATIO,
    SEQUENCE_TOKEN_RATIO,
    TOKEN_RATIO,
    clamp,
    correction_weight,
    flag,
    log_weight,
    policy_gate,
    policy_kl,
    policy_objective,
    policy_ratio,
    unclipped,
    weigh_kl,
    within,
)

# Two blocks a multiprocessor, which keep enough loads in flight. With more, some options spill.
REGISTERS = 128


@triton.jit
def sequence_log_weight(partials, slots, k, length, CORRECTION: tl.constexpr, TILE: tl.constexpr):
    """The logarithm of the weight of a tile's sequence: a sum over its tokens, or their mean."""
    total = sequence_total(partials + LOG_WEIGHT * slots, k, length, TILE)
    if CORRECTION == GEOMETRIC_CORRECTION:
        n = sequence_total(partials + TOKENS * slots, k, length, TILE)
        total *= inverse(tl.where(n > 1.0, n, 1.0))
    return total.to(tl.float32)


@triton.jit
def sequence_distance(partials, slots, k, length, TILE: tl.constexpr):
    """The mean of anchor - logprob over the tokens of a tile's sequence, as a gate takes it."""
    away = sequence_total(partials + DISTANCE * slots, k, length, TILE)
    n = sequence_total(partials + TOKENS * slots, k, length, TILE)
    return (away * inverse(tl.where(n > 1.0, n, 1.0))).to(tl.float32)


@kernel
def policy_kernel(
    batch,
    mask,
    logprobs,
    old,
    advantages,
    ref,
    rollout,
    entropy,
    weights,
    grad,
    grad_entropy,
    partials,
    c,
    OBJECTIVE: tl.constexpr,
    LEVEL: tl.constexpr,
    ESTIMATOR: tl.constexpr,
    STRAIGHT: tl.constexpr,
    KL_WEIGHT: tl.constexpr,
    KL_CAPPED: tl.constexpr,
    CORRECTION: tl.constexpr,
    MODE: tl.constexpr,
    GATE: tl.constexpr,
    ANCHOR: tl.constexpr,
    TWO_SIDED: tl.constexpr,
    SEQUENCE_MEAN: tl.constexpr,
    TILE: tl.constexpr,
):
    """Gradient (without 1 / divisor) and partial sums of one tile. c: PolicyParams."""
    pid, slots = tl.program_id(0), tl.num_programs(0)
    s, k, length, at, i, inside, kept = own_tile(batch, mask, TILE)
    logprob = load_kept(logprobs, s, at, i, kept)
    before = load_kept(old, s, at, i, kept)
    a = load_kept(advantages, s, at, i, kept)
    zero = tl.zeros_like(a)
    x = logprob - before
    r, rm1, k3 = policy_ratio(x, c)
    ratio_k3 = k3
    weight = scalar(1.0)
    learns = tl.full((), 1, tl.int1)
    if SEQUENCE_MEAN or LEVEL != TOKEN_RATIO:
        tokens = sequence_total(partials + TOKENS * slots, k, length, TILE)
        each = inverse(tl.where(tokens > 1.0, tokens, 1.0))
        if SEQUENCE_MEAN:
            weight = each.to(tl.float32)
        if LEVEL != TOKEN_RATIO:
            # All tokens have the ratio of their sequence.
            total = sequence_total(partials + LOG_RATIO * slots, k, length, TILE)
            mean = (total * each).to(tl.float32)
            r, rm1, ratio_k3 = policy_ratio(zero + mean, c)
            learns = within(mean, c.log_ratio_low, c.log_ratio_high, 1.0) != 0.0
    w, w_sum = zero + 1.0, tl.where(kept, 1.0, 0.0)
    if rollout is not None:
        sampled = load_kept(rollout, s, at, i, kept)
        log_w = log_weight(before, sampled)
        if CORRECTION == SEQUENCE_CORRECTION or CORRECTION == GEOMETRIC_CORRECTION:
            log_w = zero + sequence_log_weight(partials, slots, k, length, CORRECTION, TILE)
        correction = correction_weight(log_w, c, MODE)
        w_sum = tl.where(kept, correction, 0.0)
        if CORRECTION != NO_CORRECTION:
            w = correction
    of_objective = logprob
    if GATE != NO_GATE:
        if GATE == OPSM_GATE:
            distance = zero + sequence_distance(partials, slots, k, length, TILE)
            below, above = (a < 0.0) & (distance > c.gate_low), zero > 0.0
        else:
            anchor = before
            if ANCHOR == ROLLOUT_ANCHOR:
                anchor = load_kept(rollout, s, at, i, kept)
                anchor = tl.where(anchor == anchor, anchor, before)
            below, above = policy_gate(logprob, anchor, a, c, GATE, TWO_SIDED)
        dropped = below | above
        w = tl.where(dropped, 0.0, w)
        # 0 times the logarithm of 0 would be NaN.
        of_objective = tl.where(dropped, 0.0, logprob)
        gates = tl.join(flag(below & kept), flag(above & kept))
        gates = column_sums(gates, TILE, 2)
        place = tl.arange(0, 2)
        tl.store(partials + (GATES + place) * slots + pid, gates)
    loss, direct, slope, low, high, dual = policy_objective(
        r, rm1, ratio_k3, of_objective, a, w, c, OBJECTIVE
    )
    if OBJECTIVE == PENALTY and LEVEL != TOKEN_RATIO:
        # Only these terms can be nonzero at masked tokens, whose inputs are 0.
        loss, slope = tl.where(kept, loss, 0.0), tl.where(kept, slope, 0.0)
    kl, x_ref, k3_ref = zero, zero, zero
    if ref is not None:
        x_ref = logprob - load_kept(ref, s, at, i, kept)
        kl, kl_slope, k3_ref = policy_kl(x_ref, c, ESTIMATOR, STRAIGHT)
        if KL_WEIGHT != NO_KL_WEIGHT:
            kl, kl_slope, through, added = weigh_kl(kl, kl_slope, r, c, KL_WEIGHT, KL_CAPPED)
        # With coefficient 0 the KL is only a metric; 0 * NaN would be NaN.
        if c.kl_coef != 0.0:
            if KL_WEIGHT == RATIO_KL_WEIGHT:
                slope += c.kl_coef * through
            if KL_WEIGHT == ONE_KL_WEIGHT:
                kl_slope += added
            direct += c.kl_coef * kl_slope
    h = zero
    if entropy is not None:
        h = load_kept(entropy, s, at, i, kept)
    weighted_h = h
    share = weight
    if weights is not None:
        own = load_kept(weights, s, at, i, kept)
        own = tl.where((own >= 0.0) & (own < float("inf")), own, float("nan"))
        loss, kl, slope = loss * own, kl * own, slope * own
        weighted_h, direct, share = h * own, direct * own, weight * own
    if LEVEL == TOKEN_RATIO:
        slope = within(x, c.log_ratio_low, c.log_ratio_high, slope)
    to = token_index(batch, s, at)
    if grad is not None:
        g = direct
        if LEVEL == TOKEN_RATIO:
            g += slope
        elif LEVEL == SEQUENCE_TOKEN_RATIO:
            g += tl.where(learns, slope, 0.0)
        tl.store(grad + to + i, tl.where(kept, g * weight, 0.0), mask=inside)
    if grad_entropy is not None:
        g = -c.entropy_coef * share
        tl.store(grad_entropy + to + i, tl.where(kept, g, 0.0), mask=inside)
    if LEVEL == CLIPPED_SEQUENCE_RATIO:
        # An infinite log-ratio is not beyond a bound that is absent.
        bounded = clamp(x, -ABSENT, ABSENT)
        low = flag((a < 0.0) & (bounded < c.clip_low))
        high = flag((a > 0.0) & (bounded > c.clip_high))
    r_kept = tl.where(kept, r, 0.0)
    low, high = tl.where(kept, low, 0.0), tl.where(kept, high, 0.0)
    count = tl.where(kept, 1.0, 0.0)
    # Those of policy_combine._SUMS, the even ones and the odd ones.
    even = join8(loss, weighted_h, high, r_kept, x, x_ref, h, count)
    odd = join8(kl, low, dual, r_kept * r, k3, k3_ref, w_sum, slope)
    sums = column_sums(tl.join(even, odd), TILE, SUMS)
    column = tl.arange(0, SUMS)
    sums *= tl.where(column < 3, weight, 1.0)
    tl.store(partials + (FIRST + column) * slots + pid, sums)
    # Minimum and maximum may skip a NaN, but the sum of r does not.
    tl.store(partials + R_MIN * slots + pid, tl.min(tl.where(kept, r, 3.0e38), axis=0))
    tl.store(partials + R_MAX * slots + pid, tl.max(tl.where(kept, r, -3.0e38), axis=0))
    tl.store(partials + TILE_INDEX * slots + pid, k.to(tl.float32))


@kernel
def pooled_kernel(
    batch,
    mask,
    grad,
    partials,
    logprobs,
    old,
    advantages,
    c,
    SEQUENCE_MEAN: tl.constexpr,
    TILE: tl.constexpr,
):
    """Adds to each unmasked token its share of the slope of its sequence's ratio.

    `advantages` are given where the ratio clips tokens, which then get none.
    """
    slots = tl.num_programs(0)
    s, k, length, at, i, _, kept = own_tile(batch, mask, TILE)
    tokens = sequence_total(partials + TOKENS * slots, k, length, TILE)
    each = inverse(tl.where(tokens > 1.0, tokens, 1.0))
    mean = sequence_total(partials + LOG_RATIO * slots, k, length, TILE) * each
    share = sequence_total(partials + SLOPE * slots, k, length, TILE) * each
    if SEQUENCE_MEAN:
        share *= each
    share = share.to(tl.float32)
    share = within(mean.to(tl.float32), c.log_ratio_low, c.log_ratio_high, share)
    if advantages is not None:
        x = load_kept(logprobs, s, at, i, kept) - load_kept(old, s, at, i, kept)
        a = load_kept(advantages, s, at, i, kept)
        share = tl.where(unclipped(x, a, c.clip_low, c.clip_high), share, 0.0)
    to = grad + token_index(batch, s, at + i)
    tl.store(to, tl.load(to, mask=kept, other=0.0) + share, mask=kept)


def policy_loss(given: PolicyTokens, grad: bool, entropy_grad: bool) -> LossResults:
    logprobs, codes, c, cu_seqlens = given.logprobs, given.codes, given.params, given.cu_seqlens
    divisor = given.normalizer, given.divisor
    sweep = t.begin("policy_loss", logprobs, cu_seqlens, *divisor, len(POLICY_METRICS), ROWS)
    batch, slots, partials, loss, metrics, scale, *_ = sweep
    gradient = losses.gradient(logprobs, grad)
    entropy_gradient = losses.gradient(logprobs, entropy_grad)
    losses.check_weights("policy_loss", given.weights, given.mask, cu_seqlens)

    def spread(x: Tensor | None) -> Strided | None:
        if x is None or x.shape == logprobs.shape:
            return strided(x)
        return t.per_sequence(x)

    kept, ratios = strided(given.mask), (strided(logprobs), strided(given.old_logprobs))
    sampled = strided(given.rollout_logprobs)
    clips = codes.ratio_level == CLIPPED_SEQUENCE_RATIO.value
    pooled = clips or codes.ratio_level == SEQUENCE_RATIO.value
    gains = spread(given.advantages)
    clipping = gains if clips else None
    by_sequence = codes.ratio_level != TOKEN_RATIO.value
    by_weight = codes.correction_level >= SEQUENCE_CORRECTION.value
    sequence_mean = codes.aggregation == SEQ_MEAN_TOKEN_MEAN.value
    tile = {"TILE": t.TILE, "warps": t.WARPS}
    by_distance = codes.gate == OPSM_GATE.value
    if by_sequence or by_weight or by_distance or sequence_mean:
        against = by_distance and codes.gate_against == ROLLOUT_ANCHOR.value
        sums = {"RATIO": by_sequence, "WEIGHT": by_weight}
        sums |= {"GATED": by_distance, "AGAINST_ROLLOUT": against}
        tensors = (kept, *ratios, sampled, clipping, partials)
        bounds = (c.clip_low, c.clip_high)
        launch(t.statistics_kernel, slots, loss, batch, *tensors, *bounds, **sums, **tile)
    launch(
        policy_kernel,
        slots,
        loss,
        batch,
        kept,
        *ratios,
        gains,
        strided(given.ref_logprobs),
        sampled,
        strided(given.entropy),
        spread(given.weights),
        gradient,
        entropy_gradient,
        partials,
        c,
        OBJECTIVE=codes.objective,
        LEVEL=codes.ratio_level,
        ESTIMATOR=codes.kl_estimator,
        STRAIGHT=codes.kl_straight_through,
        KL_WEIGHT=codes.kl_weight,
        KL_CAPPED=codes.kl_weight_capped,
        CORRECTION=codes.correction_level,
        MODE=codes.correction_mode,
        GATE=codes.gate,
        ANCHOR=codes.gate_against,
        TWO_SIDED=codes.gate_two_sided,
        SEQUENCE_MEAN=sequence_mean,
        registers=REGISTERS,
        **tile,
    )
    if pooled and grad:
        read = (*ratios, clipping) if clips else (None, None, None)
        slopes = (batch, kept, gradient, partials, *read, c)
        launch(pooled_kernel, slots, loss, *slopes, SEQUENCE_MEAN=sequence_mean, **tile)
    has = {"ROLLOUT": sampled is not None, "GATED": codes.gate != NO_GATE.value}
    sweep.combine(combine_kernel, codes.aggregation, c.kl_coef, c.entropy_coef, **has)
    return LossResults(loss, metrics, gradient, entropy_gradient, scale)


LAUNCHERS: losses.Launchers = {
    "policy_loss": policy_loss,
    "loss_backward": losses.backward_launcher(scale_into),
}
