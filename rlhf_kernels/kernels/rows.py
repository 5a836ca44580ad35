"""Row kernels: what the head asks of a backend, as types."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from ..core.layout import Empty
from ..core.row_options import RowOptions

#: Sums a tensor over the ranks that share a vocabulary.
Reduce = Callable[[Tensor], Tensor]


class LabelRows(Protocol):
    """Kernels over rows of logits [N, V] and a label each, and over the log-probabilities.

    Statistics are what the backward needs of a row.
    """

    def token_logprobs(
        self, logits: Tensor, labels: Tensor, temperatures: Tensor | None, options: RowOptions, /
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(log-probabilities [N], entropies [N] or empty, statistics [N, 3])."""

    def token_logprobs_backward_inplace(
        self,
        logits: Tensor,
        labels: Tensor,
        temperatures: Tensor | None,
        stats: Tensor,
        grad_logprobs: Tensor | None,
        grad_entropy: Tensor | None,
        options: RowOptions,
        /,
    ) -> None:
        """Overwrites the logits by their gradient."""

    def policy_loss(
        self,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        ref_logprobs: Tensor | None,
        rollout_logprobs: Tensor | None,
        entropy: Tensor | None,
        cu_seqlens: Tensor | None,
        normalizer: Tensor | None,
        divisor: float,
        codes: Sequence[int],
        params: Sequence[float],
        grad: bool,
        entropy_grad: bool,
        /,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(loss, metrics, gradient of logprobs, of entropy, scale) of tokens [B, T] or [N]."""


class Rows(LabelRows, Protocol):
    """All row kernels of a backend; two are equal where they are one."""

    def __hash__(self) -> int: ...

    def kl_divergence(
        self, logits: Tensor, ref_logits: Tensor, temperature: float, reverse: bool, /
    ) -> tuple[Tensor, Tensor]:
        """(divergences [N], statistics [N, 5])."""

    def kl_divergence_backward_inplace(
        self,
        logits: Tensor,
        ref_logits: Tensor,
        stats: Tensor,
        grad: Tensor,
        temperature: float,
        reverse: bool,
        /,
    ) -> None:
        """Overwrites the logits by their gradient."""


class Kernels(NamedTuple):
    """What an algorithm over row kernels is given.

    rows: the kernels of a backend.
    empty: makes large buffers.
    reduce: where the columns here are a shard of the vocabulary, sums over its ranks; else None.
    """

    rows: Rows
    empty: Empty
    reduce: Reduce | None = None


class LabelKernels(NamedTuple):
    """The same without divergences, which no backend has over a sharded vocabulary."""

    rows: LabelRows
    empty: Empty
    reduce: Reduce | None = None
