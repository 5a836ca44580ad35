"""Launchers of token_logprobs for the native backends."""

from types import ModuleType
from typing import Any

from torch import Tensor

from ...core import data_checks
from ...core.row_options import RowOptions
from .. import logprobs
from ..logprobs import ManyLabels
from . import boundary as b


def _error(
    status: tuple[int, int],
    labels: Tensor,
    temperatures: Tensor | None,
    vocab: int,
    many: ManyLabels | None,
) -> Exception:
    code, position = status
    if code == b.LABEL_OUT_OF_RANGE:
        labels = labels if many is None else many.labels
        return data_checks.out_of_range("token_logprobs", position, labels, vocab)
    if code == b.OUT_OF_MEMORY and many is not None:
        return MemoryError(f"token_logprobs: no memory for {many.labels.numel()} labels' gradients")
    assert code == b.BAD_TEMPERATURE and temperatures is not None  # the kernel read a bad one
    return data_checks.bad_temperature("token_logprobs", position, temperatures)


def launchers(extension: ModuleType) -> logprobs.Launchers:
    """Launchers bound to an extension module."""
    make_exec = b.exec_builder(extension)

    def forward(
        logits: Tensor,
        labels: Tensor,
        temperatures: Tensor | None,
        options: RowOptions,
        many: ManyLabels | None,
        *results: Tensor | None,
    ) -> None:
        temperatures = b.as_fp32(temperatures)
        launch = extension.token_logprobs
        of_labels: tuple[Any, ...] = ()
        if many is not None:
            launch = extension.many_logprobs
            of_labels = (many.labels, many.ignore_index, many.logprobs)
        status = launch(
            logits,
            labels,
            temperatures,
            options,
            *results,
            *of_labels,
            make_exec(
                logits,
                "token_logprobs",
                lambda: (labels.numel(), logits.shape[-1], logits.element_size()),
            ),
        )
        if status[0] != b.OK:
            raise _error(status, labels, temperatures, logits.shape[-1], many)

    def backward(
        out: Tensor,
        logits: Tensor,
        labels: Tensor,
        temperatures: Tensor | None,
        stats: Tensor,
        grad_logprobs: Tensor | None,
        grad_entropy: Tensor | None,
        options: RowOptions,
        grad_lse: Tensor | None,
        grad_collision: Tensor | None,
        collision: Tensor | None,
        many: ManyLabels | None,
    ) -> None:
        temperatures = b.as_fp32(temperatures)
        grad_logprobs = b.as_upstream(grad_logprobs)
        grad_entropy = b.as_upstream(grad_entropy)
        grad_lse = b.as_upstream(grad_lse)
        grad_collision = b.as_upstream(grad_collision)
        launch = extension.token_logprobs_backward
        op = "token_logprobs_backward"
        sizes: tuple[int, ...] = (labels.numel(),)
        of_labels: tuple[Any, ...] = ()
        if many is not None:
            launch = extension.many_logprobs_backward
            of_labels = (many.labels, many.ignore_index, many.grad_logprobs)
            op, sizes = "many_logprobs_backward", (labels.numel(), many.labels.shape[-1])
        status = launch(
            logits,
            labels,
            temperatures,
            options,
            stats,
            grad_logprobs,
            grad_entropy,
            grad_lse,
            grad_collision,
            collision,
            out,
            *of_labels,
            make_exec(logits, op, lambda: sizes),
        )
        if status[0] != b.OK:
            raise _error(status, labels, temperatures, logits.shape[-1], many)

    return logprobs.launchers(forward, backward, extension.gpu)
