"""Launcher of policy_loss for the native backends."""

from types import ModuleType

from torch import Tensor

from ...config.metrics import POLICY_METRICS
from ...core import data_checks
from .. import losses
from ..rows import LossResults, PolicyTokens
from . import boundary as b
from ._tokens import begin, flags, raise_status


def launchers(extension: ModuleType) -> losses.Launchers:
    """Launchers bound to an extension module."""
    make_exec, gpu = b.exec_builder(extension), extension.gpu

    def policy_loss(given: PolicyTokens, grad: bool, entropy_grad: bool) -> LossResults:
        op, logprobs, advantages = "policy_loss", given.logprobs, given.advantages
        entropy, weights, cu_seqlens = given.entropy, given.weights, given.cu_seqlens
        begun = begin(
            op, logprobs, cu_seqlens, given.normalizer, given.divisor, len(POLICY_METRICS), gpu
        )
        tokens, loss, metrics, scale, divisor, normalizer = begun
        of_logprobs = losses.gradient(logprobs, grad)
        of_entropy = losses.gradient(logprobs if entropy is None else entropy, entropy_grad)
        results = LossResults(loss, metrics, of_logprobs, of_entropy, scale)
        if tokens is None:
            return results
        check_weights = losses.check_weights if gpu else data_checks.loss_weights
        check_weights(op, weights, given.mask, cu_seqlens)
        status = extension.policy_loss(
            *tokens,
            flags(given.mask),
            logprobs,
            given.old_logprobs,
            advantages,
            advantages.shape != logprobs.shape,
            given.ref_logprobs,
            given.rollout_logprobs,
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
            of_logprobs,
            of_entropy,
            make_exec(logprobs, op, lambda: (*tokens[:2], cu_seqlens is not None)),
        )
        raise_status(op, status, cu_seqlens, logprobs)
        return results

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
