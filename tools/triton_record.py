"""Records what launchers would compile: every Triton kernel with its types and constants.

A driver that has a target but no GPU is installed in Triton, and a hook of the JIT captures every
kernel that it is about to compile. The real launchers make the launches, so types, constants and
specialisation are real. Nothing is executed, so the values of tensors do not matter.
"""

import dataclasses
import hashlib
import importlib
import json
import pkgutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch

# The package loads its Triton kernels only if torch has a GPU.
torch.version.cuda = torch.version.cuda or "none here"

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import JITFunction, driver  # noqa: E402

import rlhf_kernels.kernels.triton  # noqa: E402
from rlhf_kernels.kernels import backends  # noqa: E402
from rlhf_kernels.ops import _calls  # noqa: E402


class Target(NamedTuple):
    """A GPU, with the shared memory and the warps of a multiprocessor."""

    gpu: GPUTarget
    shared: int
    warps: int = 64


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 164 << 10),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 228 << 10),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 228 << 10),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 << 10, 32),
}


@dataclass(frozen=True)
class Variant:
    """A kernel with everything that determines the result of its compilation."""

    kernel: str
    function: JITFunction
    # A tuple has the types of its members; their constants have the path (argument, member).
    signature: dict[str, str | tuple[str, ...]]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    def _members(self) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """(name, path, type) of every argument; of a tuple those of its members."""
        for i, (name, types) in enumerate(self.signature.items()):
            if isinstance(types, tuple):
                yield from ((f"{name}.{j}", (i, j), t) for j, t in enumerate(types))
            else:
                yield name, (i,), types

    def label(self) -> str:
        """What distinguishes it from other variants of its kernel, for readers."""
        names = {path: name for name, path, _ in self._members()}
        parts = [f"{n}:{t}" for n, _, t in self._members() if t == "i64" or t[0] == "*"]
        parts += [f"{names[path]}={v}" for path, v in self.constants.items()]
        parts += [f"{names[path]}:{n}={v}" for path, a in self.attributes.items() for n, v in a]
        return " ".join(parts).replace("tt.", "")

    def types(self) -> set[str]:
        """The types of its tensors."""
        return {f"{name}:{t}" for name, _, t in self._members() if t[0] == "*"}

    def values(self) -> set[str]:
        """The value of every argument: its constant, or its type and what is known of it."""
        found = {f"{name}={value}" for name, value in self.options.items()}
        for name, path, t in self._members():
            if path in self.constants:
                found.add(f"{name}={self.constants[path]}")
            else:
                found |= {f"{name}:{t}", f"{name} {sorted(self.attributes.get(path, []))}"}
        return found

    def switched_off(self) -> int:
        """The number of its absent arguments and options that are off, which add no code."""
        return sum(v is None or v is False for v in self.constants.values())

    def rows_aligned(self) -> bool:
        """Whether rows start at multiples of 16 bytes: all addresses and, by ALIGN, all strides."""
        names = list(self.signature)
        constants = {names[i]: v for (i, *at), v in self.constants.items() if not at}
        chosen = {p.num for p in self.function.params if not p.do_not_specialize}
        pointers = [path for _, path, t in self._members() if path[0] in chosen and t[0] == "*"]
        known = [["tt.divisibility", 16] in self.attributes.get(path, []) for path in pointers]
        return constants.get("ALIGN", 1) > 1 and bool(known) and all(known)


class Recorder:
    """A substitute for a driver that captures the kernels that the JIT is about to compile."""

    def __init__(self, target: Target) -> None:
        self._gpu = target.gpu
        self.launched: list[tuple[str, str]] = []
        self.variants: dict[str, Variant] = {}

    def get_current_target(self) -> GPUTarget:
        return self._gpu

    def get_current_device(self) -> str:
        # The JIT caches per device what it compiled for its target.
        return str(self._gpu)

    def get_current_stream(self, _: object) -> int:
        return 0

    def __enter__(self) -> "Recorder":
        driver.set_active(self)
        triton.knobs.runtime.jit_cache_hook = self._hook
        return self

    def __exit__(self, *_: object) -> None:
        triton.knobs.runtime.jit_cache_hook = None

    def _hook(self, *, fn: Any, compile: dict[str, Any], **_: object) -> bool:
        options = json.loads(compile["specialization_data"])["options"]
        options = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
        kernel = f"{fn.module.rpartition('.')[2]}.{fn.name}"
        key = hashlib.sha256(f"{kernel} {compile['key']}".encode()).hexdigest()
        self.launched.append((kernel, key))
        self.variants[key] = Variant(
            kernel,
            fn.jit_function,
            compile["signature"],
            compile["constants"],
            compile["configs"][0],
            options,
        )
        # True tells the JIT that the kernel was handled: it does not compile, launch or cache it.
        return True


def record(target: Target, cases: Iterable[Any]) -> tuple[Recorder, dict[str, list[Any]]]:
    """Runs `cases` forward and backward; returns the (kernel, key) launched by each case."""
    launches = {}
    kept = [backends.get(name) for name in ("cpu", "triton")]
    # Launchers read only shapes, strides and addresses, so CPU tensors will do.
    for backend, devices in zip(kept, ((), ("cpu",)), strict=True):
        backends.install(dataclasses.replace(backend, devices=devices))
    with Recorder(target) as recorder:
        for case in cases:
            if case.name in launches:
                raise ValueError(f"two cases are called {case.name!r}")
            start = len(recorder.launched)
            result = case.call.run()
            middle = len(recorder.launched)
            outputs = list(_calls.tensors(case.outputs(result)))
            _calls.gradients(outputs, case.call)
            launched = recorder.launched
            launches[case.name] = [launched[start:middle], launched[middle:]]
    for backend in kept:
        backends.install(backend)
    return recorder, launches


def cover(
    variants: Iterable[Variant], of: Callable[[Variant], set[str]] = Variant.values
) -> list[Variant]:
    """Few variants that have between them all that `of` finds in any variant of each kernel. Of
    equally good choices that with the fewest options switched off, which needs the most registers.
    """
    left = list(variants)
    found = [{(v.kernel, value) for value in (*of(v), "any")} for v in left]
    missing = set().union(*found)
    chosen = []
    while missing:
        gains = [(len(f & missing), -v.switched_off()) for f, v in zip(found, left, strict=True)]
        best = gains.index(max(gains))
        missing -= found[best]
        chosen.append(left[best])
    return chosen


def brief(variants: Iterable[Variant]) -> list[Variant]:
    """The largest variants of each kernel: every type of every tensor, few options switched off."""
    return cover(variants, Variant.types)


def kernels(modules: Iterable[ModuleType]) -> set[str]:
    """The names of all functions decorated with @kernel."""
    return {
        f"{module.__name__.rpartition('.')[2]}.{name}"
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction)
        and value.module == module.__name__
        and value.raw_src[0].startswith("@kernel")
    }


def package_modules() -> Iterator[ModuleType]:
    """Every module of rlhf_kernels.kernels.triton, whether the package has loaded it or not."""
    package = rlhf_kernels.kernels.triton
    for module in pkgutil.iter_modules(package.__path__):
        yield importlib.import_module(f"{package.__name__}.{module.name}")
