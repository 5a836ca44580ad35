"""Launching kernels: device, grid, and the arguments that Triton may specialise on."""

from typing import Any

import torch
import triton
from torch import Tensor

#: Whether kernels run in Triton's interpreter, on tensors of any device.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)


def kernel(function: Any = None, *, aligned: tuple[str, ...] = ()) -> Any:
    """`triton.jit` that compiles once per dtype and constexpr, not per length or address.

    Args:
        function: the kernel.
        aligned: pointers with a separate variant for 16-byte alignment, which allows 16-byte loads.
            Triton specialises on no other argument.
    """
    if function is None:
        return lambda f: kernel(f, aligned=aligned)
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    constants = {n for n, t in function.__annotations__.items() if "constexpr" in str(t)}
    runtime = [n for n in names if n not in constants and n not in aligned]
    return triton.jit(function, do_not_specialize=runtime, do_not_specialize_on_alignment=runtime)


def launch(
    kernel: Any, programs: int, on: Tensor, *args: Any, warps: int, **constants: Any
) -> None:
    """Runs `kernel` with a one-dimensional grid on the device and current stream of `on`."""
    options = dict(constants, num_warps=warps, enable_fp_fusion=True)
    device = on.device
    if device.type == "cpu" or _current(device):
        kernel[(programs,)](*args, **options)
        return
    with getattr(torch, device.type).device(device):
        kernel[(programs,)](*args, **options)


def _current(device: torch.device) -> bool:
    index: int = getattr(torch, device.type).current_device()
    return index == device.index


def tile_count(size: int, tile: int) -> int:
    """The number of tiles of `tile` elements that cover `size`."""
    return -(-size // tile)
