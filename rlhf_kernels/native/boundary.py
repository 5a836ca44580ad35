"""How tensors cross into native code: address, dtype code and strides as integers.

The only file that calls data_ptr(). Every tensor goes through `pack` or `pack_rows`, which resolve
what a raw address cannot express (lazy negation) and refuse what must not reach native code.
"""

from types import ModuleType

import torch
from torch import Tensor

from .._layout import as_grid, as_rows, grid, grid_strides, materialized, rows_strides

__all__ = ["as_grid", "as_rows", "empty", "grid", "materialized", "pack", "pack_rows", "threads"]

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

Packed = tuple[int, int, int, int] | None


def threads() -> int:
    """Threads that torch would use; passed to every kernel."""
    return torch.get_num_threads()


def pack(t: Tensor | None) -> Packed:
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
    extension.advise_huge_pages(t.data_ptr(), t.nbytes)
    return t
