"""Whether a call is traced instead of run. A traced call must not read data on the host."""

import torch
from torch import Tensor
from torch._C._functorch import is_legacy_batchedtensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad

#: torch.compiler.is_compiling, which torch.compile knows by this name too.
compiling = torch.compiler.is_compiling

#: The number of active dispatch modes: make_fx, torch.export, fake tensors, FLOP counters.
dispatch_modes = torch._C._len_torch_dispatch_stack

#: The innermost transform of torch.func in force (vmap, grad, jvp), or None: within one, a tensor
#: of the usual type may stand for several and have no memory.
transform = torch._C._functorch.peek_interpreter_stack


def active(t: Tensor) -> bool:
    """Whether `t` is a fake tensor, or reading its data would be traced."""
    if torch.compiler.is_compiling():
        return True
    return dispatch_modes() > 0 or isinstance(t, FakeTensor)


def forward_mode() -> bool:
    """Whether tensors may carry tangents, which only an autograd.Function notices, and refuses."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def stand_for_several(*values: object) -> bool:
    """Whether a tensor among `values` is a batch: upstream gradients are with `is_grads_batched`.

    `transform` recognises the batches of torch.func.vmap.
    """
    return any(isinstance(value, Tensor) and is_legacy_batchedtensor(value) for value in values)


def refuse_derivative(op: str, *values: object) -> None:
    """Refuses what the kernels' autograd.Functions do not take part in.

    Raises:
        NotImplementedError: a transform of torch.func is in force, or a tensor among `values`
            carries a tangent.
    """
    if transform() is not None:
        raise NotImplementedError(
            f"{op}: its kernels have no gradient within torch.func (grad, vjp, jacrev, vmap); take "
            "it with backward() or torch.autograd.grad, or under use_backend('reference')"
        )
    refuse_tangents(op, *values)


def refuse_tangents(op: str, *values: object) -> None:
    """Refuses forward mode, which no operation has.

    Raises:
        NotImplementedError: a tensor among `values` carries a tangent.
    """
    if forward_mode() and any(
        isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None
        for value in values
    ):
        raise NotImplementedError(
            f"{op} has no forward-mode derivative (jvp, jacfwd, hessian); take the gradient with "
            "backward() or torch.autograd.grad"
        )
