"""Whether a call is recorded instead of run: then no data may be looked at on the host."""

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

#: The number of dispatch modes in force: make_fx, torch.export, fake tensors, FLOP counters.
dispatch_modes = torch._C._len_torch_dispatch_stack


def active(t: Tensor) -> bool:
    """Whether `t` stands for data that is not there, or a look at it would be recorded."""
    if torch.compiler.is_compiling():
        return True
    return dispatch_modes() > 0 or isinstance(t, FakeTensor)
