"""Launchers of kl_divergence and kl_penalty for the native backends."""

from types import ModuleType

from torch import Tensor

from ...config.enums import PLAIN_KL_ESTIMATORS
from ...core.pair_options import PairOptions
from .. import kl
from . import boundary as b


def launchers(extension: ModuleType) -> kl.Launchers:
    """Launchers bound to an extension module."""
    make_exec = b.exec_builder(extension)

    def forward(
        logits: Tensor,
        ref_logits: Tensor,
        options: PairOptions,
        divergences: Tensor,
        stats: Tensor,
        entropies: Tensor | None,
    ) -> None:
        extension.kl_divergence(
            logits,
            ref_logits,
            options.temperature,
            options.reverse,
            options.native,
            divergences,
            stats,
            entropies,
            make_exec(
                logits,
                "kl_divergence",
                lambda: (divergences.numel(), logits.shape[-1], logits.element_size()),
            ),
        )

    def backward(
        out: Tensor,
        logits: Tensor,
        ref_logits: Tensor,
        stats: Tensor,
        grad: Tensor,
        options: PairOptions,
    ) -> None:
        extension.kl_divergence_backward(
            logits,
            ref_logits,
            options.temperature,
            options.reverse,
            options.native,
            stats,
            b.as_fp32(grad),
            out,
            make_exec(logits, "kl_divergence_backward", lambda: (grad.numel(),)),
        )

    def penalty(
        logprobs: Tensor, ref_logprobs: Tensor, grad: Tensor | None, estimator: str, out: Tensor
    ) -> None:
        code = PLAIN_KL_ESTIMATORS.index(estimator.removesuffix("+"))
        if grad is None:
            extension.kl_penalty(logprobs, ref_logprobs, code, out, make_exec(logprobs))
            return
        straight, grad = estimator.endswith("+"), b.as_fp32(grad)
        extension.kl_penalty_backward(
            logprobs, ref_logprobs, code, straight, grad, out, make_exec(logprobs)
        )

    return kl.launchers(forward, backward, penalty)
