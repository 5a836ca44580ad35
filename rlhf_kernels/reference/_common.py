"""Dtype policy of the references."""

import torch
from torch import Tensor


def compute(t: Tensor) -> Tensor:
    """`t` in the dtype that references compute in: fp64 stays, everything else becomes fp32."""
    return t if t.dtype is torch.float64 else t.float()
