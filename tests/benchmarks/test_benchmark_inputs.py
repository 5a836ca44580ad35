"""What the benchmark suite measures with: rotating inputs, lengths, peers, memory elsewhere."""

import importlib
import itertools
import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


@pytest.fixture
def suite(monkeypatch):
    """Imports a module of the suite."""
    monkeypatch.syspath_prepend(ROOT)
    return lambda name: importlib.import_module(f"benchmarks.harness.{name}")


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(6, 5),
        lambda: torch.randn(6, 5).t(),
        lambda: torch.randn(12, 10)[1::2, ::3],
        lambda: torch.randn(6, 1).expand(6, 5),
        lambda: torch.randn(40).as_strided((5, 8), (4, 1)),
        lambda: torch.randn(6, 5).bfloat16().requires_grad_(),
        lambda: torch.randn(6) > 0,
        lambda: torch.empty(0, 4),
        lambda: torch.tensor(3.0),
    ],
    ids="plain transposed gaps expanded overlapping gradient bool empty scalar".split(),
)
def test_a_copy_differs_in_its_memory_alone(suite, make):
    x = make()
    copy = suite("rotation").duplicate(x)
    assert torch.equal(copy, x) and copy.stride() == x.stride() and copy.dtype == x.dtype
    assert copy.requires_grad == x.requires_grad and copy.is_leaf
    if x.numel():
        assert copy.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()


def test_copies_are_more_than_the_cache_holds_and_no_more_than_the_bound(suite):
    rotation = suite("rotation")
    cache = 480 << 20
    for size in (1, 1 << 12, 1 << 20, 100 << 20, 256 << 20, 400 << 20, 512 << 20):
        n = rotation.copies(size, cache)
        assert n * size <= rotation.MOST_BYTES and n >= 2
        assert n * size > cache or n == rotation.MOST_COPIES
    # Of larger ones there is no room for two.
    assert [rotation.copies(s << 20, cache) for s in (513, 1024, 4096)] == [1, 1, 1]
    assert rotation.copies(0, cache) == rotation.MOST_COPIES and rotation.copies(64, 0) == 2


def test_the_largest_cache_counts(suite, tmp_path):
    read = suite("rotation").last_level_cache
    assert read(tmp_path) == suite("rotation").USUAL_CACHE
    for i, size in enumerate(("48K", "2048K", "32M")):
        (tmp_path / f"index{i}").mkdir()
        (tmp_path / f"index{i}" / "size").write_text(size + "\n")
    assert read(tmp_path) == 32 << 20


def square_case(harness, mode, **providers):
    x = torch.arange(1.0, 9.0).requires_grad_()
    return harness.Case(
        op="square",
        label="8",
        mode=mode,
        inputs=(x, torch.tensor(1.0).expand(8), "text"),
        providers={"ours": lambda x, one, _: x * x * one, **providers},
        oracle=lambda: (x.detach().double() ** 2,),
        moved=64,
        upstream=(torch.full((8,), 2.0),),
    )


@pytest.mark.parametrize("mode", ["forward", "backward", "forward+backward"])
def test_each_call_gets_the_next_copy_whoever_calls(suite, mode):
    harness = suite("measure")
    case = square_case(harness, mode)
    turns, _, _ = harness._on_cpu(case, 96)
    # 36 bytes of inputs and 32 upstream: three copies are more than twice 96.
    expected = [next(turns) for _ in range(3)]
    assert len({o.inputs[0].data_ptr() for o in expected}) == 3
    assert len({o.upstream[0].data_ptr() for o in expected}) == 3
    assert next(turns) is expected[0] and expected[0].inputs is case.inputs
    seen, cooled = [], []

    def spying(x, one, text):
        assert one.stride() == (0,) and text == "text"
        seen.append(x.data_ptr())
        return x * x * one

    first, second = (
        harness._steps(case, p, turns, lambda: cooled.append(1))
        for p in (spying, harness.Overwriting(spying))
    )
    for prepare, run in (first, second, first, first):
        torch.testing.assert_close(run(*prepare())[0], run(*prepare())[0])
        last = run(*prepare())[-1]
        wanted = case.inputs[0].detach() ** 2 if mode == "forward" else 4 * case.inputs[0].detach()
        torch.testing.assert_close(last, wanted)
    # In turn whoever calls; a provider that overwrites has a copy of its own.
    pointers = [o.inputs[0].data_ptr() for o in expected]
    turn = [pointers[(1 + i) % 3] for i in range(len(seen))]
    own = range(3, 6)
    assert all((s == t) == (i not in own) for i, (s, t) in enumerate(zip(seen, turn, strict=True)))
    # Built while no clock ran, a graph would leave the inputs in the cache.
    assert len(cooled) == (len(seen) if mode == "backward" else 0)


def test_the_machine_moves_other_bytes_each_time_too(suite):
    harness = suite("measure")
    _, rates, cool = harness._on_cpu(square_case(harness, "forward"), 1024)
    for name, elements in (("copy", 8), ("read", 16)):
        prepare, run = rates[name]
        (first,), (second,) = prepare(), prepare()
        assert len(first) == len(second) == elements and first.data_ptr() != second.data_ptr()
        assert run(first).sum() == elements
    assert cool() * 4 > 1024


def test_response_lengths_are_distributed_as_stated(suite):
    torch.manual_seed(0)
    ragged = suite("ragged")
    lengths = ragged.response_lengths(20000, 8192, CPU)
    assert lengths.min() >= 16 and lengths.max() == 8192
    assert abs(lengths.median() / 2048 - 1) < 0.05
    assert abs((lengths == 8192).float().mean() - 1 / 12) < 0.01
    assert abs(lengths.float().mean() / 8192 - 0.35) < 0.01
    assert ragged.response_lengths(500, 20, CPU).min() == 16
    assert ragged.offsets(lengths[:3]).tolist() == [0, *itertools.accumulate(lengths[:3].tolist())]


def test_what_needs_a_gpu_is_named_on_a_cpu(suite, tmp_path):
    command = [sys.executable, "-m", "benchmarks.run", "r", "--quick"]
    command += ["--out", str(tmp_path), "--providers", "trl kernel,liger,flash-attn,quack,cce"]
    points = "bf16-logprobs and not backward and not 2048x"
    done = subprocess.run([*command, "--", "-k", points], cwd=ROOT, capture_output=True, text=True)
    points = "linear_policy_loss and bf16"
    assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run(
        [*command, "--add", "--", "-k", points], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("trl kernel", "liger", "flash-attn", "quack", "cce"):
        assert f"- {name} skipped: needs a GPU" in (tmp_path / "r.md").read_text(), name


@pytest.mark.skipif(platform.system() != "Linux", reason="resident high-water mark is Linux's")
def test_peak_memory_sees_a_temporary(suite):
    size = 1 << 26
    peak = suite("memory").peak_extra_bytes(lambda: torch.ones(size // 4).sum(), CPU)
    assert size * 0.9 < peak < size * 1.5


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what glibc holds back")
def test_peak_memory_sees_what_fits_into_freed_memory(suite):
    # Small blocks of the heap, which a free block on top keeps from going back.
    rows = [torch.ones(1 << 14) for _ in range(1024)]
    top = rows.pop()
    del rows
    call = lambda: [torch.ones(1 << 14) for _ in range(512)]  # noqa: E731
    peak = suite("memory").peak_extra_bytes(call, CPU)
    assert len(top) and peak > (512 << 16) * 0.9


@pytest.mark.skipif(platform.system() != "Linux", reason="resident high-water mark is Linux's")
def test_memory_in_a_fresh_process_goes_into_the_results(tmp_path):
    command = [sys.executable, "-m", "benchmarks.run", "r", "--quick"]
    command += ["--out", str(tmp_path), "--providers", "eager", "--"]
    points = "(bf16-entropy-forward+backward and not 2048x) or kl_penalty"
    done = subprocess.run([*command, "-k", points], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    file = tmp_path / "r.json"
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.studies.memory", str(file)],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        found = {b["name"]: b["extra_info"] for b in json.loads(file.read_text())["benchmarks"]}
        logits = found.pop("test_token_logprobs[bf16-entropy-forward+backward]")["providers"]
        assert logits["ours"]["fresh"] and logits["eager"]["fresh"]
        # The gradient at least: 24×1000 of two bytes.
        assert logits["eager"]["peak_bytes"] >= 24 * 1000 * 2
        assert not any("fresh" in p for e in found.values() for p in e["providers"].values())
    # What is there is not measured again.
    assert done.stdout == ""
