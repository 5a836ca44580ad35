"""Arguments of the operations over an LM head that belong together.

`ops._operator` flattens them into the schema of an operator, field by field in this order.
"""

from typing import Annotated, NamedTuple

from torch import Tensor

from ..config.policy_codes import PolicyCodes, PolicyParams
from ..core.pair_options import PairOptions
from ..core.row_options import RowOptions


class Operands(NamedTuple):
    """What an LM head multiplies: hidden states [..., H] and weight [V, H]; bias [V], or None."""

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
    """What the gradients of log-probabilities are computed from.

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
    """How tokens are cut into products.

    chunk_tokens: of a chunk; 0 for the device's budget, negative where every product has exactly so
        many.
    kept_tokens: how many are kept, or more, as the caller knows it; negative to count them.
    """

    chunk_tokens: int
    kept_tokens: Annotated[int, "SymInt"]


class Divergence(NamedTuple):
    """What a divergence of two heads takes beside them: the mask [...], or None, and options."""

    mask: Tensor | None
    options: PairOptions
