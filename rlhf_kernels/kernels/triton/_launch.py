"""Launching kernels: device, grid, and the arguments that Triton may specialise on."""

import functools
from collections.abc import Mapping
from typing import Any

import torch
import triton
from torch import Tensor

#: Whether kernels run in Triton's interpreter, on tensors of any device.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)


class _Members(dict[tuple[Any, Any], tuple[Any, Any]]):
    """From (types, keys) of the members of a tuple, as Triton finds them, those without keys.

    Triton has a key for whatever it specialises on: a multiple of 16, and the number 1, which it
    would compile as a constant.
    """

    def __init__(self, aligned: bool) -> None:
        super().__init__()
        self._aligned = aligned

    def __missing__(self, found: tuple[Any, Any]) -> tuple[Any, Any]:
        types, keys = found
        # None is a constant without a key.
        plain = tuple(
            "i32" if t == "constexpr" and k is not None else t
            for t, k in zip(types, keys, strict=True)
        )
        kept = tuple(
            k if self._aligned and t.startswith("*") else None
            for t, k in zip(plain, keys, strict=True)
        )
        self[found] = plain, kept
        return plain, kept


class _Kernel(triton.JITFunction):  # type: ignore[misc]
    """A JIT function for which `do_not_specialize` also holds for the members of tuples.

    Triton itself always specialises on integers and addresses in tuples, so each stride of a tensor
    could compile another kernel, with another order of its sums. Named tuples are left as they are:
    they hold floats, on which Triton never specialises.
    """

    def create_binder(self) -> tuple[Any, ...]:
        *others, bind = super().create_binder()
        members = [
            (p.num, _Members(not p.do_not_specialize)) for p in self.params if not p.is_constexpr
        ]

        def bind_plainly(*args: Any, **options: Any) -> tuple[Any, list[tuple[Any, Any]], Any]:
            bound, found, rest = bind(*args, **options)
            for i, plain in members:
                if type(found[i][0]) is tuple:
                    found[i] = plain[found[i]]
            return bound, found, rest

        return *others, bind_plainly


def kernel(function: Any = None, *, aligned: tuple[str, ...] = ()) -> Any:
    """`triton.jit` that compiles once per dtype and constexpr, not per length, stride or address.

    Args:
        function: the kernel.
        aligned: tensors with a separate variant for addresses that are multiples of 16 bytes, which
            allows 16-byte loads. Triton specialises on no other argument.
    """
    if function is None:
        return lambda f: kernel(f, aligned=aligned)
    if INTERPRETED:
        return triton.jit(function)
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    constants = {n for n, t in function.__annotations__.items() if "constexpr" in str(t)}
    runtime = [n for n in names if n not in constants and n not in aligned]
    return _Kernel(function, do_not_specialize=runtime, do_not_specialize_on_alignment=runtime)


def launch(
    kernel: Any,
    programs: int,
    on: Tensor,
    *args: Any,
    warps: int,
    registers: int | Mapping[int, int] | None = None,
    **constants: Any,
) -> None:
    """Runs `kernel` with a one-dimensional grid on the device and current stream of `on`.

    `registers` is the largest number per thread, for NVIDIA's assembler, or by the major number of
    the compute capability: without one it may prefer another block a multiprocessor to registers
    for all values, and keep some in memory.
    """
    # kernel[grid](...) would do the same through one more call.
    constants |= {"num_warps": warps, "enable_fp_fusion": True}
    if registers is not None and not INTERPRETED:
        most = _most(registers, triton.runtime.driver.active)
        constants |= {"maxnreg": most} if most else {}
    device = on.device
    if device.type == "cpu" or _current(device):
        kernel.run(*args, grid=(programs,), warmup=False, **constants)
        return
    with getattr(torch, device.type).device(device):
        kernel.run(*args, grid=(programs,), warmup=False, **constants)


def _current(device: torch.device) -> bool:
    index: int = getattr(torch, device.type).current_device()
    return index == device.index


@functools.cache
def _capability(driver: Any) -> int:
    """The major number of NVIDIA's compute capability, 0 elsewhere."""
    target = driver.get_current_target()
    return int(target.arch) // 10 if target.backend == "cuda" else 0


def _most(registers: int | Mapping[int, int], driver: Any) -> int | None:
    capability = _capability(driver)
    if not capability:
        return None
    return registers if isinstance(registers, int) else registers.get(capability)


@functools.cache
def _warp_size(driver: Any) -> int:
    # That of the device that is current at the first call; others would lose speed, not bits.
    size: int = driver.get_current_target().warp_size
    return size


def warps_of(threads: int) -> int:
    """The number of warps that have so many threads: a warp has 32 or, on some GPUs, 64."""
    return threads // (32 if INTERPRETED else _warp_size(triton.runtime.driver.active))


def tile_count(size: int, tile: int) -> int:
    """The number of tiles of `tile` elements that cover `size`."""
    return -(-size // tile)
