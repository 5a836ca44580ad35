"""Shared by the native launchers of operations over tokens: masks, offsets, losses, errors."""

from typing import NamedTuple

import torch
from torch import Tensor

from ...core import data_checks
from ...core.layout import MaybeTensor
from .. import losses
from . import boundary as b


def flags(mask: MaybeTensor) -> MaybeTensor:
    """The mask as bool, int32 or int64; copies only other dtypes."""
    if mask is None or mask.dtype in b.FLAGS:
        return mask
    if mask.dtype in (torch.uint8, torch.int8):
        # Native code treats any nonzero byte as true.
        return b.materialized(mask).view(torch.bool)
    return mask != 0


class Loss(NamedTuple):
    """A loss that is about to be computed.

    tokens: (sequences, cols, offsets), as LossTokens of csrc/abi_losses.h; None if there is none.
    loss, metrics, scale: memory for the results; zeros if there is no token.
    divisor, normalizer: the number to divide by (0 to count), or the tensor that a GPU reads.
    """

    tokens: tuple[int, int, Tensor | None] | None
    loss: Tensor
    metrics: Tensor
    scale: Tensor | None
    divisor: float
    normalizer: Tensor | None


def begin(
    op: str,
    like: Tensor,
    cu_seqlens: Tensor | None,
    normalizer: Tensor | None,
    divisor: float,
    metrics: int,
    gpu: bool,
) -> Loss:
    """Checks what the host may read, and allocates; `like` are the tokens [B, T] or [N]."""
    loss, values, scale = losses.results(like, metrics, gpu)
    if gpu:
        losses.check_offsets(op, cu_seqlens, like.shape[0])
        divisor, normalizer = losses.divisor_on_device(op, like, normalizer, divisor)
        if normalizer is not None:
            kinds = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
            floating = normalizer.dtype in kinds
            normalizer = b.materialized(normalizer if floating else normalizer.double())
    else:
        divisor, normalizer = losses.divisor_on_host(op, normalizer, divisor), None
        if like.numel() == 0:
            data_checks.offsets_valid(op, cu_seqlens, 0)
            return Loss(None, loss.zero_(), values.zero_(), scale, divisor, normalizer)
    tokens = (*losses.sequences(like.shape, cu_seqlens), cu_seqlens)
    return Loss(tokens, loss, values, scale, divisor, normalizer)


def raise_status(op: str, status: tuple[int, int], cu_seqlens: Tensor | None, like: Tensor) -> None:
    """Raises the error that a kernel over tokens `like` reported, if it did."""
    code, position = status
    if code == b.BAD_OFFSETS:
        assert cu_seqlens is not None  # the kernel read a bad entry
        raise data_checks.bad_offsets(op, position, cu_seqlens, like.numel())
    if code == b.OUT_OF_MEMORY:
        raise MemoryError(f"{op}: no memory for {like.numel()} tokens' partial sums")
