"""Shared by the losses over tokens: tiles of sequences, ordered sums over tiles, the normalizer.

Sequences are cut into tiles from their start, so the arithmetic of a token does not depend on the
place of its sequence, padded or packed. Each tile has a slot for its partial sums. Tile k of
sequence s has slot s * tiles + k if padded, and slot offsets[s] // TILE + s + k if packed. Packed
slots increase with s, and their number is known without reading the offsets on the host; some
slots stay empty.

Sums are fp32 within a tile, by pairs at fixed distances, and fp64 over the slots, in order.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import losses
from ._launch import INTERPRETED, kernel, launch, tile_count
from ._math import tree_sum
from ._strided import Strided, strided
from .policy_math import (
    SEQ_MEAN_TOKEN_MEAN,
    SEQ_MEAN_TOKEN_SUM,
    clipped_log_ratio,
    log_weight,
)

# Tokens per program, 4 per thread.
TILE = 1024
WARPS = 8
# Rows of the scratch [rows, slots] that statistics_kernel writes; they come first.
TOKENS, LOG_RATIO, LOG_WEIGHT, DISTANCE = (tl.constexpr(i) for i in range(4))
# Aggregations whose implied divisor is the number of sequences with an unmasked token.
SEQUENCE_COUNTS = (SEQ_MEAN_TOKEN_MEAN.value, SEQ_MEAN_TOKEN_SUM.value)
# Slots that the combining program takes at a time. Few in the interpreter, which scans element by
# element, and where small tests must cover several groups.
GROUP = 16 if INTERPRETED else 256
# Groups whose loads are in flight together: the single program must hide their latency itself.
UNROLL = tl.constexpr(1 if INTERPRETED else 2)
COMBINE_WARPS = 8
# Slots of one sequence that a program takes at a time.
SEQUENCE_GROUP = tl.constexpr(4 if INTERPRETED else 128)
# Threads per program. A block is first folded to this width, within registers of a thread.
FOLDED = tl.constexpr(256)
# (offsets, sequences, cols) of a packed batch [cols], or (None, sequences, cols) of a padded one.
Batch = tuple[Tensor | None, int, int]


def slot_count(shape: torch.Size, cu_seqlens: Tensor | None) -> int:
    """The number of slots of a batch [B, T], or [N] with cu_seqlens."""
    if cu_seqlens is None:
        return shape[0] * tile_count(shape[1], TILE)
    return shape[0] // TILE + cu_seqlens.shape[0] - 1


def batch_of(shape: torch.Size, cu_seqlens: Tensor | None) -> Batch:
    """The sequences of a batch [B, T], or [N] with cu_seqlens, as kernels take them."""
    offsets = None if cu_seqlens is None else cu_seqlens.contiguous()
    return offsets, *losses.sequences(shape, cu_seqlens)


class Sweep(NamedTuple):
    """Shapes, memory and divisor that the launches of one call of a loss share.

    partials: scratch [rows, slots], the statistics first.
    loss, metrics, scale: results, uninitialised.
    divisor: the number to divide by, or 0 to read the normalizer, or to count without one.
    """

    batch: Batch
    slots: int
    partials: Tensor
    loss: Tensor
    metrics: Tensor
    scale: Tensor | None
    divisor: float
    normalizer: Tensor | None

    def combine(
        self, kernel: Any, aggregation: int, *coefficients: float, **constants: bool
    ) -> None:
        """Launches `kernel` in a single program: results from the partial sums of all slots."""
        counted = self.normalizer is None and self.divisor == 0.0
        launch(
            kernel,
            1,
            self.loss,
            self.batch,
            self.normalizer,
            self.partials,
            self.loss,
            self.metrics,
            self.scale,
            self.slots,
            self.divisor,
            *coefficients,
            COUNT_SEQUENCES=counted and aggregation in SEQUENCE_COUNTS,
            GROUP=GROUP,
            warps=COMBINE_WARPS,
            **constants,
        )


def begin(
    op: str,
    like: Tensor,
    cu_seqlens: Tensor | None,
    normalizer: Tensor | None,
    divisor: float,
    metrics: int,
    rows: int,
) -> Sweep:
    """Checks what the host may read, and allocates; `like` are the tokens [B, T] or [N]."""
    losses.check_offsets(op, cu_seqlens, like.shape[0])
    divisor, normalizer = losses.divisor_on_device(op, like, normalizer, divisor)
    batch, slots = batch_of(like.shape, cu_seqlens), slot_count(like.shape, cu_seqlens)
    results = losses.results(like, metrics, deferred=True)
    partials = results[0].new_empty(rows * slots)
    return Sweep(batch, slots, partials, *results, divisor, normalizer)


def per_sequence(t: Tensor) -> Strided:
    """A tensor over sequences [B] as one over tokens: its values repeat along the sequences."""
    tensor, _, stride = strided(t)
    return tensor, stride, 0


@triton.jit
def slot_tile(batch, TILE: tl.constexpr):
    """(s, k, begin, length): this program has tile k of sequence s.

    The sequence has `length` tokens from `begin`. Even with bad offsets, begin and begin + length
    are in [0, cols].
    """
    pid = tl.program_id(0)
    offsets, sequences, cols = batch
    if offsets is not None:
        # The last sequence whose first slot is not after this one.
        s = tl.full((), 0, tl.int32)
        last = tl.full((), 0, tl.int32) + sequences - 1
        while s < last:
            middle = (s + last + 1) // 2
            before = tl.load(offsets + middle) // TILE + middle <= pid
            s = tl.where(before, middle, s)
            last = tl.where(before, last, middle - 1)
        begin = tl.load(offsets + s).to(tl.int64)
        # Masked, since this entry does not exist without sequences.
        end = tl.load(offsets + s + 1, mask=s < sequences, other=0).to(tl.int64)
        begin = tl.minimum(tl.maximum(begin, 0), cols)
        length = tl.maximum(tl.minimum(end, cols) - begin, 0)
        k = (pid - (begin // TILE + s)).to(tl.int32)
    else:
        tiles = (cols - 1) // TILE + 1
        s, k = pid // tiles, pid % tiles
        begin = tl.full((), 0, tl.int64)
        length = begin + cols
    return s, k, begin, length


@triton.jit
def token_index(batch, s, i):
    """The position in a contiguous tensor of token i, counted as for `load_tile`, of sequence s."""
    offsets, _, cols = batch
    if offsets is None:
        i += s.to(tl.int64) * cols
    return i


@triton.jit
def load_tile(x, s, first, i, inside):
    """The entries of the tile at token `first` of sequence s, 0 outside."""
    pointer, stride0, stride1 = x
    at = pointer + s.to(tl.int64) * stride0 + first * stride1
    return tl.load(at + i.to(tl.int64) * stride1, mask=inside, other=0)


@triton.jit
def tile_tokens(batch, TILE: tl.constexpr):
    """The tile of this program: (s, k, length, at, i, inside).

    It is tile k of sequence s, which has `length` tokens, and starts at token `at`, counted as for
    `load_tile`. Blocks [TILE]: the index of each token within the tile, whether the sequence has
    that token.
    """
    s, k, begin, length = slot_tile(batch, TILE)
    i = tl.arange(0, TILE)
    left = tl.where(k >= 0, length - k.to(tl.int64) * TILE, 0)
    inside = i < tl.minimum(left, TILE).to(tl.int32)
    return s, k, length, begin + k.to(tl.int64) * TILE, i, inside


@triton.jit
def own_tile(batch, mask, TILE: tl.constexpr):
    """`tile_tokens`, and behind these the block [TILE] of whether a token is unmasked."""
    s, k, length, at, i, inside = tile_tokens(batch, TILE)
    return s, k, length, at, i, inside, load_tile(mask, s, at, i, inside) != 0


@triton.jit
def load_kept(x, s, first, i, kept):
    """The entries of one tile in fp32. Masked entries are not read and are 0."""
    return load_tile(x, s, first, i, kept).to(tl.float32)


@triton.jit
def join4(a, b, c, d):
    """Four blocks [N] joined to [N, 2, 2]; block number = 2 * second index + last index."""
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def join8(a, b, c, d, e, f, g, h):
    """Eight blocks [N] joined to [N, 2, 2, 2]."""
    return tl.join(join4(a, c, e, g), join4(b, d, f, h))


@triton.jit
def column_sums(x, N: tl.constexpr, COLUMNS: tl.constexpr):
    """The sums of joined blocks [N], as a block [COLUMNS], by one reduction for all."""
    x = tl.reshape(x, (N, COLUMNS))
    # Distant elements first, which are in registers of one thread; then neighbours.
    for _ in tl.static_range(4):
        if x.shape[0] > FOLDED:
            x = tl.sum(tl.reshape(x, (2, x.shape[0] // 2, COLUMNS)), axis=0)
    for _ in tl.static_range(8):
        if x.shape[0] > 1:
            x = tl.sum(tl.reshape(x, (x.shape[0] // 2, 2, COLUMNS)), axis=1)
    return tl.reshape(x, (COLUMNS,))


@triton.jit
def pick(x, i, N: tl.constexpr):
    """Element i of a block [N], exactly."""
    return tl.sum(tl.where(tl.arange(0, N) == i, x, 0.0), axis=0)


@triton.jit
def inverse(n):
    """1 / n for fp64 n in [1, 2^100]. An fp64 division would be a call that spills registers."""
    x = (1.0 / n.to(tl.float32)).to(tl.float64)
    # Each Newton step doubles the number of right digits.
    x *= 2.0 - n * x
    return x * (2.0 - n * x)


@triton.jit
def sequence_total(x, k, length, TILE: tl.constexpr):
    """The fp64 sum of x [slots] over the slots of this program's sequence, in order.

    The program has tile k of it; it has `length` tokens.
    """
    first, tiles = tl.program_id(0) - k, ((length - 1) // TILE + 1).to(tl.int32)
    total = tl.zeros((SEQUENCE_GROUP,), tl.float64)
    for start in range(0, tiles, SEQUENCE_GROUP):
        j = start + tl.arange(0, SEQUENCE_GROUP)
        total += tl.load(x + first + j, mask=j < tiles, other=0.0).to(tl.float64)
    return tree_sum(total, SEQUENCE_GROUP)


@triton.jit
def bad_offsets(batch, GROUP: tl.constexpr):
    """1 unless cu_seqlens starts at 0, never decreases and ends at cols, else 0."""
    offsets, sequences, cols = batch
    bad = tl.zeros((GROUP,), tl.int32)
    for start in range(0, sequences + 1, GROUP):
        i = start + tl.arange(0, GROUP)
        inside = i <= sequences
        entry = tl.load(offsets + i, mask=inside, other=0)
        low = tl.load(offsets + i - 1, mask=inside & (i > 0), other=0)
        high = tl.where(i > 0, cols, 0)
        wrong = (entry < low) | (entry > high) | ((i == sequences) & (entry != cols))
        bad = tl.where(inside & wrong, 1, bad)
    return tl.max(bad, axis=0)


@triton.jit
def later(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def opening_slots(tokens, tile, slot, slots, before):
    """(1 at each slot that is the first with a token in its sequence, last slot with a token).

    Args:
        tokens, tile: fp32, of every slot: its number of tokens, and its tile number in the
            sequence.
        slot: a block of consecutive slots.
        slots: the number of slots.
        before: the last slot with a token before the block, or -1.
    """
    inside = slot < slots
    some = tl.load(tokens + slot, mask=inside, other=0.0) > 0.0
    k = tl.load(tile + slot, mask=inside, other=0.0).to(tl.int32)
    previous = tl.load(tokens + slot - 1, mask=inside & (slot > 0), other=0.0) > 0.0
    last = tl.associative_scan(tl.where(previous, slot - 1, -1), 0, later)
    opens = some & (later(last, before) < slot - k)
    return tl.where(opens, 1, 0), later(before, tl.max(tl.where(some, slot, -1), axis=0))


@triton.jit
def loss_scale(batch, normalizer, divisor, count, GROUP: tl.constexpr):
    """1 / divisor in fp64: the given divisor, else `count`, at least 1.

    NaN for a bad divisor and bad offsets.
    """
    d = tl.full((), 0.0, tl.float64) + divisor
    if normalizer is not None:
        d = tl.load(normalizer).to(tl.float64)
    else:
        d = tl.where(d == 0.0, tl.where(count > 1.0, count, 1.0), d)
    good = (d > 0.0) & (d < float("inf"))
    factor = tl.where(good, 1.0 / d, float("nan"))
    offsets, _, _ = batch
    if offsets is not None:
        factor = tl.where(bad_offsets(batch, GROUP) == 0, factor, float("nan"))
    return factor


@kernel
def statistics_kernel(
    batch,
    mask,
    logprobs,
    old,
    rollout,
    advantages,
    partials,
    clip_low,
    clip_high,
    RATIO: tl.constexpr,
    WEIGHT: tl.constexpr,
    GATED: tl.constexpr,
    AGAINST_ROLLOUT: tl.constexpr,
    TILE: tl.constexpr,
):
    """Per slot: number of unmasked tokens, and their sums of logprob - old and of log_weight.

    GATED: also how far a gate by sequences finds them from its anchor. `advantages` are given where
    the ratio of a sequence clips its tokens.
    """
    pid, slots = tl.program_id(0), tl.num_programs(0)
    s, _, _, at, i, _, kept = own_tile(batch, mask, TILE)
    count = tl.where(kept, 1.0, 0.0)
    ratio, weight, distance = tl.zeros_like(count), tl.zeros_like(count), tl.zeros_like(count)
    if RATIO or WEIGHT or GATED:
        before = load_kept(old, s, at, i, kept)
        anchor = before
        if WEIGHT or AGAINST_ROLLOUT:
            sampled = load_kept(rollout, s, at, i, kept)
            if WEIGHT:
                weight = log_weight(before, sampled)
            if AGAINST_ROLLOUT:
                anchor = tl.where(sampled == sampled, sampled, before)
        if RATIO or GATED:
            now = load_kept(logprobs, s, at, i, kept)
            if RATIO:
                ratio = now - before
                if advantages is not None:
                    a = load_kept(advantages, s, at, i, kept)
                    ratio = clipped_log_ratio(ratio, a, clip_low, clip_high)
            if GATED:
                distance = log_weight(anchor, now)
    sums = column_sums(join4(count, ratio, weight, distance), TILE, 4)
    tl.store(partials + (TOKENS + tl.arange(0, 4)) * slots + pid, sums)
