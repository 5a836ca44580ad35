"""Peak memory of a call, and of the README's points in a fresh process for each provider.

    python -m benchmarks.memory benchmarks/results/<name>.json

puts the latter into the JSON, in place of what the timed run saw: there the process had run others.
Part of `run.py --full`.
"""

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .report import README, README_HEAD, holds_logits

ROOT = Path(__file__).resolve().parents[1]
# Freed memory goes back to the system at once, so that small allocations show too.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
PROVIDERS = ("ours", "eager", "compile", "trl")


def elsewhere(*arguments: str) -> str:
    """Output of `python -m` with these arguments, in a process that holds no freed memory."""
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {done.stdout}")
    return done.stdout


def peak_extra_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """Memory that `call` holds at its highest above what was there before; None if unknown."""
    gc.collect()
    if device.type != "cpu":
        module = getattr(torch, device.type)
        module.reset_peak_memory_stats(device)
        before = module.memory_allocated(device)
        call()
        return module.max_memory_allocated(device) - before

    # Freed memory that glibc still holds would take in the call's, or go in its midst: not seen.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

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


def measured(call: Callable[[], tuple[Any, ...]], device: torch.device) -> dict[str, int | None]:
    """peak_bytes of a call beyond what was there, and extra_bytes beyond its results too."""
    results: list[tuple[Any, ...]] = []
    peak = peak_extra_bytes(lambda: results.append(call()), device)
    if peak is None:
        return {"peak_bytes": None}
    return {
        "peak_bytes": peak,
        "extra_bytes": max(0, peak - sum(t.nbytes for t in results[0])),
    }


def fresh(point: str, provider: str, machine: dict[str, Any]) -> dict[str, int | None]:
    """`measured` of one provider at a point of the suite (its node id), in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "peak.json"
        words = ["pytest", point, "--full", "--peak", provider, str(file), "-p", "no:cacheprovider"]
        words += ["--backend", machine["backend"], *(["--quick"] if machine["quick"] else [])]
        elsewhere(*words)
        return json.loads(file.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("json", type=Path, help="results of a run on a CPU")
    file = parser.parse_args().json
    data = json.loads(file.read_text())
    for point in data["benchmarks"]:
        if point["name"] not in (*README, *README_HEAD) or not holds_logits(point["extra_info"]):
            continue
        for name, figures in point["extra_info"]["providers"].items():
            if name in PROVIDERS and "median" in figures and not figures.get("fresh"):
                found = fresh(point["fullname"], name, data["machine_info"])
                figures |= {**found, "fresh": True}
                print(point["name"], name, found, flush=True)
        # At once: it may be cut off.
        file.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
