"""The head's way on a GPU taken by CPU tensors, and what it would cost there.

The emulated kernels of the backend "cuda" serve them. Products of 16-bit operands into fp32 are
done in fp32, whose sums they stand for.
"""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels import emulated_cuda

from rlhf_kernels.core import data_checks, tracing
from rlhf_kernels.head import devices, gemm

_MATRIX = {"mm": torch.mm, "addmm": torch.addmm}
# What the host waits for; those of an index are in `_syncs`.
_WAITING = ("nonzero", "_local_scalar_dense", "masked_select", "_unique2", "bincount", "equal")
# Arguments of a row kernel that hold rows of logits, its result among them; how often it launches.
_ROW_KERNELS = {
    "token_logprobs": (0,),
    "token_logprobs_backward": (0, 10),
    "kl_divergence": (0, 1),
    "kl_divergence_backward": (0, 1, 7),
    "policy_rows": (0, 13),
}
_LAUNCHES = 2
_ONE_LAUNCH = ("scale", "policy_rows")


@dataclasses.dataclass
class Cost:
    """Of the calls so far.

    syncs: how often the host waits for the device.
    launches: operators of torch that compute, products among them, and kernels of this package.
    products: bytes that they read and write.
    rows: bytes of logits and of their gradients to and from row kernels.
    rest: (operator, bytes that it reads and writes) of everything else.
    kernels: how often each kernel of this package is launched.
    """

    syncs: int = 0
    launches: int = 0
    products: int = 0
    rows: int = 0
    rest: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    kernels: Counter[str] = dataclasses.field(default_factory=Counter)

    def rest_of(self, at_least: int) -> list[tuple[str, int]]:
        """The operators that move so many bytes."""
        return [(name, size) for name, size in self.rest if size >= at_least]


class _Watch(TorchDispatchMode):
    def __init__(self, cost: Cost) -> None:
        super().__init__()
        self._cost = cost
        self.off = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not self.off:
            self._count(function, [*args, *(kwargs or {}).values()], out)
        return out

    def _count(self, function, args, out) -> None:
        name = function.overloadpacket.__name__
        self._cost.syncs += _syncs(name, args)
        returns = function._schema.returns
        if any(r.alias_info is not None and not r.alias_info.is_write for r in returns):
            return  # a view
        if "empty" in name or name in ("_local_scalar_dense", "detach", "_unsafe_view"):
            return
        self._cost.launches += 1
        results = out if isinstance(out, tuple | list) else (out,)
        if name in ("index_select", "index_copy_"):
            # Of the rows that are named alone.
            moved = [2 * _size(out if name == "index_select" else args[3])]
        else:
            read = args[1:] if name in ("copy_", "fill_", "zero_") else args
            moved = [_size(t) for t in (*read, *results) if isinstance(t, torch.Tensor)]
        self._cost.rest.append((name, sum(moved)))


def _syncs(name: str, args) -> int:
    if name in ("index", "index_put_", "_index_put_impl_"):
        return sum(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
    return int(name in _WAITING)


def _size(t: torch.Tensor) -> int:
    # Of a broadcast number once.
    return t.untyped_storage().nbytes() if 0 in t.stride() else t.numel() * t.element_size()


def _mixed(name: str, watch: _Watch | None, cost: Cost):
    """torch.mm or torch.addmm as cuBLAS does it: out_dtype, in fp32 sums."""

    def call(*operands, out_dtype=None, out=None, **options):
        if watch is not None:
            cost.launches += 1
            # Of addmm the result is an operand too.
            cost.products += sum(_size(t) for t in (*operands, out))
            watch.off = True
        try:
            if out_dtype is not None:
                operands = [t.to(out_dtype) for t in operands]
            return _MATRIX[name](*operands, out=out, **options)
        finally:
            if watch is not None:
                watch.off = False

    return call


def _rows(name: str, function, cost: Cost):
    def call(*args):
        launches = 1 if name in _ONE_LAUNCH else _LAUNCHES
        cost.launches += launches
        cost.kernels[name] += launches
        if name == "scale":
            cost.rest.append((name, 2 * _size(args[1])))
        cost.rows += sum(_size(args[i]) for i in _ROW_KERNELS.get(name, ()))
        return function(*args)

    return call


@contextlib.contextmanager
def taken(watch: _Watch | None = None, cost: Cost | None = None) -> Iterator[None]:
    """The head takes its way on a GPU."""
    with contextlib.ExitStack() as stack:
        patch = lambda *args: stack.enter_context(mock.patch.object(*args))  # noqa: E731
        patch(devices, "is_cpu", lambda device: False)
        patch(devices, "mixes", lambda device: True)
        patch(gemm, "_MIXED_PRODUCTS", True)
        for name in _MATRIX:
            patch(torch, name, _mixed(name, watch, cost))
        yield


@contextlib.contextmanager
def counted() -> Iterator[Cost]:
    """What calls cost within, by the emulated backend, which must be in use; nothing is checked."""
    cost = Cost()
    watch = _Watch(cost)
    extension = emulated_cuda.load()
    with contextlib.ExitStack() as stack:
        stack.enter_context(taken(watch, cost))
        patch = lambda *args: stack.enter_context(mock.patch.object(*args))  # noqa: E731
        patch(data_checks, "can_read_on_host", lambda t: False)
        # Or an operator would be seen instead of what it is made of.
        patch(tracing, "dispatch_modes", lambda: 0)
        for name in (*_ROW_KERNELS, "policy_loss", "loss_backward", "scale"):
            patch(extension, name, _rows(name, getattr(extension, name), cost))
        tolist = torch.Tensor.tolist

        def read(t):
            cost.syncs += 1
            return tolist(t)

        patch(torch.Tensor, "tolist", read)
        stack.enter_context(watch)
        yield cost
