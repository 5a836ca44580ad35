"""The choice of a backend for a call.

A backend named by `use_backend` or RLHF_KERNELS_BACKEND serves every call or raises. In auto mode a
call takes the first available backend in its device's order of preference that has the operation.
"""

import dataclasses
import sys
import warnings
from typing import Any, Final

import torch
from torch import Tensor

from ..core import env
from ..core.env import BACKEND_NAMES, BackendName
from ..core.layout import PLAIN_MEMORY, Memory
from . import native, triton
from .launchers import Launchers
from .rows import Kernels

REFERENCE: Final = "reference"
_PACKAGE = __name__.partition(".")[0] + "."


def _absent(*_: Any) -> Any:
    raise NotImplementedError("the backend does not have this kernel")


def _scale_inplace(values: Tensor, factor: Tensor) -> Tensor:
    # A 0-d factor would be rounded to the dtype of the values.
    return values.mul_(factor.unsqueeze(0))


class RowKernels:
    """The `Rows` of a backend: launchers as attributes."""

    def __init__(self, launchers: Launchers) -> None:
        self.token_logprobs = launchers.get("token_logprobs", _absent)
        self.token_logprobs_backward_into = launchers.get("token_logprobs_backward_into", _absent)
        self.policy_loss = launchers.get("policy_loss", _absent)
        self.kl_divergence = launchers.get("kl_divergence", _absent)
        self.kl_divergence_backward_into = launchers.get("kl_divergence_backward_into", _absent)
        # Only CUDA has these two.
        self.scale_inplace = launchers.get("scale_inplace", _scale_inplace)
        self.policy_rows_for = launchers.get("policy_rows_for", lambda *_: None)


@dataclasses.dataclass(frozen=True)
class Backend:
    """A kernel backend.

    name: its name in `use_backend`.
    devices: device types that it serves.
    launchers: by operator name; empty if the backend is not available.
    gpu: its kernels are written for a GPU. Losses then return unscaled gradients and a scale to
        multiply by, because a token's gradient is written before all tokens are counted.
    memory: allocates and moves large buffers.
    simulated: its kernels run on the CPU, for tests. It then serves tensors of any device except
        meta, but only if selected by name.
    kernels: its kernels as an algorithm over row kernels takes them.
    """

    name: str
    devices: tuple[str, ...]
    launchers: Launchers
    gpu: bool
    memory: Memory = PLAIN_MEMORY
    simulated: bool = False
    kernels: Kernels = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "kernels", Kernels(RowKernels(self.launchers), self.memory))


def of_extension(name: str, devices: tuple[str, ...]) -> Backend:
    """The backend of a native extension in its current state."""
    memory = native.memory(name) if name == "cpu" else PLAIN_MEMORY
    launchers, emulated = native.launchers(name), native.emulated(name)
    return Backend(name, devices, launchers, name == "cuda", memory, emulated)


# In order of preference; the reference, which torch runs on any device, comes last. Filled at
# import, because torch.compile cannot trace the loading of extensions on first use.
_BACKENDS: dict[str, Backend] = {
    "cpu": of_extension("cpu", ("cpu",)),
    "cuda": of_extension("cuda", ("cuda",)),
    "triton": Backend(
        "triton", ("cuda", "xpu"), triton.launchers(), gpu=True, simulated=triton.interpreted()
    ),
}
_forced: str = env.BACKEND
_warned: set[str] = set()


def get(name: str) -> Backend:
    """The kernel backend of this name."""
    return _BACKENDS[name]


def install(backend: Backend) -> Backend:
    """Replaces the backend of the same name and returns the replaced one; for tests."""
    before, _BACKENDS[backend.name] = _BACKENDS[backend.name], backend
    _ORDER.update(_orders())
    return before


def _orders() -> dict[str, tuple[Backend, ...]]:
    """Backends by device type, preferred first."""
    types = {device for b in _BACKENDS.values() for device in b.devices}
    return {t: tuple(b for b in _BACKENDS.values() if t in b.devices) for t in types}


# Filled at import: torch.compile guards on this table and would recompile after a later change.
_ORDER: dict[str, tuple[Backend, ...]] = _orders()


def _order(device_type: str) -> tuple[Backend, ...]:
    return _ORDER.get(device_type, ())


def unavailable_reason(backend: str) -> str | None:
    """Why `backend` cannot be used here, or None if it can."""
    if backend == REFERENCE:
        return None
    if backend == "triton":
        return triton.unavailable_reason()
    return native.unavailable_reason(backend)


def _suits(backend: str, device: torch.device) -> bool:
    """Whether the backend has code for this device's generation."""
    # Not checked while tracing, which cannot query the device.
    known = backend != "cuda" or device.type != "cuda" or torch.compiler.is_compiling()
    return known or native.suits(device)


def available_backends(device: str | torch.device = "cpu") -> tuple[str, ...]:
    """Backends that can serve tensors of `device`, preferred first, "reference" last."""
    names = (b.name for b in _order(torch.device(device).type))
    return (*(name for name in names if unavailable_reason(name) is None), REFERENCE)


def select(op: str, device: torch.device, kernel: str | None = None) -> str:
    """The backend for `op` on `device`; warns once if a missing one leaves it to the reference.

    Args and errors as in `chosen`.
    """
    name = chosen(op, device, kernel)
    if name == REFERENCE and _forced == "auto" and not torch.compiler.is_compiling():
        for backend in _order(device.type):
            _warn_once(backend.name)
    return name


def chosen(op: str, device: torch.device, kernel: str | None = None) -> str:
    """The backend for `op` on `device`.

    Args:
        op: operation, for the messages.
        device: device of the tensors.
        kernel: name of the launcher that the operation uses; None for `op`.

    Raises:
        RuntimeError: the named backend cannot serve this operation on this device.
    """
    kernel = op if kernel is None else kernel
    if _forced != "auto":
        if _forced == REFERENCE:
            return REFERENCE
        backend = _BACKENDS[_forced]
        reason = unavailable_reason(_forced)
        if reason is not None:
            raise RuntimeError(f"{op}: backend {_forced!r} is not available: {reason}")
        simulated = backend.simulated and device.type != "meta"
        if not (simulated or device.type in backend.devices):
            raise RuntimeError(f"{op}: backend {_forced!r} does not serve {device.type} tensors")
        if not _suits(_forced, device):
            raise RuntimeError(
                f"{op}: backend {_forced!r} is built without code for {device}; rebuild it with "
                "RLHF_KERNELS_CUDA_ARCHS naming its compute capability"
            )
        if kernel not in backend.launchers:
            raise RuntimeError(f"{op}: backend {_forced!r} does not have this operation")
        return _forced
    for backend in _ORDER.get(device.type, ()):
        if kernel in backend.launchers and (backend.name == "cpu" or _suits(backend.name, device)):
            return backend.name
    return REFERENCE


def why_reference(op: str, device: torch.device, kernel: str | None = None) -> str:
    """Why no kernels serve `op` on `device`, where `chosen` names the reference."""
    if _forced == REFERENCE:
        return "the reference backend is selected by name"
    reasons = []
    for backend in _order(device.type):
        reason = unavailable_reason(backend.name)
        if reason is None:
            has = (op if kernel is None else kernel) in backend.launchers
            reason = f"it is built without code for {device}" if has else "it lacks this operation"
        reasons.append(f"{backend.name}: {reason}")
    return "; ".join(reasons) or f"no backend has kernels for {device.type} tensors"


def _warn_once(backend: str) -> None:
    reason = unavailable_reason(backend)
    if reason is not None and backend not in _warned:
        _warned.add(backend)
        warnings.warn(
            f"rlhf_kernels: backend {backend!r} is not available ({reason}); using the plain-torch "
            "reference. Run `python -m rlhf_kernels` for details.",
            RuntimeWarning,
            stacklevel=_caller(),
        )


def _caller() -> int:
    """How far up the call of the package is, as `warnings.warn` in the caller of this counts it."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    return level


class use_backend:
    """Selects a backend for the process, or for a `with` block.

    Args:
        name: "reference", "cpu", "cuda", "triton", or "auto" to choose by device again.

    The choice is global to the process, including all threads. A named backend never falls back to
    another one: a call with an operation or device that it cannot serve raises RuntimeError.

    Raises:
        ValueError: unknown name.
        RuntimeError: the backend is not available here (the message says why).
    """

    def __init__(self, name: BackendName) -> None:
        global _forced
        if name not in BACKEND_NAMES:
            raise ValueError(
                f"use_backend: expected one of {', '.join(BACKEND_NAMES)}, got {name!r}"
            )
        reason = None if name == "auto" else unavailable_reason(name)
        if reason is not None:
            raise RuntimeError(f"use_backend: {name!r} is not available: {reason}")
        self._previous = _forced
        _forced = name

    @staticmethod
    def current() -> str:
        """The name that `use_backend` or RLHF_KERNELS_BACKEND has selected, or "auto"."""
        return _forced

    def __enter__(self) -> "use_backend":
        return self

    def __exit__(self, *exc_info: object) -> None:
        global _forced
        _forced = self._previous


def current_backend() -> str:
    """The name that `use_backend` or RLHF_KERNELS_BACKEND has selected, or "auto"."""
    return _forced
