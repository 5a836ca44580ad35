"""What the launchers of policy_loss and value_loss share, native and Triton: results and divisor.

A backend whose scale is deferred hands out gradients, in fp32, that are yet to be multiplied by
`scale`, which is 1 / divisor: it writes a token's gradient before the last token is counted. That
of another backend is complete and its `scale` empty, since an operator returns no optional tensor.
"""

import torch
from torch import Tensor

from ..core import checks, env


def results(like: Tensor, metrics: int, deferred: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for the loss, as many metrics, and the scale of the gradients, all fp32."""
    loss = torch.empty((), dtype=torch.float32, device=like.device)
    return loss, loss.new_empty(metrics), loss.new_empty(() if deferred else 0)


def is_deferred(scale: Tensor) -> bool:
    """Whether the gradients that came with `scale` are yet to be multiplied by it."""
    return scale.dim() == 0


def waiting_dtype(dtype: torch.dtype) -> torch.dtype:
    """In what a gradient of weights waits for its upstream, which may be the scale that fp16 needs:
    one in fp16 would leave its range.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def gradient(like: Tensor, wanted: bool) -> Tensor:
    """Memory for the gradient of `like`, which waits for its upstream in fp32; empty if not wanted.

    So it is rounded once: the slope of a sequence's ratio comes to a token's own in a second pass.
    """
    return like.new_empty(like.shape if wanted else (0,), dtype=torch.float32)


def sequences(shape: torch.Size, cu_seqlens: Tensor | None) -> tuple[int, int]:
    """Sequences, and tokens of each: [B, T]; or of all together, [N] with cu_seqlens."""
    if cu_seqlens is None:
        return shape[0], shape[1]
    return cu_seqlens.shape[0] - 1, shape[0]


def divisor_on_host(op: str, normalizer: Tensor | None, divisor: float) -> float:
    """The number to divide by; 0 where the kernel shall count."""
    if normalizer is None:
        return float(divisor)
    checks.divisor_positive(op, normalizer)
    return float(normalizer)


def divisor_on_device(
    op: str, like: Tensor, normalizer: Tensor | None, divisor: float
) -> tuple[float, Tensor | None]:
    """The number to divide by, or the normalizer where it lies on the device of `like`.

    That is not waited for: a bad one poisons the results, unless RLHF_KERNELS_CHECK asks for more.
    """
    if normalizer is None or normalizer.device != like.device:
        return divisor_on_host(op, normalizer, divisor), None
    if env.CHECK:
        checks.divisor_positive(op, normalizer)
    return 0.0, normalizer


def check_offsets(op: str, cu_seqlens: Tensor | None, total: int) -> None:
    """Raises for bad offsets on a device where RLHF_KERNELS_CHECK asks for it; else they poison."""
    if env.CHECK:
        checks.offsets_valid(op, cu_seqlens, total)
