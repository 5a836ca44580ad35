"""Calls of the kernels, kept while recording so that they can be replayed and timed."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Call(NamedTuple):
    """A kernel call with copies of its inputs; `grad`: whether autograd was on."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grad: bool


class Recorder:
    """Calls kernels, and keeps copies of the inputs of the calls made while `active`."""

    def __init__(self) -> None:
        self.active = False
        self.calls: list[Call] = []
        self.steps = 0
        self._wanted: frozenset[int] = frozenset()

    def record_steps(self, wanted: Iterable[int]) -> None:
        """Forgets all calls; those of the `wanted` steps are to be kept."""
        self.calls, self.steps, self.active = [], 0, False
        self._wanted = frozenset(wanted)

    def begin_step(self, step: int) -> None:
        """A step begins."""
        self.active = step in self._wanted
        self.steps += self.active

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.active:
            named = {key: _snapshot(value) for key, value in kwargs.items()}
            grad = torch.is_grad_enabled()
            self.calls.append(Call(function, tuple(map(_snapshot, args)), named, grad))
        return function(*args, **kwargs)


def _snapshot(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


#: Every call of a kernel in this package goes through it.
kernel = Recorder()
