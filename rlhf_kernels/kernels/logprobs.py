"""Shared by the native and Triton launchers of token_logprobs: results, checks and outputs."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypedDict

import torch
from torch import Tensor

from ..core import data_checks, env
from ..core.layout import any_of_token, as_upstream, fp32_like
from ..core.row_options import RowOptions
from ..core.sentinels import ELSEWHERE, NOWHERE, SHARD_IGNORED
from .rows import LabelResults, Maybe


class _Forward(Protocol):
    def __call__(
        self, logits: Tensor, labels: Tensor, temperatures: Maybe, options: RowOptions,
        grad: bool = True, /,
    ) -> LabelResults: ...  # fmt: skip


class _BackwardInto(Protocol):
    def __call__(
        self, out: Tensor, logits: Tensor, labels: Tensor, temperatures: Maybe, stats: Tensor,
        grad_logprobs: Maybe, grad_entropy: Maybe, options: RowOptions,
        grad_lse: Maybe = None, grad_collision: Maybe = None, collision: Maybe = None, /,
    ) -> None: ...  # fmt: skip


class Launchers(TypedDict, total=False):
    """By operator name."""

    token_logprobs: _Forward
    token_logprobs_backward: Callable[
        [Tensor, Tensor, Maybe, Tensor, Maybe, Maybe, RowOptions, Maybe, Maybe, Maybe], Tensor
    ]
    token_logprobs_backward_inplace: Callable[
        [Tensor, Tensor, Maybe, Tensor, Maybe, Maybe, RowOptions, Maybe, Maybe, Maybe], None
    ]
    # Only for the fused head; not an operator.
    token_logprobs_backward_into: _BackwardInto


class ManyLabels(NamedTuple):
    """K labels per token, beside a label of each token of `tokens_of`.

    labels: [..., K].
    ignore_index: of these labels.
    logprobs: fp32 [..., K], which a forward pass writes; None for a backward pass.
    grad_logprobs: upstream gradient [..., K] of a backward pass, or None.
    """

    labels: Tensor
    ignore_index: int
    logprobs: Tensor | None = None
    grad_logprobs: Tensor | None = None

    def total(self) -> Tensor | None:
        """The sum of each token's upstream gradients [...], fp32."""
        if self.grad_logprobs is None:
            return None
        kept = torch.where(self.labels == self.ignore_index, 0.0, self.grad_logprobs)
        return kept.sum(-1, dtype=torch.float64).float()


_ForwardKernel = Callable[
    [Tensor, Tensor, Maybe, RowOptions, ManyLabels | None, Tensor, Maybe, Maybe, Maybe, Maybe], None
]
_BackwardKernel = Callable[
    [Tensor, Tensor, Tensor, Maybe, Tensor, Maybe, Maybe, RowOptions, Maybe, Maybe, Maybe,
     ManyLabels | None], None,
]  # fmt: skip


def tokens_of(labels: Tensor, options: RowOptions, vocab: int | None) -> tuple[Tensor, RowOptions]:
    """One label per token for labels [..., K], with which a kernel sums the token's row once.

    Returns:
        Labels [...], int64, and the options with the label that skips a token. A row is skipped
        where all K labels are. Where `vocab` is given and one of K lies outside, the row becomes
        NaN.
    """
    keep = labels != options.ignore_index
    found = torch.where(keep.any(-1), ELSEWHERE, SHARD_IGNORED)
    if vocab is not None:
        known = (labels >= 0) & (labels < vocab)
        if options.ignore_index == SHARD_IGNORED:
            known |= labels == ELSEWHERE
        found = torch.where((keep & ~known).any(-1), NOWHERE, found)
    return found, options._replace(ignore_index=SHARD_IGNORED)


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


def launchers(forward: _ForwardKernel, backward: _BackwardKernel, on_device: bool) -> Launchers:
    """Launchers from the functions of a backend that launch its kernels.

    `forward` takes logits, labels, temperatures, options and `ManyLabels`, and writes its last
    arguments: the log-probabilities, the entropies or None, and the statistics, which are None only
    where the kernels are not `on_device` and no backward pass will need them, the sums of squared
    probabilities or None, and the most likely tokens or None. `backward` takes what
    `token_logprobs_backward_into` takes, and `ManyLabels`. Neither is called without a token.
    Kernels that are not `on_device` validate the data themselves. Labels [..., K] of logits
    [..., V] are `ManyLabels`; the labels are then those of `tokens_of`, and the log-probabilities
    and the upstream gradient those of tokens.
    """

    def check(labels: Tensor, temperatures: Tensor | None, vocab: int, options: RowOptions) -> None:
        """Raises for bad data on a GPU with RLHF_KERNELS_CHECK=1."""
        if on_device and env.CHECK:
            keep = labels != options.ignore_index
            # Labels of a vocabulary shard were validated before.
            if options.ignore_index != SHARD_IGNORED:
                data_checks.labels_in_range("token_logprobs", labels, keep, vocab)
            if temperatures is not None:
                keep = any_of_token(keep, temperatures.dim())
            data_checks.temperatures_positive("token_logprobs", temperatures, keep)

    def token_logprobs(
        logits: Tensor,
        labels: Tensor,
        temperatures: Tensor | None,
        options: RowOptions,
        grad: bool = True,
    ) -> LabelResults:
        given, of_rows, many = labels, options, None
        if labels.dim() == logits.dim():
            given, of_rows = tokens_of(labels, options, logits.shape[-1] if on_device else None)
            many = ManyLabels(labels, options.ignore_index, fp32_like(labels))
        logprobs, entropies = results(given, of_rows)
        stats = statistics(logprobs) if grad or on_device else None
        further = further_results(logprobs, of_rows)
        if labels.numel() > 0:
            check(labels, temperatures, logits.shape[-1], options)
            outs = (logprobs, entropies, stats, *further)
            forward(logits, given, temperatures, of_rows, many, *outs)
        if many is not None and many.logprobs is not None:
            logprobs = many.logprobs
        return LabelResults(logprobs, entropies, stats, *further)

    def token_logprobs_backward_into(
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
        if out.numel() > 0:
            check(labels, temperatures, logits.shape[-1], options)
            many = None
            if labels.dim() == logits.dim():
                many = ManyLabels(labels, options.ignore_index, None, as_upstream(grad_logprobs))
                grad_logprobs = many.total()
                # A bad label has left its row NaN statistics.
                labels, options = tokens_of(labels, options, None)
            upstream = (grad_logprobs, grad_entropy, options, grad_lse, grad_collision)
            backward(out, logits, labels, temperatures, stats, *upstream, collision, many)

    # Their arguments stand in `Launchers`; here they are only passed on.
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
        "token_logprobs_backward_into": token_logprobs_backward_into,
    }
