"""How tensors cross into native code: as they are.

csrc/bind/tensor.h reads their addresses, dtypes and strides. It copies an input whose layout no
kernel reads, or that is a lazily negated view, and refuses a tensor without memory. Here is what
else a call needs.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from ...core.layout import MaybeTensor, grid, materialized

__all__ = [
    "as_fp32", "as_upstream", "empty", "exec_builder", "grid", "materialized", "transpose_into"
]  # fmt: skip

# csrc/abi_types.h: DType
DTYPE_CODES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.int64: 3,
    torch.int32: 4,
    torch.bool: 5,
    torch.float64: 6,
}
# The dtypes of masks that kernels read.
FLAGS = (torch.bool, torch.int64, torch.int32)
# csrc/abi_types.h: StatusCode
OK, LABEL_OUT_OF_RANGE, BAD_TEMPERATURE, BAD_OFFSETS, OUT_OF_MEMORY = 0, 1, 2, 3, 4
BAD_INDPTR, INDEX_OUT_OF_RANGE, INDEX_REPEATED = 5, 6, 7

# csrc/bind/tensor.h: Exec
Exec = int | tuple[int, int, int, Tensor | None]

Sizes = Callable[[], tuple[int, ...]]


class MakeExec(Protocol):
    """What `exec_builder` returns."""

    def __call__(
        self, like: Tensor, op: str | None = None, sizes: Sizes | None = None, /
    ) -> Exec: ...


def as_fp32(t: MaybeTensor) -> MaybeTensor:
    """`t` in the one dtype in which kernels read temperatures, biases and upstream gradients."""
    return t if t is None or t.dtype is torch.float32 else t.float()


def as_upstream(t: Tensor | None) -> Tensor | None:
    """As `layout.as_upstream`: None for the empty gradient of a result that was not requested."""
    return None if t is None or t.numel() == 0 else as_fp32(t)


def _threads(like: Tensor, op: str | None = None, sizes: Sizes | None = None) -> Exec:
    return torch.get_num_threads()


def exec_builder(extension: ModuleType) -> MakeExec:
    """The function `make_exec(like, op=None, sizes=None)` that builds an extension's Exec argument.

    Exec is the last argument of every native function. For the CPU it is torch's number of threads.
    For CUDA it holds the device of `like`, its current stream and, if `op` is given, scratch of
    `<op>_scratch(*sizes())` bytes. The scratch comes from torch's allocator and lives as long as
    the result: keep the result until the call returns.

    Also tells the extension what torch's tensors and dtypes are.
    """
    extension.learn_torch(Tensor, torch.nn.Parameter, DTYPE_CODES)
    if not extension.gpu:
        return _threads

    def make_exec(like: Tensor, op: str | None = None, sizes: Sizes | None = None) -> Exec:
        given = () if sizes is None else sizes()
        size = getattr(extension, f"{op}_scratch")(*given) if op is not None else 0
        scratch = torch.empty(size, dtype=torch.uint8, device=like.device) if size else None
        address = 0 if scratch is None else scratch.data_ptr()
        device = like.device.index
        # A CPU tensor: only the tests' emulated extension takes those.
        if device is None:
            return 0, 0, address, scratch
        return device, torch._C._cuda_getCurrentRawStream(device), address, scratch

    return make_exec


def empty(
    extension: ModuleType, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """torch.empty for a large buffer that torch writes first; pre-faults its pages."""
    t = torch.empty(shape, dtype=dtype, device=device)
    extension.prepare_pages(t.data_ptr(), t.nbytes, torch.get_num_threads())
    return t


def transpose_into(extension: ModuleType, out: Tensor, x: Tensor) -> None:
    """out [m, n] = x [n, m].T, of 16-bit dtypes with unit strides along rows."""
    extension.transpose(x, out, torch.get_num_threads())
