"""Launcher of policy_loss for the native backends, and helpers of the losses over tokens."""

from types import ModuleType

import torch
from torch import Tensor

from ...config.metrics import POLICY_METRICS
from ...core import data_checks
from .. import losses
from ..rows import LossResults, PolicyTokens
from . import boundary as b


def flags(mask: Tensor) -> Tensor:
    """The mask as bool, int32 or int64; copies only other dtypes."""
    dtype = mask.dtype
    if dtype in b.FLAGS:
        return mask
    if dtype in (torch.uint8, torch.int8):
        # Native code treats any nonzero byte as true.
        return b.materialized(mask).view(torch.bool)
    return mask != 0


def divisor_on(
    op: str, like: Tensor, normalizer: Tensor | None, divisor: float, gpu: bool
) -> tuple[float, Tensor | None]:
    """The number to divide by (0 to count), or the tensor that a GPU kernel reads."""
    if not gpu:
        return losses.divisor_on_host(op, normalizer, divisor), None
    divisor, normalizer = losses.divisor_on_device(op, like, normalizer, divisor)
    if normalizer is not None:
        floating = normalizer.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        normalizer = b.materialized(normalizer if floating else normalizer.double())
    return divisor, normalizer


def sequences(
    op: str, like: Tensor, cu_seqlens: Tensor | None, gpu: bool
) -> tuple[int, int, Tensor | None] | None:
    """(sequences, cols, offsets), as LossTokens of csrc/abi_losses.h; None if there is no token."""
    if gpu:
        losses.check_offsets(op, cu_seqlens, like.shape[0])
    elif like.numel() == 0:
        data_checks.offsets_valid(op, cu_seqlens, 0)
        return None
    return *losses.sequences(like.shape, cu_seqlens), cu_seqlens


def raise_status(op: str, status: tuple[int, int], cu_seqlens: Tensor | None, like: Tensor) -> None:
    """Raises the error that a kernel over tokens `like` reported, if it did."""
    code, position = status
    if code == b.BAD_OFFSETS:
        assert cu_seqlens is not None  # the kernel read a bad entry
        raise data_checks.bad_offsets(op, position, cu_seqlens, like.numel())
    if code == b.OUT_OF_MEMORY:
        raise MemoryError(f"{op}: no memory for {like.numel()} tokens' partial sums")


def launchers(extension: ModuleType) -> losses.Launchers:
    """Launchers bound to an extension module."""
    make_exec, gpu = b.exec_builder(extension), extension.gpu

    def policy_loss(given: PolicyTokens, grad: bool, entropy_grad: bool) -> LossResults:
        op = "policy_loss"
        logprobs, old, advantages, mask, ref, rollout, entropy, weights, cu_seqlens = given[:9]
        loss, metrics, scale = losses.results(logprobs, len(POLICY_METRICS), gpu)
        policy_grad = losses.gradient(logprobs, grad)
        entropy_gradient = losses.gradient(logprobs if entropy is None else entropy, entropy_grad)
        divisor, normalizer = divisor_on(op, logprobs, given.normalizer, given.divisor, gpu)
        tokens = sequences(op, logprobs, cu_seqlens, gpu)
        if tokens is None:
            loss, metrics = loss.zero_(), metrics.zero_()
            return LossResults(loss, metrics, policy_grad, entropy_gradient, scale)
        check_weights = losses.check_weights if gpu else data_checks.loss_weights
        check_weights(op, weights, mask, cu_seqlens)
        status = extension.policy_loss(
            *tokens,
            flags(mask),
            logprobs,
            old,
            advantages,
            advantages.shape != logprobs.shape,
            ref,
            rollout,
            entropy,
            weights,
            weights is not None and weights.shape != logprobs.shape,
            divisor,
            normalizer,
            given.codes,
            given.params,
            loss,
            metrics,
            scale,
            policy_grad,
            entropy_gradient,
            make_exec(logprobs, op, lambda: (*tokens[:2], cu_seqlens is not None)),
        )
        raise_status(op, status, cu_seqlens, logprobs)
        return LossResults(loss, metrics, policy_grad, entropy_gradient, scale)

    def scale_into(first: Tensor, *others: Tensor | None) -> None:
        extension.loss_backward(first.numel(), first, *others, make_exec(first))

    def scale_inplace(values: Tensor, factor: Tensor) -> Tensor:
        """values [...], contiguous, times the 0-d factor; touches none where that is 1."""
        if values.numel() > 0:
            extension.scale(values.numel(), values.view(-1), factor, make_exec(values))
        return values

    table: losses.Launchers = {"policy_loss": policy_loss}
    # Gradients from the CPU kernels are complete and need no loss_backward. Scaling in place is of
    # use to the head alone; not an operator.
    if gpu:
        table["loss_backward"] = losses.backward_launcher(scale_into)
        table["scale_inplace"] = scale_inplace
    return table
