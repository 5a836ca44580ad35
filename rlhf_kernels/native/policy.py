"""Launcher of policy_loss for the native backends, and what the losses over tokens share."""

from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from .. import _checks
from . import boundary as b

# csrc/abi.h: kPolicyMetrics
_METRICS = 18


def mask_grid(mask: Tensor) -> Tensor:
    """The mask as bool, int32 or int64, without a copy where its own bytes serve."""
    if mask.dtype in (torch.uint8, torch.int8):
        # Native code takes any nonzero byte as true.
        mask = b.materialized(mask).view(torch.bool)
    elif mask.dtype not in (torch.bool, torch.int64, torch.int32):
        mask = mask != 0
    return b.as_grid(mask)


def divisor_value(op: str, normalizer: Tensor | None, divisor: float) -> float:
    """The number to divide by; 0 where the kernel shall count."""
    if normalizer is None:
        return divisor
    _checks.divisor_positive(op, normalizer)
    return normalizer.item()


def outputs(like: Tensor, metrics: int, grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, metrics and the gradient of `like` (empty if not wanted)."""
    loss = torch.empty((), dtype=torch.float32, device=like.device)
    values = torch.empty(metrics, dtype=torch.float32, device=like.device)
    shape = like.shape if grad else (0,)
    return loss, values, torch.empty(shape, dtype=like.dtype, device=like.device)


def sequences(op: str, like: Tensor, cu_seqlens: Tensor | None) -> tuple[int, int, b.Packed] | None:
    """(sequences, cols, offsets) of csrc/abi.h: LossTokens; None where there is no token."""
    if like.numel() == 0:
        _checks.offsets_valid(op, cu_seqlens, 0)
        return None
    if cu_seqlens is None:
        return like.shape[0], like.shape[1], None
    return cu_seqlens.shape[0] - 1, like.shape[0], b.pack(cu_seqlens)


def raise_status(op: str, status: tuple[int, int], cu_seqlens: Tensor | None, total: int) -> None:
    """Raises what the kernel has found."""
    code, position = status
    if code == b.BAD_OFFSETS:
        raise _checks.bad_offsets(op, position, cu_seqlens, total)
    if code == b.OUT_OF_MEMORY:
        raise MemoryError(f"{op}: no memory for {total} tokens' partial sums")


def _spread(advantages: Tensor, logprobs: Tensor) -> b.Packed:
    packed = b.pack(advantages)
    if advantages.shape == logprobs.shape:
        return packed
    address, dtype, _, step = packed
    return address, dtype, step, 0


def launchers(extension: ModuleType) -> dict[str, Callable[..., object]]:
    """Launchers by operator name, bound to an extension module."""
    where = b.place(extension)

    def policy_loss(
        logprobs: Tensor,
        old: Tensor,
        advantages: Tensor,
        mask: Tensor,
        ref: Tensor | None,
        rollout: Tensor | None,
        entropy: Tensor | None,
        cu_seqlens: Tensor | None,
        normalizer: Tensor | None,
        divisor: float,
        codes: Sequence[int],
        params: Sequence[float],
        grad: bool,
        entropy_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        op = "policy_loss"
        loss, metrics, gradient = outputs(logprobs, _METRICS, grad)
        shape = entropy.shape if entropy_grad else (0,)
        bonus = torch.empty(
            shape, dtype=(entropy if entropy_grad else logprobs).dtype, device=logprobs.device
        )
        # The gradients are complete.
        scale = loss.new_empty(0)
        divisor = divisor_value(op, normalizer, divisor)
        tokens = sequences(op, logprobs, cu_seqlens)
        if tokens is None:
            return loss.zero_(), metrics.zero_(), gradient, bonus, scale
        mask, logprobs, old = mask_grid(mask), b.as_grid(logprobs), b.as_grid(old)
        advantages, ref = b.as_grid(advantages), b.as_grid(ref)
        rollout, entropy = b.as_grid(rollout), b.as_grid(entropy)
        status = extension.policy_loss(
            *tokens, b.pack(mask), b.pack(logprobs), b.pack(old), _spread(advantages, logprobs),
            b.pack(ref), b.pack(rollout), b.pack(entropy), divisor, codes, params, b.pack(loss),
            b.pack(metrics), b.pack(gradient) if grad else None,
            b.pack(bonus) if entropy_grad else None, where(logprobs),
        )  # fmt: skip
        raise_status(op, status, cu_seqlens, logprobs.numel())
        return loss, metrics, gradient, bonus, scale

    return {"policy_loss": policy_loss}
