"""Arguments of the operations over an LM head that belong together.

`ops._operator` flattens them into the schema of an operator, field by field in this order.
"""

from typing import Annotated, NamedTuple

from torch import Tensor

from ..config.policy_codes import PolicyCodes, PolicyParams
from ..core.pair_options import PairOptions
from ..core.row_options import RowOptions


class Operands(NamedTuple):
    """Hidden states [..., H], the weight [V, H] of an LM head, and its bias [V] or None."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


class Targets(NamedTuple):
    """Labels [...] of hidden states [..., H], and the options of their rows of logits.

    temperatures: one per token [...], or None for the temperature of the options.
    """

    labels: Tensor
    temperatures: Tensor | None
    options: RowOptions


class Upstream(NamedTuple):
    """Statistics of a forward pass, and the upstream gradients of its results.

    stats: statistics of the rows, fp32 [..., 3].
    collisions: sums of the squared probabilities [...], where these are wanted.
    grad_logprobs and the like: upstream gradients [...]; None counts as zero.
    """

    stats: Tensor
    collisions: Tensor | None
    grad_logprobs: Tensor | None
    grad_entropy: Tensor | None
    grad_lse: Tensor | None
    grad_collision: Tensor | None


class PolicyArguments(NamedTuple):
    """Arguments of a policy loss beside the log-probabilities, as `policy_loss` has them.

    old_logprobs: None for the policy's own.
    normalizer, divisor: the aggregation divides by the tensor or the number; None and 0 for the
        count that it implies.
    """

    old_logprobs: Tensor | None
    advantages: Tensor
    mask: Tensor
    ref_logprobs: Tensor | None
    rollout_logprobs: Tensor | None
    weights: Tensor | None
    cu_seqlens: Tensor | None
    normalizer: Tensor | None
    divisor: float
    codes: PolicyCodes
    params: PolicyParams

    @property
    def entropy_bonus(self) -> bool:
        """Whether the loss has a term of the entropies."""
        return self.params.entropy_coef != 0


class Batching(NamedTuple):
    """How tokens are cut into products, in two integers: all that a schema gets.

    The algorithms read the properties.
    """

    chunk_tokens: int
    kept_tokens: Annotated[int, "SymInt"]

    @classmethod
    def of(cls, tokens: int | None, kept: int | None, *, exact: bool) -> "Batching":
        """Chunks of `tokens`, or of what the device's budget holds; `kept` tokens, or counted."""
        return cls((-1 if exact else 1) * (tokens or 0), -1 if kept is None else kept)

    @property
    def tokens(self) -> int | None:
        """Tokens of a chunk; None for what the device's budget holds."""
        return abs(self.chunk_tokens) or None

    @property
    def exact(self) -> bool:
        """Whether every product has exactly so many tokens."""
        return self.chunk_tokens < 0

    @property
    def kept(self) -> int | None:
        """How many tokens are kept, or more, as the caller knows it; None to count them."""
        return None if self.kept_tokens < 0 else self.kept_tokens


class Divergence(NamedTuple):
    """The mask [...] of a divergence of two heads, or None, and its options."""

    mask: Tensor | None
    options: PairOptions
