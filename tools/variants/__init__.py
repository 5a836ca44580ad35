"""The field's losses and estimators, our call of each, and how far it is from the formula.

A row's call is the text that the table shows and the code that is run. Its oracle is the formula in
float64, written here from the papers and the trainers' documentation, without this package. Loss
and gradient are compared on one batch, in float32 on the chosen backend.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

import rlhf_kernels as rk

Oracle = Callable[[SimpleNamespace], Tensor]


@dataclass(frozen=True)
class Variant:
    """A loss or an estimator of the field.

    Attributes:
        name: as the field calls it.
        who: who has it.
        call: our expression; "" if there is none.
        oracle: the formula, of float64 tensors under the names of the call; None without a call.
        where: names of the call beside the tensors, and their expressions.
        note: what the reader has to know, or why there is no call.
        theirs: a trainer's own function, of the same names in float64; None where it is missing.
    """

    name: str
    who: str
    call: str = ""
    oracle: Oracle | None = None
    where: tuple[tuple[str, str], ...] = ()
    note: str = ""
    theirs: Oracle | None = None


@dataclass(frozen=True)
class Family:
    """Variants over the same tensors.

    Attributes:
        title: of its table.
        tensors: makes float32 tensors by name.
        leaves: names of those with a gradient.
        variants: the rows.
    """

    title: str
    tensors: Callable[[], dict[str, Tensor]]
    leaves: tuple[str, ...]
    variants: Sequence[Variant]


@dataclass(frozen=True)
class Difference:
    """Largest differences, relative to the largest value and gradient.

    Attributes:
        value: of value or loss from the formula.
        gradient: of the gradient from the formula's; None for results without.
        theirs: the larger of both from a trainer's own function; None where it is missing.
    """

    value: float
    gradient: float | None
    theirs: float | None


def _value(result: Any) -> Tensor:
    """The loss of a result, or its tensor."""
    found = getattr(result, "loss", result)
    found = getattr(found, "advantages", found)
    assert isinstance(found, Tensor)
    return found


def _leaves(tensors: dict[str, Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    return {k: t.clone().requires_grad_() if k in names else t for k, t in tensors.items()}


def _with_gradients(value: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    if not value.requires_grad:
        return value, []
    # Different weights for the elements of a result that is no sum.
    weights = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape)
    total = value if value.dim() == 0 else (value * weights).sum()
    gradients = torch.autograd.grad(total, leaves, materialize_grads=True)
    return value.detach(), list(gradients)


def difference(variant: Variant, family: Family) -> Difference:
    """How far the call is from its oracle."""
    assert variant.oracle is not None
    tensors = family.tensors()
    own = _leaves(tensors, family.leaves)
    names: dict[str, Any] = {"rk": rk, "torch": torch, "C": rk.PolicyLossConfig} | own
    for name, expression in variant.where:
        names[name] = eval(expression, names)
    result = eval(variant.call, names)
    found = _with_gradients(_value(result), [own[k] for k in family.leaves])
    value, gradient = _compared(variant.oracle, tensors, family, found)
    theirs = None
    if variant.theirs is not None:
        theirs = max(_compared(variant.theirs, tensors, family, found))
    return Difference(value, gradient if family.leaves else None, theirs)


def _compared(
    function: Oracle,
    tensors: dict[str, Tensor],
    family: Family,
    found: tuple[Tensor, list[Tensor]],
) -> tuple[float, float]:
    """Differences of `found` from a function in float64: (of the value, of the gradients or 0)."""
    exact = {k: t.double() if t.is_floating_point() else t for k, t in tensors.items()}
    exact = _leaves(exact, family.leaves)
    value, gradients = found
    expected, slopes = _with_gradients(
        function(SimpleNamespace(**exact)), [exact[k] for k in family.leaves]
    )
    if bool(gradients) != bool(slopes):
        raise ValueError("one of two functions has no gradient")
    return _relative([value], [expected]), _relative(gradients, slopes) if gradients else 0.0


def _relative(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    error = max(float((a.double() - e).abs().max()) for a, e in zip(found, expected, strict=True))
    return error / max(max(float(e.abs().max()) for e in expected), 1e-30)
