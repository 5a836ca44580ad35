"""What the benchmarks measure with: the gate, rotating inputs, clocks, memory; a point end to end.

Figures are not judged here, only that they are of what they say.
"""

import itertools
import platform

import pytest
import torch

from benchmarks.harness import (
    Case,
    Missing,
    Overwriting,
    Settings,
    clocks,
    memory,
    ragged,
    rotation,
    rounds,
)
from benchmarks.harness import measure as m

CPU = torch.device("cpu")
QUICK = Settings(CPU, True, None)


def square_case(mode="forward+backward", **providers):
    x = torch.arange(1.0, 9.0).requires_grad_()
    exact = x.detach().double()
    return Case(
        op="square",
        label="8",
        mode=mode,
        inputs=(x, torch.tensor(1.0).expand(8), "text"),
        providers={"ours": lambda x, one, _: x * x * one, **providers},
        oracle=lambda: (exact**2, 4 * exact)[: 1 if mode == "forward" else 2],
        moved=64,
        upstream=(torch.full((8,), 2.0),),
    )


class Benchmark:
    """pytest-benchmark's fixture, as far as a point uses it: that is off under pytest-xdist."""

    stats = True

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, function, setup, rounds, iterations):
        for _ in range(rounds):
            arguments, options = setup()
            function(*arguments, **options)


class Event:
    """A device's event on a clock of its own, which each record moves by a millisecond."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        Event.now += 1e-3
        self.at = Event.now

    def synchronize(self):
        assert self.at

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x, *_: x * x + 0.1,
        lambda x, *_: x.detach() ** 2 + 1.9 * (x - x.detach()),
        lambda x, *_: x * x * torch.where(x > 7.5, torch.nan, 1.0),
        lambda x, *_: (x * x)[:-1],
    ],
    ids=["value", "gradient", "nan", "shape"],
)
def test_gate_refuses_a_wrong_provider(wrong):
    case = square_case()
    expected = case.oracle()
    assert m.gate(case, case.providers["ours"], expected) < 1
    with pytest.raises((m.GateError, RuntimeError)):
        m.gate(case, wrong, expected)


def clocked(monkeypatch, seconds):
    """Rounds of ours, copy and eager on a clock that gives each call its `seconds(round)`."""
    current = {"name": ""}

    class Clock:
        def start(self, ahead):
            pass

        def stop(self):
            return seconds(current["name"], made.count)

    def provider(name):
        def run():
            current["name"] = name

        return tuple, run

    steps = {name: provider(name) for name in ("copy", "eager")}
    one = dict.fromkeys((*steps, "ours"), 1)
    made = rounds.Rounds(steps, provider("ours"), Clock(), one, one, CPU)
    return made


def test_rounds_whose_halves_differ_are_measured_again(monkeypatch):
    calls = []

    def seconds(name, count):
        # The machine is busy in the second half of the first attempt.
        calls.append(name)
        busy = len(calls) > 12 and len(calls) <= 24
        return {"copy": 1.0, "eager": 4.0, "ours": 2.0}[name] * (1.5 if busy else 1.0)

    found = clocked(monkeypatch, seconds)
    found.again(8)
    assert found.disagreement("copy") == pytest.approx(1.5)
    assert m._steadiest(found, "copy", 8, 2) == 1.0
    # One repetition was enough, and its times alone are kept.
    assert len(calls) == 48 and found.times["ours"] == [2.0] * 8
    assert found.ours_over("eager") == [0.5] * 8


def test_rounds_that_never_agree_keep_the_best_attempt(monkeypatch):
    attempt = []

    def seconds(name, count):
        if name == "ours" and count == 1:
            attempt.append(1)
        slow = {1: 2.0, 2: 1.3, 3: 1.6}[max(1, len(attempt))]
        return slow if name == "ours" and count > 4 else 1.0

    found = clocked(monkeypatch, seconds)
    found.again(8)
    assert m._steadiest(found, "copy", 8, 2) == pytest.approx(1.3)
    assert len(attempt) == 3 and max(found.times["ours"]) == 1.3


@pytest.mark.parametrize(
    "values,expected",
    [([1, 1, 2, 2], 2.0), ([2, 2, 1, 1], 2.0), ([1, 9, 1, 1, 1, 1], 1.0), ([1, 5, 9], 1.0)],
)
def test_disagreement_of_halves(values, expected):
    assert rounds.disagreement(values) == expected


def test_copy_rate():
    # Between a floppy disk and a cache.
    assert 1e6 < rounds.copy_rate(CPU) < 1e13


def test_only_providers_that_pass_are_timed():
    calls = []

    def broken(*_):
        calls.append(1)
        raise OSError("no such kernel\ndetails")

    passes = iter([torch.square])
    case = square_case(
        once=lambda x, *_: next(passes)(x),
        eager=lambda x, *_: torch.square(x),
        wrong=lambda x, *_: x * x * 1.01,
        broken=broken,
        absent=Missing("not installed"),
    )
    benchmark, failures = Benchmark(), []
    m.measure(benchmark, QUICK, failures, case)
    record = benchmark.extra_info["providers"]
    assert failures == [] and "off by" in record["wrong"]["error"]
    assert record["broken"] == {"error": "OSError: no such kernel"} and len(calls) == 1
    assert record["absent"] == {"skipped": "not installed"}
    assert record["once"] == {"error": "StopIteration: "}
    for name, figures in record.items():
        assert ("median" in figures) == (name in ("ours", "eager", "copy", "read")), name
        if "median" in figures:
            assert figures["rounds"] == m.QUICK_ROUNDS
            assert 0 < figures["p20"] <= figures["median"] <= figures["p80"]
    assert record["eager"]["ours_over"]["rounds"] == m.QUICK_ROUNDS


def test_a_wrong_result_of_ours_fails_the_point():
    case, failures = square_case(ours=lambda x, *_: x * x + 1), []
    with pytest.raises(pytest.fail.Exception, match="ours: result 0 is off"):
        m.measure(None, QUICK, failures, case)
    assert failures[0]["op"] == "square" and "median" not in failures[0]["providers"]["ours"]


def test_device_events_time_the_call_and_not_the_wait(monkeypatch):
    waits = []
    monkeypatch.setattr(clocks, "FLUSH_BYTES", 1 << 20)
    monkeypatch.setattr(torch.cpu, "Event", Event, raising=False)
    monkeypatch.setattr(torch.cpu, "_sleep", waits.append, raising=False)
    clock = clocks.DeviceEvents(CPU)
    clock.start(ahead=0.01)
    Event.now += 0.02
    assert clock.stop() == pytest.approx(0.021)
    assert waits == [clocks.LEAST_CYCLES + int(0.015 * clocks.CYCLES_PER_SECOND)]
    # A whole point on such a device.
    monkeypatch.setattr(m, "timer", clocks.DeviceEvents)
    benchmark = Benchmark()
    m.measure(benchmark, QUICK, [], square_case(eager=lambda x, *_: torch.square(x)))
    for name in ("ours", "eager", "copy", "read"):
        figures = benchmark.extra_info["providers"][name]
        assert figures["rounds"] == m.QUICK_ROUNDS
        assert figures["median"] > 0 and figures["host"] > 0


@pytest.mark.parametrize("mode", ["forward", "backward", "forward+backward"])
def test_a_provider_that_overwrites_its_input_gets_a_copy(mode):
    class Spoiling(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            gradient, result = 2 * x, x * x
            x.data.copy_(gradient)
            ctx.gradient = x.data
            return result

        @staticmethod
        def backward(ctx, upstream):
            return ctx.gradient * upstream

    case = square_case(mode)
    provider = Overwriting(lambda x, *_: Spoiling.apply(x))
    before = case.inputs[0].detach().clone()
    turns = itertools.repeat(rotation.Operands(case.inputs, case.upstream))
    for _ in range(2):
        assert m.gate(case, provider, case.oracle()) < 1
        prepare, run = m._steps(case, provider, turns)
        torch.testing.assert_close(run(*prepare())[-1].double(), case.oracle()[-1])
    assert torch.equal(case.inputs[0], before)


@pytest.mark.parametrize("mode", ["forward", "backward", "forward+backward"])
def test_each_call_gets_the_next_copy_whoever_calls(mode):
    case = square_case(mode)
    turns, _, _ = m._on_cpu(case, 96)
    # 36 bytes of inputs and 32 upstream: three copies are more than twice 96.
    expected = [next(turns) for _ in range(3)]
    pointers = [o.inputs[0].data_ptr() for o in expected]
    assert len(set(pointers)) == 3 == len({o.upstream[0].data_ptr() for o in expected})
    assert next(turns) is expected[0] and expected[0].inputs is case.inputs
    seen, cooled = [], []

    def spying(x, one, text):
        assert one.stride() == (0,) and text == "text"
        seen.append(x.data_ptr())
        return x * x * one

    plain, overwriting = (
        m._steps(case, p, turns, lambda: cooled.append(1)) for p in (spying, Overwriting(spying))
    )
    for prepare, run in (plain, overwriting, plain, plain):
        torch.testing.assert_close(run(*prepare())[-1].double(), case.oracle()[-1])
    # In turn whoever calls; a provider that overwrites has a copy of its own.
    turn = [pointers[(1 + i) % 3] for i in range(len(seen))]
    assert [s == t for s, t in zip(seen, turn, strict=True)] == [True, False, True, True]
    # Built while no clock ran, a graph would leave the inputs in the cache.
    assert len(cooled) == (len(seen) if mode == "backward" else 0)


def test_the_machine_moves_other_bytes_each_time_too():
    _, rates, cool = m._on_cpu(square_case("forward"), 1024)
    for name, elements in (("copy", 8), ("read", 16)):
        prepare, run = rates[name]
        (first,), (second,) = prepare(), prepare()
        assert len(first) == len(second) == elements and first.data_ptr() != second.data_ptr()
        assert run(first).sum() == elements
    assert cool() * 4 > 1024


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(6, 5),
        lambda: torch.randn(12, 10)[1::2, ::3].t(),
        lambda: torch.randn(6, 1).expand(6, 5),
        lambda: torch.randn(40).as_strided((5, 8), (4, 1)),
        lambda: torch.randn(6, 5).bfloat16().requires_grad_(),
        lambda: torch.empty(0, 4) > 0,
        lambda: torch.tensor(3.0),
    ],
    ids="plain gaps expanded overlapping gradient empty scalar".split(),
)
def test_a_copy_differs_in_its_memory_alone(make):
    x = make()
    copy = rotation.duplicate(x)
    assert torch.equal(copy, x) and copy.stride() == x.stride() and copy.dtype == x.dtype
    assert copy.requires_grad == x.requires_grad and copy.is_leaf
    if x.numel():
        assert copy.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_copies_are_more_than_the_largest_cache_holds_and_no_more_than_the_bound(tmp_path):
    assert rotation.last_level_cache(tmp_path) == rotation.USUAL_CACHE
    for i, size in enumerate(("48K", "2048K", "32M")):
        (tmp_path / f"index{i}").mkdir()
        (tmp_path / f"index{i}" / "size").write_text(size + "\n")
    assert rotation.last_level_cache(tmp_path) == 32 << 20
    cache = 480 << 20
    for size in (1, 1 << 12, 1 << 20, 100 << 20, 256 << 20, 400 << 20, 512 << 20):
        n = rotation.copies(size, cache)
        assert n * size <= rotation.MOST_BYTES and n >= 2
        assert n * size > cache or n == rotation.MOST_COPIES
    # Of larger ones there is no room for two.
    assert [rotation.copies(s << 20, cache) for s in (513, 1024, 4096)] == [1, 1, 1]
    assert rotation.copies(0, cache) == rotation.MOST_COPIES and rotation.copies(64, 0) == 2


def test_response_lengths_are_distributed_as_stated():
    torch.manual_seed(0)
    lengths = ragged.response_lengths(20000, 8192, CPU)
    assert lengths.min() >= 16 and lengths.max() == 8192
    assert abs(lengths.median() / 2048 - 1) < 0.05
    assert abs((lengths == 8192).float().mean() - 1 / 12) < 0.01
    assert abs(lengths.float().mean() / 8192 - 0.35) < 0.01
    assert ragged.offsets(lengths[:3]).tolist() == [0, *itertools.accumulate(lengths[:3].tolist())]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="Linux's mark, what glibc holds back")
def test_peak_memory_sees_a_temporary_also_in_freed_memory():
    size = 1 << 26
    peak = memory.peak_extra_bytes(lambda: torch.ones(size // 4).sum(), CPU)
    assert size * 0.9 < peak < size * 1.5
    # Small blocks of the heap, which a free block on top keeps from going back.
    rows = [torch.ones(1 << 14) for _ in range(1024)]
    top = rows.pop()
    del rows
    peak = memory.peak_extra_bytes(lambda: [torch.ones(1 << 14) for _ in range(512)], CPU)
    assert len(top) and peak > (512 << 16) * 0.9
