"""Faults of operations on rows: logits, and differences of log-probabilities."""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from tests.cases.faults.case import (
    INF,
    NAN,
    Arguments,
    Case,
    Make,
    Run,
    backward,
    filled,
    in_layouts,
    named,
    normal,
)

import rlhf_kernels as rk

# Rows of logits. They allow 16-byte loads; a few cases have a vocabulary of several tiles, with a
# ragged last tile.
ROWS, VOCAB, TILES = 3, 304, 8197


def token_logprobs() -> Iterator[Case]:
    yield from named("small", _token_logprobs(VOCAB))
    yield from named("tiles", _token_logprobs(TILES))


def _token_logprobs(vocab: int) -> Iterator[Case]:
    def run(
        logits: Tensor, labels: Tensor, upstream: Tensor, temperature: Tensor | float = 1.0
    ) -> tuple[Tensor, ...]:
        logits = logits.detach().requires_grad_()
        out = rk.token_logprobs(logits, labels, temperature=temperature, entropy=True)[:2]
        return (*out, backward(out, logits, upstream))

    def make() -> Arguments:
        labels = torch.tensor([0, vocab - 1, vocab // 2])
        return {"logits": normal(ROWS, vocab), "labels": labels, "upstream": torch.ones(ROWS)}

    def with_label(row: int, label: int, dtype: torch.dtype = torch.int64) -> Case:
        def labelled() -> Arguments:
            given = filled(make, "labels", row, label)
            return given | {"labels": given["labels"].to(dtype)}

        error = f"IndexError: token_logprobs: label at flat position {row} is {label};"
        return Case(f"label {label} {dtype} in row {row}", run, labelled, "clean", (row,), error)

    def with_temperature(value: float) -> Case:
        def tempered() -> Arguments:
            temperature = torch.ones(ROWS)
            temperature[1] = value
            return make() | {"temperature": temperature}

        error = "temperature at flat position 1 must be a finite number > 0, between 2^-60 and "
        error += f"2^60 (8.7e-19 and 1.2e18), got {value}"
        # The gradient of a row with a bad temperature is not specified.
        return Case(f"temperature {value}", run, tempered, "clean", (1,), error, slice(2))

    def ignored(fill: float) -> Arguments:
        given = filled(make, "labels", [0, 2], -100)
        given["logits"][[0, 2]] = fill
        return given

    def sized(rows: int, words: int) -> Arguments:
        labels = torch.zeros(rows, dtype=torch.int64)
        return {"logits": normal(rows, words), "labels": labels, "upstream": torch.ones(rows)}

    yield Case("clean", run, make)
    yield Case("ignored", run, partial(ignored, 0.0), like="ignored")
    yield Case("NaN in ignored rows", run, partial(ignored, NAN), like="ignored")
    for label in (vocab, -1, 2**40):
        yield with_label(ROWS - 1, label)
    if vocab == TILES:
        return
    for row in (0, ROWS - 1):
        for label in (vocab + 1, 2**31, -(2**31), -(2**40), 2**63 - 1, -(2**63)):
            yield with_label(row, label)
        for label in (vocab, -1, 2**31 - 1, -(2**31)):
            yield with_label(row, label, torch.int32)
    for value in (0.0, -1.0, NAN, INF):
        yield with_temperature(value)
    for fill in (INF, -INF):
        yield Case(f"{fill} in ignored rows", run, partial(ignored, fill), like="ignored")
    yield Case("vocabulary of one", run, partial(sized, ROWS, 1), like="vocabulary of one")
    yield Case("empty", run, partial(sized, 0, vocab), like="empty")
    yield Case("expanded upstream", run, lambda: make() | {"upstream": torch.ones(()).expand(ROWS)})
    yield from in_layouts(run, make)


def kl_divergence() -> Iterator[Case]:
    for direction in ("reverse", "forward"):
        yield from named(f"{direction} small", _kl_divergence(direction, VOCAB))
        yield from named(f"{direction} tiles", _kl_divergence(direction, TILES))


def _kl_divergence(direction: str, vocab: int) -> Iterator[Case]:
    def run(logits: Tensor, ref_logits: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
        logits = logits.detach().requires_grad_()
        kl = rk.kl_divergence(logits, ref_logits, direction=direction, temperature=0.7)
        return kl, backward((kl,), logits, upstream)

    def make(rows: int = ROWS, words: int = vocab) -> Arguments:
        logits, ref = normal(rows, words), normal(rows, words, seed=1)
        return {"logits": logits, "ref_logits": ref, "upstream": torch.ones(rows)}

    def dirty(name: str, column: int | slice, value: float) -> Case:
        bad = partial(filled, make, name, (2, column), value)
        return Case(f"{value} in {name} at {column}", run, bad, "clean", (2,), part=slice(1))

    yield Case("clean", run, make)
    for name in ("logits", "ref_logits"):
        yield dirty(name, vocab - 1, NAN)
    if vocab == TILES:
        return
    for name in ("logits", "ref_logits"):
        yield dirty(name, vocab // 2, INF)
        yield dirty(name, slice(None), -INF)
    yield from without_upstream(run, make, "logits", (NAN,))
    yield Case("vocabulary of one", run, partial(make, words=1), like="vocabulary of one")
    yield Case("empty", run, partial(make, rows=0, words=9), like="empty")
    yield Case("expanded upstream", run, lambda: make() | {"upstream": torch.ones(()).expand(ROWS)})
    # The other direction only swaps the two arguments.
    if direction == "reverse":
        yield from in_layouts(run, make)


def without_upstream(run: Run, make: Make, name: str, fills: tuple[float, ...]) -> Iterator[Case]:
    """Row 2 of an argument is not finite, but its upstream gradient is 0: so is its gradient."""

    def frozen(fill: float) -> Arguments:
        given = filled(make, "upstream", 2, 0.0)
        given[name][2] = fill
        return given

    yield Case("frozen", run, partial(frozen, 0.0), like="frozen", part=slice(1, None))
    for fill in fills:
        label = f"{fill} in a row without upstream"
        yield Case(label, run, partial(frozen, fill), like="frozen", part=slice(1, None))


def kl_penalty() -> Iterator[Case]:
    def run(logprobs: Tensor, ref_logprobs: Tensor, upstream: Tensor) -> tuple[Tensor, ...]:
        logprobs = logprobs.detach().requires_grad_()
        kl = rk.kl_penalty(logprobs, ref_logprobs, estimator="k3")
        return kl, backward((kl,), logprobs, upstream)

    def make(rows: int = 7, length: int = 211) -> Arguments:
        names = ("logprobs", "ref_logprobs", "upstream")
        return {name: normal(rows, length, seed=i) for i, name in enumerate(names)}

    yield Case("clean", run, make)
    yield Case("NaN in a row", run, partial(filled, make, "logprobs", 3, NAN), "clean", (3,))
    yield from without_upstream(run, make, "logprobs", (NAN, INF, -INF))
    yield Case("empty", run, partial(make, 0, 9), like="empty")
    for name, shape in (("ones", (7, 211)), ("expanded upstream", ())):
        yield Case(name, run, lambda s=shape: make() | {"upstream": torch.ones(s)}, like="ones")
    yield from in_layouts(run, make)
