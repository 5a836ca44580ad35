"""Shared by the autograd.Functions of operations: recording a call, refusing a second gradient."""

import functools
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..core import tracing

#: The gradients that the backward pass of an autograd.Function returns.
InputGradients = tuple[Tensor | None, ...]


class _Dispatched(TorchDispatchMode):
    """Sends operators through the dispatcher, which takes batched tensors apart."""

    def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return f(*args, **(kwargs or {}))


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
            if torch.compiler.is_compiling():
                return backward(ctx, *args)
            once, several = torch.is_grad_enabled(), tracing.stand_for_several(*args)
            if not once and not several:
                return backward(ctx, *args)
            with torch.no_grad(), _Dispatched() if several else nullcontext():
                gradients = backward(ctx, *args)
            if not once:
                return gradients
            anchor = torch.empty(0, requires_grad=True)
            upstream = [t for t in args if isinstance(t, Tensor)]
            guarded: InputGradients = _Once.apply(
                op, len(gradients), *gradients, anchor, *upstream, *_sources(ctx)
            )
            return guarded

        return run

    return decorate


def gathered(args: tuple[Any, ...], *kinds: Any) -> tuple[Any, ...]:
    """The named tuples `kinds` whose fields stand one behind the other in `args`, and what follows.

    The forward pass of an autograd.Function takes fields, because autograd sees no tensor in a
    tuple.
    """
    found, at = [], 0
    for kind in kinds:
        end = at + len(kind._fields)
        found.append(kind(*args[at:end]))
        at = end
    return (*found, *args[at:])


class _Unrecorded:
    """Stands for the context of an autograd.Function whose backward pass never comes."""

    needs_input_grad = (False,) * 32

    def save_for_backward(self, *_: Tensor | None) -> None: ...

    mark_non_differentiable = save_for_backward

    def set_materialize_grads(self, _: bool) -> None: ...


def apply(op: str, function: Any, *args: Any, plain: bool = False) -> Any:
    """The result of operation `op`, recorded for a backward pass if an input asks for a gradient.

    Args:
        op: name for errors.
        function: the autograd.Function that computes the operation and its gradient.
        args: of its forward.
        plain: whether `checks.plain` has found all tensors that may need a gradient to be so.

    Raises:
        NotImplementedError: a gradient is asked for that the kernels do not have; see
            `tracing.refuse_derivative`.
    """
    if torch.compiler.is_compiling():
        return function.apply(*args)
    wanted = torch.is_grad_enabled() and any(
        isinstance(t, Tensor) and t.requires_grad for t in args
    )
    if not (wanted or tracing.forward_mode()):
        return function.forward(_Unrecorded(), *args)
    tracing.refuse_derivative(op, *args)
    if plain:
        # What Function.apply does before its base class's: it looks for transforms of torch.func,
        # refused above, and for tensors that outlived one, which are not plain. 2 to 3 µs.
        base: Any = super(torch.autograd.Function, function)
        return base.apply(*args)
    return function.apply(*args)


# From torch 2.5 on; not public.
_keeps_graph = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)


def graph_is_kept() -> bool:
    """Whether the running backward pass may run again, and so needs its saved tensors unchanged.

    True where torch does not tell.
    """
    return True if _keeps_graph is None else bool(_keeps_graph())
