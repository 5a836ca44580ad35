"""mismatch_weights: one read of every token gives its weight, what is kept and the tile's sums.

Launches tile_kernel, then judge_kernel, a single program that judges the sequences and makes the
metrics, and finish_kernel for what a sequence, the batch or bad offsets decide. The formulas are
those of csrc/mismatch_math.h.
"""

import triton
import triton.language as tl
from torch import Tensor

from .. import mismatch as shared
from . import _tokens as t
from ._launch import kernel, launch
from ._strided import strided
from ._tokens import (
    column_sums,
    join4,
    join8,
    load_kept,
    own_tile,
    tile_tokens,
    token_index,
)
from .mismatch_judge import JUDGED, judge_kernel
from .mismatch_math import (
    BOUND,
    ENDS,
    S_K3,
    S_LOW,
    SUMS,
    TOKEN,
    bounded_weight,
    exp_whole,
    is_outside,
)
from .policy_math import ABSENT, clamp, flag

# Rows of the scratch [ROWS, slots].
ROWS = SUMS.value + ENDS.value


@triton.jit
def least_of(x, inside):
    """The smallest, ABSENT without any; a NaN is skipped."""
    return tl.min(tl.where(inside & (x == x), x, ABSENT), axis=0)


@triton.jit
def most_of(x, inside):
    return tl.max(tl.where(inside & (x == x), x, -ABSENT), axis=0)


@kernel
def tile_kernel(
    batch,
    mask,
    old,
    rollout,
    weights,
    kept_out,
    partials,
    p,
    LEVEL: tl.constexpr,
    MODE: tl.constexpr,
    DROP: tl.constexpr,
    TILE: tl.constexpr,
):
    """What is kept of one tile, its weights if they are tokens', and its sums."""
    pid, slots = tl.program_id(0), tl.num_programs(0)
    s, _, _, at, i, inside, kept = own_tile(batch, mask, TILE)
    before = load_kept(old, s, at, i, kept)
    sampled = load_kept(rollout, s, at, i, kept)
    x = clamp(before - sampled, -BOUND, BOUND)
    missing = kept & (x != x) & (before == before)
    x = tl.where(missing, 0.0, x)
    sampled = tl.where(missing, before, sampled)
    lost = flag(missing)
    if DROP:
        kept = kept & ~missing
        before = tl.where(kept, before, 0.0)
        sampled = tl.where(kept, sampled, 0.0)
    near = clamp(x, -p.clamp, p.clamp)
    rejected = kept & is_outside(near, p.token_low, p.token_high)
    stays = kept & ~rejected
    to = token_index(batch, s, at + i)
    tl.store(kept_out + to, stays, mask=inside)
    out = partials + pid
    column = tl.arange(0, 8)
    half_square = 0.5 * near * near
    terms = join8(flag(kept), lost, flag(rejected), x, near, before, sampled, half_square)
    sums = column_sums(terms, TILE, 8)
    tl.store(out + column * slots, sums)
    # Behind the first sums, across which their blocks would have to be kept in registers.
    e, em1, em1mx = exp_whole(near)
    ratio = tl.where(kept, e, 0.0)
    w, off = tl.zeros_like(x), tl.zeros_like(x)
    low, high = w, w
    if LEVEL == TOKEN:
        w = tl.where(kept, bounded_weight(e, near, p, MODE), 0.0)
        off = tl.where(kept, w - 1.0, 0.0)
        low = flag(kept & (near < p.count_log_low))
        high = flag(kept & (near > p.count_log_high))
        tl.store(weights + to, tl.where(stays, w, 0.0), mask=inside)
    sums = column_sums(join8(em1mx, ratio, em1, em1 * em1, w, w * w, off, off * off), TILE, 8)
    tl.store(out + (S_K3 + column) * slots, sums)
    zero = tl.zeros_like(x)
    sums = column_sums(join4(low, high, zero, zero), TILE, 4)
    few = tl.arange(0, 4)
    tl.store(out + (S_LOW + few) * slots, sums, mask=few < 2)
    tl.store(out + SUMS * slots, least_of(near, kept))
    tl.store(out + (SUMS + 1) * slots, most_of(near, kept))
    tl.store(out + (SUMS + 2) * slots, least_of(w, kept))
    tl.store(out + (SUMS + 3) * slots, most_of(w, kept))


@kernel
def finish_kernel(batch, weights, kept_out, verdicts, LEVEL: tl.constexpr, TILE: tl.constexpr):
    """The weights that a sequence or the batch decides; NaN for all if the offsets are bad."""
    _, sequences, cols = batch
    if tl.load(verdicts + 2 * sequences + 1) != 0.0:
        # Sequences mean nothing: plain tiles.
        to = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
        tl.store(weights + to, tl.full((TILE,), float("nan"), tl.float32), mask=to < cols)
        tl.store(kept_out + to, tl.full((TILE,), 1, tl.int1), mask=to < cols)
    else:
        # Not `_`: that name has a value before, of another type.
        s, _k, _length, at, i, inside = tile_tokens(batch, TILE)
        to = token_index(batch, s, at + i)
        factor = tl.load(verdicts + 2 * sequences)
        there = s < sequences
        rejected = tl.load(verdicts + sequences + s, mask=there, other=0.0)
        kept = tl.load(kept_out + to, mask=inside, other=0) != 0
        if LEVEL == TOKEN:
            w = tl.load(weights + to, mask=inside, other=0.0)
        else:
            w = tl.where(kept, tl.load(verdicts + s, mask=there, other=0.0), 0.0)
        w = tl.where(rejected != 0.0, 0.0, w / factor)
        tl.store(weights + to, w, mask=inside)
        stays = tl.where(rejected != 0.0, 0.0, flag(kept)) != 0.0
        tl.store(kept_out + to, stays, mask=inside)


def _judge(
    old: Tensor,
    rollout: Tensor,
    mask: Tensor,
    cu_seqlens: Tensor | None,
    rules: shared.MismatchRules,
    weights: Tensor,
    kept: Tensor,
    metrics: Tensor,
) -> None:
    level, mode, drop, normalize, p = rules
    slots, batch = t.slot_count(old.shape, cu_seqlens), t.batch_of(old.shape, cu_seqlens)
    partials = weights.new_empty(ROWS * slots)
    verdicts = weights.new_empty(2 * batch[1] + 2)
    tile = {"TILE": t.TILE, "warps": t.WARPS}
    launch(
        tile_kernel,
        slots,
        weights,
        batch,
        strided(mask),
        strided(old),
        strided(rollout),
        weights,
        kept,
        partials,
        p,
        LEVEL=level,
        MODE=mode,
        DROP=drop,
        **tile,
    )
    launch(
        judge_kernel,
        1,
        weights,
        batch,
        partials,
        verdicts,
        metrics,
        slots,
        p,
        LEVEL=level,
        MODE=mode,
        NORMALIZE=normalize,
        GROUP=JUDGED,
        TILE=t.TILE,
        warps=4,
    )
    launch(finish_kernel, slots, weights, batch, weights, kept, verdicts, LEVEL=level, **tile)


LAUNCHERS: shared.Launchers = shared.launchers(_judge, on_device=True)
