"""Native extensions: loading, and the table of launchers that each offers.

One module per operation here holds the launchers; `boundary` is the only file that reads a
tensor's address. torch is imported before the extension so that both share one OpenMP runtime.
"""

import functools
import importlib
from collections.abc import Callable
from types import ModuleType

# First, so that libgomp is loaded.
import torch

from .. import _config
from . import advantages, boundary, kl, logprobs, policy, support, value

_NAMES = {"cpu": "_cpu"}
# One module per operation, each with launchers(extension) -> {operator name: launcher}.
_OPS = (logprobs, support, kl, advantages, policy, value)


def _load(backend: str) -> tuple[ModuleType | None, str | None]:
    try:
        module = importlib.import_module(f"rlhf_kernels.{_NAMES[backend]}")
    except ImportError as error:
        return None, f"extension {_NAMES[backend]} could not be imported: {error}"
    if backend == "cpu" and _config.CPU_ISA is not None:
        if _config.CPU_ISA not in module.isa_names():
            raise ValueError(
                f"RLHF_KERNELS_CPU_ISA: expected one of {', '.join(module.isa_names())}, "
                f"got {_config.CPU_ISA!r}"
            )
        module.select_isa(_config.CPU_ISA)
    return module, None


_MODULES = {backend: _load(backend) for backend in _NAMES}
# Filled at import, not on first use: torch.compile cannot trace an import.
_LAUNCHERS: dict[str, dict[str, Callable[..., object]]] = {
    backend: {name: launcher for op in _OPS for name, launcher in op.launchers(extension).items()}
    if extension is not None
    else {}
    for backend, (extension, _) in _MODULES.items()
}


def module(backend: str) -> ModuleType | None:
    """The extension module of a native backend, or None where it is not built."""
    return _MODULES[backend][0]


def empty(backend: str) -> Callable[..., torch.Tensor]:
    """empty(shape, dtype, device) of a native backend, for large buffers."""
    extension = _MODULES[backend][0]
    return functools.partial(boundary.empty, extension)


def unavailable_reason(backend: str) -> str | None:
    """Why a native backend cannot be used, or None if it can."""
    if backend not in _MODULES:
        return f"unknown backend {backend!r}"
    return _MODULES[backend][1]


def launchers(backend: str) -> dict[str, Callable[..., object]]:
    """Launchers of a native backend by operator name; empty where it is not built."""
    return _LAUNCHERS[backend]
