"""Shared by the native and Triton launchers of token_logprobs: results, checks and outputs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..core import checks, env
from ..core.layout import fp32_like
from ..core.row_options import RowOptions
from ..core.sentinels import SHARD_IGNORED


def results(labels: Tensor, options: RowOptions) -> tuple[Tensor, Tensor | None]:
    """Memory for log-probabilities [...], and entropies [...] if wanted, fp32."""
    logprobs = fp32_like(labels)
    return logprobs, torch.empty_like(logprobs) if options.entropy else None


def statistics(logprobs: Tensor) -> Tensor:
    """Memory for the statistics [..., 3] that go with log-probabilities [...]."""
    return logprobs.new_empty(*logprobs.shape, 3)


def further_results(logprobs: Tensor, options: RowOptions) -> tuple[Tensor | None, Tensor | None]:
    """Memory for sums of squared probabilities, fp32, and for most likely tokens, int64."""
    collisions = torch.empty_like(logprobs) if options.collision else None
    return collisions, logprobs.new_empty(
        logprobs.shape, dtype=torch.int64
    ) if options.argmax else None


def log_sum_exp(
    labels: Tensor, temperatures: Tensor | None, stats: Tensor, options: RowOptions
) -> Tensor:
    """log sum_j exp(z_j) of rows [...], fp32, from their statistics [..., 3]; 0 where ignored."""
    # Their product may be far above the distances that the statistics are sums of.
    m, s, _ = stats.double().unbind(-1)
    scaled = m / (options.temperature if temperatures is None else temperatures.float().double())
    return torch.where(labels == options.ignore_index, 0.0, scaled + s.log()).float()


def launchers(
    forward: Callable[..., None], backward: Callable[..., None], on_device: bool
) -> dict[str, Callable[..., object]]:
    """Launchers by operator name, from the functions of a backend that launch its kernels.

    `forward` takes logits, labels, temperatures and options, and writes its last arguments: the
    log-probabilities, the entropies or None, and the statistics, which are None only where the
    kernels are not `on_device` and no backward pass will need them, the sums of squared
    probabilities or None, and the most likely tokens or None. `backward` takes what
    `token_logprobs_backward_into` takes. Neither is called without a token. Kernels that are not
    `on_device` validate the data themselves.
    """

    def check(labels: Tensor, temperatures: Tensor | None, vocab: int, options: RowOptions) -> None:
        """Raises for bad data on a GPU with RLHF_KERNELS_CHECK=1."""
        if on_device and env.CHECK:
            keep = labels != options.ignore_index
            # Labels of a vocabulary shard were validated before.
            if options.ignore_index != SHARD_IGNORED:
                checks.labels_in_range("token_logprobs", labels, keep, vocab)
            checks.temperatures_positive("token_logprobs", temperatures, keep)

    def token_logprobs(
        logits: Tensor,
        labels: Tensor,
        temperatures: Tensor | None,
        options: RowOptions,
        grad: bool = True,
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        logprobs, entropies = results(labels, options)
        stats = statistics(logprobs) if grad or on_device else None
        further = further_results(logprobs, options)
        if labels.numel() > 0:
            check(labels, temperatures, logits.shape[-1], options)
            forward(logits, labels, temperatures, options, logprobs, entropies, stats, *further)
        return logprobs, entropies, stats, *further

    def token_logprobs_backward_into(
        out: Tensor,
        logits: Tensor,
        labels: Tensor,
        temperatures: Tensor | None,
        stats: Tensor,
        grad_logprobs: Tensor | None,
        grad_entropy: Tensor | None,
        options: RowOptions,
        *further: Tensor | None,
    ) -> None:
        if out.numel() > 0:
            check(labels, temperatures, logits.shape[-1], options)
            upstream = (grad_logprobs, grad_entropy, options, *further)
            backward(out, logits, labels, temperatures, stats, *upstream)

    def token_logprobs_backward(logits: Tensor, labels: Tensor, *args: Any) -> Tensor:
        out = torch.empty_like(logits, memory_format=torch.contiguous_format)
        token_logprobs_backward_into(out, logits, labels, *args)
        return out

    def token_logprobs_backward_inplace(logits: Tensor, labels: Tensor, *args: Any) -> None:
        token_logprobs_backward_into(logits, logits, labels, *args)

    return {
        "token_logprobs": token_logprobs,
        "token_logprobs_backward": token_logprobs_backward,
        "token_logprobs_backward_inplace": token_logprobs_backward_inplace,
        # Only for the fused head; not an operator.
        "token_logprobs_backward_into": token_logprobs_backward_into,
    }
