"""Launchers of token_logprobs for the native backends."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ...core import checks, env
from ...core.layout import fp32_like
from ...core.row_options import RowOptions
from ...core.sentinels import SHARD_IGNORED
from . import boundary as b


def _raise(
    status: tuple[int, int], labels: Tensor, temperatures: Tensor | None, vocab: int
) -> None:
    code, position = status
    if code == b.LABEL_OUT_OF_RANGE:
        raise checks.out_of_range("token_logprobs", position, labels, vocab)
    if code == b.BAD_TEMPERATURE:
        assert temperatures is not None  # the kernel read a bad one
        raise checks.bad_temperature("token_logprobs", position, temperatures)


def launchers(extension: ModuleType) -> dict[str, Callable[..., object]]:
    """Launchers by operator name, bound to an extension module."""
    make_exec, gpu = b.exec_builder(extension), extension.gpu

    def check(labels: Tensor, temperatures: Tensor | None, vocab: int, ignore_index: int) -> None:
        # CPU kernels validate the data themselves.
        if gpu and env.CHECK:
            keep = labels != ignore_index
            # Labels of a vocabulary shard were validated before.
            if ignore_index != SHARD_IGNORED:
                checks.labels_in_range("token_logprobs", labels, keep, vocab)
            checks.temperatures_positive("token_logprobs", temperatures, keep)

    def token_logprobs(
        logits: Tensor,
        labels: Tensor,
        temperatures: Tensor | None,
        options: RowOptions,
    ) -> tuple[Tensor, Tensor, Tensor]:
        shape, vocab = labels.shape, logits.shape[-1]
        logprobs = fp32_like(labels)
        entropies = torch.empty_like(logprobs) if options.entropy else logprobs.new_empty(0)
        stats = logprobs.new_empty(*shape, 3)
        if labels.numel() == 0:
            return logprobs, entropies, stats
        temperatures = b.as_grid(temperatures, torch.float32)
        check(labels, temperatures, vocab, options.ignore_index)
        status = extension.token_logprobs(
            *b.grid(shape),
            vocab,
            logits,
            labels,
            temperatures,
            options,
            logprobs,
            entropies if options.entropy else None,
            stats,
            make_exec(logits, "token_logprobs", labels.numel(), vocab, logits.element_size()),
        )
        _raise(status, labels, temperatures, vocab)
        return logprobs, entropies, stats

    def backward(
        out: Tensor,
        logits: Tensor,
        labels: Tensor,
        temperatures: Tensor | None,
        stats: Tensor,
        grad_logprobs: Tensor | None,
        grad_entropy: Tensor | None,
        options: RowOptions,
    ) -> None:
        if labels.numel() == 0:
            return
        shape, vocab = labels.shape, logits.shape[-1]
        temperatures = b.as_grid(temperatures, torch.float32)
        check(labels, temperatures, vocab, options.ignore_index)
        grad_logprobs = b.as_upstream(grad_logprobs)
        grad_entropy = b.as_upstream(grad_entropy)
        status = extension.token_logprobs_backward(
            *b.grid(shape),
            vocab,
            logits,
            labels,
            temperatures,
            options,
            stats,
            grad_logprobs,
            grad_entropy,
            out,
            make_exec(logits, "token_logprobs_backward", labels.numel()),
        )
        _raise(status, labels, temperatures, vocab)

    def token_logprobs_backward(logits: Tensor, labels: Tensor, *args: Any) -> Tensor:
        out = torch.empty_like(logits, memory_format=torch.contiguous_format)
        backward(out, logits, labels, *args)
        return out

    def token_logprobs_backward_inplace(logits: Tensor, labels: Tensor, *args: Any) -> None:
        backward(logits, logits, labels, *args)

    return {
        "token_logprobs": token_logprobs,
        "token_logprobs_backward": token_logprobs_backward,
        "token_logprobs_backward_inplace": token_logprobs_backward_inplace,
        # Only for the fused head; not an operator.
        "token_logprobs_backward_into": backward,
    }
