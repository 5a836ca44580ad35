"""Which backend serves a call.

A backend that is named, by `use_backend` or RLHF_KERNELS_BACKEND, either serves or raises. In auto
mode the first in the device's order that exists and has the operation is taken.
"""

import warnings
from collections.abc import Callable

import torch

from ..core import env
from ..head import chunks, row_launchers, shard
from . import native, triton

REFERENCE = "reference"

# Preference per device type. Every device ends with the reference, which torch runs anywhere.
_ORDER = {"cpu": ("cpu",), "cuda": ("cuda", "triton"), "xpu": ("triton",)}

# Losses of these hand out gradients that are yet to be multiplied by a scale: on a GPU a token's
# gradient is written before the last one is counted.
GPU = ("cuda", "triton")

_Launcher = Callable[..., object]


def table(rows: dict[str, _Launcher], empty: chunks.Empty) -> dict[str, _Launcher]:
    """All launchers of a backend, by name, from those of its own kernels."""
    return {**rows, **row_launchers.launchers(rows, empty), **shard.launchers(rows, empty)}


# Filled at import, not on first use: torch.compile cannot trace what fills them.
_TABLES: dict[str, dict[str, _Launcher]] = {
    "cpu": table(native.launchers("cpu"), native.empty("cpu")),
    "cuda": table(native.launchers("cuda"), chunks.plain_empty),
    "triton": table(triton.launchers(), chunks.plain_empty),
}
_forced: str = env.BACKEND
_warned: set[str] = set()


def _launchers(backend: str) -> dict[str, _Launcher]:
    """Operations that a kernel backend has, by name; empty where it is not built."""
    return _TABLES[backend]


def unavailable_reason(backend: str) -> str | None:
    """Why `backend` cannot be used here, or None if it can."""
    if backend == REFERENCE:
        return None
    if backend == "triton":
        return triton.unavailable_reason()
    return native.unavailable_reason(backend)


def _serves(backend: str, device_type: str) -> bool:
    # Triton's interpreter and the CUDA emulator take tensors of the CPU, but only where they are
    # asked for by name: they are for tests.
    simulated = triton.interpreted() if backend == "triton" else native.emulated(backend)
    return simulated or backend in _ORDER.get(device_type, ())


def _suits(backend: str, device: torch.device) -> bool:
    """Whether the backend's code runs on this very device."""
    # Not while tracing, which cannot ask the device: it would have been refused before.
    known = backend != "cuda" or device.type != "cuda" or torch.compiler.is_compiling()
    return known or native.suits(device)


def available_backends(device: str | torch.device = "cpu") -> tuple[str, ...]:
    """Backends that can serve tensors of `device`, preferred first, "reference" last."""
    order = _ORDER.get(torch.device(device).type, ())
    return (*(b for b in order if unavailable_reason(b) is None), REFERENCE)


def select(op: str, device: torch.device) -> str:
    """The backend for `op` on `device`.

    Raises:
        RuntimeError: a backend was named and cannot serve this operation on this device.
    """
    if _forced != "auto":
        if _forced == REFERENCE:
            return REFERENCE
        reason = unavailable_reason(_forced)
        if reason is not None:
            raise RuntimeError(f"{op}: backend {_forced!r} is not available: {reason}")
        if not _serves(_forced, device.type):
            raise RuntimeError(f"{op}: backend {_forced!r} does not serve {device.type} tensors")
        if not _suits(_forced, device):
            raise RuntimeError(
                f"{op}: backend {_forced!r} is built without code for {device}; rebuild it with "
                "RLHF_KERNELS_CUDA_ARCHS naming its compute capability"
            )
        if op not in _launchers(_forced):
            raise RuntimeError(f"{op}: backend {_forced!r} does not have this operation")
        return _forced
    for backend in _ORDER.get(device.type, ()):
        if op in _launchers(backend) and _suits(backend, device):
            return backend
    if not torch.compiler.is_compiling():
        for backend in _ORDER.get(device.type, ()):
            _warn_once(backend)
    return REFERENCE


def _warn_once(backend: str) -> None:
    reason = unavailable_reason(backend)
    if reason is not None and backend not in _warned:
        _warned.add(backend)
        warnings.warn(
            f"rlhf_kernels: backend {backend!r} is not available ({reason}); using the plain-torch "
            "reference. Run `python -m rlhf_kernels` for details.",
            RuntimeWarning,
            stacklevel=4,
        )


def launcher(backend: str, op: str) -> _Launcher:
    """The function of `backend` that runs `op`."""
    return _launchers(backend)[op]


class use_backend:
    """Forces a backend, for the process or for a `with` block.

    Args:
        name: "reference", "cpu", "cuda", "triton", or "auto" to choose by device again.

    The choice is global to the process, threads included. A named backend never falls back: an
    operation or device it cannot serve raises RuntimeError at the call.

    Raises:
        ValueError: unknown name.
        RuntimeError: the backend is not available here (the message says why).
    """

    def __init__(self, name: str) -> None:
        global _forced
        if name not in env.BACKEND_NAMES:
            raise ValueError(
                f"use_backend: expected one of {', '.join(env.BACKEND_NAMES)}, got {name!r}"
            )
        reason = None if name == "auto" else unavailable_reason(name)
        if reason is not None:
            raise RuntimeError(f"use_backend: {name!r} is not available: {reason}")
        self._previous = _forced
        _forced = name

    def __enter__(self) -> "use_backend":
        return self

    def __exit__(self, *exc_info: object) -> None:
        global _forced
        _forced = self._previous


def current_backend() -> str:
    """The forced backend's name, or "auto"."""
    return _forced
