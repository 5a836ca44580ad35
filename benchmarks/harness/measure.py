"""Measures one point: all providers of one operation on one shape, in the same rounds.

A provider is timed only if its result agrees with the fp64 oracle. In each round, the other
providers and the machine's copy and read run in random order, then `pytest_benchmark` times ours.
A drifting clock therefore affects all of them equally.

On a CPU, the wall clock is used, and each call gets another copy of the inputs, so that the caches
do not hold them. On a GPU, device events are used, with a cold L2 cache and launches queued far
enough ahead that they do not delay the device. The host time of a call is reported separately.
"""

import gc
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from .case import Case, Missing, Overwriting, Provider, Settings
from .clocks import DeviceEvents, host_once, once, timer
from .memory import measured
from .rotation import Operands, chunks, last_level_cache, rotated
from .rounds import REPEATS, STEADY, Rounds, Steps, copy_rate

# Cheap points have more rounds. A provider slower than SLOW_SECONDS runs in every fourth round.
MAX_ROUNDS, POINT_SECONDS = 100, 6.0
SLOW_SECONDS, SLOW_STRIDE = 1.0, 4
QUICK_ROUNDS = 4
# On a GPU calls are short and compilation is slow.
GPU_POINT_SECONDS, GPU_SLOW_SECONDS, GPU_SLOW_STRIDE = 2.0, 0.05, 10

# The largest error that passes the gate, by dtype of the result: a fraction of the oracle's element
# plus the same fraction of its RMS, or of its row's RMS if larger, because the gradient of a
# frequent token is large but has small elements. The gate finds wrong formulas, not inaccuracy.
GATE = {torch.float32: 1e-4, torch.bfloat16: 6e-2, torch.float16: 1e-2}


class GateError(Exception):
    """The result of a provider disagrees with the oracle."""


def _tensors(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _inputs(inputs: tuple[Any, ...], function: Provider) -> tuple[Any, ...]:
    """The arguments for a provider, with a copy of an input that it overwrites."""
    if not isinstance(function, Overwriting):
        return inputs
    first, *rest = inputs
    return (first.detach().clone().requires_grad_(first.requires_grad), *rest)


def _backward(operands: Operands, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradients w.r.t. the inputs that require grad."""
    upstream = operands.upstream or tuple(torch.ones_like(o) for o in outputs)
    return torch.autograd.grad(
        outputs,
        [i for i in operands.inputs if isinstance(i, Tensor) and i.requires_grad],
        [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=True)],
    )


def _steps(
    case: Case, function: Provider, turns: Iterator[Operands], cool: Callable[[], Any] = tuple
) -> tuple[Callable[[], tuple], Callable[..., tuple]]:
    """(prepare, run): `run(*prepare())` is one measurement, of which only `run` is timed.

    turns: the operands of each call. cool: removes data of a forward pass from the caches.
    """

    def operands() -> tuple[Operands]:
        given = next(turns)
        return (given._replace(inputs=_inputs(given.inputs, function)),)

    def forward(given: Operands) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return _tensors(function(*given.inputs))

    def graph() -> tuple[Operands, tuple[Tensor, ...]]:
        (given,) = operands()
        outputs = _tensors(function(*given.inputs))
        cool()
        return given, outputs

    def backward(given: Operands, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return _backward(given, outputs[: case.outputs])

    def both(given: Operands) -> tuple[Tensor, ...]:
        outputs = _tensors(function(*given.inputs))
        return (*outputs, *backward(given, outputs))

    if case.mode == "backward":
        return graph, backward
    return operands, forward if case.mode == "forward" else both


def gate(case: Case, function: Provider, expected: tuple[Tensor, ...]) -> float:
    """The provider's largest error against the oracle, as a fraction of the allowed error.

    Raises:
        GateError: a result is wrong.
    """
    given = Operands(_inputs(case.inputs, function), case.upstream)
    outputs = _tensors(function(*given.inputs))[: case.outputs]
    results = list(outputs)
    if case.mode != "forward":
        results += _backward(given, outputs)
    if len(results) != len(expected):
        raise GateError(f"{len(results)} results, expected {len(expected)}")
    worst = 0.0
    for i, (result, e) in enumerate(zip(results, expected, strict=True)):
        r = case.select(result.detach()).double()
        if r.shape != e.shape:
            raise GateError(f"result {i}: shape {tuple(r.shape)}, expected {tuple(e.shape)}")
        scale = e.square().mean().sqrt()
        if e.dim() > 1:
            scale = e.square().mean(-1, keepdim=True).sqrt().clamp(min=scale)
        allowed = max(GATE[result.dtype], GATE[case.rounded]) * (e.abs() + scale)
        error = float(((r - e).abs() / allowed.clamp(min=1e-30)).max())
        # `error > 1` would accept NaN.
        if not error <= 1:
            raise GateError(f"result {i} is off by {error:.3g} times what the gate allows")
        worst = max(worst, error)
    return worst


def _on_cpu(case: Case, cache: int) -> tuple[Iterator[Operands], Steps, Callable[[], Any]]:
    """The operands of each call; a copy and a read of as many bytes as the case; and `cool`.

    Copy and read use fp32 for all dtypes: a bf16 sum is bound by conversions, not by memory.
    """
    whole, parts = chunks(case.moved, cache)

    def half() -> tuple[Tensor]:
        part = next(parts)
        return (part[: max(1, len(part) // 2)],)

    rates = {"copy": (half, torch.clone), "read": (lambda: (next(parts),), torch.sum)}
    return rotated(Operands(case.inputs, case.upstream), cache), rates, whole.sum


def _on_gpu(case: Case, device: torch.device) -> tuple[Iterator[Operands], Steps, Any]:
    """Like `_on_cpu`; `cool` does nothing, because the clock empties the cache before each call."""
    # Some GPUs move constant data faster than random numbers.
    source = torch.rand(max(1, case.moved // 4), device=device)
    half = source[: max(1, len(source) // 2)]
    rates = {"copy": (tuple, half.clone), "read": (tuple, source.sum)}
    return itertools.repeat(Operands(case.inputs, case.upstream)), rates, lambda: None


def _summary(values: list[float]) -> dict[str, float | int]:
    p20, median, p80 = np.quantile(values, (0.2, 0.5, 0.8)).tolist()
    return {"median": median, "p20": p20, "p80": p80, "rounds": len(values)}


def peak_alone(case: Case, name: str, device: torch.device) -> dict[str, int | None]:
    """The peak memory of one provider, in a process that has done nothing else."""
    turns = itertools.repeat(Operands(case.inputs, case.upstream))
    prepare, run = _steps(case, case.providers[name], turns)
    # The first call includes one-time setup.
    run(*prepare())
    prepared = prepare()
    return measured(lambda: run(*prepared), device)


def _steadiest(found: Rounds, limit: str, rounds: int, repeats: int) -> float:
    """Measures again while the halves of the rounds differ; keeps the attempt that agrees most."""
    best, kept = found.disagreement(limit), (found.times, found.hosts)
    for _ in range(repeats):
        if best <= STEADY:
            break
        found.again(rounds)
        if found.disagreement(limit) < best:
            best, kept = found.disagreement(limit), (found.times, found.hosts)
    found.times, found.hosts = kept
    return best


_POINT = ("op", "label", "mode")


def measure(benchmark: Any, settings: Settings, failures: list[dict], case: Case) -> None:
    """Checks and times all providers of `case`; stores the results in `benchmark.extra_info`."""
    device = settings.device
    torch.compiler.reset()
    expected = case.oracle()
    record: dict[str, dict[str, Any]] = {}
    steps: Steps = {}
    # Seconds of one call of each provider so far.
    took: dict[str, float] = {}
    if device.type == "cpu":
        # A quick run measures nothing; two copies show that rotation works.
        turns, rates, cool = _on_cpu(case, 0 if settings.quick else last_level_cache())
    else:
        turns, rates, cool = _on_gpu(case, device)
    for name, function in case.providers.items():
        if settings.providers is not None and name not in settings.providers:
            continue
        if isinstance(function, Missing):
            record[name] = {"skipped": function.reason}
            continue
        try:
            error = gate(case, function, expected)
            prepare, run = steps[name] = _steps(case, function, turns, cool)
            if case.mode == "forward":
                # The gate ran with autograd; without it a provider may have to compile again.
                run(*prepare())
            prepared = prepare()
            start = time.perf_counter()
            peaks = measured(lambda r=run, p=prepared: r(*p), device)
            took[name] = time.perf_counter() - start
            record[name] = {"gate": error, **peaks}
        except GateError as wrong:
            record[name] = {"error": str(wrong)}
        except Exception as broken:
            # It may have failed in its second call.
            steps.pop(name, None)
            reason = (str(broken).splitlines() or [""])[0]
            record[name] = {"error": f"{type(broken).__name__}: {reason}"}
        # This also frees the inputs of a call that failed.
        prepared = None
        if device.type != "cpu":
            # Free memory that a provider left cached or referenced, for the next one.
            gc.collect()
            getattr(torch, device.type).empty_cache()
    info = {
        **{k: getattr(case, k) for k in (*_POINT, "moved", "flops", "limit", "targets", "at_most")},
        "providers": record,
    }
    if "ours" not in steps:
        failures.append(info)
        pytest.fail(f"ours: {record['ours']['error']}")
    for name, function in case.extra.items():
        steps[name], record[name] = _steps(case, function, turns, cool), {}
    for name, pair in (rates | {n: (tuple, f) for n, f in case.baselines.items()}).items():
        steps[name], record[name] = pair, {}

    clock = timer(device)
    is_gpu = isinstance(clock, DeviceEvents)
    point_seconds = GPU_POINT_SECONDS if is_gpu else POINT_SECONDS
    slow, every = (GPU_SLOW_SECONDS, GPU_SLOW_STRIDE) if is_gpu else (SLOW_SECONDS, SLOW_STRIDE)
    # Up to two more calls, because the first may still compile or page in. Gate and memory have
    # called every provider, so slow ones run only once more and the slowest not at all.
    host = {} if is_gpu else dict(took)
    for most in (4 * slow, slow):
        again = [n for n in steps if is_gpu or host.get(n, 0.0) < most]
        host |= {n: host_once(*steps[n], device) for n in again}
    estimates = dict(host)
    if is_gpu:
        estimates = {name: once(*s, clock, host[name]) for name, s in steps.items()}
    prepare, run = steps.pop("ours")
    ours = max(estimates.pop("ours"), host["ours"] if is_gpu else 0.0)
    # Only slow providers skip rounds. Copy, read and baselines run in every round.
    strided = {n for n in case.providers if max(estimates.get(n, 0.0), host.get(n, 0.0)) > slow}
    stride = {n: every if n in strided else 1 for n in estimates}
    per_round = ours + sum(max(t, host[n]) / stride[n] for n, t in estimates.items())
    if settings.seconds is not None:
        point_seconds = settings.seconds
    rounds = max(case.least_rounds, min(MAX_ROUNDS, int(point_seconds / per_round)))
    rounds = QUICK_ROUNDS if settings.quick else rounds
    found = Rounds(steps, (prepare, run), clock, host, stride, device)
    gc.collect()
    gc.disable()
    try:
        benchmark.pedantic(found.timed, setup=found.others, rounds=rounds, iterations=1)
        # With --benchmark-disable everything has run but nothing is recorded.
        if benchmark.stats is not None:
            if not settings.quick:
                info["copy_rate"] = copy_rate(device)
                # A GPU's minutes are too few for repetitions.
                repeats = 0 if is_gpu else REPEATS
                info["disagreement"] = _steadiest(found, case.limit, rounds, repeats)
            for name, seconds in found.times.items():
                record[name].update(_summary(seconds))
                if name != "ours":
                    record[name]["ours_over"] = _summary(found.ours_over(name))
                if is_gpu:
                    record[name]["host"] = _summary(found.hosts[name])["median"]
    finally:
        gc.enable()
    benchmark.group = case.op
    benchmark.extra_info.update(info)
