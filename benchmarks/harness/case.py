"""One operation on one shape, as a point hands it to `measure`."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

# Rounds of a point at least.
MIN_ROUNDS = 20
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class Missing(NamedTuple):
    """A provider that is not here, and why. False: `peer(...) and (lambda ...)` stays Missing."""

    reason: str

    def __bool__(self) -> bool:
        return False


Provider = Callable[..., Any]


@dataclass
class Overwriting:
    """A provider that writes over its first input: it gets a copy, made while no clock runs."""

    function: Provider

    def __call__(self, *inputs: Any) -> Any:
        return self.function(*inputs)


@dataclass
class Settings:
    """Command-line options of a run; `seconds` of a point, None: by the device."""

    device: torch.device
    quick: bool
    providers: set[str] | None
    seconds: float | None = None


@dataclass
class Case:
    """One operation on one shape.

    Attributes:
        op: name of the operation, with its options where they matter.
        label: dtype and shape, for people.
        mode: "forward", "backward" or "forward+backward".
        inputs: arguments of the providers; gradients are taken in those that require grad.
        providers: name -> function(*inputs) -> tensor or tensors. "ours" is timed by the fixture.
        oracle: -> fp64 outputs, followed by fp64 gradients where the mode has a backward, each
            already passed through `select`.
        moved: bytes that the operation must read and write at least.
        flops: of the products in it; 0 where memory is what bounds it.
        limit: what bounds it: "copy" or "read", the machine's rates, or one of `baselines`.
        targets: provider (or "copy", "read", a baseline) -> least ratio of its time to ours.
        at_most: "median" (time) or "host" (time of the host in a call) of ours -> seconds;
            "extra_bytes" (memory beyond inputs and results) -> bytes.
        select: part of each result that the oracle holds (sampled rows, unmasked tokens).
        upstream: gradient of each checked output; ones if empty.
        extra: more functions of the inputs to time beside the providers, ungated.
        outputs: how many outputs are checked and differentiated; the rest (metrics) are only
            computed. All of them if None.
        baselines: work without which the operation cannot be done, as functions of nothing.
        least_rounds: fewer than MIN_ROUNDS where a round takes many seconds.
        rounded: dtype that something is rounded to on the way, where coarser than the results.
    """

    op: str
    label: str
    mode: str
    inputs: tuple[Any, ...]
    providers: dict[str, Provider | Missing]
    oracle: Callable[[], tuple[Tensor, ...]]
    moved: int
    flops: int = 0
    limit: str = "copy"
    targets: dict[str, float] = field(default_factory=dict)
    at_most: dict[str, float] = field(default_factory=dict)
    select: Callable[[Tensor], Tensor] = lambda t: t
    upstream: tuple[Tensor, ...] = ()
    extra: dict[str, Provider] = field(default_factory=dict)
    outputs: int | None = None
    baselines: dict[str, Callable[[], Any]] = field(default_factory=dict)
    least_rounds: int = MIN_ROUNDS
    rounded: torch.dtype = torch.float32


@dataclass
class Point:
    """What the test of a point is called with: calling it measures the case of these fields."""

    settings: Settings
    record: Callable[[Case], None]

    def __call__(self, **fields: Any) -> None:
        self.record(Case(**fields))

    @property
    def device(self) -> torch.device:
        return self.settings.device

    def size(self, small: Any, full: Any) -> Any:
        """A shape: `small` in a quick run."""
        return small if self.settings.quick else full


def points(cpu: Iterable[str], gpu: Iterable[str], full: Iterable[str] = ()) -> list[Any]:
    """Names of the points of both kinds, as parameters; a run takes one kind (`--points`).

    full: CPU points that only a full run takes (`--full`).
    """
    marked = ((), cpu), (pytest.mark.full, full), (pytest.mark.gpu, gpu)
    return [pytest.param(n, marks=mark) for mark, names in marked for n in names]


def compiled(function: Provider) -> Provider:
    """`function` under torch.compile, in the form that suits it best: one graph, static shapes."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def against(
    eager: Provider | Missing,
    ours: Provider,
    *,
    vectorized: Provider | None = None,
    others: dict[str, Provider | Missing] | None = None,
) -> dict[str, Provider | Missing]:
    """Providers of a point: eager, its compilation (that of `vectorized`, if any), others, ours."""
    torch_forms = {"eager": eager} | ({"vectorized": vectorized} if vectorized else {})
    fused = compiled(vectorized or eager)
    return {**torch_forms, "compile": fused, **(others or {}), "ours": ours}


def exact(
    function: Callable[..., Any],
    leaves: Iterable[Tensor],
    upstream: Iterable[Tensor] = (),
    gradient: bool = True,
) -> tuple[Tensor, ...]:
    """fp64 results of `function(*leaves)`, and with `gradient` those in the leaves.

    upstream: gradient of each result; results without one are scalars.
    """
    wide = [t.detach().double().requires_grad_(gradient) for t in leaves]
    found = function(*wide)
    outputs = (found,) if isinstance(found, Tensor) else tuple(found)
    if not gradient:
        return outputs
    ones = [u.double() for u in upstream] or None
    return *(o.detach() for o in outputs), *torch.autograd.grad(outputs, wide, ones)


def sized(dtype: torch.dtype, *sizes: int) -> str:
    """A label: dtype and shape."""
    return f"{SHORT[dtype]} {'×'.join(map(str, sizes))}"
