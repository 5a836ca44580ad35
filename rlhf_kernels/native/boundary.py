"""How tensors cross into native code: address, dtype code and strides as integers.

The only file that calls data_ptr(). Every tensor goes through `pack` or `pack_rows`, which resolve
what a raw address cannot express (lazy negation) and refuse what must not reach native code.
"""

import torch
from torch import Tensor

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

Packed = tuple[int, int, int, int] | None


def threads() -> int:
    """Threads that torch would use; passed to every kernel."""
    return torch.get_num_threads()


def materialized(t: Tensor) -> Tensor:
    """`t` with its memory equal to its value (a lazily negated view is not)."""
    return t.resolve_neg() if t.is_neg() else t


def grid(shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
    """Token shape [...] as (rows, cols): the last dimension is cols, the others are rows."""
    cols = shape[-1] if len(shape) else 1
    rows = 1
    for n in shape[:-1]:
        rows *= n
    return rows, cols


def _row_stride(shape: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
    """Stride of the collapsed leading dimensions, or None where they do not collapse to one."""
    stride, expected = 0, None
    for size, step in zip(reversed(shape), reversed(strides), strict=True):
        if size == 1:
            continue
        if expected is None:
            stride = step
        elif step != expected:
            return None
        expected = step * size
    return stride


def pack(t: Tensor | None) -> Packed:
    """A token tensor [...] as a grid [rows, cols] with any strides.

    The caller keeps `t` alive and has passed it through `as_grid`, so that this is the very memory.
    """
    if t is None:
        return None
    # The common case first: these few lines run for every argument of every call.
    if t.is_contiguous():
        stride0, stride1 = t.shape[-1] if t.dim() > 1 else 0, 1
    else:
        stride0, stride1 = _row_stride(tuple(t.shape[:-1]), t.stride()[:-1]), t.stride(-1)
        if stride0 is None:
            raise ValueError(f"strides {t.stride()} of shape {tuple(t.shape)} do not form a grid")
    address = t.data_ptr()
    if address == 0 and t.numel() > 0:
        raise ValueError("tensor has no memory (fake or meta tensor)")
    return address, DTYPE_CODES[t.dtype], stride0, stride1


def as_grid(t: Tensor | None, dtype: torch.dtype | None = None) -> Tensor | None:
    """`t` as something `pack` can describe: itself where possible, else a contiguous copy."""
    if t is None:
        return None
    if dtype is not None and t.dtype is not dtype:
        t = t.to(dtype)
    t = materialized(t)
    if not t.is_contiguous() and _row_stride(tuple(t.shape[:-1]), t.stride()[:-1]) is None:
        t = t.contiguous()
    return t


def as_rows(t: Tensor) -> Tensor:
    """Logits [..., V] with unit stride over V and leading dimensions that form a grid.

    Itself wherever the strides allow it (any [N, V] or [B, T, V] slice), else a contiguous copy.
    """
    t = materialized(t)
    lead = tuple(t.shape[:-2]), t.stride()[:-2]
    if (t.stride(-1) != 1 and t.shape[-1] > 1) or _row_stride(*lead) is None:
        t = t.contiguous()
    return t


def pack_rows(t: Tensor) -> Packed:
    """Logits [..., V] from `as_rows`: the strides are those of the leading grid."""
    address = t.data_ptr()
    if address == 0 and t.numel() > 0:
        raise ValueError("tensor has no memory (fake or meta tensor)")
    stride1 = t.stride(-2) if t.dim() > 1 else 0
    stride0 = _row_stride(tuple(t.shape[:-2]), t.stride()[:-2]) if t.dim() > 2 else 0
    return address, DTYPE_CODES[t.dtype], stride0, stride1
