"""Launchers of token_logprobs for the native backends."""

from collections.abc import Callable
from types import ModuleType

from torch import Tensor

from ...core import checks
from ...core.row_options import RowOptions
from .. import logprobs
from . import boundary as b


def _error(
    status: tuple[int, int], labels: Tensor, temperatures: Tensor | None, vocab: int
) -> Exception:
    code, position = status
    if code == b.LABEL_OUT_OF_RANGE:
        return checks.out_of_range("token_logprobs", position, labels, vocab)
    assert code == b.BAD_TEMPERATURE and temperatures is not None  # the kernel read a bad one
    return checks.bad_temperature("token_logprobs", position, temperatures)


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
        temperatures = b.as_fp32(temperatures)
        status = extension.token_logprobs(
            logits,
            labels,
            temperatures,
            options,
            *results,
            make_exec(
                logits,
                "token_logprobs",
                lambda: (labels.numel(), logits.shape[-1], logits.element_size()),
            ),
        )
        if status[0] != b.OK:
            raise _error(status, labels, temperatures, logits.shape[-1])

    def backward(
        out: Tensor,
        logits: Tensor,
        labels: Tensor,
        temperatures: Tensor | None,
        stats: Tensor,
        grad_logprobs: Tensor | None,
        grad_entropy: Tensor | None,
        options: RowOptions,
        grad_lse: Tensor | None = None,
        grad_collision: Tensor | None = None,
        collision: Tensor | None = None,
    ) -> None:
        temperatures = b.as_fp32(temperatures)
        grad_logprobs = b.as_upstream(grad_logprobs)
        grad_entropy = b.as_upstream(grad_entropy)
        grad_lse = b.as_upstream(grad_lse)
        grad_collision = b.as_upstream(grad_collision)
        status = extension.token_logprobs_backward(
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
            make_exec(logits, "token_logprobs_backward", lambda: (labels.numel(),)),
        )
        if status[0] != b.OK:
            raise _error(status, labels, temperatures, logits.shape[-1])

    return logprobs.launchers(forward, backward, extension.gpu)
