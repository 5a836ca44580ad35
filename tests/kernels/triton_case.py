"""A call that Triton's kernels are recorded of, and how its tensors lie."""

import mmap
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_kernels.core import checks
from rlhf_kernels.ops._calls import GIVEN, SUPPORT, Call, Inputs, call

FP32, BF16 = torch.float32, torch.bfloat16
DTYPES = checks.FLOATING
#: Sequences as the token kernels see them: one tile each, several, rows with gaps, packed.
LAYOUTS = ("padded", "long", "strided", "packed", "packed64")
#: Of rows "odd": their length is no multiple of 16 bytes; "shifted": it is, the address is not.
ROW_LAYOUTS = ("even", "odd", "shifted")


class Case(NamedTuple):
    """One call; `outputs` picks what of its result the backward starts from."""

    name: str
    call: Call
    outputs: Callable[[Any], Any] = lambda result: result


def label(values: dict[str, Any]) -> str:
    def text(v: Any) -> str:
        return str(v).removeprefix("torch.")

    return ",".join(f"{k}={text(v)}" for k, v in values.items())


def far(dtype: torch.dtype) -> Tensor:
    """Logits [2, 2, 256] whose rows are more than 2^31 elements apart; nothing is allocated."""
    stride = (1 << 31) + 264
    bytes_ = (3 * stride + 256) * dtype.itemsize
    # Private memory that nobody touches takes no pages.
    memory = mmap.mmap(-1, bytes_, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)
    return torch.frombuffer(memory, dtype=dtype).as_strided((2, 2, 256), (2 * stride, stride, 1))


def inputs(rows: int, size: int, dtype: torch.dtype = FP32, **options: Any) -> Inputs:
    """Inputs on the CPU. No kernel is executed, so their values do not matter."""
    return Inputs(rows, size, dtype, torch.device("cpu"), torch.Generator(), **options)


def inputs_of(layout: str, dtype: torch.dtype) -> Inputs:
    """Three sequences in a layout of LAYOUTS, or three rows in one of ROW_LAYOUTS."""
    if layout in ROW_LAYOUTS:
        vocabulary, width = (251, 61) if layout == "odd" else (256, 64)
        return inputs(3, 1, dtype, packed=True, vocabulary=vocabulary, width=width)
    size = 10000 if layout == "long" else 70
    return inputs(3, size, dtype, packed=layout.startswith("packed"))


def laid(t: Tensor, layout: str) -> Tensor:
    """A tensor with the shape of `t` in a layout; "inner" is a part of a larger tensor."""
    if layout == "strided":
        return t.t().contiguous().t()
    if layout == "shifted":
        return t.new_zeros(t.numel() + 1)[1:].view(t.shape)
    if layout == "inner":
        larger = t.new_zeros([n + 3 for n in t.shape])
        return larger[(slice(2, -1),) * t.dim()]
    return t


def case(
    name: str,
    function: Callable[..., Any],
    x: Inputs,
    layout: str = "",
    *,
    grads: tuple[str, ...] | None = None,
    outputs: Callable[[Any], Any] = lambda result: result,
    **options: Any,
) -> Case:
    """A call of `function`, where the tensors `grads` require a gradient: by default all that may.

    An option that is a dtype becomes the tensor for GIVEN, of this dtype.
    """
    dtypes = {k: v for k, v in options.items() if isinstance(v, torch.dtype)}
    made = call(function, x, **options | dict.fromkeys(dtypes, GIVEN))
    if "support" in dtypes:
        dtypes |= dict.fromkeys(SUPPORT, dtypes["support"])
    if layout == "packed":
        dtypes["cu_seqlens"] = torch.int32
    tensors = {k: t.to(dtypes.get(k, t.dtype)) for k, t in made.tensors.items()}
    shape = x.shape if layout != "shifted" else (*x.shape, x.vocabulary)
    tensors = {k: laid(t, layout) if t.shape == shape else t for k, t in tensors.items()}
    grads = made.differentiable if grads is None else grads
    return Case(name, made._replace(tensors=tensors).requiring(*grads), outputs)
