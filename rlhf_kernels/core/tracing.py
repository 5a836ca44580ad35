"""Whether a call is traced instead of run. A traced call must not read data on the host."""

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad

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
