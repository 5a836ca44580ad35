"""A call that Triton's kernels are recorded of, and the tensors that it is made of."""

import mmap
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_kernels.core import checks

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = checks.FLOATING


class Case(NamedTuple):
    """One call; `outputs` picks what of its result the backward starts from."""

    name: str
    function: Callable[..., Any]
    args: tuple[Any, ...]
    options: dict[str, Any]
    outputs: Callable[[Any], Any] = lambda result: result


def label(values: dict[str, Any]) -> str:
    def text(v: Any) -> str:
        return str(v).removeprefix("torch.")

    return ",".join(f"{k}={text(v)}" for k, v in values.items())


def logits(dtype: torch.dtype, layout: str, rows: int = 3) -> Tensor:
    """[rows, V]; "odd": V is no multiple of 16 bytes; "shifted": it is, the address is not."""
    vocab = 251 if layout == "odd" else 256
    flat = torch.zeros(rows * vocab + 1, dtype=dtype)
    start = 1 if layout == "shifted" else 0
    return flat[start : start + rows * vocab].view(rows, vocab).requires_grad_()


def far(dtype: torch.dtype) -> Tensor:
    """Logits [2, 2, 256] whose rows are more than 2^31 elements apart; nothing is allocated."""
    stride = (1 << 31) + 264
    bytes_ = (3 * stride + 256) * dtype.itemsize
    # Private memory that nobody touches takes no pages.
    memory = mmap.mmap(-1, bytes_, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    flat = torch.frombuffer(memory, dtype=dtype)
    return flat.as_strided((2, 2, 256), (2 * stride, stride, 1)).requires_grad_()


#: Sequences as the token kernels see them: one tile each, several, rows with gaps, packed.
LAYOUTS = ("padded", "long", "strided", "packed", "packed64")


class Tokens(NamedTuple):
    """Makes token tensors of one layout."""

    layout: str

    @property
    def shape(self) -> tuple[int, ...]:
        return (3, 10000) if self.layout == "long" else (3, 70) if self.padded else (210,)

    @property
    def padded(self) -> bool:
        return not self.layout.startswith("packed")

    def __call__(self, dtype: torch.dtype, *, grad: bool = False) -> Tensor:
        if self.layout == "strided":
            return torch.zeros(70, 3, dtype=dtype).t().requires_grad_(grad)
        return torch.zeros(self.shape, dtype=dtype).requires_grad_(grad)

    def options(self) -> dict[str, Tensor]:
        if self.padded:
            return {}
        dtype = torch.int64 if self.layout == "packed64" else torch.int32
        return {"cu_seqlens": torch.tensor([0, 70, 140, 210], dtype=dtype)}
