"""Measures one point: every provider of one operation on one shape, in the same rounds.

A provider is timed only after its result passed the gate against the fp64 oracle. In each round
the other providers and the machine's own copy and read run in a random order, then
`pytest_benchmark` times ours; so a drifting clock hits all of them alike.
"""

import gc
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

# Rounds per point: more where they are cheap. A provider slower than SLOW joins every fourth round.
MIN_ROUNDS, MAX_ROUNDS, POINT_SECONDS = 20, 100, 6.0
SLOW_SECONDS, SLOW_STRIDE = 1.0, 4
QUICK_ROUNDS = 4

# Largest error that passes the gate: a fraction of the oracle's element plus the same fraction of
# its RMS. It finds a wrong formula; accuracy has its own tests. By dtype of the result.
GATE = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}


class Missing(NamedTuple):
    """A provider that is not here, and why. False: `peer(...) and (lambda ...)` stays Missing."""

    reason: str

    def __bool__(self) -> bool:
        return False


Provider = Callable[..., Any]


class GateError(Exception):
    """A provider's result is not what the oracle says."""


@dataclass
class Settings:
    """Command-line options of a run."""

    device: torch.device
    quick: bool
    providers: set[str] | None


@dataclass
class Case:
    """One operation on one shape.

    Attributes:
        op: name of the operation, with its options where they matter.
        label: dtype and shape, for people.
        mode: "forward", "backward" or "forward+backward".
        inputs: arguments of the providers; gradients are taken in those that require grad.
        providers: name -> function(*inputs) -> tensor or tensors. "ours" is timed by the fixture.
        oracle: -> fp64 outputs, followed by fp64 gradients where the mode has a backward, each
            already passed through `select`.
        moved: bytes that the operation must read and write at least.
        limit: "copy" or "read", the machine rate that bounds it.
        targets: provider (or "copy", "read") -> least ratio of its time to ours.
        select: part of each result that the oracle holds (sampled rows, unmasked tokens).
        upstream: gradient of each checked output; ones if empty.
        extra: more functions of the inputs to time beside the providers, ungated.
        outputs: how many outputs are checked and differentiated; the rest (metrics) are only
            computed. All of them if None.
    """

    op: str
    label: str
    mode: str
    inputs: tuple[Any, ...]
    providers: dict[str, Provider | Missing]
    oracle: Callable[[], tuple[Tensor, ...]]
    moved: int
    limit: str = "copy"
    targets: dict[str, float] = field(default_factory=dict)
    select: Callable[[Tensor], Tensor] = lambda t: t
    upstream: tuple[Tensor, ...] = ()
    extra: dict[str, Provider] = field(default_factory=dict)
    outputs: int | None = None


def compiled(function: Provider) -> Provider:
    """`function` under torch.compile, in the form that suits it best: one graph, static shapes."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _backward(case: Case, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Gradients in the inputs that require grad."""
    upstream = case.upstream or tuple(torch.ones_like(o) for o in outputs)
    return torch.autograd.grad(
        outputs,
        [i for i in case.inputs if isinstance(i, Tensor) and i.requires_grad],
        [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=True)],
    )


def _steps(case: Case, function: Provider) -> tuple[Callable[[], tuple], Callable[..., tuple]]:
    """(prepare, run): `run(*prepare())` is one measurement, of which only `run` is timed."""

    def forward() -> tuple[Tensor, ...]:
        return _tensors(function(*case.inputs))

    def forward_only() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return forward()

    def backward(*outputs: Tensor) -> tuple[Tensor, ...]:
        return _backward(case, outputs[: case.outputs])

    def both() -> tuple[Tensor, ...]:
        outputs = forward()
        return (*outputs, *backward(*outputs))

    if case.mode == "forward":
        return tuple, forward_only
    return (forward, backward) if case.mode == "backward" else (tuple, both)


def gate(case: Case, function: Provider, expected: tuple[Tensor, ...]) -> float:
    """Worst error of the provider against the oracle, as a fraction of what the gate allows.

    Raises:
        GateError: a result is wrong.
    """
    outputs = _tensors(function(*case.inputs))[: case.outputs]
    results = list(outputs)
    if case.mode != "forward":
        results += _backward(case, outputs)
    if len(results) != len(expected):
        raise GateError(f"{len(results)} results, expected {len(expected)}")
    worst = 0.0
    for i, (result, e) in enumerate(zip(results, expected, strict=True)):
        r = case.select(result.detach()).double()
        if r.shape != e.shape:
            raise GateError(f"result {i}: shape {tuple(r.shape)}, expected {tuple(e.shape)}")
        allowed = GATE[result.dtype] * (e.abs() + e.square().mean().sqrt())
        error = float(((r - e).abs() / allowed.clamp(min=1e-30)).max())
        # Not `error > 1`: NaN must fail.
        if not error <= 1:
            raise GateError(f"result {i} is off by {error:.3g} times what the gate allows")
        worst = max(worst, error)
    return worst


def synchronize(device: torch.device) -> None:
    """Waits for the work queued on `device`."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _once(prepare: Callable[[], tuple], run: Callable[..., Any], device: torch.device) -> float:
    prepared = prepare()
    synchronize(device)
    start = time.perf_counter()
    # Bound to a name, so that freeing it is not timed.
    result = run(*prepared)  # noqa: F841
    synchronize(device)
    return time.perf_counter() - start


def peak_extra_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Memory that `call` holds at its highest above what was there before; None if unknown."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before

    def kilobytes(name: str) -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split(f"{name}:")[1].split()[0])

    try:
        # Linux: sets the high-water mark of resident memory back to the present.
        Path("/proc/self/clear_refs").write_text("5")
        before = kilobytes("VmRSS")
        call()
        return max(0, kilobytes("VmHWM") - before) * 1024
    except OSError:
        return None


def _machine_rates(case: Case, device: torch.device) -> dict[str, Provider]:
    """A copy and a read that move as many bytes as the case.

    fp32 whatever the case's dtype: a bf16 sum is bound by its conversions, not by memory.
    """
    elements = max(1, case.moved // 4)
    source = torch.ones(elements, device=device)
    half = source[: max(1, elements // 2)]
    return {"copy": half.clone, "read": source.sum}


def _summary(seconds: list[float]) -> dict[str, float | int]:
    t = torch.tensor(seconds, dtype=torch.float64)
    p20, median, p80 = torch.quantile(t, torch.tensor([0.2, 0.5, 0.8], dtype=t.dtype)).tolist()
    return {"median": median, "p20": p20, "p80": p80, "rounds": len(seconds)}


def measure(benchmark: Any, settings: Settings, failures: list[dict], case: Case) -> None:
    """Gates and times all providers of `case`; the figures go into `benchmark.extra_info`."""
    device = settings.device
    torch.compiler.reset()
    expected = case.oracle()
    record: dict[str, dict[str, Any]] = {}
    steps: dict[str, tuple[Callable[[], tuple], Callable[..., tuple]]] = {}
    for name, function in case.providers.items():
        if settings.providers is not None and name not in settings.providers:
            continue
        if isinstance(function, Missing):
            record[name] = {"skipped": function.reason}
            continue
        try:
            error = gate(case, function, expected)
            prepare, run = steps[name] = _steps(case, function)
            peak = peak_extra_bytes(lambda p=prepare, r=run: r(*p()), device)
            record[name] = {"gate": error, "peak_bytes": peak}
        except GateError as wrong:
            record[name] = {"error": str(wrong)}
        except Exception as broken:
            record[name] = {"error": f"{type(broken).__name__}: {str(broken).splitlines()[0]}"}
    info = {
        **{k: getattr(case, k) for k in ("op", "label", "mode", "moved", "limit", "targets")},
        "providers": record,
    }
    if "ours" not in steps:
        failures.append(info)
        pytest.fail(f"ours: {record['ours']['error']}")
    for name, function in case.extra.items():
        steps[name], record[name] = _steps(case, function), {}
    for name, call in _machine_rates(case, device).items():
        steps[name], record[name] = (tuple, call), {}

    prepare, run = steps.pop("ours")
    # Twice: the first call may still compile, allocate or page in.
    ours = [_once(prepare, run, device) for _ in range(2)][-1]
    estimates = {name: [_once(*s, device) for _ in range(2)][-1] for name, s in steps.items()}
    stride = {n: SLOW_STRIDE if t > SLOW_SECONDS else 1 for n, t in estimates.items()}
    per_round = ours + sum(t / stride[n] for n, t in estimates.items())
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(POINT_SECONDS / per_round)))
    rounds = QUICK_ROUNDS if settings.quick else rounds
    times: dict[str, list[float]] = {name: [] for name in steps}
    shuffler = random.Random(0)
    count = 0

    def others() -> tuple[tuple, dict]:
        nonlocal count
        for name in shuffler.sample(list(steps), len(steps)):
            if count % stride[name] == 0:
                times[name].append(_once(*steps[name], device))
        count += 1
        prepared = prepare()
        synchronize(device)
        return prepared, {}

    def timed(*prepared: Tensor) -> tuple[Tensor, ...]:
        result = run(*prepared)
        synchronize(device)
        return result

    gc.collect()
    gc.disable()
    try:
        benchmark.pedantic(timed, setup=others, rounds=rounds, iterations=1)
    finally:
        gc.enable()
    # Disabled (--benchmark-disable): everything ran, nothing is recorded.
    if benchmark.stats is not None:
        record["ours"].update(_summary(benchmark.stats.stats.data))
        for name, seconds in times.items():
            record[name].update(_summary(seconds))
    benchmark.group = case.op
    benchmark.extra_info.update(info)
