"""Registration of kernels as torch.library operators.

An operator takes the backend's name as its last argument, so that a backward pass uses the backend
of its forward pass. Eager calls on plain tensors skip the dispatcher and call the launcher, because
the dispatcher costs more than a small kernel (3 µs against 1.5 µs per call, torch 2.13). All other
calls (torch.compile, fake tensors, tensor subclasses, transforms of torch.func) use the registered
operator.
"""

import functools
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..config.policy import PolicyCodes, PolicyParams
from ..core import tracing
from ..core.row_options import RowOptions
from ..kernels import backends

_LIBRARY = torch.library.Library("rlhf_kernels", "DEF")
# Argument types that a launcher accepts directly.
_PLAIN = frozenset(
    (
        *(Tensor, torch.nn.Parameter, type(None), bool, int, float, str, tuple, list),
        *(torch.dtype, RowOptions, PolicyCodes, PolicyParams),
    )
)
# The fields of RowOptions in schema syntax.
_ROW_OPTIONS = ", ".join(f"{t.__name__} {name}" for name, t in RowOptions.__annotations__.items())
_FIELDS = len(RowOptions._fields)

R = TypeVar("R")
#: The gradients that the backward pass of an autograd.Function returns.
InputGradients = tuple[Tensor | None, ...]


class Operator(Generic[R]):
    """A registered operator, callable as `op(*args, backend)`; R is the type of its result.

    RowOptions is a single argument of this call; the schema has one argument per field.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        fake: Callable[..., R],
        algorithm: Callable[..., R] | None,
    ) -> None:
        self.name, self._algorithm = name, algorithm
        before, found, _ = schema.partition("RowOptions options")
        self._options_at = before.count(",") if found else None
        _LIBRARY.define(name + schema.replace("RowOptions options", _ROW_OPTIONS))
        _LIBRARY.impl(name, self._gathered(self._run), "CompositeExplicitAutograd")
        torch.library.register_fake(f"rlhf_kernels::{name}", self._gathered(fake), lib=_LIBRARY)
        self._registered = getattr(torch.ops.rlhf_kernels, name).default

    def _run(self, *args: Any) -> R:
        backend = backends.get(args[-1])
        if self._algorithm is not None:
            return self._algorithm(backend.kernels, *args[:-1])
        launcher: Callable[..., R] = backend.launchers[self.name]
        return launcher(*args[:-1])

    def _gathered(self, f: Callable[..., R]) -> Callable[..., R]:
        """`f` with the schema's arguments, which it gathers into RowOptions."""
        at = self._options_at
        if at is None:
            return f

        def run(*args: Any) -> R:
            end = at + _FIELDS
            return f(*args[:at], RowOptions(*args[at:end]), *args[end:])

        return run

    def __call__(self, *args: Any) -> R:
        if torch.compiler.is_compiling() or tracing.dispatch_modes():
            return self._dispatch(args)
        if tracing.transform() is not None or not _PLAIN.issuperset(map(type, args)):
            return self._dispatch(args)
        backend = backends.get(args[-1])
        if self._algorithm is not None:
            return self._algorithm(backend.kernels, *args[:-1])
        launcher: Callable[..., R] = backend.launchers[self.name]
        return launcher(*args[:-1])

    def _dispatch(self, args: tuple[Any, ...]) -> R:
        at = self._options_at
        if at is not None:
            args = (*args[:at], *args[at], *args[at + 1 :])
        result: R = self._registered(*args)
        return result


class _Once(torch.autograd.Function):
    """Passes gradients through; differentiating them w.r.t. any further tensor raises."""

    @staticmethod
    def forward(ctx: Any, op: str, count: int, *tensors: Tensor | None) -> InputGradients:
        ctx.op = op
        return tuple(None if g is None else g.detach() for g in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor | None) -> InputGradients:
        raise RuntimeError(
            f"{ctx.op}: its kernels are once_differentiable, and their gradient is differentiated "
            "(create_graph=True); under use_backend('reference') it can be"
        )


def remember(ctx: Any, *inputs: Tensor | None) -> None:
    """Stores weak references to the inputs w.r.t. which a second derivative may be requested."""
    if torch.compiler.is_compiling():  # torch itself refuses to differentiate a compiled backward
        return
    ctx.sources = [
        weakref.ref(t) for t in inputs if t is not None and t.requires_grad and not t.is_leaf
    ]


def _sources(ctx: Any) -> list[Tensor]:
    """Tensors on which the gradient of a node depends: its live inputs and all leaves of its graph.

    A derivative w.r.t. a freed input cannot be requested, but one w.r.t. a leaf always can.
    """
    found = [t for t in (source() for source in ctx.sources) if t is not None]
    nodes, seen = [ctx], {ctx}
    while nodes:
        for node, _ in nodes.pop().next_functions:
            if node is None or node in seen:
                continue
            seen.add(node)
            nodes.append(node)
            if type(node).__name__ == "AccumulateGrad":
                found.append(node.variable)
    return found


def once_differentiable(
    op: str,
) -> Callable[[Callable[..., InputGradients]], Callable[..., InputGradients]]:
    """Makes differentiating the result of a backward pass raise, whatever the upstream gradient.

    torch's decorator of this name silently cuts the graph where the upstream gradient requires no
    gradient, although the result still depends on the saved tensors. The raising node here has
    these tensors as inputs, because autograd only runs nodes on a path to the requested `inputs`.
    """

    def decorate(backward: Callable[..., InputGradients]) -> Callable[..., InputGradients]:
        @functools.wraps(backward)
        def run(ctx: Any, *args: object) -> InputGradients:
            # torch itself refuses to differentiate a compiled backward.
            if torch.compiler.is_compiling() or not torch.is_grad_enabled():
                return backward(ctx, *args)
            with torch.no_grad():
                gradients = backward(ctx, *args)
            anchor = torch.empty(0, requires_grad=True)
            upstream = [t for t in args if isinstance(t, Tensor)]
            once: InputGradients = _Once.apply(
                op, len(gradients), *gradients, anchor, *upstream, *_sources(ctx)
            )
            return once

        return run

    return decorate


# Operations over a head -> the row kernel that each uses; they have no kernel of their own.
_ROW_KERNELS = {
    "linear_kl_divergence": "kl_divergence",
    "linear_policy_loss": "token_logprobs",
    "linear_token_logprobs": "token_logprobs",
}


def select(op: str, device: torch.device) -> str:
    """The backend for a public operation on `device`; errors as `backends.select`."""
    return backends.select(op, device, _ROW_KERNELS.get(op, op))


def head_gradients_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a head's operands; empty where not needed."""

    def empty(t: Tensor | None, need: bool) -> Tensor:
        return t.new_empty(t.shape) if need and t is not None else hidden.new_empty(0)

    of_hidden, of_weight, of_bias = needs
    return empty(hidden, of_hidden), empty(weight, of_weight), empty(bias, of_bias)


def define(
    name: str,
    schema: str,
    fake: Callable[..., R],
    algorithm: Callable[..., R] | None = None,
) -> Operator[R]:
    """Registers `rlhf_kernels::<name>`.

    Args:
        name: operator name, also the key of its launcher in each backend.
        schema: arguments and results; the last argument is `str backend`. `RowOptions options`
            expands to one argument per field.
        fake: returns empty results with the right shapes and dtypes from the same arguments.
        algorithm: runs instead of a launcher; takes the backend's `Kernels`, then the arguments.
    """
    return Operator(name, schema, fake, algorithm)
