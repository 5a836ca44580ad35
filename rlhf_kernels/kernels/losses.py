"""Results and divisor of the losses over tokens, shared by native and Triton launchers.

A backend with a deferred scale writes a token's gradient before all tokens are counted. It returns
unscaled fp32 gradients, and the backward pass multiplies them by `scale` = 1 / divisor. The other
backends return complete gradients and no `scale`. What is not there is None to a launcher, and an
empty tensor in traced code, whose operators cannot return None.
"""

from collections.abc import Callable
from typing import NamedTuple, TypedDict, TypeGuard

import torch
from torch import Tensor

from ..core import data_checks, env
from ..core.layout import fp32_like
from ..core.row_options import RowOptions
from .rows import Maybe, PolicyLoss, PolicyRows

_Backward = Callable[[Tensor, Maybe, Tensor, Tensor, torch.dtype, torch.dtype], list[Tensor]]


class ValueTokens(NamedTuple):
    """All that a value loss of tokens [B, T], or packed [N] with cu_seqlens, is computed from.

    normalizer, divisor: the aggregation divides by the tensor or the number; None and 0 for the
        count that it implies.
    clip_range: 0 for no clipping.
    aggregation: position in AGGREGATIONS.
    """

    values: Tensor
    old_values: Tensor
    returns: Tensor
    mask: Tensor
    cu_seqlens: Tensor | None
    normalizer: Tensor | None
    divisor: float
    clip_range: float
    aggregation: int


class ValueResults(NamedTuple):
    """Results of a value loss, fp32; fields as those of `rows.LossResults`."""

    loss: Tensor
    metrics: Tensor
    of_values: Tensor | None
    scale: Tensor | None


class Launchers(TypedDict, total=False):
    """By operator name; those from `loss_backward` on are of GPUs alone."""

    policy_loss: PolicyLoss
    value_loss: Callable[[ValueTokens, bool], ValueResults]
    loss_backward: _Backward
    # Only for the fused head; not operators.
    scale_inplace: Callable[[Tensor, Tensor], Tensor]
    policy_rows_for: Callable[[torch.device, int, RowOptions], PolicyRows | None]


def results(like: Tensor, metrics: int, deferred: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Uninitialised loss, metrics and scale of the gradients, fp32; the scale only if deferred."""
    memory = like.new_empty(metrics, dtype=torch.float32)
    # `size` by its name: torch parses it a third faster than a () by position.
    return memory.new_empty(size=()), memory, memory.new_empty(size=()) if deferred else None


def is_deferred(scale: Tensor | None) -> TypeGuard[Tensor]:
    """Whether the gradients returned with `scale` still have to be multiplied by it."""
    return scale is not None and scale.dim() == 0


def waiting_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that stores a gradient of weights until it is multiplied by the upstream gradient.

    fp16 gradients need fp32: the upstream gradient may be a loss scale, without which they could
    leave the range of fp16.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def gradient(like: Tensor, wanted: bool) -> Tensor | None:
    """Uninitialised fp32 memory for the gradient of `like`; None if not wanted.

    A second pass may add the slope of a sequence's ratio, and the backward pass multiplies by the
    upstream gradient. In fp32 the gradient is rounded to its dtype only once, at the end.
    """
    return fp32_like(like) if wanted else None


def sequences(shape: torch.Size, cu_seqlens: Tensor | None) -> tuple[int, int]:
    """(B, T) of padded [B, T]; (number of sequences, N) of packed [N] with cu_seqlens."""
    if cu_seqlens is None:
        return shape[0], shape[1]
    return cu_seqlens.shape[0] - 1, shape[0]


def divisor_on_host(op: str, normalizer: Tensor | None, divisor: float) -> float:
    """The number to divide by; 0 if the kernel must count."""
    if normalizer is None:
        return float(divisor)
    data_checks.divisor_positive(op, normalizer)
    return float(normalizer)


def divisor_on_device(
    op: str, like: Tensor, normalizer: Tensor | None, divisor: float
) -> tuple[float, Tensor | None]:
    """(number to divide by, None), or (0, normalizer) if it is a tensor on the device of `like`.

    Such a tensor is not read on the host: a bad normalizer makes the results NaN, or raises with
    RLHF_KERNELS_CHECK=1.
    """
    if normalizer is None or normalizer.device != like.device:
        return divisor_on_host(op, normalizer, divisor), None
    if env.CHECK:
        data_checks.divisor_positive(op, normalizer)
    return 0.0, normalizer


def check_offsets(op: str, cu_seqlens: Tensor | None, total: int) -> None:
    """With RLHF_KERNELS_CHECK=1, raises for bad offsets; else they make GPU results NaN."""
    if env.CHECK:
        data_checks.offsets_valid(op, cu_seqlens, total)


def check_weights(op: str, weights: Tensor | None, mask: Tensor, cu_seqlens: Tensor | None) -> None:
    """With RLHF_KERNELS_CHECK=1, raises for bad weights; else they make GPU results NaN."""
    if env.CHECK:
        data_checks.loss_weights(op, weights, mask, cu_seqlens)


def backward_launcher(
    scale_into: Callable[[Tensor, Maybe, Tensor, Tensor, Tensor, Maybe], None],
) -> _Backward:
    """Launcher of loss_backward.

    `scale_into` takes one or two gradients, the scale and the upstream gradient, and writes its
    last two arguments. The second gradient and result are None where there is one.
    """

    def loss_backward(
        first: Tensor,
        second: Tensor | None,
        scale: Tensor,
        upstream: Tensor,
        first_dtype: torch.dtype,
        second_dtype: torch.dtype,
    ) -> list[Tensor]:
        out = torch.empty_like(first, dtype=first_dtype)
        other = None if second is None else torch.empty_like(second, dtype=second_dtype)
        if first.numel() > 0:
            scale_into(first, second, scale, upstream, out, other)
        return [out] if other is None else [out, other]

    return loss_backward
