"""Whether a call is traced instead of run. A traced call must not read data on the host."""

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

#: The number of active dispatch modes: make_fx, torch.export, fake tensors, FLOP counters.
dispatch_modes = torch._C._len_torch_dispatch_stack


def active(t: Tensor) -> bool:
    """Whether `t` is a fake tensor, or reading its data would be traced."""
    if torch.compiler.is_compiling():
        return True
    return dispatch_modes() > 0 or isinstance(t, FakeTensor)
