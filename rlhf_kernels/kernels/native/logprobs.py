"""Launchers of token_logprobs for the native backends."""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor

from ...core import checks
from ...core.row_options import RowOptions
from .. import logprobs
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
    make_exec = b.exec_builder(extension)

    def forward(
        logits: Tensor,
        labels: Tensor,
        temperatures: Tensor | None,
        options: RowOptions,
        *results: Tensor | None,
    ) -> None:
        vocab, temperatures = logits.shape[-1], b.as_grid(temperatures, torch.float32)
        status = extension.token_logprobs(
            *b.grid(labels.shape),
            vocab,
            logits,
            labels,
            temperatures,
            options,
            *results,
            make_exec(logits, "token_logprobs", labels.numel(), vocab, logits.element_size()),
        )
        _raise(status, labels, temperatures, vocab)

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
        vocab, temperatures = logits.shape[-1], b.as_grid(temperatures, torch.float32)
        grad_logprobs = b.as_upstream(grad_logprobs)
        grad_entropy = b.as_upstream(grad_entropy)
        status = extension.token_logprobs_backward(
            *b.grid(labels.shape),
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

    return logprobs.launchers(forward, backward, extension.gpu)
