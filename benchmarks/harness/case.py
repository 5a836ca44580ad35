"""One operation on one shape, as a benchmark point passes it to `measure`."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

# The minimum number of rounds of a point.
MIN_ROUNDS = 20
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class Missing(NamedTuple):
    """A provider that is not available, and why. It is falsy: `peer(...) and f` stays Missing."""

    reason: str

    def __bool__(self) -> bool:
        return False


Provider = Callable[..., Any]


@dataclass
class Overwriting:
    """A provider that overwrites its first input; it gets a copy, which is not timed."""

    function: Provider

    def __call__(self, *inputs: Any) -> Any:
        return self.function(*inputs)


@dataclass
class Settings:
    """Command-line options of a run; `seconds` per point, None for the device's default."""

    device: torch.device
    quick: bool
    providers: set[str] | None
    seconds: float | None = None


@dataclass
class Case:
    """One operation on one shape.

    Attributes:
        op: name of the operation, with options that matter.
        label: dtype and shape, for readers.
        mode: "forward", "backward" or "forward+backward".
        inputs: arguments of the providers; gradients are taken w.r.t. those that require grad.
        providers: name -> function(*inputs) -> tensor or tensors. The fixture times "ours".
        oracle: returns fp64 outputs, then fp64 gradients if the mode has a backward pass, all of
            them already passed through `select`.
        moved: minimum number of bytes that the operation reads and writes.
        flops: floating-point operations of its matrix products; 0 if memory is the bound.
        limit: what bounds it: "copy" or "read", the machine's rates, or one of `baselines`.
        targets: provider (or "copy", "read", a baseline) -> minimum ratio of its time to ours.
        at_most: "median" (time) or "host" (host time of a call) of ours -> seconds;
            "extra_bytes" (memory beyond inputs and results) -> bytes.
        select: selects the part of a result that the oracle has (sampled rows, unmasked tokens).
        upstream: gradient of each checked output; ones if empty.
        extra: further functions of the inputs to time, without a check of their results.
        outputs: number of outputs that are checked and differentiated; the others (metrics) are
            only computed. None means all.
        baselines: functions without arguments for work that every implementation needs.
        least_rounds: minimum rounds; less than MIN_ROUNDS if a round takes many seconds.
        rounded: dtype of intermediate results, if it is coarser than that of the results.
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
    """The argument of a point's test; calling it measures a Case with the given fields."""

    settings: Settings
    record: Callable[[Case], None]

    def __call__(self, **fields: Any) -> None:
        self.record(Case(**fields))

    @property
    def device(self) -> torch.device:
        return self.settings.device

    def size(self, small: Any, full: Any) -> Any:
        """The shape to use: `small` in a quick run."""
        return small if self.settings.quick else full


def points(cpu: Iterable[str], gpu: Iterable[str], full: Iterable[str] = ()) -> list[Any]:
    """CPU and GPU points as pytest parameters; a run measures one kind (`--points`).

    full: CPU points that only a full run measures (`--full`).
    """
    marked = ((), cpu), (pytest.mark.full, full), (pytest.mark.gpu, gpu)
    return [pytest.param(n, marks=mark) for mark, names in marked for n in names]


def compiled(function: Provider) -> Provider:
    """`function` under torch.compile with its best options: one graph, static shapes."""
    return torch.compile(function, fullgraph=True, dynamic=False)


def against(
    eager: Provider | Missing,
    ours: Provider,
    *,
    vectorized: Provider | None = None,
    others: dict[str, Provider | Missing] | None = None,
) -> dict[str, Provider | Missing]:
    """Providers of a point: eager, its compilation (of `vectorized`, if given), others, ours."""
    torch_forms = {"eager": eager} | ({"vectorized": vectorized} if vectorized else {})
    fused = compiled(vectorized or eager)
    return {**torch_forms, "compile": fused, **(others or {}), "ours": ours}


def exact(
    function: Callable[..., Any],
    leaves: Iterable[Tensor],
    upstream: Iterable[Tensor] = (),
    gradient: bool = True,
) -> tuple[Tensor, ...]:
    """fp64 results of `function(*leaves)`, and with `gradient` also the gradients of the leaves.

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
    """A label of dtype and shape."""
    return f"{SHORT[dtype]} {'×'.join(map(str, sizes))}"
