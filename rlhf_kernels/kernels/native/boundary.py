"""How tensors cross into native code: address, dtype code and strides as integers.

The only file that calls data_ptr(). Every tensor goes through `pack` or `pack_rows`, which resolve
what a raw address cannot express (lazy negation) and refuse what must not reach native code.
"""

from collections.abc import Callable
from types import ModuleType
from typing import overload

import torch
from torch import Tensor

from ...core.layout import (
    as_grid,
    as_rows,
    as_upstream,
    grid,
    grid_strides,
    materialized,
    rows_strides,
)

__all__ = [
    "as_grid",
    "as_rows",
    "as_upstream",
    "empty",
    "grid",
    "materialized",
    "pack",
    "pack_rows",
    "place",
]

# csrc/abi.h: DType
DTYPE_CODES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.int64: 3,
    torch.int32: 4,
    torch.bool: 5,
    torch.float64: 6,
}
# csrc/abi.h: StatusCode
OK, LABEL_OUT_OF_RANGE, BAD_TEMPERATURE, BAD_OFFSETS, OUT_OF_MEMORY = 0, 1, 2, 3, 4
BAD_INDPTR, INDEX_OUT_OF_RANGE, INDEX_REPEATED = 5, 6, 7

# Address, dtype code and two strides.
Packed = tuple[int, int, int, int]

# csrc/bind/tensor.h: Exec
Exec = int | tuple[int, int, int, Tensor | None]


def _threads(like: Tensor, op: str | None = None, *sizes: int) -> Exec:
    return torch.get_num_threads()


def place(extension: ModuleType) -> Callable[..., Exec]:
    """How an extension is told where to run: `where(like, op=None, *sizes)`.

    The result is the last argument of every native function. For the CPU it is the number of
    threads that torch would use. For CUDA it is the device of `like`, its current stream and, with
    the name of an operation, as many bytes of scratch as `<op>_scratch(*sizes)` asks for. They come
    from torch's allocator and live as long as the result: keep it until the call returns.
    """
    if not extension.gpu:
        return _threads

    def where(like: Tensor, op: str | None = None, *sizes: int) -> Exec:
        size = getattr(extension, f"{op}_scratch")(*sizes) if op is not None else 0
        scratch = torch.empty(size, dtype=torch.uint8, device=like.device) if size else None
        address = 0 if scratch is None else scratch.data_ptr()
        device = like.device.index
        # Only the emulated extension of the tests is called with CPU tensors.
        if device is None:
            return 0, 0, address, scratch
        return device, torch._C._cuda_getCurrentRawStream(device), address, scratch

    return where


@overload
def pack(t: Tensor) -> Packed: ...


@overload
def pack(t: Tensor | None) -> Packed | None: ...


def pack(t: Tensor | None) -> Packed | None:
    """A token tensor [...] as a grid [rows, cols] with any strides.

    The caller keeps `t` alive and has passed it through `as_grid`, so that this is the very memory.
    """
    if t is None:
        return None
    stride0, stride1 = grid_strides(t)
    address = t.data_ptr()
    if address == 0 and t.numel() > 0:
        raise ValueError("tensor has no memory (fake or meta tensor)")
    return address, DTYPE_CODES[t.dtype], stride0, stride1


def pack_rows(t: Tensor) -> Packed:
    """Logits [..., V] from `as_rows`: the strides are those of the leading grid."""
    address = t.data_ptr()
    if address == 0 and t.numel() > 0:
        raise ValueError("tensor has no memory (fake or meta tensor)")
    return address, DTYPE_CODES[t.dtype], *rows_strides(t)


def empty(
    extension: ModuleType, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """torch.empty for a large buffer that something else than our kernels writes first."""
    t = torch.empty(shape, dtype=dtype, device=device)
    extension.prepare_pages(t.data_ptr(), t.nbytes, torch.get_num_threads())
    return t
