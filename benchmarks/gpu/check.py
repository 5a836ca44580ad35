"""Everything that needs a GPU, in parts that can be repeated: `make gpu-check OUT=dir`.

    python -m benchmarks.gpu.check --out dir [--device cuda] [--parts tests,bench] [--limit 590]

Parts: build, env, gpu, bench, tests, sanitizer; the report is written after each. A part that
finished is not run again unless --parts names it; one that was cut off goes on. Each has a budget
of seconds, plus what the parts before it left, and all together have --limit. OUT gets a log and a
JSON of each part, and report.json and report.md: the results to keep. Exit status 1: something
failed or is not finished; 2: there is no such device.

The running interpreter is used as it is. --wheels DIR adds the packages that it lacks (peers,
pytest-xdist, hypothesis) from wheels, without a network.
"""

import datetime
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .. import ROOT, make_parser
from .process import (
    CUT,
    DONE,
    FAILED,
    SKIPPED,
    Result,
    Run,
    kernel_backends,
    missing,
    refusal,
    status,
)

# Seconds to end with: stopping what was cut off, and the report.
RESERVE = 15
# Operation tests; the others are about the CPU, the package or the trainer.
_OPERATION_TESTS = (
    "logprobs logprobs_rules policy policy_rules policy_masks kl advantages advantages_rules value "
    "preference support support_rules extremes fp16 empty interface missing meta masks"
).split()
TEST_FILES = ("head/test_head", "head/test_cases", *(f"ops/test_{n}" for n in _OPERATION_TESTS))
# What has most at stake first: time may run out.
BENCH_FILES = tuple("logprobs head kl advantages policy value support preference".split())
SANITIZER_TOOLS = ("memcheck", "racecheck", "initcheck")

# --- env ---------------------------------------------------------------------------------------


def device_facts(device: str) -> dict[str, Any]:
    """The device, its driver and its memory rates, each a median of 20 with a cold cache."""
    import torch

    from ..harness.clocks import once, timer

    d = torch.device(device)
    facts: dict[str, Any] = {"device": device, "name": platform.machine()}
    size = 1 << 20 if d.type == "cpu" else 1 << 30
    if d.type != "cpu":
        module = getattr(torch, d.type)
        properties = module.get_device_properties(d)
        facts["name"] = properties.name
        facts["memory_bytes"] = properties.total_memory
        facts["count"] = module.device_count()
        for key in ("major", "minor", "multi_processor_count", "L2_cache_size", "gcnArchName"):
            if hasattr(properties, key):
                facts[key] = getattr(properties, key)
        # Room for the source, its copy and the buffer that empties the cache.
        if properties.total_memory < 6 << 30:
            size >>= 2
    source = torch.rand(size // 4, device=d)
    clock = timer(d)
    rates = {}
    for name, call, moved in (("copy", source.clone, 2 * size), ("read", source.sum, size)):
        seconds = [once(tuple, call, clock) for _ in range(22)]
        rates[name] = moved / sorted(seconds[2:])[10]
    return facts | {"bytes_per_second": rates, "rate_tensor_bytes": size}


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 and done.stdout.strip() else None


def part_build(run: Run) -> Result:
    """The extensions beside their sources: CUDA for this very device, the CPU's to compare with."""
    reason = "a dry run takes it as it is" if run.dry else missing("setuptools", "pybind11")
    if reason:
        return {"status": SKIPPED, "reason": reason}
    variables = {"RLHF_KERNELS_CUDA": "0"}
    if run.device.startswith("cuda"):
        # Where there is a compiler, its failure is one. Where there is none, what is built serves.
        nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
        variables = {"RLHF_KERNELS_CUDA": "1" if nvcc else ""}
        ask = "import sys, torch; print(*torch.cuda.get_device_capability(sys.argv[1]), sep='')"
        if run.python("build-device.log", "-c", ask, run.device) == 0:
            variables["RLHF_KERNELS_CUDA_ARCHS"] = run.tail("build-device.log", 1)
    code = run.python("build.log", "setup.py", "-q", "build_ext", "--inplace", **variables)
    failures = [] if code == 0 else [run.tail("build.log")]
    built = [line for line in run.lines("build.log") if line.startswith("rlhf_kernels:")]
    return {"status": status(code), "failures": failures, "said": built}


def part_env(run: Run) -> Result:
    doctor_file = run.out / "env-doctor.log"
    doctor = run.python("env-doctor.log", "-m", "rlhf_kernels", "--json")
    # Warnings may stand before the report.
    text = doctor_file.read_text()
    found = json.loads(text[text.index("{") :]) if "{" in text else None
    facts_file = run.out / "env-device.json"
    # In a process of its own: this one must not hold memory of the device.
    code = (
        "import json, sys; from benchmarks.gpu.check import device_facts; "
        "json.dump(device_facts(sys.argv[1]), open(sys.argv[2], 'w'))"
    )
    facts = run.python("env-device.log", "-c", code, run.device, str(facts_file))
    packages = ("pytest", "pytest_benchmark", "hypothesis", "xdist", "pybind11", "numpy")
    driver = "--query-gpu=name,driver_version,memory.total,power.limit"
    result = {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M"),
        "dirty": bool(_output("git", "status", "--porcelain", "--untracked-files=no")),
        "missing": [p for p in packages if importlib.util.find_spec(p) is None],
        "doctor": found,
        "device": json.loads(facts_file.read_text()) if facts == 0 else None,
        "driver": _output("nvidia-smi", driver, "--format=csv,noheader"),
    }
    failures = []
    if doctor != 0:
        failures.append("the doctor's self-check: " + run.tail("env-doctor.log", 3))
    if facts != 0:
        failures.append("the device: " + run.tail("env-device.log", 3))
    return {"status": status(doctor, facts), "failures": failures, **result}


# --- tests -------------------------------------------------------------------------------------


def read_junit(file: Path) -> dict[str, Any]:
    """Counts, failures and reasons for skipping from pytest's XML."""
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures: list[str] = []
    skips: dict[str, int] = {}
    for case in ElementTree.parse(file).getroot().iter("testcase"):
        bad = [e for e in case if e.tag in ("failure", "error")]
        skip = case.find("skipped")
        kind = "failed" if bad else "skipped" if skip is not None else "passed"
        counts[kind] += 1
        if bad:
            lines = (bad[0].get("message") or "").splitlines() or [""]
            failures.append(f"{case.get('classname')}::{case.get('name')}: {lines[0][:300]}")
        elif skip is not None:
            reason = skip.get("message") or ""
            skips[reason] = skips.get(reason, 0) + 1
    return {**counts, "failures": failures, "skips": skips}


def _pytest(run: Run, name: str, *arguments: str, needs: tuple[str, ...] = ()) -> Result:
    reason = missing("pytest", *needs)
    if reason:
        return {"status": SKIPPED, "reason": reason}
    file = run.out / f"{name}.xml"
    file.unlink(missing_ok=True)
    fixed = ("--device", run.device, "-p", "no:cacheprovider", "--tb=short", "--maxfail=200")
    code = run.python(f"{name}.log", "-m", "pytest", "-v", *arguments, *fixed, f"--junitxml={file}")
    result: Result = {"status": status(code), "log": f"{name}.log"}
    if code == 5:
        return result | {"failures": ["no test was found"]}
    try:
        return result | read_junit(file)
    except (OSError, ElementTree.ParseError):
        # Cut off, or it broke before the first test: the log has what there is.
        pass
    lines = run.lines(f"{name}.log")
    failed = [x for x in lines if " FAILED" in f" {x}"]
    counts = {k: sum(f" {k.upper()}" in x for x in lines) for k in ("passed", "failed", "skipped")}
    failures = failed if code is None else [*failed, run.tail(f"{name}.log", 5)]
    return result | counts | {"failures": failures}


def _workers(run: Run, distribution: str, most: int) -> list[str]:
    """Several processes on one GPU: compiling is most of the time, and that is the CPU's."""
    if run.dry or importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(max(1, min(most, (os.cpu_count() or 2) // 2))), "--dist", distribution]


def part_gpu(run: Run) -> Result:
    arguments = ["tests/kernels/test_gpu.py"]
    if run.dry:
        arguments += ["-k", "poisons and (temperature or synchronisation)"]
    return _pytest(run, "gpu", *arguments, *_workers(run, "loadgroup", 4))


def part_tests(run: Run) -> Result:
    arguments = [f"tests/{name}.py" for name in TEST_FILES]
    arguments += ["-m", "not gpu and not slow"]
    if run.dry:
        arguments = ["tests/ops/test_logprobs.py", "-k", "triton and (empty_batch or infinite)"]
    workers = _workers(run, "worksteal", 8)
    return _pytest(run, "tests", *arguments, *workers, needs=("hypothesis",))


# --- bench -------------------------------------------------------------------------------------


def _records(run: Run, *, failed: bool = True) -> list[dict[str, Any]]:
    """Points measured so far; the others, and without `failed` those that failed, are dropped."""
    file = run.out / "bench-points.jsonl"
    if not file.exists():
        return []
    found = []
    for line in file.read_text().splitlines():
        try:
            point = json.loads(line)
        except json.JSONDecodeError:
            # Cut off while it was written: that point is measured again.
            continue
        if failed or not point["failed"]:
            found.append(point)
    file.write_text("".join(json.dumps(f) + "\n" for f in found))
    return found


def part_bench(run: Run) -> Result:
    reason = missing("pytest", "pytest_benchmark")
    if reason:
        return {"status": SKIPPED, "reason": reason}
    _records(run, failed=False)
    backends = ["triton"] if run.dry else kernel_backends(run)
    codes, logs = [], []
    for backend in backends:
        arguments = ["-m", "pytest", *(f"benchmarks/points/{n}.py" for n in BENCH_FILES)]
        arguments += ["--points", "gpu", "--device", run.device]
        arguments += ["--records", str(run.out / "bench-points.jsonl"), "-p", "no:cacheprovider"]
        arguments += ["--backend", backend, "--tb=short", "-v", "--benchmark-disable-gc"]
        if run.dry:
            arguments += ["--quick", "-k", "kl_penalty", "--providers", "eager,verl"]
        elif logs:
            # The others were measured beside the first.
            arguments += ["--providers", "ours"]
        logs.append("bench.log" if not logs else f"bench-{backend}.log")
        # Wide, so that the summary gives reasons in full.
        codes.append(run.python(logs[-1], *arguments, COLUMNS="300"))
    code = None if None in codes else max(codes)
    launches = run.out / "bench-launches.json"
    counted: int | None = 0
    if code is not None and not launches.exists():
        profiled = ["-m", "benchmarks.studies.launches"]
        profiled += ["--device", run.device, "--out", str(launches)]
        counted = run.python("bench-launches.log", *profiled)
    points = _records(run)
    # Those that raised before they were measured are in no record.
    failures = [x for n in logs for x in run.lines(n) if x.startswith(("FAILED ", "ERROR "))]
    if code not in (0, None) and not failures:
        failures += [run.tail(n, 5) for n, c in zip(logs, codes, strict=True) if c]
    if counted not in (0, None):
        failures.append("launches: " + run.tail("bench-launches.log", 3))
    return {
        "status": status(code, counted),
        "points": points,
        "failures": failures,
        "launches": json.loads(launches.read_text()) if launches.exists() else None,
    }


# --- sanitizer ---------------------------------------------------------------------------------


def part_sanitizer(run: Run) -> Result:
    name = "compute-sanitizer"
    tool = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    for folder in run.packages:
        # NVIDIA also packs it as a wheel.
        tool = tool or next((str(f) for f in folder.rglob(name) if f.is_file()), None)
    script = [sys.executable, "-m", "tests.kernels.gpu_faults", "--device", run.device]
    # Triton's interpreter takes seconds for each.
    script += [*(["--every", "40"] if run.dry else []), "--backend"]
    backends = kernel_backends(run)
    # First without: kernels are compiled and cached, and a fault shows that is not memory's.
    for backend in backends:
        plain = run.process("sanitizer-plain.log", *script, backend)
        if plain != 0:
            failure = f"{backend} without the sanitizer: " + run.tail("sanitizer-plain.log", 3)
            return {"status": status(plain), "failures": [failure]}
    if tool is None or run.device == "cpu":
        return {"status": SKIPPED, "reason": "compute-sanitizer is not here"}
    tools: dict[str, str] = {}
    failures: list[str] = []
    for kind in SANITIZER_TOOLS:
        for backend in backends:
            found = _sanitize(
                run, tool, kind, [*script, backend], f"sanitizer-{kind}-{backend}.log"
            )
            tools[f"{kind} {backend}"] = found
            if found.startswith(FAILED):
                failures.append(f"{kind} {backend}: {found.partition(': ')[2]}")
                tools[f"{kind} {backend}"] = FAILED
    result = {"tools": tools, "failures": failures}
    # The first is a must; the others take what time there is.
    first = [tools[f"{SANITIZER_TOOLS[0]} {b}"] for b in backends]
    if failures or CUT in first:
        return {"status": FAILED if failures else CUT, **result}
    if any(f.startswith(SKIPPED) for f in first):
        return {"status": SKIPPED, "reason": "memcheck does not work here", **result}
    return {"status": DONE, **result}


def _sanitize(run: Run, tool: str, kind: str, script: list[str], log: str) -> str:
    """Outcome of one of the sanitizer's tools."""
    if run.left() < 10:
        return CUT
    command = [tool, "--tool", kind, "--error-exitcode", "9", "--print-limit", "50"]
    if kind == "memcheck":
        # torch asks the driver what it then is refused.
        command += ["--report-api-errors", "no"]
    # Each allocation by itself, so that the one behind it is not taken for it.
    code = run.process(log, *command, *script, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    text = (run.out / log).read_text(errors="replace")
    if code in (0, None):
        return status(code)
    if "ERROR SUMMARY" not in text or "Device not supported" in text:
        return f"{SKIPPED}: {run.tail(log, 2)}"
    if kind == "memcheck" or _names_ours(text):
        return f"{FAILED}: {run.tail(log, 3)}"
    return "done; it names kernels of torch only"


def _names_ours(log: str) -> bool:
    """Whether the sanitizer found something in one of our kernels."""
    sources = (ROOT / "rlhf_kernels/kernels/triton").glob("*.py")
    names = {n for s in sources for n in re.findall(r"^def (\w+_kernel)\(", s.read_text(), re.M)}
    if "rk::cuda::" in log:
        return True
    return any(found in names for found in re.findall(r"\b(?:at|in) (\w+_kernel)\b", log))


class Part(NamedTuple):
    """A part and its budget in seconds."""

    run: Callable[[Run], Result]
    budget: float


# By what would be missed most. All budgets together stay below ten minutes.
PARTS = {
    "build": Part(part_build, 75),
    "env": Part(part_env, 45),
    "gpu": Part(part_gpu, 110),
    "bench": Part(part_bench, 180),
    "tests": Part(part_tests, 110),
    "sanitizer": Part(part_sanitizer, 45),
}


def load(out: Path) -> dict[str, Result]:
    """Results of the parts that were run, by name."""
    files = {name: out / f"{name}.json" for name in PARTS}
    return {name: json.loads(f.read_text()) for name, f in files.items() if f.exists()}


def run_part(run: Run, name: str, later: float) -> Result:
    """Runs a part and keeps its result, whatever happens; `later` seconds are for what follows."""
    part = PARTS[name]
    started = time.monotonic()
    end = run.deadline - RESERVE
    run.ends = min(end, max(started + part.budget, end - later))
    print(f"{name}: at most {run.left():.0f} s", flush=True)
    try:
        result = part.run(run)
    except Exception as error:
        # A broken part must not take the others with it.
        result = {"status": FAILED, "failures": [f"{type(error).__name__}: {error}"]}
    result["seconds"] = round(time.monotonic() - started, 1)
    # Parts may be run on different days.
    result["commit"] = _output("git", "rev-parse", "HEAD")
    (run.out / f"{name}.json").write_text(json.dumps(result, indent=1))
    print(f"{name}: {result['status']} in {result['seconds']} s", flush=True)
    for line in result.get("failures", [])[:20]:
        print(f"  {line}", flush=True)
    return result


def main(argv: list[str] | None = None) -> int:
    from ..reports import gpu as report

    parser = make_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of logs and results")
    parser.add_argument("--device", default="cuda", help="device of the tensors")
    parser.add_argument("--parts", help=f"run these again, of {','.join(PARTS)}")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to take what is missing from")
    parser.add_argument("--limit", type=float, default=590, help="seconds for everything")
    parser.add_argument(
        "--dry-run", action="store_true", help="a few small cases: does this script work?"
    )
    options = parser.parse_args(argv)
    named = [p for p in (options.parts or "").split(",") if p]
    unknown = set(named) - set(PARTS)
    if unknown:
        parser.error(f"unknown parts: {', '.join(sorted(unknown))}")
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    run = Run(options)
    reason = refusal(run)
    if reason:
        print(f"gpu_check: cannot use device {run.device!r}: {reason}", file=sys.stderr)
        return 2
    if "bench" in named:
        for file in ("bench-points.jsonl", "bench-launches.json"):
            (run.out / file).unlink(missing_ok=True)
    results = load(run.out)
    for name, result in results.items():
        if not named and result["status"] in (DONE, SKIPPED):
            print(f"{name}: {result['status']} before", flush=True)
    finished = () if named else (DONE, SKIPPED)
    pending = [n for n in named or PARTS if results.get(n, {}).get("status") not in finished]
    while pending:
        name = pending.pop(0)
        if run.deadline - RESERVE - time.monotonic() < 5:
            print(f"{name}: no time left; run this again", flush=True)
            continue
        results[name] = run_part(run, name, sum(PARTS[n].budget for n in pending))
        # Now, since the next part may take this process with it.
        report.write(results, run.out, quick=run.dry)
    report.write(results, run.out, quick=run.dry)
    print((run.out / "report.md").read_text())
    good = all(results.get(name, {}).get("status") in (DONE, SKIPPED) for name in PARTS)
    return 0 if good else 1


def terminated(*_: Any) -> None:
    """Ends this as an interruption does, so that what it started ends too."""
    sys.exit(143)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, terminated)
    sys.exit(main())
