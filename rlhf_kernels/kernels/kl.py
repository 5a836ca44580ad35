"""Shared by the native and Triton launchers of kl_divergence and kl_penalty: results, outputs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core.pair_options import PairOptions


def launchers(
    forward: Callable[..., None],
    backward: Callable[..., None],
    penalty: Callable[..., None],
) -> dict[str, Callable[..., object]]:
    """Launchers by operator name, from the functions of a backend that launch its kernels.

    `forward` takes logits, ref_logits and options, and writes its last arguments: the divergences,
    the statistics, and the entropies or None. `backward` takes what `kl_divergence_backward_into`
    takes. `penalty` takes logprobs, ref_logprobs, the upstream gradient or None, and the estimator,
    and writes its last argument: the gradient or the penalty. None is called without a token.
    """

    def kl_divergence(
        logits: Tensor, ref_logits: Tensor, options: PairOptions
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        kl = torch.empty(logits.shape[:-1], dtype=torch.float32, device=logits.device)
        stats = kl.new_empty((*kl.shape, 5))
        entropies = torch.empty_like(kl) if options.entropy else None
        if kl.numel() > 0:
            forward(logits, ref_logits, options, kl, stats, entropies)
        return kl, stats, entropies

    def kl_divergence_backward_into(
        out: Tensor,
        logits: Tensor,
        ref_logits: Tensor,
        stats: Tensor,
        grad: Tensor,
        options: PairOptions,
    ) -> None:
        if out.numel() > 0:
            backward(out, logits, ref_logits, stats, grad, options)

    def kl_divergence_backward(logits: Tensor, *args: Any) -> Tensor:
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        kl_divergence_backward_into(out, logits, *args)
        return out

    def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, estimator: str) -> Tensor:
        out = torch.empty(logprobs.shape, dtype=torch.float32, device=logprobs.device)
        if out.numel() > 0:
            penalty(logprobs, ref_logprobs, None, estimator, out)
        return out

    def kl_penalty_backward(
        logprobs: Tensor, ref_logprobs: Tensor, grad: Tensor, estimator: str
    ) -> Tensor:
        out = torch.empty(logprobs.shape, dtype=logprobs.dtype, device=logprobs.device)
        if out.numel() > 0:
            penalty(logprobs, ref_logprobs, grad, estimator, out)
        return out

    return {
        "kl_divergence": kl_divergence,
        "kl_divergence_backward": kl_divergence_backward,
        # Only for the fused head; not an operator.
        "kl_divergence_backward_into": kl_divergence_backward_into,
        "kl_penalty": kl_penalty,
        "kl_penalty_backward": kl_penalty_backward,
    }
