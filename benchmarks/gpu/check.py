"""Runs every check that needs a GPU, in parts that can be repeated: `make gpu-check OUT=dir`.

    python -m benchmarks.gpu.check --out dir [--device cuda] [--parts tests,ours] [--limit 590]

The parts, most important first, are build, compile, env, smoke, ours, ncu, peers, sanitizer,
launches and tests. Each has its own limit in seconds; the last one gets the rest of --limit. A
finished part does not run again unless --parts names it; an interrupted one continues. OUT gets a
log and a JSON file of each part, and report.json and report.md. After each part, the report and an
archive of all files are written atomically to --results (default: OUT/results), so that losing the
machine loses only the part that was running. Exit status 1: something failed or is unfinished; 2:
there is no such device.

The running interpreter is not changed. --wheels DIR adds missing packages (peers, pytest-xdist,
hypothesis) from wheels, without network access. Extensions from `make gpu-extensions` on another
machine are used instead of compiling, if they fit.
"""

import datetime
import importlib.util
import json
import os
import platform
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
from . import keep, prebuilt
from .bench import part_launches, part_ours, part_peers
from .ncu import part_ncu
from .process import (
    CUT,
    DONE,
    DRY_SECONDS,
    FAILED,
    SKIPPED,
    Result,
    Run,
    kernel_backends,
    missing,
    refusal,
    status,
)
from .sanitizer import part_sanitizer

# Seconds reserved for stopping interrupted processes and writing the report.
RESERVE = 15
# Tests of operations; the other tests cover the CPU, the package or the trainer.
_OPERATION_TESTS = (
    "logprobs logprobs_rules row_results many_labels policy policy_rules policy_masks "
    "policy_gates policy_clipped policy_weights policy_support kl kl_options kl_topk empty_support "
    "advantages advantages_rules advantages_general advantages_groups value mismatch preference "
    "support support_rules tiles token_loads extremes fp16 empty interface missing meta masks "
    "scratch"
).split()
_HEAD_TESTS = ("head/test_head", "head/test_cases", "head/test_kl_options")
TEST_FILES = (*_HEAD_TESTS, *(f"ops/test_{n}" for n in _OPERATION_TESTS))
# Processes of pytest on one GPU: most of the time is compilation, which runs on the CPU.
WORKERS = 12
# Selects a few tests of each file.
DRY_TESTS = "triton and (poisons and temperature or empty_batch or infinite)"
# Compute capabilities that tools/triton_aot.py compiles for.
AHEAD_OF_TIME = ("80", "90", "100")

# --- env ---------------------------------------------------------------------------------------


def device_facts(device: str) -> dict[str, Any]:
    """The device, its driver and its memory rates, medians of 20 measurements with cold caches."""
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
        # The source, its copy and the buffer that empties the cache have to fit.
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


def _capability(run: Run) -> str | None:
    """The compute capability of a CUDA device, as in "90"; None for other devices."""
    if not run.device.startswith("cuda"):
        return None
    ask = "import sys, torch; print(*torch.cuda.get_device_capability(sys.argv[1]), sep='')"
    return (
        run.tail("capability.log", 1)
        if run.python("capability.log", "-c", ask, run.device) == 0
        else None
    )


def part_build(run: Run) -> Result:
    """Installs the prebuilt extensions, or compiles them for this device."""
    if run.dry:
        return {"status": SKIPPED, "reason": "a dry run takes it as it is"}
    arch = _capability(run)
    reason = prebuilt.refusal(arch)
    if reason is None:
        prebuilt.install()
        return {"status": DONE, "said": [f"prebuilt: {', '.join(prebuilt.file_names())}"]}
    absent = missing("setuptools", "pybind11")
    if absent:
        return {"status": SKIPPED, "reason": absent, "said": [reason]}
    variables = {"RLHF_KERNELS_CUDA": "0"}
    if run.device.startswith("cuda"):
        # With nvcc, a failing CUDA build is an error. Without nvcc, an existing build is used.
        nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
        variables = {"RLHF_KERNELS_CUDA": "1" if nvcc else ""}
        if arch is not None:
            variables["RLHF_KERNELS_CUDA_ARCHS"] = arch
    code = run.python("build.log", "setup.py", "-q", "build_ext", "--inplace", **variables)
    failures = [] if code == 0 else [run.tail("build.log")]
    built = [line for line in run.lines("build.log") if line.startswith("rlhf_kernels:")]
    return {"status": status(code), "failures": failures, "said": [reason, *built]}


def part_env(run: Run) -> Result:
    doctor_file = run.out / "env-doctor.log"
    doctor = run.python("env-doctor.log", "-m", "rlhf_kernels", "--json")
    # The output may have warnings before the report.
    text = doctor_file.read_text()
    found = json.loads(text[text.index("{") :]) if "{" in text else None
    facts_file = run.out / "env-device.json"
    # Runs in a separate process, because this one must not hold device memory.
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


def part_compile(run: Run) -> Result:
    """Compiles all Triton kernels into the cache on disk, on all cores, for the later parts."""
    arch = _capability(run)
    if run.dry or arch not in AHEAD_OF_TIME:
        return {"status": SKIPPED, "reason": f"compiled as they are called: device {arch}"}
    words = ["-m", "tools.triton_aot", "--target", f"sm_{arch}"]
    words += ["--processes", str(os.cpu_count() or 1)]
    # If it is interrupted, the cache keeps what has been compiled.
    code = run.python("compile.log", *words)
    failures = [] if code in (0, None) else [run.tail("compile.log", 5)]
    return {"status": status(code), "failures": failures}


def part_smoke(run: Run) -> Result:
    """Compares every operation on every backend with fp64, on small inputs."""
    backends = ["triton"] if run.dry else kernel_backends(run)
    file = run.out / "smoke.jsonl"
    file.unlink(missing_ok=True)
    words = ["-m", "benchmarks.gpu.smoke", "--device", run.device, "--out", str(file)]
    words += ["--backends", ",".join(backends)]
    words += ["--only", "kl_penalty"] if run.dry else []
    code = run.python("smoke.log", *words)
    lines = file.read_text().splitlines() if file.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    bad = [x for x in found if not x["ok"]]
    failures = [
        "{operation} {backend} {dtype} size {size}: ".format(**x)
        + x.get("message", f"off by {x['error']} roundings")
        for x in bad
    ]
    if code not in (0, None) and not bad:
        failures.append(run.tail("smoke.log", 5))
    return {
        "status": status(code),
        "failures": failures,
        "passed": len(found) - len(bad),
        "failed": len(bad),
        "checks": found,
    }


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
        # pytest was interrupted or failed before the first test; read its log instead.
        pass
    lines = run.lines(f"{name}.log")
    failed = [x for x in lines if " FAILED" in f" {x}"]
    counts = {k: sum(f" {k.upper()}" in x for x in lines) for k in ("passed", "failed", "skipped")}
    failures = failed if code is None else [*failed, run.tail(f"{name}.log", 5)]
    return result | counts | {"failures": failures}


def part_tests(run: Run) -> Result:
    """Runs the tests that need a GPU, then all tests of operations, until the time is up."""
    arguments = ["tests/kernels/test_gpu.py", *(f"tests/{name}.py" for name in TEST_FILES)]
    arguments += ["-m", "not slow"]
    if run.dry:
        arguments = ["tests/kernels/test_gpu.py", "tests/ops/test_logprobs.py", "-k", DRY_TESTS]
    elif importlib.util.find_spec("xdist") is not None:
        # Tests that fill the memory are in one group, and must not run at the same time.
        arguments += ["-n", str(min(WORKERS, os.cpu_count() or 1)), "--dist", "loadgroup"]
    return _pytest(run, "tests", *arguments, needs=("hypothesis",))


class Part(NamedTuple):
    """A part and its limit in seconds; a limit of 0 means the remaining time."""

    run: Callable[[Run], Result]
    limit: float


# The most important parts come first, because the machine may be lost. All limits together stay
# below ten minutes even if everything has to be compiled.
PARTS = {
    "build": Part(part_build, 90),
    # This precedes the doctor, whose check would compile the kernels one by one.
    "compile": Part(part_compile, 40),
    "env": Part(part_env, 30),
    "smoke": Part(part_smoke, 60),
    "ours": Part(part_ours, 90),
    "ncu": Part(part_ncu, 60),
    "peers": Part(part_peers, 120),
    "sanitizer": Part(part_sanitizer, 40),
    "launches": Part(part_launches, 20),
    "tests": Part(part_tests, 0),
}


def load(out: Path) -> dict[str, Result]:
    """The results of finished parts, by name."""
    files = {name: out / f"{name}.json" for name in PARTS}
    return {name: json.loads(f.read_text()) for name, f in files.items() if f.exists()}


def run_part(run: Run, name: str) -> Result:
    """Runs a part within its limit, and stores its result even if it is interrupted."""
    part = PARTS[name]
    started = time.monotonic()
    end = run.deadline - RESERVE
    limit = DRY_SECONDS if run.dry else part.limit
    run.ends = min(end, started + limit) if limit else end
    print(f"{name}: at most {run.left():.0f} s", flush=True)
    # This result is stored if the part is interrupted.
    result: Result = {"status": CUT, "failures": ["interrupted"]}
    try:
        result = part.run(run)
    except Exception as error:
        # An error in one part must not stop the others.
        result = {"status": FAILED, "failures": [f"{type(error).__name__}: {error}"]}
    finally:
        result["seconds"] = round(time.monotonic() - started, 1)
        # Parts may run at different commits.
        result["commit"] = _output("git", "rev-parse", "HEAD")
        keep.write_text(run.out / f"{name}.json", json.dumps(result, indent=1))
    print(f"{name}: {result['status']} in {result['seconds']} s", flush=True)
    for line in result.get("failures", [])[:20]:
        print(f"  {line}", flush=True)
    return result


def publish(run: Run) -> None:
    """Writes the report and the archive of the results so far."""
    from ..reports import gpu as report

    report.write(load(run.out), run.out, quick=run.dry)
    keep.publish(run.out, run.results)


def main(argv: list[str] | None = None) -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of logs and results")
    parser.add_argument("--results", type=Path, help="folder of the report and the archive")
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
    options.results = (options.results or options.out / "results").resolve()
    run = Run(options)
    reason = refusal(run)
    if reason:
        print(f"gpu_check: cannot use device {run.device!r}: {reason}", file=sys.stderr)
        return 2
    for name in set(named) & {"ours", "peers"}:
        (run.out / f"{name}-points.jsonl").unlink(missing_ok=True)
    results = load(run.out)
    for name, result in results.items():
        if not named and result["status"] in (DONE, SKIPPED):
            print(f"{name}: {result['status']} before", flush=True)
    finished = () if named else (DONE, SKIPPED)
    pending = [n for n in named or PARTS if results.get(n, {}).get("status") not in finished]
    try:
        for name in pending:
            if run.deadline - RESERVE - time.monotonic() < 5:
                print(f"{name}: no time left; run this again", flush=True)
                continue
            run_part(run, name)
            # Publish after every part, because the next one may end this process.
            publish(run)
    finally:
        publish(run)
    print((run.out / "report.md").read_text())
    results = load(run.out)
    good = all(results.get(name, {}).get("status") in (DONE, SKIPPED) for name in PARTS)
    return 0 if good else 1


def terminated(*_: Any) -> None:
    """Exits on a signal in the same way as on an interrupt, so that child processes end too."""
    sys.exit(143)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, terminated)
    sys.exit(main())
