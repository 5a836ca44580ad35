"""The benchmark suite in `make gpu-check`, as two parts: ours alone, and ours beside its peers."""

import json
from pathlib import Path
from typing import Any

from .process import SKIPPED, Result, Run, kernel_backends, missing, status

# The most important files come first, because time may run out; the head's points take longest.
BENCH_FILES = tuple("logprobs kl advantages policy head value mismatch support preference".split())
# Even then each point has at least 20 rounds of a few milliseconds.
OURS_SECONDS = 0.5
#: Peers are compared on these shapes: logits 8192×151936 and two of 4096×131072, the head of
#: 8192×4096×151936, rows of 131,072 tokens.
PEER_FILES = ("logprobs", "head", "kl", "advantages")
PEER_POINTS = (
    "gpu-bf16 and (test_token_logprobs or test_linear_policy_loss or test_kl_divergence)"
    " or test_gae and gpu-16x131072"
)
# A single file, because importing the peers of all files takes most of a dry run.
_DRY_FILES = ("kl",)
_DRY = ("--quick", "-k", "kl_penalty")


def records(file: Path, *, failed: bool = True) -> list[dict[str, Any]]:
    """Reads the measured points, failed ones only if `failed`, and rewrites the file with them."""
    if not file.exists():
        return []
    found = []
    for line in file.read_text().splitlines():
        try:
            point = json.loads(line)
        except json.JSONDecodeError:
            # The line was cut off while it was written; its point is measured again.
            continue
        if failed or not point["failed"]:
            found.append(point)
    file.write_text("".join(json.dumps(f) + "\n" for f in found))
    return found


def command(run: Run, files: tuple[str, ...], backend: str, file: Path) -> list[str]:
    """The pytest command for GPU points; pytest appends each finished point to `file`."""
    arguments = ["-m", "pytest", *(f"benchmarks/points/{n}.py" for n in files)]
    arguments += ["--points", "gpu", "--device", run.device, "--records", str(file)]
    arguments += ["-p", "no:cacheprovider", "--tb=short", "-v", "--benchmark-disable-gc"]
    return [*arguments, "--backend", backend]


def _measured(run: Run, name: str, arguments: dict[str, list[str]]) -> Result:
    """Runs pytest with the arguments of each backend, and shares the time between backends."""
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
        # The terminal is wide, so that pytest's summary does not cut reasons.
        code = run.python(log, *words, seconds=share, COLUMNS="300")
        codes.append(code)
        # Points that raised before they were measured have no record.
        found = [x for x in run.lines(log) if x.startswith(("FAILED ", "ERROR "))]
        failures += found or ([run.tail(log, 5)] if code else [])
    return {"status": status(*codes), "points": records(file), "failures": failures}


def part_ours(run: Run) -> Result:
    """Measures ours and the machine's copy rate, on every GPU shape and both backends."""
    backends = ["triton"] if run.dry else kernel_backends(run)
    files = _DRY_FILES if run.dry else BENCH_FILES
    file = run.out / "ours-points.jsonl"
    more = ["--providers", "ours", "--seconds", str(OURS_SECONDS), *(_DRY if run.dry else ())]
    return _measured(run, "ours", {b: [*command(run, files, b, file), *more] for b in backends})


def part_peers(run: Run) -> Result:
    """Measures ours beside all installed peers, on the most important shapes."""
    backend = "triton" if run.dry else kernel_backends(run)[0]
    file = run.out / "peers-points.jsonl"
    files, chosen = PEER_FILES, ["-k", PEER_POINTS]
    if run.dry:
        files, chosen = _DRY_FILES, [*_DRY, "--providers", "eager"]
    return _measured(run, "peers", {backend: [*command(run, files, backend, file), *chosen]})


def part_launches(run: Run) -> Result:
    """Counts the launches of each operation."""
    file = run.out / "launches-counts.json"
    words = ["-m", "benchmarks.studies.launches", "--device", run.device, "--out", str(file)]
    code = run.python("launches.log", *words)
    failures = [run.tail("launches.log", 3)] if code else []
    counts = json.loads(file.read_text()) if code == 0 else None
    return {"status": status(code), "failures": failures, "launches": counts}
