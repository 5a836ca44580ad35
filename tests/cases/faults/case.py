"""A call with bad data or an odd layout, and what is promised of its results."""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.cases.layouts import layouts

from rlhf_kernels.testing import assert_bitwise_equal

NAN, INF = math.nan, math.inf
ALL = "all"
Arguments = dict[str, Any]
Make = Callable[[], Arguments]
Run = Callable[..., tuple[Tensor, ...]]


class Case(NamedTuple):
    """A call and what is promised of its results, tensors whose first dimension is rows."""

    name: str
    run: Run
    make: Make
    # Name of the case with the same results, bit for bit, except for the poisoned rows.
    like: str = "clean"
    # Rows that are NaN in every result; ALL means that all elements are NaN.
    poisoned: tuple[int, ...] | str = ()
    # The error with RLHF_KERNELS_CHECK=1: its type, and a part of the message.
    error: str = ""
    # The results to which the promise applies.
    part: slice = slice(None)

    def call(self) -> tuple[Tensor, ...]:
        return self.run(**self.make())[self.part]


def assert_promised(case: Case, actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """Asserts the promise; `expected` are the results of the case that `case.like` names."""
    if case.poisoned == ALL:
        assert all(t.isnan().all() for t in actual)
        return
    # `expected` may have more results, because a case may select only the first ones.
    for a, e in zip(actual, expected, strict=False):
        assert_bitwise_equal(_unharmed(a, case.poisoned), _unharmed(e, case.poisoned))
        for row in case.poisoned:
            assert a[row].isnan().all()
        if not case.poisoned:
            assert a.isfinite().all()


def _unharmed(tensor: Tensor, poisoned: tuple[int, ...]) -> Tensor:
    """The rows of a result that are not poisoned."""
    keep = [row for row in range(tensor.shape[0]) if row not in poisoned] if tensor.dim() else []
    return tensor[keep] if poisoned else tensor


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, device="cpu")
    # The default device is wherever factories make tensors, also in a `with` block.
    return values.to(torch.empty(0).device)


def filled(make: Make, name: str, where: Any, value: float) -> Arguments:
    """The arguments with `value` written into one of them."""
    given = make()
    given[name][where] = value
    return given


def backward(outputs: tuple[Tensor, ...], of: Tensor, upstream: Tensor) -> Tensor:
    return torch.autograd.grad(outputs, of, [upstream.expand_as(o) for o in outputs])[0]


def in_layouts(run: Run, make: Make) -> Iterator[Case]:
    """Cases with every layout of every argument of `run`; in each they have different layouts."""
    names = [[layout for layout, _ in layouts(t)] for t in make().values()]

    def odd(i: int) -> Arguments:
        given = {}
        for place, (name, t) in enumerate(make().items()):
            views = list(layouts(t))
            given[name] = views[(i + place) % len(views)][1]
        return given

    for i in range(max(map(len, names))):
        label = ", ".join(n[(i + place) % len(n)] for place, n in enumerate(names))
        yield Case(label, run, partial(odd, i))


def named(prefix: str, cases: Iterator[Case]) -> Iterator[Case]:
    return (c._replace(name=f"{prefix} {c.name}", like=f"{prefix} {c.like}") for c in cases)
