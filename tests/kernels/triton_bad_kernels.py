"""Kernels that the gate of triton_aot.py must refuse: that it can fail is tested with these."""

import functools
import sys
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from tests.cases.combinations import one_by_one, pairs
from tests.kernels.triton_case import Case

from rlhf_kernels.kernels.triton._launch import kernel, launch
from rlhf_kernels.ops._calls import Call

MODULES = (sys.modules[__name__],)


@kernel
def spilling_kernel(x, BLOCK: tl.constexpr):
    """128 values a thread and half as many registers."""
    at = tl.arange(0, BLOCK)
    values = tl.load(x + at)
    total = tl.sum(values, axis=0)
    tl.store(x + at, tl.exp(values - total))


@kernel
def meeting_kernel(x, A: tl.constexpr, B: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    """As the one above where two of its options meet; with either alone it holds no values."""
    at = tl.arange(0, BLOCK)
    if A and B:
        values = tl.load(x + at)
        total = tl.sum(values, axis=0)
        tl.store(x + at, tl.exp(values - total))
    elif C:
        tl.store(x + at, 1.0)


@kernel
def crowding_kernel(x, BLOCK: tl.constexpr):
    """Sixteen warps with more than 64 registers a thread: no room for a second block."""
    at = tl.arange(0, BLOCK)
    values = tl.load(x + at)
    total = tl.sum(values, axis=0)
    tl.store(x + at, tl.exp(values - total))


@kernel(aligned=("x",))
def narrow_kernel(x, size, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    """Nothing says that the mask is a multiple of 16 bytes."""
    at = tl.arange(0, BLOCK)
    tl.store(x + at, tl.load(x + at, mask=at < size) + 1.0, mask=at < size)


@kernel
def atomic_kernel(x):
    """A sum in any order."""
    tl.atomic_add(x, 1.0)


@kernel
def broken_kernel(x, absent):
    """Reads what was not given."""
    tl.store(x, tl.load(absent))


@kernel
def forgotten_kernel(x):
    """Nobody launches it."""
    tl.store(x, 1.0)


@triton.jit
def helper(x):
    """Not a kernel."""
    return x


def cases(full: bool) -> Iterator[Case]:
    x = torch.zeros(1 << 16)
    for name, call in {
        "spilling": lambda: launch(spilling_kernel, 1, x, x, BLOCK=1 << 16, warps=16),
        "crowding": lambda: launch(crowding_kernel, 1, x, x, BLOCK=1 << 15, warps=16),
        "atomic": lambda: launch(atomic_kernel, 1, x, x, warps=1),
        "broken": lambda: launch(broken_kernel, 1, x, x, None, warps=1),
        "narrow": lambda: launch(narrow_kernel, 1, x, x, 9, ALIGN=4, BLOCK=1024, warps=4),
    }.items():
        yield Case(name, Call(lambda call=call: call() or (), {}, {}, ()))
    size = {"BLOCK": 1 << 16, "warps": 16}
    for v in (pairs if full else one_by_one)(A=(False, True), B=(False, True), C=(False, True)):
        call = functools.partial(launch, meeting_kernel, 1, x, x, **v, **size)
        yield Case(f"meeting/{v}", Call(lambda call=call: call() or (), {}, {}, ()))
