"""gae, discounted_returns, ppo_advantages: tiles of sequences scanned in parallel.

Tiles are counted from the start of each sequence, so a sequence's bits depend neither on the batch
nor on padding or packing, and 16 rows of 131,072 steps fill a device as well as 8,192 rows of
4,096. The first launch computes, for each tile, the map from the state after the tile to the state
before it. In the second launch a program composes the maps of all later tiles of its sequence,
scans its own tile and writes the results. No program waits for another one.

Launches: 1 if every row is one tile, else 2; packed 2. `whiten=True` adds 2: one combines the
moments that the scan has stored, one applies them. `whiten` alone takes 3, `group_advantages` takes
1, or 2 with scale "batch", after torch's sort of group ids.

Memory traffic per token in bytes, for fp32 and a bool mask: `gae` reads 9 and writes 8. The second
launch reads the same 9 again, from the L2 cache except for the largest batches. `whiten=True` adds
9. `whiten` alone moves 14.
"""

from typing import Any

import torch
import triton.language as tl

from ..advantages import Kernels, Launchers, Scan, ScanResults, launchers
from ._launch import INTERPRETED, kernel, launch, tile_count
from ._math import scalar
from ._strided import strided
from .advantages_general import general
from .advantages_groups import BLOCK as GROUP_BLOCK
from .advantages_groups import groups
from .advantages_moments import merge_moments, store_moments, whiten, whiten_scan
from .advantages_scan import (
    CHECKED,
    CUT,
    FIELDS,
    ahead_both,
    before,
    block_steps,
    check_offsets,
    compose,
    load_block,
    locate,
    pick,
    score_of,
    sequence_at,
    state_behind,
)

# Steps per program, so that a row of 4096 is read once. Few in the interpreter, which scans element
# by element, and where short tests must cover several tiles.
TILE = 64 if INTERPRETED else 4096
# Steps that a program scans at a time, 8 per thread. This is small enough for several programs per
# multiprocessor, so that one loads while another scans.
BLOCK = 32 if INTERPRETED else 1024
WARPS = 4
# Tiles that a program composes at a time.
GROUP = 16 if INTERPRETED else 64
# Left alone, the assembler keeps 24 bytes of one variant in memory on compute capability 8, for 6
# blocks a multiprocessor (4 with this cap, without memory), and 8 bytes of some on 10.
SCAN_REGISTERS = {8: 128, 10: 168}


@kernel
def aggregate_kernel(
    rewards,
    ref,
    values,
    mask,
    dones,
    scores,
    batch,
    bad,
    aggregates,
    rates,
    ESTIMATOR: tl.constexpr,
    CARRY: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    CHECKED: tl.constexpr,
):
    """The map of one tile that has earlier tiles. If packed, program 0 also checks the offsets."""
    slot = tl.program_id(0)
    gamma, decay, kl_coef, clip = rates
    tokens = rewards, ref, values, mask
    offsets, cols, _, sequences, _ = batch
    if offsets is not None:
        if slot == 0:
            check_offsets(offsets, bad, sequences, cols, CHECKED)
        slot -= 1
    sequence, k, row, begin, count, _ = locate(tl.maximum(slot, 0), batch, TILE)
    if (slot >= 0) & (k > 0) & (count > 0):
        i = tl.arange(0, BLOCK)
        g, d = scalar(gamma).to(tl.float64), scalar(decay).to(tl.float64)
        p, q = tl.full((), 1.0, tl.float64), tl.full((), -0.0, tl.float64)
        scored = q
        first_value = tl.full((), 0.0, tl.float64)
        kept = tl.full((), 0, tl.int32)
        blocks = (count + BLOCK - 1) // BLOCK
        for block in range(blocks):
            start = (blocks - 1 - block) * BLOCK
            place = row, begin + start, count - start
            loaded = load_block(tokens, place, kl_coef, ESTIMATOR, CARRY, BLOCK)
            # Not `_`: that name has a value before the loop, of another type.
            keep, exists, last, r, v, _v_next = loaded
            # The value after the block is left out here; it is part of u.
            a, b = block_steps(loaded, r, 0.0, dones, place, rates, values is not None, BLOCK)
            ahead_value = tl.full((), 0.0, tl.float64)
            if values is not None:
                first = tl.min(tl.where(exists, i, BLOCK), axis=0)
                ahead_value = pick(v, i, first).to(tl.float64)
            if scores is None:
                a, b = compose(a, b, dones is not None)
            else:
                # It is not known yet whether the sequence's last kept token is in this tile.
                final = tl.max(tl.where(keep, i, -1), axis=0)
                score = score_of(scores, sequence, clip)
                scored_r = tl.where((i == final) & (kept == 0), r + score, r)
                s = block_steps(
                    loaded, scored_r, 0.0, dones, place, rates, values is not None, BLOCK
                )[1]
                a, b, s = tl.associative_scan((a, b, s), 0, ahead_both, reverse=True)
            if last >= 0:
                a0, b0 = pick(a, i, 0).to(tl.float64), pick(b, i, 0).to(tl.float64)
                if scores is not None:
                    s0 = pick(s, i, 0).to(tl.float64)
                    scored = tl.fma(d, before(a0, s0, scored), g * ahead_value)
                q = tl.fma(d, before(a0, b0, q), g * ahead_value)
                p = tl.where((a0 < 0.0) | (p < 0.0), CUT, d * a0 * p)
                first_value = ahead_value
            kept = tl.maximum(kept, tl.max(keep.to(tl.int32), axis=0))
        at = aggregates + slot.to(tl.int64) * FIELDS
        tl.store(at, p)
        tl.store(at + 1, q)
        tl.store(at + 2, first_value)
        tl.store(at + 3, kept.to(tl.float64))
        if scores is not None:
            tl.store(at + 4, scored)


@kernel
def scan_kernel(
    rewards,
    ref,
    values,
    mask,
    dones,
    scores,
    bootstrap,
    batch,
    bad,
    aggregates,
    advantages,
    returns,
    shaped,
    partials,
    rates,
    ESTIMATOR: tl.constexpr,
    CARRY: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Results of one tile; with `partials` also the moments of its advantages."""
    slot = tl.program_id(0)
    gamma, decay, kl_coef, clip = rates
    tokens = rewards, ref, values, mask
    offsets, cols, _, _, _ = batch
    i = tl.arange(0, BLOCK)
    sequence, _, row, begin, count, behind = locate(slot, batch, TILE)
    n = tl.full((), 0.0, tl.float64)
    mean, m2 = n, n
    if offsets is not None:
        if tl.load(bad) != 0:
            # With bad offsets all tokens become NaN, tile by tile without regard to sequences.
            count = 0
            n, mean = n + 1.0, mean + float("nan")
            for start in range(0, TILE, BLOCK):
                at = slot.to(tl.int64) * TILE + start + i
                poison = tl.full((BLOCK,), float("nan"), tl.float32)
                if values is not None:
                    tl.store(advantages + at, poison, mask=at < cols)
                tl.store(returns + at, poison, mask=at < cols)
                if scores is not None:
                    tl.store(shaped + at, poison, mask=at < cols)
    if count > 0:
        v_behind = tl.full((), 0.0, tl.float32)
        x = tl.full((), 0.0, tl.float64)
        d = scalar(decay).to(tl.float64)
        if bootstrap is not None:
            end = tl.load(sequence_at(bootstrap, sequence)).to(tl.float32)
            if values is not None:
                v_behind = end
            else:
                x = d * end.to(tl.float64)
        kept = tl.full((), 0, tl.int32)
        if aggregates is not None:
            v_behind, x, kept = state_behind(
                aggregates,
                slot,
                behind,
                v_behind,
                x,
                gamma,
                values is not None,
                scores is not None,
                CARRY,
                dones is not None,
                GROUP,
            )
        blocks = (count + BLOCK - 1) // BLOCK
        for block in range(blocks):
            start = (blocks - 1 - block) * BLOCK
            place = row, begin + start, count - start
            loaded = load_block(tokens, place, kl_coef, ESTIMATOR, CARRY, BLOCK)
            keep, exists, last, r, v, _v_next = loaded
            at = row * cols + begin + start + i
            inside = i < count - start
            if scores is not None:
                # The last kept token receives the score.
                final = tl.max(tl.where(keep, i, -1), axis=0)
                score = score_of(scores, sequence, clip)
                r = tl.where((i == final) & (kept == 0), r + score, r)
                kept = tl.maximum(kept, tl.max(keep.to(tl.int32), axis=0))
                tl.store(shaped + at, r, mask=inside)
            a, b = block_steps(loaded, r, v_behind, dones, place, rates, values is not None, BLOCK)
            a, b = compose(a, b, dones is not None)
            # x as two fp32 parts, so that the sum of a long sequence is rounded only once.
            high = x.to(tl.float32)
            low = (x - high.to(tl.float64)).to(tl.float32)
            # The second part of an infinity would be NaN.
            low = tl.where(low == low, low, 0.0)
            if last >= 0:
                x = d * before(pick(a, i, 0).to(tl.float64), pick(b, i, 0).to(tl.float64), x)
                if values is not None:
                    first = tl.min(tl.where(exists, i, BLOCK), axis=0)
                    v_behind = pick(v, i, first)
            near = b
            b = tl.fma(a, low, b)
            g = tl.fma(a, high, b + v)
            b = tl.fma(a, high, b)
            if dones is not None:
                g = tl.where(a < 0.0, near + v, g)
                b = tl.where(a < 0.0, near, b)
            b = tl.where(keep, b, 0.0)
            tl.store(returns + at, tl.where(keep, g, 0.0), mask=inside)
            if values is not None:
                tl.store(advantages + at, b, mask=inside)
            if partials is not None:
                n, mean, m2 = merge_moments(n, mean, m2, b, keep, BLOCK)
    if partials is not None:
        store_moments(partials, slot, n, mean, m2)


def _scan(scan: Scan, results: ScanResults) -> None:
    advantages, returns, shaped = results
    cu_seqlens = scan.cu_seqlens
    cols = returns.shape[-1]
    if cu_seqlens is not None:
        sequences, tiles = cu_seqlens.shape[0] - 1, 0
        slots = cols // TILE + sequences
        offsets, bad = cu_seqlens.contiguous(), returns.new_empty(1, dtype=torch.int32)
    else:
        sequences, tiles = returns.shape[0], tile_count(cols, TILE)
        slots, offsets, bad = sequences * tiles, None, None
    penalty = scan.ref_logprobs is not None and scan.kl_coef != 0
    ref = strided(scan.ref_logprobs if penalty else None)
    estimator = "reward" if scan.scores is None else scan.kl_estimator if penalty else "none"
    kept = strided(scan.mask)
    per_token = (strided(scan.tokens), ref, strided(scan.values), kept, strided(scan.dones))
    of_sequences, end = strided(scan.scores), strided(scan.bootstrap_values)
    batch = (offsets, cols, tiles, sequences, sequences.bit_length())
    # float(): an int has another type and would compile another kernel.
    numbers = (scan.gamma, scan.gamma * scan.lam, scan.kl_coef, scan.reward_clip or 0.0)
    rates = tuple(float(x) for x in numbers)
    constants: dict[str, Any] = {"ESTIMATOR": estimator, "TILE": TILE, "BLOCK": BLOCK}
    constants |= {"CARRY": scan.masked == "carry" and scan.mask is not None, "warps": WARPS}
    aggregates = None
    if offsets is not None or tiles > 1:
        aggregates = returns.new_empty(slots * FIELDS.value, dtype=torch.float64)
        programs = slots if offsets is None else slots + 1
        launch(
            aggregate_kernel,
            programs,
            returns,
            *per_token,
            of_sequences,
            batch,
            bad,
            aggregates,
            rates,
            CHECKED=CHECKED,
            **constants,
        )
    partials = returns.new_empty(3 * slots, dtype=torch.float64) if scan.whiten else None
    launch(
        scan_kernel,
        slots,
        returns,
        *per_token,
        of_sequences,
        end,
        batch,
        bad,
        aggregates,
        advantages,
        returns,
        shaped,
        partials,
        rates,
        GROUP=GROUP,
        registers=SCAN_REGISTERS,
        **constants,
    )
    if partials is not None:
        whiten_scan(advantages, kept, partials)


LAUNCHERS: Launchers = launchers(
    Kernels(_scan, general, groups, whiten, alone=GROUP_BLOCK, on_device=True)
)
