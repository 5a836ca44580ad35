"""Native extensions: loading, and the launchers of each.

Each family of operations has a module of launchers. csrc/bind/tensor.h reads the tensors;
`boundary` reads the addresses of scratch memory, and of buffers whose pages it makes present. torch
is imported before the extensions, because `_cpu` shares its OpenMP runtime.
"""

import functools
import importlib
from types import ModuleType

# Before the extensions, so that libgomp is loaded.
import torch

from ...core import checks, env
from ...core.layout import PLAIN_MEMORY, Memory
from ..launchers import Launchers
from . import (
    advantages,
    architectures,
    boundary,
    kl,
    logprobs,
    mismatch,
    policy,
    policy_rows,
    support,
    value,
)

_NAMES = {"cpu": "_cpu", "cuda": "_cuda"}
# What each needs when the package is installed.
_NEEDED = {"cpu": "a C++ compiler", "cuda": "nvcc"}


def _load(backend: str) -> tuple[ModuleType | None, str | None]:
    name = f"rlhf_kernels.{_NAMES[backend]}"
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        said = str(error)
        if isinstance(error, ModuleNotFoundError) and error.name == name:
            said = (
                f"it was not built, which needs {_NEEDED[backend]} where the package is installed; "
                f"with RLHF_KERNELS_{backend.upper()}=1 pip install says what is missing"
            )
        return None, f"extension {_NAMES[backend]} could not be imported: {said}"
    if backend == "cpu":
        if not hasattr(module, "transpose"):
            return None, f"extension {_NAMES[backend]} is of an older version: build it again"
        checks.use_native(module.plain)
        if env.CPU_ISA is not None:
            if env.CPU_ISA not in module.isa_names():
                raise ValueError(
                    f"RLHF_KERNELS_CPU_ISA: expected one of {', '.join(module.isa_names())}, "
                    f"got {env.CPU_ISA!r}"
                )
            module.select_isa(env.CPU_ISA)
    return module, _cuda_reason(module) if backend == "cuda" else None


def _cuda_reason(module: ModuleType) -> str | None:
    """Why a built CUDA extension cannot run here. Does not initialise CUDA."""
    if module.emulated:
        return None
    driver, runtime = module.driver_version(), module.runtime_version()
    if driver == 0:
        return "built, no driver"
    if driver // 1000 < runtime // 1000:
        return f"built for CUDA {runtime // 1000}, the driver supports CUDA {driver // 1000} only"
    if torch.version.cuda is None:
        return "built, but this torch is not built for CUDA"
    return None


_MODULES = {backend: _load(backend) for backend in _NAMES}


def launchers(backend: str) -> Launchers:
    """Launchers of a native backend by operator name; empty if it cannot run here."""
    extension, reason = _MODULES[backend]
    if extension is None or reason is not None:
        return {}
    return {
        **logprobs.launchers(extension),
        **support.launchers(extension),
        **kl.launchers(extension),
        **advantages.launchers(extension),
        **policy.launchers(extension),
        **policy_rows.launchers(extension),
        **value.launchers(extension),
        **mismatch.launchers(extension),
    }


def install(
    backend: str, extension: ModuleType | None, reason: str | None = None
) -> tuple[ModuleType | None, str | None]:
    """Replaces a backend's module; returns the replaced module and its reason; for tests."""
    before, _MODULES[backend] = _MODULES[backend], (extension, reason)
    return before


def module(backend: str) -> ModuleType | None:
    """The extension module of a native backend, or None if it is not built."""
    return _MODULES[backend][0]


def memory(backend: str) -> Memory:
    """What a native backend does with large buffers."""
    extension = _MODULES[backend][0]
    if extension is None:
        return PLAIN_MEMORY
    return Memory(
        functools.partial(boundary.empty, extension),
        functools.partial(boundary.transpose_into, extension),
    )


def unavailable_reason(backend: str) -> str | None:
    """Why a native backend cannot be used, or None if it can."""
    if backend not in _MODULES:
        return f"unknown backend {backend!r}"
    return _MODULES[backend][1]


def emulated(backend: str) -> bool:
    """Whether a backend's kernels run in the tests' emulator, which takes CPU tensors."""
    extension = module(backend)
    return extension is not None and extension.emulated


def suits(device: torch.device) -> bool:
    """Whether the CUDA extension has code for a device: machine code for its compute capability, or
    PTX of an earlier one.
    """
    return architectures.suit(architectures.of(module("cuda")), device)
