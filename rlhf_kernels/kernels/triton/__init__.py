"""Triton kernels: NVIDIA, AMD and Intel GPUs, and any tensor under Triton's interpreter.

`<family>.py` has a family's launchers by operator name in `LAUNCHERS`, and its main kernels; other
files have further kernels. The modules are loaded at import if torch has a GPU or
TRITON_INTERPRET=1 selects the interpreter. Loading on first use would fail under torch.compile,
which cannot trace an import.
"""

import importlib.util
import os

import torch

from ..launchers import Launchers

_LAUNCHERS: Launchers = {}
_REASON: str | None = None
_INTERPRETED = False


def _load() -> str | None:
    """Fills the table of launchers; returns None, or why Triton is not available."""
    global _INTERPRETED, _LAUNCHERS
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    version = torch.version
    gpu = version.cuda or version.hip or getattr(version, "xpu", None)
    if not gpu and not os.environ.get("TRITON_INTERPRET"):
        return "this torch is built without GPU support (TRITON_INTERPRET=1 runs the interpreter)"
    try:
        import triton

        if not hasattr(triton, "knobs"):  # absent in the Triton of torch 2.6 and 2.7
            return f"triton {triton.__version__} is too old: expected 3.4 or later"
        from . import _launch, advantages, kl, logprobs, mismatch, policy, support, value
    except ImportError as error:
        return f"triton could not be imported: {error}"
    _LAUNCHERS = {
        **logprobs.LAUNCHERS,
        **kl.LAUNCHERS,
        **support.LAUNCHERS,
        **advantages.LAUNCHERS,
        **policy.LAUNCHERS,
        **value.LAUNCHERS,
        **mismatch.LAUNCHERS,
    }
    _INTERPRETED = _launch.INTERPRETED
    return None


_REASON = _load()


def unavailable_reason() -> str | None:
    """Why the Triton backend cannot be used, or None if it can."""
    return _REASON


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which accepts tensors of any device."""
    return _INTERPRETED


def launchers() -> Launchers:
    """Launchers by operator name; empty if Triton is not available."""
    return _LAUNCHERS
