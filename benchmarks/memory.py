"""Peak memory of a call."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


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
