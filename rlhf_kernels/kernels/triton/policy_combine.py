"""policy_loss: the partial sums of its tiles, and what becomes of them."""

import triton.language as tl

from ...config.metrics import POLICY_METRICS
from ._launch import kernel
from ._math import scalar
from ._tokens import UNROLL, column_sums, inverse, loss_scale, opening_slots, pick

# Positions of the metrics that a kernel stores; of consecutive metrics only the first.
_slot = POLICY_METRICS.index
LOSS, PG_LOSS = tl.constexpr(_slot("loss")), tl.constexpr(_slot("pg_loss"))
KL_LOSS, ENTROPY_LOSS = tl.constexpr(_slot("kl_loss")), tl.constexpr(_slot("entropy_loss"))
CLIP_FRACTIONS = tl.constexpr(_slot("clip_frac_low"))
GATE_FRACTIONS = tl.constexpr(_slot("gate_frac_low"))
RATIO_MEAN = tl.constexpr(_slot("ratio_mean"))
RATIO_MIN, RATIO_MAX = tl.constexpr(_slot("ratio_min")), tl.constexpr(_slot("ratio_max"))
K1_OLD, OTHER_MEANS = tl.constexpr(_slot("k1_old")), tl.constexpr(_slot("k3_old"))
ESS, CORRECTION_MEAN = tl.constexpr(_slot("ess")), tl.constexpr(_slot("correction_mean"))
TOKEN_COUNT = tl.constexpr(_slot("tokens"))
# Rows of the scratch [ROWS, slots] after the statistics: the sums of policy_kernel, and the tile
# number of each slot in its sequence.
_SUMS = (
    *("pg", "kl", "entropy_bonus", "clip_low", "clip_high", "dual_clip", "ratio", "ratio_square"),
    *("log_ratio", "k3", "ref_log_ratio", "ref_k3", "entropy", "weight", "tokens", "slope"),
)
_sum = _SUMS.index
SUMS = tl.constexpr(len(_SUMS))
S_PG, S_KL = tl.constexpr(_sum("pg")), tl.constexpr(_sum("kl"))
S_BONUS, S_CLIPPED = tl.constexpr(_sum("entropy_bonus")), tl.constexpr(_sum("clip_low"))
S_RATIO, S_RATIO_SQUARE = tl.constexpr(_sum("ratio")), tl.constexpr(_sum("ratio_square"))
# Those from k3 on are of metrics that follow one another.
S_LOG_RATIO, S_MEANS = tl.constexpr(_sum("log_ratio")), tl.constexpr(_sum("k3"))
S_WEIGHT, S_TOKENS = tl.constexpr(_sum("weight")), tl.constexpr(_sum("tokens"))
_STATISTICS = 4
FIRST = tl.constexpr(_STATISTICS)
COUNT = tl.constexpr(_STATISTICS + _sum("tokens"))
SLOPE = tl.constexpr(_STATISTICS + _sum("slope"))
_AFTER = _STATISTICS + len(_SUMS)
R_MIN, R_MAX, TILE_INDEX = (tl.constexpr(_AFTER + i) for i in range(3))
# The two sums of a gate.
GATES = tl.constexpr(_AFTER + 3)
ROWS = _AFTER + 5


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
    kl_coef,
    entropy_coef,
    COUNT_SEQUENCES: tl.constexpr,
    ROLLOUT: tl.constexpr,
    GATED: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Loss, metrics and 1 / divisor from the partial sums of all slots, in fp64."""
    column = tl.arange(0, SUMS)[None, :]
    total = tl.zeros((GROUP, SUMS), tl.float64)
    r_min = tl.full((GROUP,), 3.0e38, tl.float32)
    r_max = tl.full((GROUP,), -3.0e38, tl.float32)
    found = tl.zeros((GROUP,), tl.int32)
    last = tl.full((), -1, tl.int32)
    for start in range(0, slots, UNROLL * GROUP):
        for j in tl.static_range(UNROLL):
            slot = start + j * GROUP + tl.arange(0, GROUP)
            inside = slot < slots
            at = partials + (FIRST + column) * slots + slot[:, None]
            total += tl.load(at, mask=inside[:, None], other=0.0).to(tl.float64)
            low = tl.load(partials + R_MIN * slots + slot, mask=inside, other=3.0e38)
            high = tl.load(partials + R_MAX * slots + slot, mask=inside, other=-3.0e38)
            r_min, r_max = tl.minimum(r_min, low), tl.maximum(r_max, high)
            if COUNT_SEQUENCES:
                opens, last = opening_slots(
                    partials + COUNT * slots, partials + TILE_INDEX * slots, slot, slots, last
                )
                found += opens
    gates = tl.zeros((GROUP, 2), tl.float64)
    if GATED:
        place = tl.arange(0, 2)[None, :]
        for start in range(0, slots, GROUP):
            slot = start + tl.arange(0, GROUP)[:, None]
            at = partials + (GATES + place) * slots + slot
            gates += tl.load(at, mask=slot < slots, other=0.0).to(tl.float64)
    gates = column_sums(gates, GROUP, 2)
    sums = column_sums(total, GROUP, SUMS)
    tokens = pick(sums, S_TOKENS, SUMS)
    count = tokens
    if COUNT_SEQUENCES:
        count = tl.sum(found, axis=0).to(tl.float64)
    factor = loss_scale(batch, normalizer, divisor, count, GROUP)
    tl.store(scale, factor.to(tl.float32))
    # NaN if the factor is NaN, else 0.
    fault = factor - factor
    n = tl.where(tokens > 1.0, tokens, 1.0)
    share = inverse(n)
    some = tokens > 0.0
    pg, kl = pick(sums, S_PG, SUMS) * factor, pick(sums, S_KL, SUMS) * factor
    bonus = pick(sums, S_BONUS, SUMS) * factor
    value = pg
    # A term with coefficient 0 is skipped, since it may be infinite.
    value += tl.where(kl_coef != 0.0, scalar(kl_coef).to(tl.float64) * kl, 0.0)
    value -= tl.where(entropy_coef != 0.0, scalar(entropy_coef).to(tl.float64) * bonus, 0.0)
    r, rr = pick(sums, S_RATIO, SUMS), pick(sums, S_RATIO_SQUARE, SUMS)
    # Minimum and maximum may have skipped a NaN, but the sum has not.
    lost = (r - r).to(tl.float32)
    low, high = tl.min(r_min, axis=0) + lost, tl.max(r_max, axis=0) + lost
    w = tl.where(some, 1.0, 0.0).to(tl.float64)
    if ROLLOUT:
        w = pick(sums, S_WEIGHT, SUMS) * share
    tl.store(loss, value.to(tl.float32))
    tl.store(metrics + LOSS, value.to(tl.float32))
    tl.store(metrics + PG_LOSS, pg.to(tl.float32))
    tl.store(metrics + KL_LOSS, kl.to(tl.float32))
    tl.store(metrics + ENTROPY_LOSS, bonus.to(tl.float32))
    for j in tl.static_range(3):
        fraction = pick(sums, S_CLIPPED + j, SUMS) * share + fault
        tl.store(metrics + CLIP_FRACTIONS + j, fraction.to(tl.float32))
    for j in tl.static_range(2):
        fraction = pick(gates, j, 2) * share + fault
        tl.store(metrics + GATE_FRACTIONS + j, fraction.to(tl.float32))
    tl.store(metrics + RATIO_MEAN, (r * share + fault).to(tl.float32))
    tl.store(metrics + RATIO_MIN, tl.where(some, low, 0.0) + fault.to(tl.float32))
    tl.store(metrics + RATIO_MAX, tl.where(some, high, 0.0) + fault.to(tl.float32))
    tl.store(metrics + K1_OLD, (fault - pick(sums, S_LOG_RATIO, SUMS) * share).to(tl.float32))
    for j in tl.static_range(4):
        mean = pick(sums, S_MEANS + j, SUMS) * share + fault
        tl.store(metrics + OTHER_MEANS + j, mean.to(tl.float32))
    size = tl.where(some, r * r / tl.where(some, n * rr, 1.0), 0.0)
    tl.store(metrics + ESS, (size + fault).to(tl.float32))
    tl.store(metrics + CORRECTION_MEAN, (w + fault).to(tl.float32))
    tl.store(metrics + TOKEN_COUNT, (tokens + fault).to(tl.float32))
