"""Device functions of the reverse scans: the tile of a program, its steps, the state behind it.

"Behind" a step means later in its sequence, "ahead" means earlier. A step maps the advantage A'
behind it to b + a A'. Steps that "carry" skips and positions outside a sequence are the identity:
a = 1 and b = -0.0, which preserves every bit. A done step has a = CUT: nothing passes it, not even
a NaN, which would survive a factor of 0.

A tile is scanned in blocks, from its end. The last step of a block needs the value V and the
advantage A of the step behind the block. Its own factor is therefore left out (a = 1), and
x = decay A is applied to all steps of the block once it is known. A whole tile maps
u = gamma V + x behind it to p u + q, the u ahead of it.

Multiply-adds are written as fma where a compiler could contract them in two ways.
"""

import triton
import triton.language as tl

from ._math import exp_parts, scalar

CUT = tl.constexpr(-1.0)
# Fields of a tile's aggregate: p, q, the value of its first step, whether it has a kept token, and
# the alternative q if its last kept token receives the sequence's score.
FIELDS = tl.constexpr(5)
# Entries of cu_seqlens that are checked at a time.
CHECKED = 1024


@triton.jit
def ahead(a_behind, b_behind, a, b):
    """Composes the step (a, b) with the composed steps behind it."""
    return a * a_behind, tl.fma(a, b_behind, b)


@triton.jit
def ahead_cut(a_behind, b_behind, a, b):
    """`ahead` if steps may have a = CUT."""
    cut = a < 0.0
    composed = tl.where(cut | (a_behind < 0.0), CUT, a * a_behind)
    return composed, tl.where(cut, b, tl.fma(a, b_behind, b))


@triton.jit
def ahead_both(a_behind, b_behind, s_behind, a, b, s):
    """`ahead` for two values of b at once."""
    return a * a_behind, tl.fma(a, b_behind, b), tl.fma(a, s_behind, s)


@triton.jit
def nearer(behind, index):
    return tl.minimum(behind, index)


@triton.jit
def offset_at(offsets, s, total):
    """cu_seqlens[s] clamped to [0, total], so that bad offsets never give bad addresses."""
    return tl.minimum(tl.maximum(tl.load(offsets + s).to(tl.int64), 0), total)


@triton.jit
def check_offsets(offsets, bad, sequences, total, CHECKED: tl.constexpr):
    """Stores whether cu_seqlens are bad: not from 0 to total, or decreasing."""
    wrong = tl.zeros((CHECKED,), tl.int32)
    for start in range(0, sequences + 1, CHECKED):
        i = start + tl.arange(0, CHECKED)
        inside = i <= sequences
        entry = tl.load(offsets + i, mask=inside, other=0).to(tl.int64)
        before = tl.load(offsets + i - 1, mask=inside & (i > 0), other=0).to(tl.int64)
        good = (entry >= before) & tl.where(i == 0, entry == 0, True)
        good = good & tl.where(i == sequences, entry == total, True)
        wrong = tl.where(inside & (good == 0), 1, wrong)
    tl.store(bad, tl.max(wrong, axis=0))


@triton.jit
def packed_tile(slot, offsets, sequences, total, bits, TILE: tl.constexpr):
    """(sequence, k, first token, tokens left from it) of the tile k in `slot`; 0 left if empty.

    Tile k of sequence s is in slot offsets[s] // TILE + s + k. No two tiles share a slot: with
    offsets[s] = q TILE + r, sequence s + 1 starts floor((r + length) / TILE) + 1 slots after s,
    and s has only ceil(length / TILE) tiles, which is not more. The first slots therefore increase
    with s and can be searched, and total // TILE + sequences slots suffice.
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
def locate(slot, batch, TILE: tl.constexpr):
    """(sequence, k, row, first token in the row, tokens, tiles behind) of the tile k in `slot`."""
    offsets, cols, tiles, sequences, bits = batch
    if offsets is not None:
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
def address(x, row, t):
    """Addresses of tokens t of a row, in 64 bits.

    t includes the position of the block. Offsets that are equal for every block of a loop would
    occupy registers.
    """
    pointer, stride0, stride1 = x
    return pointer + row * stride0 + t * stride1


@triton.jit
def sequence_at(x, sequence):
    """The address of the entry of a sequence in a tensor over sequences."""
    pointer, _, stride = x
    return pointer + sequence.to(tl.int64) * stride


@triton.jit
def load_flags(x, row, t, inside):
    return tl.load(address(x, row, t), mask=inside, other=0) != 0


@triton.jit
def load_tokens(x, row, t, inside):
    return tl.load(address(x, row, t), mask=inside, other=0.0).to(tl.float32)


@triton.jit
def kl_estimate(x, ESTIMATOR: tl.constexpr):
    """KL of one token, `kl_estimate` of csrc/math.h."""
    if ESTIMATOR == "k2":
        x = 0.5 * x * x
    elif ESTIMATOR == "k3":
        # exp(-x) - 1 + x; beyond the range of exp_parts, exp(-x) is the square of exp(-x / 2).
        far = tl.abs(x) > 80.0
        u = tl.where(far, -0.5 * x, -x)
        e, _, rest = exp_parts(tl.where(u > 80.0, 80.0, tl.where(u < -80.0, -80.0, u)))
        x = tl.where(far, e * e - 1.0 + x, rest)
    elif ESTIMATOR == "abs":
        x = tl.abs(x)
    return x


@triton.jit
def score_of(scores, sequence, clip):
    """A sequence's score in fp32, clipped to [-clip, clip] unless clip is 0."""
    score = tl.load(sequence_at(scores, sequence)).to(tl.float32)
    clip = scalar(clip)
    clipped = tl.where(score > clip, clip, tl.where(score < -clip, -clip, score))
    return tl.where(clip > 0.0, clipped, score)


@triton.jit
def load_block(
    tokens, place, kl_coef, ESTIMATOR: tl.constexpr, CARRY: tl.constexpr, BLOCK: tl.constexpr
):
    """Loads a block of tokens.

    Args:
        tokens: (rewards, ref, values, mask); log-probabilities unless ESTIMATOR is "reward".
        place: (row, first token, number of tokens) of the block.

    Returns:
        (keep, exists, last, r, v, v_next): mask of kept tokens, mask of steps of the recurrence,
        index of the last step or -1, reward and value (0 where masked), and the value behind each
        step (undefined for the last step).
    """
    rewards, ref, values, mask = tokens
    row, begin, count = place
    i = tl.arange(0, BLOCK)
    inside = i < count
    keep, exists = inside, inside
    ahead_kept = i + 1 < count
    if mask is not None:
        keep = inside & load_flags(mask, row, begin + i, inside)
        if values is not None:
            ahead_kept = ahead_kept & load_flags(mask, row, begin + i + 1, ahead_kept)
        if CARRY:
            exists = keep
    last = tl.max(tl.where(exists, i, -1), axis=0)
    v = tl.zeros((BLOCK,), tl.float32)
    v_next = v
    if values is not None:
        v = load_tokens(values, row, begin + i, inside)
        v = tl.where(keep, v, 0.0)
        # Loads each next token again, now from the L1 cache.
        if CARRY:
            behind = i + 1
            first = tl.min(tl.where(exists, i, BLOCK), axis=0)
            if tl.sum(exists.to(tl.int32), axis=0) < last - first + 1:
                # The value of the next kept token, past masked tokens.
                behind = tl.associative_scan(
                    tl.where(ahead_kept, behind, BLOCK), 0, nearer, reverse=True
                )
            v_next = load_tokens(values, row, begin + behind, behind <= last)
        else:
            v_next = load_tokens(values, row, begin + i + 1, i + 1 < count)
            if mask is not None:
                v_next = tl.where(ahead_kept, v_next, 0.0)
    if ESTIMATOR == "none":
        r = tl.zeros((BLOCK,), tl.float32)
    else:
        r = load_tokens(rewards, row, begin + i, inside)
        if ESTIMATOR != "reward":
            r -= load_tokens(ref, row, begin + i, inside)
            r = -scalar(kl_coef) * kl_estimate(r, ESTIMATOR)
        r = tl.where(keep, r, 0.0)
    return keep, exists, last, r, v, v_next


@triton.jit
def block_steps(block, r, v_behind, dones, place, rates, VALUES: tl.constexpr, BLOCK: tl.constexpr):
    """(a, b) of each step of a block from `load_block`; the last step has a = 1 (see above).

    r: the rewards, with the score added if there is one.
    """
    _, exists, last, _, v, v_next = block
    row, begin, _ = place
    gamma, decay, _, _ = rates
    i = tl.arange(0, BLOCK)
    a = tl.where(i == last, 1.0, scalar(decay))
    if VALUES:
        v_next = tl.where(i == last, v_behind, v_next)
    if dones is not None:
        done = load_flags(dones, row, begin + i, exists)
        a = tl.where(done, CUT, a)
        v_next = tl.where(done, 0.0, v_next)
    b = r
    if VALUES:
        b = tl.fma(v_next, scalar(gamma), r) - v
    return tl.where(exists, a, 1.0), tl.where(exists, b, -0.0)


@triton.jit
def compose(a, b, CUTS: tl.constexpr):
    """Composes each step of a block with all steps behind it."""
    if CUTS:
        a, b = tl.associative_scan((a, b), 0, ahead_cut, reverse=True)
    else:
        a, b = tl.associative_scan((a, b), 0, ahead, reverse=True)
    return a, b


@triton.jit
def pick(x, i, at):
    """Element `at` of a block with indices i; 0 if there is none. Ignores NaN in the others."""
    return tl.sum(tl.where(i == at, x, 0.0), axis=0)


@triton.jit
def before(a, b, x):
    """b + a x of scalars; b where a is CUT."""
    return tl.where(a < 0.0, b, tl.fma(a, x, b))


@triton.jit
def state_behind(
    aggregates,
    slot,
    behind,
    v,
    x,
    gamma,
    VALUES: tl.constexpr,
    SCORE: tl.constexpr,
    CARRY: tl.constexpr,
    CUTS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """The state behind a tile, from the `behind` tiles in the slots after its own.

    Args:
        v: value behind the sequence, fp32.
        x: decay times the advantage (or return) behind the sequence, fp64.

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
        # Groups are counted from this tile, so that masked tiles at the end change no bit.
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
        # This difference is accurate in fp64.
        u = tl.where(found != 0, u - gamma * v.to(tl.float64), x)
    return v, u, kept
