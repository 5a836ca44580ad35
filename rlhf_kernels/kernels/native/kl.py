"""Launchers of kl_divergence and kl_penalty for the native backends."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...config.enums import PLAIN_KL_ESTIMATORS
from . import boundary as b


def launchers(extension: ModuleType) -> dict[str, Callable[..., object]]:
    """Launchers by operator name, bound to an extension module."""
    make_exec = b.exec_builder(extension)

    def kl_divergence(
        logits: Tensor, ref_logits: Tensor, temperature: float, reverse: bool
    ) -> tuple[Tensor, Tensor]:
        shape = logits.shape[:-1]
        kl = torch.empty(shape, dtype=torch.float32, device=logits.device)
        stats = torch.empty((*shape, 5), dtype=torch.float32, device=logits.device)
        if kl.numel() > 0:
            extension.kl_divergence(
                logits,
                ref_logits,
                temperature,
                reverse,
                kl,
                stats,
                make_exec(
                    logits,
                    "kl_divergence",
                    lambda: (kl.numel(), logits.shape[-1], logits.element_size()),
                ),
            )
        return kl, stats

    def backward(
        out: Tensor,
        logits: Tensor,
        ref_logits: Tensor,
        stats: Tensor,
        grad: Tensor,
        temperature: float,
        reverse: bool,
    ) -> None:
        if out.numel() > 0:
            grad = b.as_fp32(grad)
            extension.kl_divergence_backward(
                logits,
                ref_logits,
                temperature,
                reverse,
                stats,
                grad,
                out,
                make_exec(logits, "kl_divergence_backward", lambda: (grad.numel(),)),
            )

    def kl_divergence_backward(logits: Tensor, *args: Any) -> Tensor:
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        backward(out, logits, *args)
        return out

    def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
        out = torch.empty(logprobs.shape, dtype=torch.float32, device=logprobs.device)
        if out.numel() > 0:
            extension.kl_penalty(
                logprobs,
                ref_logprobs,
                PLAIN_KL_ESTIMATORS.index(estimator.removesuffix("+")),
                out,
                make_exec(logprobs),
            )
        return out

    def kl_penalty_backward(
        logprobs: Tensor, ref_logprobs: Tensor, grad: Tensor, estimator: str
    ) -> Tensor:
        out = torch.empty(logprobs.shape, dtype=logprobs.dtype, device=logprobs.device)
        if out.numel() > 0:
            grad = b.as_fp32(grad)
            extension.kl_penalty_backward(
                logprobs,
                ref_logprobs,
                PLAIN_KL_ESTIMATORS.index(estimator.removesuffix("+")),
                estimator.endswith("+"),
                grad,
                out,
                make_exec(logprobs),
            )
        return out

    return {
        "kl_divergence": kl_divergence,
        "kl_divergence_backward": kl_divergence_backward,
        # Only for the fused head; not an operator.
        "kl_divergence_backward_into": backward,
        "kl_penalty": kl_penalty,
        "kl_penalty_backward": kl_penalty_backward,
    }
