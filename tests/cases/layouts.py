"""Copies of a tensor at other addresses and with other strides."""

from collections.abc import Iterator

import torch
from torch import Tensor


def layouts(t: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(name, view) of copies of `t` without gradient; elements between the values are 7."""
    t = t.detach()
    n = t.shape[-1]
    # The data starts one element after an aligned address.
    yield "misaligned", t.new_full((t.numel() + 1,), 7)[1:].view(t.shape).copy_(t)
    yield "strided", t.new_full((*t.shape[:-1], 2 * n + 1), 7)[..., 1::2].copy_(t)
    yield "wide rows", t.new_full((*t.shape[:-1], n + 3), 7)[..., 2 : 2 + n].copy_(t)
    yield "transposed", t.transpose(0, -1).contiguous().transpose(0, -1)
    if t.dtype is torch.float32:
        # The view has the negative bit set: its sign has not been applied yet.
        yield "negated", torch.view_as_complex(torch.stack((t, -t), -1)).conj().imag
