"""Peak memory of a call."""

import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from .. import ROOT

# glibc then returns freed memory immediately, so that small allocations are visible too.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}


def elsewhere(*arguments: str) -> str:
    """The output of `python -m` with these arguments, in a process without freed memory."""
    command = [sys.executable, "-m", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {done.stdout}")
    return done.stdout


def peak_extra_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """The peak memory during `call` above the memory before it; None if unknown."""
    gc.collect()
    if device.type != "cpu":
        module = getattr(torch, device.type)
        module.reset_peak_memory_stats(device)
        before = module.memory_allocated(device)
        call()
        return module.max_memory_allocated(device) - before

    # Freed memory that glibc still holds would hide allocations of the call.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)

    def kilobytes(name: str) -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split(f"{name}:")[1].split()[0])

    try:
        # Linux resets the high-water mark of resident memory to its current size.
        Path("/proc/self/clear_refs").write_text("5")
        before = kilobytes("VmRSS")
        call()
        return max(0, kilobytes("VmHWM") - before) * 1024
    except OSError:
        return None


def measured(call: Callable[[], tuple[Any, ...]], device: torch.device) -> dict[str, int | None]:
    """peak_bytes of a call beyond the memory before it, and extra_bytes beyond its results too."""
    results: list[tuple[Any, ...]] = []
    peak = peak_extra_bytes(lambda: results.append(call()), device)
    if peak is None:
        return {"peak_bytes": None}
    return {
        "peak_bytes": peak,
        "extra_bytes": max(0, peak - sum(t.nbytes for t in results[0])),
    }
