"""Memory and strides of tensors: a kernel reads almost any layout without a copy."""

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

#: empty(shape, dtype, device): a backend's torch.empty, which may treat large buffers specially.
Empty = Callable[[tuple[int, ...], torch.dtype, torch.device], Tensor]

#: A tensor, or None where None may be given.
MaybeTensor = TypeVar("MaybeTensor", Tensor, Tensor | None)


# Bound once: on small tensors the attribute look-ups are a noticeable part of a call.
_empty_like, _FP32, _CONTIGUOUS = torch.empty_like, torch.float32, torch.contiguous_format


def _transpose_into(out: Tensor, x: Tensor) -> None:
    out.copy_(x.T)


def plain_empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=device)


class Memory(NamedTuple):
    """What a backend does with memory for an algorithm over its row kernels.

    empty: allocates a large buffer.
    transpose_into: out [m, n] = x [n, m].T, of 16-bit dtypes with unit strides along rows.
    """

    empty: Empty = plain_empty
    transpose_into: Callable[[Tensor, Tensor], None] = _transpose_into


#: torch's own.
PLAIN_MEMORY = Memory()


def fp32_like(t: Tensor) -> Tensor:
    """Memory for a contiguous float32 tensor of the shape of `t`, on its device.

    torch reads the shape of a tensor much faster than one that it is given.
    """
    return _empty_like(t, dtype=_FP32, memory_format=_CONTIGUOUS)


def any_of_token(flags: Tensor, dims: int) -> Tensor:
    """Flags [...] of tokens of so many dimensions; of those [..., K], whether any of a token's."""
    return flags if flags.dim() == dims else flags.any(-1)


def constant(t: MaybeTensor) -> MaybeTensor:
    """`t`, detached if it requires a gradient."""
    return t.detach() if t is not None and t.requires_grad else t


def constants(*tensors: Tensor | None) -> list[Tensor | None]:
    """`constant` of each."""
    return [t.detach() if t is not None and t.requires_grad else t for t in tensors]


def materialized(t: Tensor) -> Tensor:
    """`t`, copied if it is a lazily negated view, whose memory holds the negated values."""
    return t.resolve_neg() if t.is_neg() else t


def grid(shape: torch.Size | tuple[int, ...]) -> tuple[int, int]:
    """Token shape [...] as (rows, cols): the last dimension is cols, the others are rows."""
    cols = shape[-1] if len(shape) else 1
    rows = 1
    for n in shape[:-1]:
        rows *= n
    return rows, cols


def row_stride(shape: tuple[int, ...], strides: tuple[int, ...]) -> int | None:
    """Stride of the dimensions collapsed into one, or None where they do not collapse."""
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


def as_grid(t: MaybeTensor, dtype: torch.dtype | None = None) -> MaybeTensor:
    """`t` [...] with strides that form a grid of rows and columns; a contiguous copy if needed."""
    if t is None:
        return None
    if dtype is not None and t.dtype is not dtype:
        t = t.to(dtype)
    t = materialized(t)
    if not t.is_contiguous() and row_stride(tuple(t.shape[:-1]), t.stride()[:-1]) is None:
        t = t.contiguous()
    return t


def as_upstream(t: Tensor | None) -> Tensor | None:
    """The upstream gradient of a per-token result as an fp32 grid, or None.

    Traced code passes an empty gradient for an optional result that was not requested; this
    returns None for it.
    """
    return None if t is None or t.numel() == 0 else as_grid(t, torch.float32)


def grid_strides(t: Tensor) -> tuple[int, int]:
    """Strides (rows, cols) of a token tensor [...] from `as_grid`; the first is 0 for one row."""
    # The contiguous case comes first: this runs for every argument of every call.
    if t.is_contiguous():
        return t.shape[-1] if t.dim() > 1 else 0, 1 if t.dim() else 0
    stride0 = row_stride(tuple(t.shape[:-1]), t.stride()[:-1])
    if stride0 is None:
        raise ValueError(f"strides {t.stride()} of shape {tuple(t.shape)} do not form a grid")
    return stride0, t.stride(-1)


def as_rows(t: Tensor) -> Tensor:
    """Logits [..., V] with unit stride over V and leading dimensions that form a grid.

    Returns `t` itself where its strides allow it (any [N, V] or [B, T, V] slice), else a contiguous
    copy.
    """
    t = materialized(t)
    lead = tuple(t.shape[:-2]), t.stride()[:-2]
    if (t.stride(-1) != 1 and t.shape[-1] > 1) or row_stride(*lead) is None:
        t = t.contiguous()
    return t


def rows_strides(t: Tensor) -> tuple[int, int]:
    """Strides (rows, cols) of the leading grid of logits [..., V] from `as_rows`."""
    stride1 = t.stride(-2) if t.dim() > 1 else 0
    if t.dim() <= 2:
        return 0, stride1
    stride0 = row_stride(tuple(t.shape[:-2]), t.stride()[:-2])
    if stride0 is None:
        raise ValueError(f"strides {t.stride()} of shape {tuple(t.shape)} do not form a grid")
    return stride0, stride1
