"""Shared by the native and Triton launchers of kl_divergence and kl_penalty: results, outputs."""

from collections.abc import Callable
from typing import TypedDict

import torch
from torch import Tensor

from ..core.pair_options import PairOptions
from .rows import Maybe

BackwardInto = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, PairOptions], None]


class Launchers(TypedDict, total=False):
    """By operator name."""

    kl_divergence: Callable[[Tensor, Tensor, PairOptions], tuple[Tensor, Tensor, Maybe]]
    kl_divergence_backward: Callable[[Tensor, Tensor, Tensor, Tensor, PairOptions], Tensor]
    # Only for the fused head; not an operator.
    kl_divergence_backward_into: BackwardInto
    kl_penalty: Callable[[Tensor, Tensor, str], Tensor]
    kl_penalty_backward: Callable[[Tensor, Tensor, Tensor, str], Tensor]


def launchers(
    forward: Callable[[Tensor, Tensor, PairOptions, Tensor, Tensor, Maybe], None],
    backward: BackwardInto,
    penalty: Callable[[Tensor, Tensor, Maybe, str, Tensor], None],
) -> Launchers:
    """Launchers from the functions of a backend that launch its kernels.

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

    def kl_divergence_backward(
        logits: Tensor, ref_logits: Tensor, stats: Tensor, grad: Tensor, options: PairOptions
    ) -> Tensor:
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
        kl_divergence_backward_into(out, logits, ref_logits, stats, grad, options)
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
        "kl_divergence_backward_into": kl_divergence_backward_into,
        "kl_penalty": kl_penalty,
        "kl_penalty_backward": kl_penalty_backward,
    }
