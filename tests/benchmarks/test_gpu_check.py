"""`make gpu-check` without a GPU: parts resume, end in time, report what failed; a dry run."""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

from benchmarks import ROOT
from benchmarks.gpu import bench, check, keep, process, sanitizer
from benchmarks.reports import gpu as report


def parts(monkeypatch, **functions):
    monkeypatch.setattr(check, "PARTS", {n: check.Part(f, 30) for n, f in functions.items()})
    # Seconds of imports; it has its own test.
    monkeypatch.setattr(check, "refusal", lambda run: None)


NAMED = ["--device", "cpu", "--parts"]


def done(run):
    return {"status": "done"}


def options(out, **more):
    given = {"device": "cuda", "out": out, "dry_run": False, "wheels": None, "limit": 60}
    given["results"] = out / "results"
    return argparse.Namespace(**given | more)


def test_finished_parts_are_not_run_again_and_one_that_raises_fails_alone(
    monkeypatch, tmp_path, capsys
):
    calls = []

    def fails_once(run):
        calls.append("gpu")
        if len(calls) == 1:
            raise KeyError("gate 7")
        return {"status": "done"}

    def counted(run):
        calls.append("tests")
        return {"status": "done"}

    parts(monkeypatch, env=done, gpu=fails_once, tests=counted)
    arguments = ["--out", str(tmp_path), "--device", "cpu"]
    # A failure fails the run, but the later part runs.
    assert check.main(arguments) == 1 and calls == ["gpu", "tests"]
    assert "gpu: KeyError: 'gate 7'" in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["gpu"]["status"] == "failed"
    # What failed is run again, what was done is not.
    assert check.main(arguments) == 0 and calls == ["gpu", "tests", "gpu"]
    assert "gate 7" not in (tmp_path / "report.md").read_text()
    # A part that is named runs again, even if it was done.
    assert check.main([*arguments, "--parts", "tests"]) == 0
    assert calls == ["gpu", "tests", "gpu", "tests"]
    with pytest.raises(SystemExit):
        check.main([*arguments, "--parts", "nonsense"])
    assert "unknown parts: nonsense" in capsys.readouterr().err


def test_what_hangs_is_cut_off_with_all_that_it_started(monkeypatch, tmp_path):
    code = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""

    def hangs(run):
        run.ends = time.monotonic() + 3
        return {"status": check.status(run.python("hang.log", "-c", code))}

    parts(monkeypatch, gpu=hangs, tests=done)
    assert check.main(["--out", str(tmp_path), "--device", "cpu"]) == 1
    results = check.load(tmp_path)
    assert results["gpu"]["status"] == "cut off" and results["tests"]["status"] == "done"
    state = Path(f"/proc/{(tmp_path / 'hang.log').read_text().split()[0]}/stat")
    # Gone, or dead and waiting for its new parent.
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] in "ZX"


def test_a_part_has_its_limit_and_the_last_one_what_is_left(monkeypatch, tmp_path):
    ends, now = {}, [1000.0]

    def part(name, seconds):
        def run(r):
            ends[name] = r.ends - 1000
            now[0] += seconds
            return {"status": "done"}

        return run

    # A clock that moves by what the parts take alone.
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(check, "_output", lambda *command: None)
    parts(monkeypatch, env=part("env", 10), gpu=part("gpu", 25), tests=part("tests", 1))
    check.PARTS["tests"] = check.PARTS["tests"]._replace(limit=0)
    assert check.main(["--out", str(tmp_path), "--device", "cpu", "--limit", "100"]) == 0
    # 85 s without the reserve; 30 from where each begins, whatever those before it left.
    assert ends == {"env": 30, "gpu": 40, "tests": 85}
    # A limit beyond the end ends there.
    assert check.main([*NAMED, "env", "--out", str(tmp_path), "--limit", "35"]) == 0
    assert ends["env"] == now[0] - 1000 - 10 + 20
    # A dry run is no measurement: a busy machine cuts nothing off.
    assert check.main([*NAMED, "env", "--out", str(tmp_path), "--limit", "35", "--dry-run"]) == 0
    assert ends["env"] == now[0] - 1000 - 10 + process.DRY_SECONDS - check.RESERVE


def test_the_parts_are_in_the_order_of_what_is_most_needed_and_end_within_ten_minutes():
    words = "build compile env smoke ours ncu peers sanitizer launches tests"
    assert list(check.PARTS) == words.split()
    limits = {name: part.limit for name, part in check.PARTS.items()}
    wanted = {"smoke": 60, "ours": 90, "ncu": 60, "peers": 120, "tests": 0}
    assert wanted.items() <= limits.items()
    # Only the last one takes what is left, and something is.
    assert [n for n, limit in limits.items() if not limit] == ["tests"]
    # The last one, which may need 11 s to be stopped, ends inside the reserve.
    assert sum(limits.values()) + check.RESERVE <= 590 - 15
    assert check.RESERVE > 11


def test_every_benchmark_and_every_test_of_the_backends_is_run_and_every_name_exists():
    points = {f.stem for f in (ROOT / "benchmarks/points").glob("[a-z]*.py")} - {"conftest"}
    assert set(bench.BENCH_FILES) == points
    of_backends = {
        str(f.relative_to(ROOT / "tests").with_suffix(""))
        for f in (ROOT / "tests").rglob("test_*.py")
        if re.search(r"^def test_\w+\([^)]*\bbackend\b", f.read_text(), re.M)
    }
    # Processes over gloo, and trainers that are not there: on a CPU's tensors.
    elsewhere = ("head/test_shard", "parity/", "integrations/", "benchmarks/")
    assert set(check.TEST_FILES) == {f for f in of_backends if not f.startswith(elsewhere)}
    # Files that the sources of the parts name must exist.
    sources = (ROOT / "benchmarks/gpu").glob("*.py")
    source = "".join(file.read_text() for file in sources)
    files = set(re.findall(r"\b(?:tests|tools|benchmarks)/[\w/]+\.py", source))
    modules = set(re.findall(r'"-m", "((?:tests|tools|benchmarks)[\w.]+)"', source))
    files |= {m.replace(".", "/") + ".py" for m in modules}
    assert len(files) >= 4 and all((ROOT / f).is_file() for f in files), files
    targets = (ROOT / "tools/triton_record.py").read_text()
    assert all(f'"sm_{capability}": Target(' in targets for capability in check.AHEAD_OF_TIME)


def test_no_such_device_is_one_line(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu.check", "--out", str(tmp_path)]
    command += ["--device", "nonsense"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 2 and run.stdout == ""
    (line,) = run.stderr.splitlines()
    assert line.startswith("gpu_check: cannot use device 'nonsense': RuntimeError: ")
    assert not (tmp_path / "report.md").exists()


def test_a_terminated_run_leaves_no_process_and_goes_on(tmp_path):
    code = f"""
import signal, sys
from benchmarks.gpu import check
def first(run):
    return {{"status": "done"}}
def second(run):
    file = run.out / "once"
    if file.exists():
        return {{"status": "done"}}
    file.touch()
    run.python("child.log", "-c", "import os, time; print(os.getpid()); time.sleep(600)")
check.PARTS = {{"env": check.Part(first, 600), "gpu": check.Part(second, 600)}}
check.refusal = lambda run: None
signal.signal(signal.SIGTERM, check.terminated)
sys.exit(check.main(["--out", {str(tmp_path)!r}, "--device", "cpu"]))
"""
    command = [sys.executable, "-c", code]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    log = tmp_path / "child.log"
    while not (log.exists() and log.read_text().strip()):
        assert run.poll() is None
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=900)
    assert run.returncode == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text().split()[0]), 0)
    # What the part that was interrupted has logged is kept too.
    found = json.loads((tmp_path / "results" / "report.json").read_text())
    assert found["env"]["status"] == "done" and found["gpu"]["status"] == "cut off"
    with tarfile.open(tmp_path / "results" / "logs.tar.gz") as packed:
        assert {"env.json", "gpu.json", "child.log"} <= set(packed.getnames())
    # What was finished is kept, the rest is run.
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and "env: done before" in again.stdout
    assert "| gpu | done |" in (tmp_path / "report.md").read_text()


def test_wheels_add_what_is_missing_and_nothing_else(monkeypatch, tmp_path):
    wheels, out = tmp_path / "wheels", tmp_path / "out"
    wheels.mkdir(), out.mkdir()
    for name in ("rk_absent_peer-1.0-py3-none-any.whl", "pytest-1.0-py3-none-any.whl"):
        package = name.split("-")[0]
        with zipfile.ZipFile(wheels / name, "w") as archive:
            archive.writestr(f"{package}/__init__.py", "answer = 42")
            info = zipfile.ZipInfo(f"{package}/bin/compute-sanitizer")
            info.external_attr = 0o100755 << 16
            archive.writestr(info, "#!/bin/sh")
    monkeypatch.setattr(sys, "path", list(sys.path))
    (folder,) = process.unpacked(wheels, out)
    assert "rk_absent_peer" in str(folder) and process.missing("rk_absent_peer") is None
    assert os.access(folder / "rk_absent_peer/bin/compute-sanitizer", os.X_OK)
    changed = (folder / "rk_absent_peer/__init__.py").stat().st_mtime_ns
    # Again, by a run; its processes see it, behind what the caller had.
    run = process.Run(options(out, wheels=wheels))
    assert run.packages == [folder]
    assert (folder / "rk_absent_peer/__init__.py").stat().st_mtime_ns == changed
    run.python("seen.log", "-c", "import rk_absent_peer as p, pytest; print(p.answer)")
    assert run.tail("seen.log") == "42"
    with pytest.raises(NotADirectoryError):
        process.unpacked(tmp_path / "nowhere", out)


def test_a_cut_off_line_of_a_point_is_measured_again(tmp_path):
    file = tmp_path / "ours-points.jsonl"
    good, bad = ({"point": p, "failed": p == "b"} for p in "ab")
    lines = [json.dumps(good), json.dumps(bad), '{"point": "c", "fai']
    file.write_text("\n".join(lines))
    assert bench.records(file) == [good, bad]
    assert bench.records(file, failed=False) == [good]
    assert file.read_text() == json.dumps(good) + "\n"


TOOL = """#!{python}
import sys
if "{broken}" == "all":
    print("Device not supported"); sys.exit(1)
print("========= COMPUTE-SANITIZER", sys.argv[2])
assert "gpu_faults" in " ".join(sys.argv)
assert ("--report-api-errors" in sys.argv) == (sys.argv[2] == "memcheck")
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
def test_the_sanitizer_part(monkeypatch, tmp_path, broken, outcome, words, backends):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(TOOL.format(python=sys.executable, broken=broken))
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    plain = process.Run.process

    def faster(run, log, *command, **variables):
        # The faults themselves have a test; here they would take a minute.
        return 0 if log == "sanitizer-plain.log" else plain(run, log, *command, **variables)

    monkeypatch.setattr(process.Run, "process", faster)
    parts(monkeypatch, sanitizer=sanitizer.part_sanitizer)
    monkeypatch.setattr(sanitizer, "kernel_backends", lambda run: backends)
    check.main(["--out", str(tmp_path), "--device", "cuda"])
    result = check.load(tmp_path)["sanitizer"]
    tools = zip(sanitizer.SANITIZER_TOOLS, words, strict=True)
    assert result["tools"] == {f"{t} {b}": w for t, w in tools for b in backends}
    assert result["status"] == outcome
    assert "compute-sanitizer: memcheck" in (tmp_path / "report.md").read_text()


def test_the_sanitizer_tells_our_kernels_from_others():
    line = "=========     at {}+0x4d0 in kernel.py:12"
    assert sanitizer._names_ours(line.format("partial_kernel"))
    assert not sanitizer._names_ours(line.format("vectorized_elementwise_kernel"))
    assert sanitizer._names_ours(line.format("void rk::cuda::<unnamed>::scan_kernel<(int)16>(...)"))


def test_failures_and_reasons_are_read_from_pytest(tmp_path):
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


def test_the_report_judges_targets_and_hides_the_machine(tmp_path):
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
    wrong = point | {"op": "whiten", "providers": {"ours": {"error": "result 0 is off"}}}
    part = {"status": "done", "seconds": 1.0}
    report.write({"ours": part | {"points": [point, wrong]}}, tmp_path, quick=False)
    text = (tmp_path / "report.md").read_text()
    assert "| gae, forward | fp32 16×131072 | 40 | 39–41 | 9 | 1.0 | 891 | 50% copy |" in text
    assert "| 75% of copy, ≤ 30 µs | missed: copy 75%; missed: time ≤ 30 µs |" in text
    assert "| whiten, forward | fp32 16×131072 | failed: result 0 is off |" in text
    assert "ModuleNotFoundError" in text
    assert str(ROOT) not in text + (tmp_path / "report.json").read_text()
    both = [point | {"backend": b} for b in ("cuda", "triton")]
    report.write({"ours": part | {"points": both}}, tmp_path, quick=False)
    assert "| gae, forward, triton | fp32 16×131072 |" in (tmp_path / "report.md").read_text()
    # Where both parts have a point, that with the peers counts; unless it has no time of ours.
    slower = both[0] | {"providers": {**point["providers"], "ours": {"median": 80e-6}}}
    broken = both[1] | {"providers": {"ours": {"error": "out of memory"}}}
    results = {"ours": part | {"points": both}, "peers": part | {"points": [slower, broken]}}
    assert report.points_of(results) == [slower, both[1]]


def test_the_report_of_what_there_is(tmp_path):
    """Parts that are missing, or broke before they had results."""
    report.write({}, tmp_path, quick=False)
    assert "the part `env` has no result" in (tmp_path / "report.md").read_text()
    env = {"status": "failed", "seconds": 1, "date": "2026-01-31 10:00", "device": None}
    ours = {"status": "cut off", "seconds": 2, "commit": "abc", "points": []}
    report.write({"env": {**env, "doctor": None}, "ours": ours}, tmp_path, quick=False)
    text = (tmp_path / "report.md").read_text()
    assert "- device: unknown\n" in text and "commit abc, unknown\n" in text
    assert "| ours | cut off | – | – | – | 2 |" in text


def test_dry_run(tmp_path):
    """Every part in order; no limit of time, so that a busy machine changes nothing."""
    out, results = tmp_path / "out", tmp_path / "results"
    command = [sys.executable, "-m", "benchmarks.gpu.check", "--out", str(out)]
    command += ["--device", "cpu", "--dry-run", "--results", str(results)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    started = re.findall(r"^(\w+): at most", run.stdout, re.M)
    assert started == list(check.PARTS)
    found = json.loads((results / "report.json").read_text())
    assert found["env"]["doctor"]["ok"] and found["env"]["device"]["bytes_per_second"]["copy"] > 0
    assert found["smoke"]["passed"] == 2 and found["smoke"]["failed"] == 0
    assert found["tests"]["passed"] == 6 and found["tests"]["failed"] == 0
    for part in ("ours", "peers"):
        (point,) = found[part]["points"]
        assert point["op"] == "kl_penalty k3" and point["providers"]["ours"]["median"] > 0
        assert point["providers"]["copy"]["median"] > 0
        assert ("eager" in point["providers"]) == (part == "peers")
    assert found["ncu"]["reason"] == "ncu is not here"
    assert "compute-sanitizer is not here" in found["sanitizer"]["reason"]
    assert "no device activity" in found["launches"]["launches"]["reason"]
    text = (results / "report.md").read_text()
    assert text.count("| kl_penalty k3, forward+backward | fp32 4×50 |") == 1
    assert str(ROOT) not in text + json.dumps(found)
    # What comes back from a machine that gives back eight files.
    assert {f.name for f in results.iterdir()} == set(keep.PUBLISHED)
    assert len(keep.PUBLISHED) <= 4
    with tarfile.open(results / "logs.tar.gz") as packed:
        names = set(packed.getnames())
    assert {f"{name}.json" for name in check.PARTS} | {"tests.log", "ours-triton.log"} <= names


KILLED = """
import os, sys, time
from benchmarks.gpu import check
def first(run):
    (run.out / "first.log").write_text("all of it")
    return {{"status": "done"}}
def second(run):
    print("second", flush=True)
    time.sleep(600)
check.PARTS = {{"env": check.Part(first, 0), "gpu": check.Part(second, 0)}}
check.refusal = lambda run: None
sys.exit(check.main(["--out", {out!r}, "--results", {results!r}, "--device", "cpu"]))
"""


def test_a_kill_in_the_middle_leaves_the_earlier_parts_whole_in_few_files(tmp_path):
    out, results = tmp_path / "out", tmp_path / "results"
    code = KILLED.format(out=str(out), results=str(results))
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as run:
        # What comes before the second part is on disk when that begins.
        for line in run.stdout:
            if line == "second\n":
                break
        run.kill()
    assert run.wait() == -signal.SIGKILL
    assert {f.name for f in results.iterdir()} == set(keep.PUBLISHED)
    assert json.loads((results / "report.json").read_text())["env"]["status"] == "done"
    assert "| env | done |" in (results / "report.md").read_text()
    with tarfile.open(results / "logs.tar.gz") as packed:
        assert packed.extractfile("first.log").read() == b"all of it"
        assert json.load(packed.extractfile("env.json"))["status"] == "done"
        assert "gpu.json" not in packed.getnames()


def test_what_is_half_written_is_never_seen(monkeypatch, tmp_path):
    out, results = tmp_path / "out", tmp_path / "results"
    out.mkdir()
    (out / "report.md").write_text("one")
    (out / "long.log").write_bytes(b"0" * keep.LOG_BYTES + b"the end")
    keep.publish(out, results)
    before = (results / "logs.tar.gz").read_bytes()
    with tarfile.open(results / "logs.tar.gz") as packed:
        kept = packed.extractfile("long.log").read()
    assert len(kept) == keep.LOG_BYTES and kept.endswith(b"the end")

    def killed(*_):
        raise SystemExit

    # Between writing and renaming: nobody finds the new one, and the old one is whole.
    monkeypatch.setattr(os, "replace", killed)
    (out / "report.md").write_text("two")
    with pytest.raises(SystemExit):
        keep.publish(out, results)
    assert (results / "logs.tar.gz").read_bytes() == before
    assert (results / "report.md").read_text() == "one"
    assert len(list(results.iterdir())) <= 8
