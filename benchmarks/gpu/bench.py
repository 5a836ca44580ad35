"""The benchmark suite on a GPU, in two parts of `gpu_check`: ours alone, then beside the peers."""

import json
from pathlib import Path
from typing import Any

from .process import SKIPPED, Result, Run, kernel_backends, missing, status

# What has most at stake first, since time may run out; a point of the head takes the longest.
BENCH_FILES = tuple("logprobs kl advantages policy head value support preference".split())
# A point of ours has 20 rounds at least, of a few milliseconds.
OURS_SECONDS = 0.5
#: The shapes on which peers are compared: logits 8192×151936 and two of 4096×131072, the head of
#: 8192×4096×151936, rows of 131,072 tokens.
PEER_FILES = ("logprobs", "head", "kl", "advantages")
PEER_POINTS = (
    "gpu-bf16 and (test_token_logprobs or test_linear_policy_loss or test_kl_divergence)"
    " or test_gae and gpu-16x131072"
)
# One file: importing the peers of all takes longer than everything else in a dry run.
_DRY_FILES = ("kl",)
_DRY = ("--quick", "-k", "kl_penalty")


def records(file: Path, *, failed: bool = True) -> list[dict[str, Any]]:
    """Points measured so far; the others, and without `failed` those that failed, are dropped."""
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


def command(run: Run, files: tuple[str, ...], backend: str, file: Path) -> list[str]:
    """pytest over points of a GPU, which appends each to `file` as it ends."""
    arguments = ["-m", "pytest", *(f"benchmarks/points/{n}.py" for n in files)]
    arguments += ["--points", "gpu", "--device", run.device, "--records", str(file)]
    arguments += ["-p", "no:cacheprovider", "--tb=short", "-v", "--benchmark-disable-gc"]
    return [*arguments, "--backend", backend]


def _measured(run: Run, name: str, arguments: dict[str, list[str]]) -> Result:
    """Runs pytest with the arguments of each backend; the first of two leaves the other a share."""
    reason = missing("pytest", "pytest_benchmark")
    if reason:
        return {"status": SKIPPED, "reason": reason}
    file = run.out / f"{name}-points.jsonl"
    records(file, failed=False)
    codes, failures = [], []
    for i, (backend, words) in enumerate(arguments.items()):
        if run.left() < 5:
            codes.append(None)
            continue
        share = run.left() / (len(arguments) - i)
        log = f"{name}-{backend}.log"
        # Wide, so that the summary gives reasons in full.
        code = run.python(log, *words, seconds=share, COLUMNS="300")
        codes.append(code)
        # Those that raised before they were measured are in no record.
        found = [x for x in run.lines(log) if x.startswith(("FAILED ", "ERROR "))]
        failures += found or ([run.tail(log, 5)] if code else [])
    return {"status": status(*codes), "points": records(file), "failures": failures}


def part_ours(run: Run) -> Result:
    """Ours beside the machine's copy rate, every shape of a GPU, on both backends."""
    backends = ["triton"] if run.dry else kernel_backends(run)
    files = _DRY_FILES if run.dry else BENCH_FILES
    file = run.out / "ours-points.jsonl"
    more = ["--providers", "ours", "--seconds", str(OURS_SECONDS), *(_DRY if run.dry else ())]
    return _measured(run, "ours", {b: [*command(run, files, b, file), *more] for b in backends})


def part_peers(run: Run) -> Result:
    """Ours beside everybody else who is installed, on the shapes that matter."""
    backend = "triton" if run.dry else kernel_backends(run)[0]
    file = run.out / "peers-points.jsonl"
    files, chosen = PEER_FILES, ["-k", PEER_POINTS]
    if run.dry:
        files, chosen = _DRY_FILES, [*_DRY, "--providers", "eager"]
    return _measured(run, "peers", {backend: [*command(run, files, backend, file), *chosen]})


def part_launches(run: Run) -> Result:
    """How many launches each operation takes."""
    file = run.out / "launches-counts.json"
    words = ["-m", "benchmarks.studies.launches", "--device", run.device, "--out", str(file)]
    code = run.python("launches.log", *words)
    failures = [run.tail("launches.log", 3)] if code else []
    counts = json.loads(file.read_text()) if code == 0 else None
    return {"status": status(code), "failures": failures, "launches": counts}
