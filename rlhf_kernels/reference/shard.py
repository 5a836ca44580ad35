"""Reference over a vocabulary sharded over a process group, with differentiable collectives.

Every rank computes the same loss from the same replicated values, and gradients are those of this
one loss. A sum over the ranks therefore copies its gradient to each rank, and a tensor copied to
the ranks sums their gradients.
"""

from typing import Any

import torch
from torch import Tensor

from ..core import groups
from ..core.layout import any_of_token
from ..core.row_options import RowResults
from ._common import compute, per_row, with_options


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return groups.sum_(x.clone(memory_format=torch.contiguous_format), group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # _Summed and _Copied are each other's derivative, so second derivatives are right too.
        return _Copied.apply(grad, ctx.group), None


class _Copied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _Summed.apply(grad, ctx.group), None


def copied(x: Tensor, group: str) -> Tensor:
    """Replicated x as an operand of each rank's shard; its gradient is summed over the ranks."""
    result: Tensor = _Copied.apply(x, group)
    return result


def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    temperature: float | Tensor,
    entropy: bool,
    ignore_index: int,
    lse: bool,
    collision: bool,
    argmax: bool,
    group: str,
    **options: Any,
) -> RowResults:
    """`token_logprobs` of logits [..., V_rank]; labels count from rank 0's first column."""
    several, wanted = labels.dim() == logits.dim(), labels != ignore_index
    keep = any_of_token(wanted, logits.dim() - 1)
    z = with_options(torch.where(keep.unsqueeze(-1), compute(logits), 0), **options)
    # amax needs one column, but a shard may be empty.
    z = torch.nn.functional.pad(z, (0, 1), value=-torch.inf)
    top, rates = groups.maximum(z.detach().amax(-1), group), per_row(temperature, keep)
    d = (z - top.unsqueeze(-1)) / rates
    e = d.exp()
    # From here on only sums over the ranks are used, so results are the same on every rank.
    log_s = _Summed.apply(e.sum(-1), group).log()
    sizes = groups.gather(torch.tensor(logits.shape[-1], device=logits.device), group)
    rank = groups.rank(group)
    local = labels.long() - sizes[:rank].sum()
    owned = wanted & (local >= 0) & (local < sizes[rank])
    columns = torch.where(owned, local, 0)
    own = d.gather(-1, columns if several else columns.unsqueeze(-1))
    own = own if several else own.squeeze(-1)
    own = _Summed.apply(torch.where(owned, own, 0), group)
    logprobs = torch.where(wanted, own - (log_s.unsqueeze(-1) if several else log_s), 0)
    of_entropy = of_lse = squares = ids = None
    if entropy:
        # The limit of d e^d at d = -inf is 0; the product would be NaN.
        weighted = _Summed.apply((e * torch.where(e > 0, d, 0)).sum(-1), group)
        of_entropy = torch.where(keep, log_s - weighted / log_s.exp(), 0)
    if lse:
        scaled = (top.unsqueeze(-1) / rates).squeeze(-1)
        of_lse = torch.where(keep, log_s + scaled, 0)
    if collision:
        sums = _Summed.apply(e.square().sum(-1), group)
        squares = torch.where(keep, sums / (2 * log_s).exp(), 0)
    if argmax:
        ids = torch.where(keep, _first_of_largest(logits, sizes, rank, group), -1)
    return RowResults(logprobs, of_entropy, squares, of_lse, ids)


def _first_of_largest(logits: Tensor, sizes: Tensor, rank: int, group: str) -> Tensor:
    """The id [...] of the first of the largest logits of all ranks; of the first NaN if any."""
    # Padded, as a shard may be empty.
    x = torch.nn.functional.pad(compute(logits.detach()), (0, 1), value=-torch.inf)
    nan = x.isnan()
    some = groups.maximum(nan.any(-1).float(), group).unsqueeze(-1) > 0
    top = groups.maximum(torch.where(nan, -torch.inf, x).amax(-1), group).unsqueeze(-1)
    hit = torch.where(some, nan, x == top)
    first, total = sizes[:rank].sum(), sizes.sum()
    ids = torch.arange(x.shape[-1], device=x.device) + first
    hit = hit & (ids < first + sizes[rank])
    # fp64 holds ids exactly; their smallest is the largest of their negatives.
    own = torch.where(hit, ids, total).amin(-1)
    return -groups.maximum(-own.double(), group).long()
