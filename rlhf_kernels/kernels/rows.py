"""Row kernels: the types of the kernels that the head needs from a backend."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..config.policy_codes import PolicyCodes, PolicyParams
from ..core.layout import Memory
from ..core.pair_options import PairOptions
from ..core.row_options import RowOptions

#: A tensor that may be absent.
Maybe = Tensor | None

#: Sums a tensor over the ranks of a sharded vocabulary.
Reduce = Callable[[Tensor], Tensor]


class TokenConstants(NamedTuple):
    """The constants of tokens [N] in a policy loss.

    old_logprobs: None where they are the log-probabilities themselves.
    weights: the weight of each token in the loss, fp32.
    """

    old_logprobs: Tensor | None
    advantages: Tensor
    ref_logprobs: Tensor | None
    rollout_logprobs: Tensor | None
    weights: Tensor


class PolicyTokens(NamedTuple):
    """All that a policy loss of tokens [B, T], or packed [N] with cu_seqlens, is computed from.

    advantages, weights: one per token, or one per sequence.
    entropy: of the tokens; None for a loss and metrics without it.
    normalizer, divisor: the aggregation divides by the tensor or the number; None and 0 for the
        count that it implies.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    ref_logprobs: Tensor | None
    rollout_logprobs: Tensor | None
    entropy: Tensor | None
    weights: Tensor | None
    cu_seqlens: Tensor | None
    normalizer: Tensor | None
    divisor: float
    codes: PolicyCodes
    params: PolicyParams


class LossResults(NamedTuple):
    """Results of a policy loss, fp32.

    loss, metrics: 0-d, and one number for each of POLICY_METRICS.
    of_logprobs, of_entropy: gradients in the tokens' shape; None where not asked for.
    scale: what these are still to be multiplied by; see kernels/losses.py.
    """

    loss: Tensor
    metrics: Tensor
    of_logprobs: Tensor | None
    of_entropy: Tensor | None
    scale: Tensor | None


class PolicyLoss(Protocol):
    """A kernel from tokens to their loss, and to the gradients that are asked for."""

    def __call__(self, given: PolicyTokens, grad: bool, entropy_grad: bool, /) -> LossResults: ...


class PolicyRows(Protocol):
    """A kernel from logits to the gradient of a policy loss in which no token needs another."""

    def __call__(
        self,
        out: Tensor,
        logits: Tensor,
        labels: Tensor,
        temperatures: Tensor | None,
        options: RowOptions,
        constants: TokenConstants,
        codes: PolicyCodes,
        params: PolicyParams,
        /,
    ) -> tuple[Tensor, Tensor]:
        """(log-probabilities [N], entropies [N]) of fp32 logits [N, V]; writes their gradient.

        The same bits as those of token_logprobs, policy_loss and token_logprobs_backward_into. A
        label of ignore_index masks its token. `out` may be the logits, or bfloat16.
        """


class LabelResults(NamedTuple):
    """Results of rows of logits [..., V] for their labels [...] or [..., K]; fp32 but `argmax`.

    logprobs: like the labels.
    entropy: [...], or None where the options do not ask for it.
    stats: [..., 3], for the backward pass; None, which its type hides, if the caller needs none.
    collision: sums of squared probabilities [...], or None.
    argmax: the most likely tokens [...], int64, or None.
    """

    logprobs: Tensor
    entropy: Tensor | None
    stats: Tensor | Any
    collision: Tensor | None
    argmax: Tensor | None


class LabelRows(Protocol):
    """Kernels over rows of logits [N, V] with one label each, and over log-probabilities."""

    def token_logprobs(
        self, logits: Tensor, labels: Tensor, temperatures: Tensor | None, options: RowOptions, /
    ) -> LabelResults: ...

    def token_logprobs_backward_into(
        self,
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
        /,
    ) -> None:
        """Writes the gradient of the logits to `out`, which may be the logits.

        On a GPU `out` may also be bfloat16 where they are fp32.
        """

    @property
    def policy_loss(self) -> PolicyLoss:
        """The loss of the tokens, as of the operator."""

    def policy_rows_for(
        self, device: torch.device, vocab: int, options: RowOptions, /
    ) -> PolicyRows | None:
        """The one kernel, where it takes less time than the three that it replaces; else None."""


class Rows(LabelRows, Protocol):
    """All row kernels of a backend; hashed and compared by identity."""

    def __hash__(self) -> int: ...

    def scale_inplace(self, values: Tensor, factor: Tensor, /) -> Tensor:
        """values [...], multiplied by the fp32 0-d factor where they lie."""

    def kl_divergence(
        self, logits: Tensor, ref_logits: Tensor, options: PairOptions, /
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(divergences [N], statistics [N, 5], the policy's entropies [N] or None)."""

    def kl_divergence_backward_into(
        self,
        out: Tensor,
        logits: Tensor,
        ref_logits: Tensor,
        stats: Tensor,
        grad: Tensor,
        options: PairOptions,
        /,
    ) -> None:
        """Writes the gradient of the logits to `out`, which may be the logits.

        On a GPU `out` may also be bfloat16 where they are fp32.
        """


class Kernels(NamedTuple):
    """The first argument of an algorithm over row kernels.

    rows: the kernels of a backend.
    memory: allocates and moves large buffers.
    reduce: sums over the ranks of a sharded vocabulary; None for a whole vocabulary.
    """

    rows: Rows
    memory: Memory
    reduce: Reduce | None = None


class LabelKernels(NamedTuple):
    """`Kernels` without divergences, which no backend offers over a sharded vocabulary."""

    rows: LabelRows
    memory: Memory
    reduce: Reduce | None = None
