"""`make gpu-check` without a GPU: parts resume, end in time, report what failed; a dry run."""

import argparse
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

import rlhf_kernels as rk

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def check(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.gpu.check")


def parts(monkeypatch, check, **functions):
    monkeypatch.setattr(check, "PARTS", {n: check.Part(f, 30) for n, f in functions.items()})
    # Seconds of imports; it has its own test.
    monkeypatch.setattr(check, "refusal", lambda run: None)


def done(run):
    return {"status": "done"}


def test_finished_parts_are_not_run_again(check, monkeypatch, tmp_path, capsys):
    calls = []

    def fails_once(run):
        calls.append("b")
        return {
            "status": "done" if len(calls) > 1 else "failed",
            "failures": ["gate 7"][len(calls) - 1 :],
        }

    def counted(run):
        calls.append("a")
        return {"status": "done"}

    parts(monkeypatch, check, env=done, gpu=fails_once, tests=counted)
    arguments = ["--out", str(tmp_path), "--device", "cpu"]
    # A failure fails the run, but the later part runs.
    assert check.main(arguments) == 1
    assert calls == ["b", "a"]
    assert "gpu: gate 7" in (tmp_path / "report.md").read_text()
    # What failed is run again, what was done is not.
    assert check.main(arguments) == 0
    assert calls == ["b", "a", "b"]
    assert "gate 7" not in (tmp_path / "report.md").read_text()
    # Unless it is named.
    assert check.main([*arguments, "--parts", "tests"]) == 0
    assert calls == ["b", "a", "b", "a"]
    with pytest.raises(SystemExit):
        check.main([*arguments, "--parts", "nonsense"])
    assert "unknown parts: nonsense" in capsys.readouterr().err


def test_a_part_that_raises_is_a_failure_and_the_rest_runs(check, monkeypatch, tmp_path):
    def broken(run):
        raise KeyError("no such thing")

    parts(monkeypatch, check, env=broken, gpu=done)
    assert check.main(["--out", str(tmp_path), "--device", "cpu"]) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["env"]["status"] == "failed" and report["gpu"]["status"] == "done"
    assert "KeyError" in report["env"]["failures"][0]


def test_what_hangs_is_cut_off_with_all_that_it_started(check, monkeypatch, tmp_path):
    code = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""

    def hangs(run):
        run.ends = time.monotonic() + 3
        code_of_exit = run.python("hang.log", "-c", code)
        return {"status": check.status(code_of_exit)}

    parts(monkeypatch, check, gpu=hangs, tests=done)
    assert check.main(["--out", str(tmp_path), "--device", "cpu"]) == 1
    results = check.load(tmp_path)
    assert results["gpu"]["status"] == "cut off" and results["tests"]["status"] == "done"
    state = Path(f"/proc/{(tmp_path / 'hang.log').read_text().split()[0]}/stat")
    # Gone, or dead and waiting for its new parent.
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] in "ZX"


def test_time_that_a_part_leaves_is_the_later_ones(check, monkeypatch, tmp_path):
    left = {}

    def part(name):
        def run(r):
            left[name] = r.left()
            return {"status": "done"}

        return run

    parts(monkeypatch, check, env=part("env"), gpu=part("gpu"), tests=part("tests"))
    assert check.main(["--out", str(tmp_path), "--device", "cpu", "--limit", "100"]) == 0
    # 85 s without the reserve: 30 for each at first, and the last may use all.
    assert 29 < left["env"] <= 30 and 50 < left["gpu"] <= 55 and 75 < left["tests"] <= 85


def test_all_parts_end_within_ten_minutes(check):
    # The last one, which may need 11 s to be stopped, ends inside the reserve.
    assert sum(p.budget for p in check.PARTS.values()) + check.RESERVE <= 590
    assert check.RESERVE > 11


def test_every_benchmark_is_run(check):
    files = {f.stem for f in (ROOT / "benchmarks/points").glob("[a-z]*.py")} - {"conftest"}
    assert set(check.BENCH_FILES) == files


def test_every_test_of_the_backends_is_run(check):
    of_backends = {
        str(f.relative_to(ROOT / "tests").with_suffix(""))
        for f in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"def test_\w+\([^)]*\bbackend\b", f.read_text())
    }
    # Processes over gloo, and trainers that are not there: on a CPU's tensors.
    elsewhere = {"head/test_shard", *(f"parity/test_{n}" for n in ("openrlhf", "trl", "verl"))}
    assert set(check.TEST_FILES) == of_backends - elsewhere


def test_no_such_device_is_one_line(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu.check", "--out", str(tmp_path)]
    run = subprocess.run(
        [*command, "--device", "nonsense"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 2 and run.stdout == ""
    (line,) = run.stderr.splitlines()
    assert line.startswith("gpu_check: cannot use device 'nonsense': RuntimeError: ")
    assert not (tmp_path / "report.md").exists()


def test_a_terminated_run_leaves_no_process_and_goes_on(tmp_path):
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
import signal
from benchmarks.gpu import check
def first(run):
    return {{"status": "done"}}
def second(run):
    file = run.out / "once"
    if file.exists():
        return {{"status": "done"}}
    file.touch()
    run.python("child.log", "-c", "import os, time; print(os.getpid()); time.sleep(600)")
check.PARTS = {{"env": check.Part(first, 60), "gpu": check.Part(second, 60)}}
check.refusal = lambda run: None
signal.signal(signal.SIGTERM, check.terminated)
sys.exit(check.main(["--out", {str(tmp_path)!r}, "--device", "cpu"]))
"""
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    log = tmp_path / "child.log"
    deadline = time.monotonic() + 300
    while not (log.exists() and log.read_text().strip()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=300)
    assert run.returncode == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text().split()[0]), 0)
    # What was finished is kept, the rest is run.
    again = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and "env: done before" in again.stdout
    assert "| gpu | done |" in (tmp_path / "report.md").read_text()


def test_wheels_add_what_is_missing_and_nothing_else(check, monkeypatch, tmp_path):
    wheels, out = tmp_path / "wheels", tmp_path / "out"
    wheels.mkdir(), out.mkdir()
    names = ("rk_absent_peer-1.0-py3-none-any.whl", "pytest-1.0-py3-none-any.whl")
    for name in names:
        package = name.split("-")[0]
        with zipfile.ZipFile(wheels / name, "w") as archive:
            archive.writestr(f"{package}/__init__.py", "answer = 42")
            info = zipfile.ZipInfo(f"{package}/bin/compute-sanitizer")
            info.external_attr = 0o100755 << 16
            archive.writestr(info, "#!/bin/sh")
    process = importlib.import_module("benchmarks.gpu.process")
    monkeypatch.setattr(sys, "path", list(sys.path))
    (folder,) = process.unpacked(wheels, out)
    assert "rk_absent_peer" in str(folder) and process.missing("rk_absent_peer") is None
    assert os.access(folder / "rk_absent_peer/bin/compute-sanitizer", os.X_OK)
    changed = (folder / "rk_absent_peer/__init__.py").stat().st_mtime_ns
    assert process.unpacked(wheels, out) == [folder]
    assert (folder / "rk_absent_peer/__init__.py").stat().st_mtime_ns == changed
    # And the processes see it, behind what the caller had.
    seen = {}

    def part(run):
        run.python("seen.log", "-c", "import rk_absent_peer as p, pytest; print(p.answer)")
        seen["text"] = run.tail("seen.log")
        return {"status": "done"}

    parts(monkeypatch, check, env=part)
    arguments = ["--out", str(out), "--device", "cpu", "--wheels", str(wheels)]
    assert check.main(arguments) == 0 and seen["text"] == "42"
    with pytest.raises(NotADirectoryError):
        process.unpacked(tmp_path / "nowhere", out)


def test_a_cut_off_line_of_a_point_is_measured_again(check, tmp_path):
    run = type("Run", (), {"out": tmp_path})
    good, bad = ({"point": p, "failed": p == "b"} for p in "ab")
    lines = [json.dumps(good), json.dumps(bad), '{"point": "c", "fai']
    (tmp_path / "bench-points.jsonl").write_text("\n".join(lines))
    assert check._records(run) == [good, bad]
    assert check._records(run, failed=False) == [good]
    assert (tmp_path / "bench-points.jsonl").read_text() == json.dumps(good) + "\n"


TOOL = """#!{python}
import subprocess, sys
if "{broken}" == "all":
    print("Device not supported"); sys.exit(1)
print("========= COMPUTE-SANITIZER", sys.argv[2])
at = sys.argv.index("50") + 1
if sys.argv[2] == "memcheck":
    at += 2
assert sys.argv[at + 1 : at + 3] == ["-m", "tests.kernels.gpu_faults"]
if sys.argv[2] == "{broken}":
    print("=========     at vectorized_elementwise_kernel" if "{broken}" == "initcheck" else "")
    print("========= ERROR SUMMARY: 1 error"); sys.exit(9)
print("========= ERROR SUMMARY: 0 errors")
"""


@pytest.mark.parametrize("backends", [["triton"], ["cuda", "triton"]], ids="+".join)
@pytest.mark.parametrize(
    "broken,outcome,words",
    [
        ("none", "done", ["done", "done", "done"]),
        ("memcheck", "failed", ["failed", "done", "done"]),
        ("initcheck", "done", ["done", "done", "done; it names kernels of torch only"]),
        ("all", "skipped", ["skipped: Device not supported"] * 3),
    ],
)
def test_the_sanitizer_part(check, monkeypatch, tmp_path, broken, outcome, words, backends):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(TOOL.format(python=sys.executable, broken=broken))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    process = importlib.import_module("benchmarks.gpu.process")
    plain = process.Run.process

    def faster(run, log, *command, **variables):
        # The faults themselves have a test; here they would take a minute.
        if log == "sanitizer-plain.log":
            command = (sys.executable, "-c", "")
        return plain(run, log, *command, **variables)

    monkeypatch.setattr(process.Run, "process", faster)
    parts(monkeypatch, check, sanitizer=check.part_sanitizer)
    monkeypatch.setattr(check, "kernel_backends", lambda run: backends)
    check.main(["--out", str(tmp_path), "--device", "cuda"])
    result = check.load(tmp_path)["sanitizer"]
    expected = {f"{t} {b}": w for t, w in zip(check.SANITIZER_TOOLS, words, strict=True)
                for b in backends}  # fmt: skip
    assert result["status"] == outcome and result["tools"] == expected
    assert "compute-sanitizer: memcheck" in (tmp_path / "report.md").read_text()


def test_the_sanitizer_tells_our_kernels_from_others(check):
    line = "=========     at {}+0x4d0 in kernel.py:12"
    assert check._names_ours(line.format("partial_kernel"))
    assert not check._names_ours(line.format("vectorized_elementwise_kernel"))
    assert check._names_ours(line.format("void rk::cuda::<unnamed>::scan_kernel<(int)16>(...)"))


def test_backends_are_those_of_the_device(check, tmp_path):
    process = importlib.import_module("benchmarks.gpu.process")
    run = process.Run(
        argparse.Namespace(device="cuda", out=tmp_path, dry_run=False, wheels=None, limit=60)
    )
    found = process.kernel_backends(run)
    # Without a GPU there may be none: then Triton's, whose tests say so.
    assert found == ([b for b in rk.available_backends("cuda") if b != "reference"] or ["triton"])
    run.device = "cpu"
    assert process.kernel_backends(run) == ["triton"]


def test_failures_and_reasons_are_read_from_pytest(check, tmp_path):
    (tmp_path / "test_three.py").write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "def test_absent(): pytest.skip('no such device')\n"
    )
    file = tmp_path / "out.xml"
    command = [sys.executable, "-m", "pytest", str(tmp_path), "-p", "no:cacheprovider"]
    subprocess.run([*command, f"--junitxml={file}"], capture_output=True, cwd=tmp_path)
    found = check.read_junit(file)
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 1, 1)
    assert "test_bad: assert 1 == 2" in found["failures"][0]
    assert list(found["skips"].values()) == [1] and "no such device" in str(found["skips"])


def test_the_report_judges_targets_and_hides_the_machine(check, tmp_path):
    from benchmarks.reports import gpu as gpu_report

    point = {
        "op": "gae", "label": "fp32 16×131072", "mode": "forward", "moved": 35651584,
        "limit": "copy", "targets": {"copy": 0.75}, "at_most": {"median": 30e-6}, "failed": False,
        "providers": {
            "ours": {
                "median": 40e-6, "p20": 39e-6, "p80": 41e-6, "host": 9e-6, "peak_bytes": 2**20,
            },
            "copy": {"median": 20e-6, "ours_over": {"median": 2.0}},
            "liger": {"skipped": f"ModuleNotFoundError: {ROOT}/liger"},
        },
    }  # fmt: skip
    results = {"bench": {"status": "done", "seconds": 1.0, "points": [point]}}
    gpu_report.write(results, tmp_path, quick=False)
    text = (tmp_path / "report.md").read_text()
    assert "| gae, forward | fp32 16×131072 | 40 | 39–41 | 9 | 1.0 | 891 | 50% copy |" in text
    assert "| 75% of copy, ≤ 30 µs | missed: copy 75%; missed: time ≤ 30 µs |" in text
    both = [point | {"backend": b} for b in ("cuda", "triton")]
    gpu_report.write({"bench": results["bench"] | {"points": both}}, tmp_path, quick=False)
    assert "| gae, forward, triton | fp32 16×131072 |" in (tmp_path / "report.md").read_text()
    gpu_report.write(results, tmp_path, quick=False)
    assert "ModuleNotFoundError" in text and str(ROOT) not in text
    assert str(ROOT) not in (tmp_path / "report.json").read_text()


def test_the_report_of_what_there_is(tmp_path, check):
    """Parts that are missing, or broke before they had results."""
    from benchmarks.reports import gpu as gpu_report

    gpu_report.write({}, tmp_path, quick=False)
    assert "the part `env` has no result" in (tmp_path / "report.md").read_text()
    env = {"status": "failed", "seconds": 1, "date": "2026-01-31 10:00", "device": None}
    bench = {"status": "cut off", "seconds": 2, "commit": "abc", "points": [], "launches": None}
    gpu_report.write({"env": {**env, "doctor": None}, "bench": bench}, tmp_path, quick=False)
    text = (tmp_path / "report.md").read_text()
    assert "- device: unknown\n" in text and "commit abc, unknown\n" in text
    assert "| bench | cut off | – | – | – | 2 |" in text


class _Event:
    """A device's event, as far as the harness uses it, on a clock of its own."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        _Event.now += 1e-3
        self.at = _Event.now

    def synchronize(self):
        assert self.at

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


def test_device_events_time_the_call_and_not_the_wait(check, monkeypatch):
    from benchmarks.harness import clocks
    from benchmarks.harness import measure as harness

    waits = []
    monkeypatch.setattr(clocks, "FLUSH_BYTES", 1 << 20)
    monkeypatch.setattr(torch.cpu, "Event", _Event, raising=False)
    monkeypatch.setattr(torch.cpu, "_sleep", waits.append, raising=False)
    clock = clocks.DeviceEvents(torch.device("cpu"))
    clock.start(ahead=0.01)
    _Event.now += 0.02
    assert clock.stop() == pytest.approx(0.021)
    assert waits == [clocks.LEAST_CYCLES + int(0.015 * clocks.CYCLES_PER_SECOND)]
    # A whole point on such a device.
    monkeypatch.setattr(harness, "timer", clocks.DeviceEvents)
    x = torch.arange(1.0, 9.0).requires_grad_()
    exact = x.detach().double()
    case = harness.Case(
        op="square", label="8", mode="forward+backward", inputs=(x,), moved=64,
        providers={"ours": lambda x: x * x, "eager": torch.square},
        oracle=lambda: (exact**2, 2 * exact),
    )  # fmt: skip

    class Benchmark:
        stats, extra_info = True, {}

        def pedantic(self, function, setup, rounds, iterations):
            for _ in range(rounds):
                arguments, options = setup()
                function(*arguments, **options)

    settings = harness.Settings(torch.device("cpu"), True, None)
    harness.measure(Benchmark(), settings, [], case)
    for name in ("ours", "eager", "copy", "read"):
        record = Benchmark.extra_info["providers"][name]
        assert record["rounds"] == harness.QUICK_ROUNDS
        assert record["median"] > 0 and record["host"] > 0


def test_dry_run(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu.check", "--out", str(tmp_path)]
    command += ["--device", "cpu", "--dry-run", "--limit", "580"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["env"]["doctor"]["ok"] and report["env"]["device"]["bytes_per_second"]["copy"] > 0
    assert report["gpu"]["passed"] >= 4 and report["gpu"]["failed"] == 0
    assert report["tests"]["passed"] == 2 and report["tests"]["failed"] == 0
    (point,) = report["bench"]["points"]
    assert point["op"] == "kl_penalty k3" and point["providers"]["ours"]["median"] > 0
    assert "compute-sanitizer is not here" in report["sanitizer"]["reason"]
    text = (tmp_path / "report.md").read_text()
    assert "| kl_penalty k3, forward+backward | fp32 4×50 |" in text
    assert str(ROOT) not in text + json.dumps(report)
