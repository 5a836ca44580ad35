"""Faults of operations on tokens and sequences."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from tests.cases.faults.case import (
    ALL,
    INF,
    NAN,
    Arguments,
    Case,
    Make,
    Run,
    backward,
    in_layouts,
    named,
    normal,
)

import rlhf_kernels as rk

# Rows of tokens span two tiles of 64, the last one ragged. Offsets EVEN name the same rows packed.
BATCH, LENGTH = 3, 70
EVEN = [0, 70, 140, 210]
# Wrong offsets for the same tokens, and the index of the entry that the error names.
BAD_OFFSETS = {
    "late start": ([7, 70, 140, 210], 0),
    "negative start": ([-7, 70, 140, 210], 0),
    "early end": ([0, 70, 140, 200], 3),
    "end beyond": ([0, 70, 140, 211], 3),
    "end far beyond": ([0, 70, 140, 100_000], 3),
    "falling": ([0, 140, 70, 210], 2),
    "negative": ([0, -5, 140, 210], 1),
    "huge": ([0, 2**40, 140, 210], 1),
    "hugely negative": ([0, -(2**40), 140, 210], 1),
    "all huge": ([2**62] * 4, 0),
    "falling from beyond": ([0, 2**31 - 1, -(2**31), 210], 1),
    "no sequence": ([0], 0),
}
# Offsets that fit into 32 bits and for which the width of an entry could matter.
OF_32_BITS = ("negative", "end beyond", "falling from beyond", "no sequence")


def mask() -> Tensor:
    keep = torch.rand(BATCH, LENGTH, generator=torch.Generator().manual_seed(3), device="cpu") < 0.7
    keep[1] = False
    return keep.to(torch.empty(0).device)


def of_tokens(
    operation: str, run: Run, make: Make, per_sequence: tuple[str, ...] = ()
) -> Iterator[Case]:
    """The promises of every operation on tokens; `make` gives [BATCH, LENGTH] or [BATCH]."""
    tokens = [name for name in make() if name not in per_sequence]

    def packed(offsets: list[int], dtype: torch.dtype = torch.int64) -> Arguments:
        given = make()
        given |= {name: given[name].reshape(-1) for name in tokens}
        # One entry per sequence, for the number of sequences in the offsets.
        given |= {name: given[name][: len(offsets) - 1] for name in per_sequence}
        return given | {"cu_seqlens": torch.tensor(offsets, dtype=dtype)}

    def masked(fill: float) -> Arguments:
        given, keep = make(), mask()
        for name in tokens:
            if given[name].is_floating_point():
                given[name] = given[name].masked_fill(~keep, fill)
        return given | {"mask": keep}

    def resized(rows: int, cols: int) -> Arguments:
        return {n: t[:rows] if n in per_sequence else t[:rows, :cols] for n, t in make().items()}

    yield Case("clean", run, make)
    yield Case("packed", run, partial(packed, EVEN), like="packed")
    for dtype in (torch.int32, torch.int64):
        for name, (offsets, at) in BAD_OFFSETS.items():
            if dtype is torch.int32 and name not in OF_32_BITS:
                continue
            # The only entry of [0] is also the last, which must be the number of tokens.
            error = f"ValueError: {operation}: cu_seqlens must start at 0, never decrease and "
            error += f"end at the number of tokens, 210; entry {at} is {offsets[at]}"
            bad = partial(packed, offsets, dtype)
            yield Case(f"offsets {name} {dtype}", run, bad, "packed", ALL, error)
    for dtype in (torch.int32, torch.int64):
        gaps = [0, 0, 0, 210] if dtype is torch.int32 else [0, 210, 210, 210]
        name = f"sequences of no tokens {dtype}"
        yield Case(name, run, partial(packed, gaps, dtype), like=name)
    yield Case("masked", run, partial(masked, 0.0), like="masked")
    for fill in (NAN, INF, -INF):
        yield Case(f"{fill} under the mask", run, partial(masked, fill), like="masked")
    for rows, cols in ((0, LENGTH), (BATCH, 0), (1, 1), (BATCH, 1)):
        name = f"{rows} x {cols}"
        yield Case(name, run, partial(resized, rows, cols), like=name)
    yield from in_layouts(run, make)


def gae() -> Iterator[Case]:
    def run(rewards: Tensor, values: Tensor, **options: Tensor) -> tuple[Tensor, ...]:
        return tuple(rk.gae(rewards, values, gamma=0.9, lam=0.8, **options))

    def make() -> Arguments:
        return {
            "rewards": normal(BATCH, LENGTH),
            "values": normal(BATCH, LENGTH, seed=1),
            "mask": torch.ones(BATCH, LENGTH, dtype=torch.bool),
            "dones": normal(BATCH, LENGTH, seed=2) > 2,
            "bootstrap_values": normal(BATCH, seed=4),
        }

    yield from of_tokens("gae", run, make, ("bootstrap_values",))


def discounted_returns() -> Iterator[Case]:
    def run(rewards: Tensor, **options: Tensor) -> tuple[Tensor, ...]:
        return (rk.discounted_returns(rewards, gamma=0.9, **options),)

    def make() -> Arguments:
        ones = torch.ones(BATCH, LENGTH, dtype=torch.int64)
        return {"rewards": normal(BATCH, LENGTH), "mask": ones, "bootstrap_values": normal(BATCH)}

    yield from of_tokens("discounted_returns", run, make, ("bootstrap_values",))


def ppo_advantages() -> Iterator[Case]:
    def run(**given: Tensor) -> tuple[Tensor, ...]:
        return tuple(rk.ppo_advantages(**given, kl_coef=0.1, kl_estimator="k3", gamma=0.9))

    def make() -> Arguments:
        names = ("logprobs", "ref_logprobs", "values")
        tokens = {name: normal(BATCH, LENGTH, seed=i) for i, name in enumerate(names)}
        ones = torch.ones(BATCH, LENGTH, dtype=torch.uint8)
        return {"scores": normal(BATCH, seed=4), **tokens, "mask": ones}

    yield from of_tokens("ppo_advantages", run, make, ("scores",))


def whiten() -> Iterator[Case]:
    def run(x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return (rk.whiten(x, mask=mask),)

    def make() -> Arguments:
        return {"x": normal(BATCH, 1500), "mask": normal(BATCH, 1500, seed=1) > 0}

    def masked(fill: float) -> Arguments:
        given = make()
        return given | {"x": given["x"].masked_fill(~given["mask"], fill)}

    def shaped(*shape: int) -> Arguments:
        return {"x": normal(*shape), "mask": torch.ones(shape, dtype=torch.bool)}

    yield Case("clean", run, make)
    for fill in (NAN, INF, -INF):
        yield Case(f"{fill} under the mask", run, partial(masked, fill))
    for shape in ((0, 7), (7, 0), (1,), ()):
        name = f"shape {shape}"
        yield Case(name, run, partial(shaped, *shape), like=name)
    yield from in_layouts(run, make)


def group_advantages() -> Iterator[Case]:
    def run(rewards: Tensor, groups: Tensor | int) -> tuple[Tensor, ...]:
        return (rk.group_advantages(rewards, groups),)

    def make() -> Arguments:
        return {"rewards": normal(300), "groups": torch.arange(300) % 7}

    def ids(values: list[int]) -> Arguments:
        return make() | {"groups": torch.tensor(values)[torch.arange(300) % 7]}

    def sized(count: int, size: int) -> Arguments:
        return {"rewards": normal(count), "groups": size}

    yield Case("clean", run, make)
    extreme = [-(2**63), -(2**40), -1, 0, 2**31, 2**40, 2**63 - 1]
    yield Case("any ids", run, partial(ids, extreme))
    yield Case("ids in falling order", run, partial(ids, extreme[::-1]))
    yield Case("groups of one", run, partial(sized, 300, 1), like="groups of one")
    yield Case("one group", run, partial(sized, 300, 300), like="one group")
    yield Case("empty", run, lambda: {"rewards": normal(0), "groups": normal(0) > 0}, like="empty")
    yield from in_layouts(run, make)


def policy_loss() -> Iterator[Case]:
    # Options per sequence need a pass over the tokens before the loss, and one after it.
    sequences = rk.PolicyLossConfig(
        ratio_level="sequence",
        correction_level="sequence",
        correction_max=2.0,
        aggregation="seq-mean-token-mean",
    )
    terms = rk.PolicyLossConfig(kl_coef=0.1, entropy_coef=0.01)
    yield from named("terms", _policy_loss(terms))
    yield from named("sequences", _policy_loss(sequences))


def _policy_loss(config: rk.PolicyLossConfig) -> Iterator[Case]:
    def run(logprobs: Tensor, old_logprobs: Tensor, **given: Tensor) -> tuple[Tensor, ...]:
        logprobs = logprobs.detach().requires_grad_()
        mask = given.pop("mask", torch.ones_like(logprobs, dtype=torch.bool))
        loss, metrics = rk.policy_loss(logprobs, old_logprobs, mask=mask, config=config, **given)
        return loss, backward((loss,), logprobs, torch.ones_like(loss)), metrics.tensor

    def make() -> Arguments:
        names = ("logprobs", "old_logprobs", "ref_logprobs", "rollout_logprobs")
        tokens = {name: normal(BATCH, LENGTH, seed=i) * 0.2 for i, name in enumerate(names)}
        return {
            **tokens,
            "entropy": normal(BATCH, LENGTH, seed=4),
            "advantages": normal(BATCH, seed=5),
        }

    yield from of_tokens("policy_loss", run, make, ("advantages",))
    yield from normalizers(run, make)


def value_loss() -> Iterator[Case]:
    def run(values: Tensor, **given: Tensor) -> tuple[Tensor, ...]:
        values = values.detach().requires_grad_()
        mask = given.pop("mask", torch.ones_like(values, dtype=torch.bool))
        loss, metrics = rk.value_loss(values, mask=mask, clip_range=0.2, **given)
        return loss, backward((loss,), values, torch.ones_like(loss)), metrics.tensor

    def make() -> Arguments:
        names = ("values", "old_values", "returns")
        return {name: normal(BATCH, LENGTH, seed=i) for i, name in enumerate(names)}

    yield from of_tokens("value_loss", run, make)
    yield from normalizers(run, make)


def normalizers(run: Run, make: Make) -> Iterator[Case]:
    def divided(value: float) -> Arguments:
        return make() | {"normalizer": torch.tensor(value)}

    for bad in (0.0, -2.0, NAN, INF):
        error = f"normalizer must be a finite number > 0, got {bad}"
        name, arguments = f"normalizer {bad}", partial(divided, bad)
        # Metrics do not depend on the normalizer.
        yield Case(name, run, arguments, "clean", ALL, error, slice(2))
