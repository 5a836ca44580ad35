"""The values of a tensor behind other addresses and strides."""

from collections.abc import Iterator

import torch
from torch import Tensor


def layouts(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(name, view) of `t` without its gradient; what lies beside the values is 7."""
    t = t.detach()
    n = t.shape[-1]
    # One element behind an aligned address.
    yield "misaligned", t.new_full((t.numel() + 1,), 7)[1:].view(t.shape).copy_(t)
    yield "strided", t.new_full((*t.shape[:-1], 2 * n + 1), 7)[..., 1::2].copy_(t)
    yield "wide rows", t.new_full((*t.shape[:-1], n + 3), 7)[..., 2 : 2 + n].copy_(t)
    yield "transposed", t.transpose(0, -1).contiguous().transpose(0, -1)
    if t.dtype is torch.float32:
        # Behind a sign that is still to be applied.
        yield "negated", torch.view_as_complex(torch.stack((t, -t), -1)).conj().imag
