"""Tensors of any layout as one argument of a kernel: (tensor, row stride, column stride).

None stands for an absent tensor.
"""

from typing import overload

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...core.layout import as_grid, grid_strides, rows_strides

Strided = tuple[Tensor, int, int]


@overload
def strided(t: Tensor, dtype: torch.dtype | None = None) -> Strided: ...
@overload
def strided(t: Tensor | None, dtype: torch.dtype | None = None) -> Strided | None: ...
def strided(t: Tensor | None, dtype: torch.dtype | None = None) -> Strided | None:
    """A tensor over tokens [...], of `dtype` if that is given, with its strides as a grid."""
    if t is None:
        return None
    t = as_grid(t, dtype)
    return t, *grid_strides(t)


def strided_rows(t: Tensor) -> Strided:
    """Logits [..., V] from `as_rows` with the strides of their rows."""
    return t, *rows_strides(t)


def in_units(x: Strided, unit: int) -> Strided:
    """`x` with its strides counted in `unit` elements, of which they are multiples."""
    t, stride0, stride1 = x
    return t, stride0 // unit, stride1 // unit


def alignment(width: int, *tensors: Strided) -> int:
    """Elements in at least 16 bytes of each, if `width` and all strides are multiples; else 1."""
    unit = 16 // min(t.element_size() for t, *_ in tensors)
    for _, stride0, stride1 in tensors:
        if width % unit or stride0 % unit or stride1 % unit:
            return 1
    return unit


@triton.jit
def token_at(x, i, cols, UNIT: tl.constexpr = 1):
    """The address of token i of a grid [rows, cols]; strides are counted in UNIT elements."""
    pointer, stride0, stride1 = x
    return pointer + ((i // cols).to(tl.int64) * stride0 + (i % cols).to(tl.int64) * stride1) * UNIT
