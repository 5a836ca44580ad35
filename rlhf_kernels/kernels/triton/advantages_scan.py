"""Device functions of the reverse scans: which tile a program has, its steps, what lies behind it.

A step maps the advantage A' behind it to b + a A'. Steps that "carry" skips and places outside a
sequence are the identity, a = 1 and b = -0.0, which leaves every bit of what it meets. A step that
is done is a = CUT: nothing passes it, not even NaN, which a factor of 0 would let through.

A tile is scanned in blocks, from its end. The last step of a block looks at a value V and an
advantage A of steps that are not in the block. Its factor is left out, a = 1, and what it gets from
behind, x = decay A, is applied to all steps of the block when it is known. A tile as a whole maps
u = gamma V + x behind it, all that its last step gets, to the u ahead of it, p u + q.

Multiply-adds are spelled out where a compiler could contract them in two ways.
"""

import triton
import triton.language as tl

from ._math import exp_parts, scalar

CUT = tl.constexpr(-1.0)
# Numbers in a tile's aggregate: p, q, the value of its first step, whether a token of it is kept,
# and q if the sequence's score belongs to its last kept token.
FIELDS = tl.constexpr(5)


@triton.jit
def ahead(a_behind, b_behind, a, b):
    """The step (a, b) ahead of the composed steps behind it."""
    return a * a_behind, tl.fma(a, b_behind, b)


@triton.jit
def ahead_cut(a_behind, b_behind, a, b):
    """`ahead` where steps may be cut."""
    cut = a < 0.0
    composed = tl.where(cut | (a_behind < 0.0), CUT, a * a_behind)
    return composed, tl.where(cut, b, tl.fma(a, b_behind, b))


@triton.jit
def ahead_both(a_behind, b_behind, s_behind, a, b, s):
    """`ahead` for two b at once."""
    return a * a_behind, tl.fma(a, b_behind, b), tl.fma(a, s_behind, s)


@triton.jit
def nearer(behind, index):
    return tl.minimum(behind, index)


@triton.jit
def offset_at(offsets, s, total):
    """cu_seqlens[s], moved into [0, total]: bad offsets give bad numbers, not bad addresses."""
    return tl.minimum(tl.maximum(tl.load(offsets + s).to(tl.int64), 0), total)


@triton.jit
def packed_tile(slot, offsets, sequences, total, bits, TILE: tl.constexpr):
    """(sequence, k, first token, tokens left from it) of the tile k in `slot`; none left if empty.

    Tile k of sequence s is in slot offsets[s] // TILE + s + k. No two tiles share one: with
    offsets[s] = q TILE + r, sequence s + 1 starts floor((r + length) / TILE) + 1 slots after s,
    at least the ceil(length / TILE) that s has. So the first slots rise with s and can be
    searched, and total // TILE + sequences slots are enough.
    """
    low = tl.full((), 0, tl.int32)
    high = low + sequences
    for _ in range(bits):
        middle = (low + high) // 2
        before = offset_at(offsets, middle, total) // TILE + middle <= slot
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    start = offset_at(offsets, low, total)
    end = offset_at(offsets, low + 1, total)
    k = slot - (start // TILE + low)
    begin = start + k * TILE
    return low, k, begin, tl.where((k >= 0) & (begin < end), end - begin, 0)


@triton.jit
def locate(
    slot, offsets, cols, tiles, sequences, bits, PACKED: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """(sequence, k, row, first token in the row, tokens, tiles behind) of the tile k in `slot`."""
    if PACKED:
        sequence, k, begin, left = packed_tile(slot, offsets, sequences, cols, bits, TILE)
        row = begin * 0
    else:
        sequence, k = slot // tiles, slot % tiles
        row = sequence.to(tl.int64)
        begin = k.to(tl.int64) * TILE
        left = cols - begin
    behind = tl.maximum((left + TILE - 1) // TILE - 1, 0).to(tl.int32)
    return sequence, k, row, begin, tl.minimum(left, TILE).to(tl.int32), behind


@triton.jit
def address(x, row, t, stride0, stride1):
    """Addresses of tokens t of a row, in 64 bits.

    t has the place of the block in it: offsets that are the same for every block of a loop would be
    kept in registers.
    """
    return x + row * stride0 + t * stride1


@triton.jit
def load_flags(x, row, t, stride0, stride1, inside):
    return tl.load(address(x, row, t, stride0, stride1), mask=inside, other=0) != 0


@triton.jit
def load_tokens(x, row, t, stride0, stride1, inside):
    return tl.load(address(x, row, t, stride0, stride1), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def kl_estimate(x, ESTIMATOR: tl.constexpr):
    """KL of one token, `kl_estimate` of csrc/math.h."""
    if ESTIMATOR == "k2":
        x = 0.5 * x * x
    elif ESTIMATOR == "k3":
        # exp(-x) - 1 + x; where exp_parts ends, as a square of half the exponent.
        far = tl.abs(x) > 80.0
        u = tl.where(far, -0.5 * x, -x)
        e, _, rest = exp_parts(tl.where(u > 80.0, 80.0, tl.where(u < -80.0, -80.0, u)))
        x = tl.where(far, e * e - 1.0 + x, rest)
    elif ESTIMATOR == "abs":
        x = tl.abs(x)
    return x


@triton.jit
def score_of(scores, sequence, stride, clip):
    """A sequence's score in fp32, within [-clip, clip] unless clip is 0."""
    score = tl.load(scores + sequence.to(tl.int64) * stride).to(tl.float32)
    clip = scalar(clip)
    clipped = tl.where(score > clip, clip, tl.where(score < -clip, -clip, score))
    return tl.where(clip > 0.0, clipped, score)


@triton.jit
def load_block(
    rewards, ref, values, mask, row, begin, count, rewards_stride0, rewards_stride1, ref_stride0,
    ref_stride1, values_stride0, values_stride1, mask_stride0, mask_stride1, kl_coef,
    ESTIMATOR: tl.constexpr, CARRY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A block's tokens: `count` of a row from `begin`.

    Args:
        rewards: rewards if ESTIMATOR is "reward", else log-probabilities.

    Returns:
        (keep, exists, last, r, v, v_next): kept tokens, steps of the recurrence, index of the last
        step, -1 if none, reward and value, 0 where masked, and the value behind each step but the
        last, for which it is anything.
    """
    i = tl.arange(0, BLOCK)
    inside = i < count
    keep, exists = inside, inside
    ahead_kept = i + 1 < count
    if mask is not None:
        keep = inside & load_flags(mask, row, begin + i, mask_stride0, mask_stride1, inside)
        if values is not None:
            ahead_kept = ahead_kept & load_flags(
                mask, row, begin + i + 1, mask_stride0, mask_stride1, ahead_kept
            )
        if CARRY:
            exists = keep
    last = tl.max(tl.where(exists, i, -1), axis=0)
    v = tl.zeros((BLOCK,), tl.float32)
    v_next = v
    if values is not None:
        v = load_tokens(values, row, begin + i, values_stride0, values_stride1, inside)
        v = tl.where(keep, v, 0.0)
        # The next token once more, now from the first-level cache.
        if CARRY:
            behind = i + 1
            first = tl.min(tl.where(exists, i, BLOCK), axis=0)
            if tl.sum(exists.to(tl.int32), axis=0) < last - first + 1:
                # Masked tokens between steps: the next kept one.
                behind = tl.associative_scan(
                    tl.where(ahead_kept, behind, BLOCK), 0, nearer, reverse=True
                )
            v_next = load_tokens(
                values, row, begin + behind, values_stride0, values_stride1, behind <= last
            )
        else:
            v_next = load_tokens(
                values, row, begin + i + 1, values_stride0, values_stride1, i + 1 < count
            )
            if mask is not None:
                v_next = tl.where(ahead_kept, v_next, 0.0)
    if ESTIMATOR == "none":
        r = tl.zeros((BLOCK,), tl.float32)
    else:
        r = load_tokens(rewards, row, begin + i, rewards_stride0, rewards_stride1, inside)
        if ESTIMATOR != "reward":
            r -= load_tokens(ref, row, begin + i, ref_stride0, ref_stride1, inside)
            r = -scalar(kl_coef) * kl_estimate(r, ESTIMATOR)
        r = tl.where(keep, r, 0.0)
    return keep, exists, last, r, v, v_next


@triton.jit
def block_steps(
    r, v, v_next, v_behind, dones, exists, last, row, begin, dones_stride0, dones_stride1, gamma,
    decay, VALUES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(a, b) of each step of a block; the last one's own factor is left out."""
    i = tl.arange(0, BLOCK)
    a = tl.where(i == last, 1.0, scalar(decay))
    if VALUES:
        v_next = tl.where(i == last, v_behind, v_next)
    if dones is not None:
        done = load_flags(dones, row, begin + i, dones_stride0, dones_stride1, exists)
        a = tl.where(done, CUT, a)
        v_next = tl.where(done, 0.0, v_next)
    b = r
    if VALUES:
        b = tl.fma(v_next, scalar(gamma), r) - v
    return tl.where(exists, a, 1.0), tl.where(exists, b, -0.0)


@triton.jit
def compose(a, b, CUTS: tl.constexpr):
    """Each step of a block composed with all behind it."""
    if CUTS:
        a, b = tl.associative_scan((a, b), 0, ahead_cut, reverse=True)
    else:
        a, b = tl.associative_scan((a, b), 0, ahead, reverse=True)
    return a, b


@triton.jit
def pick(x, i, at):
    """Element `at` of a block with indices i, whatever the others are; 0 if there is none."""
    return tl.sum(tl.where(i == at, x, 0.0), axis=0)


@triton.jit
def before(a, b, x):
    """b + a x of scalars, b alone where a is CUT."""
    return tl.where(a < 0.0, b, tl.fma(a, x, b))


@triton.jit
def state_behind(
    aggregates, slot, behind, v, x, gamma, VALUES: tl.constexpr, SCORE: tl.constexpr,
    CARRY: tl.constexpr, CUTS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """What a tile gets from the `behind` tiles in the slots after its own.

    Args:
        v: value behind the sequence, fp32.
        x: decay times the advantage (or return) there, fp64.

    Returns:
        (v, x, kept): v and x behind the tile, and whether a token behind it is kept, 0 or 1.
    """
    gamma = scalar(gamma).to(tl.float64)
    u = x
    if VALUES:
        u = tl.fma(gamma, v.to(tl.float64), x)
    kept = tl.full((), 0, tl.int32)
    found = tl.full((), 0, tl.int32)
    groups = (behind + GROUP - 1) // GROUP
    for g in range(groups):
        # Groups are counted from the tile itself: masked tiles at the end then change no bit.
        nearest = (groups - 1 - g) * GROUP
        j = nearest + tl.arange(0, GROUP)
        inside = j < behind
        at = aggregates + (slot + 1 + j).to(tl.int64) * FIELDS
        p = tl.load(at, mask=inside, other=1.0)
        q = tl.load(at + 1, mask=inside, other=-0.0)
        first = tl.load(at + 2, mask=inside, other=0.0).to(tl.float32)
        has = tl.load(at + 3, mask=inside, other=0.0) != 0.0
        if SCORE:
            final = tl.max(tl.where(has, j, -1), axis=0)
            scored = tl.load(at + 4, mask=inside, other=0.0)
            q = tl.where((j == final) & (kept == 0), scored, q)
        kept = tl.maximum(kept, tl.max(has.to(tl.int32), axis=0))
        p, q = compose(p, q, CUTS)
        u = before(pick(p, j, nearest), pick(q, j, nearest), u)
        if VALUES:
            exists = inside
            if CARRY:
                exists = has
            near = tl.min(tl.where(exists, j, 2147483647), axis=0)
            some = near < 2147483647
            v = tl.where(some, pick(first, j, near), v)
            found = tl.where(some, 1, found)
    if VALUES:
        # In fp64 this difference loses nothing.
        u = tl.where(found != 0, u - gamma * v.to(tl.float64), x)
    return v, u, kept
