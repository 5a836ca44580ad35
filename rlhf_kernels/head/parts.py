"""Results of rows whose vocabulary is in parts: shards of a group's ranks, or blocks of columns.

Each part reduces its own columns to (m, s, log p(y), mean): maximum, sum of e = exp((z - m) / T),
log-probability of the label among these columns and mean of (z - m) / T over them. With P the share
of a part, log p(y) = log P + log p(y | part), and the mean over all, whose distance to log s is the
entropy, is sum P (mean_part + its distance to the common maximum): neither cancels. Sums are in the
order of the parts, in fp64. Parts may differ in size, and be empty.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.layout import any_of_token
from ..kernels.rows import LabelResults
from .arguments import Targets


class Parts(NamedTuple):
    """What parts [R] of a vocabulary know of their rows [...].

    stats: m, s, mean, [R, ..., 3].
    logprobs: [R, ...], or [R, ..., K] of several labels; +inf where another part has the label.
    collisions: sums of squared probabilities [R, ...], or None.
    ids, largest: most likely tokens in the whole vocabulary, int64, negative where there is none,
        and their logits without cap and temperature [R, ...]; or None.
    """

    stats: Tensor
    logprobs: Tensor
    collisions: Tensor | None
    ids: Tensor | None
    largest: Tensor | None

    @classmethod
    def stack(cls, parts: "Sequence[Parts]") -> "Parts":
        """Of what each part knows, without the dimension R."""

        def stacked(own: tuple[Tensor | None, ...]) -> Tensor | None:
            given = [t for t in own if t is not None]
            return torch.stack(given) if given else None

        stats, logprobs, *further = zip(*parts, strict=True)
        return cls(torch.stack(stats), torch.stack(logprobs), *map(stacked, further))


def merged(parts: Parts, wanted: Tensor, targets: Targets) -> LabelResults:
    """Results over the whole vocabulary.

    Args:
        parts: of any floating dtype.
        wanted: which labels are not ignored, bool, like them. A sentinel is compared in int64.
        targets: temperatures and options are read: the temperature of all tokens where none are
            given; whether entropies are wanted, and the mean is one.
    """
    _, temperatures, options = targets
    m, s, mean = parts.stats.double().unbind(-1)
    own = parts.logprobs.double()
    several = own.dim() > m.dim()
    rate = (
        1.0 / options.temperature if temperatures is None else 1.0 / temperatures.float().double()
    )

    # Nothing but -inf here.
    empty = m == -torch.inf
    # A NaN reaches the sums; the maximum is that of the others, as in a row that is whole.
    top = torch.where(m.isnan(), -torch.inf, m).amax(0)
    shift = (m - top) * rate
    total = _ordered_sum(torch.where(empty, 0.0, s * shift.exp()))
    total = torch.where(top == -torch.inf, torch.nan, total)
    log_share = torch.where(empty, -torch.inf, s.log() + shift) - total.log()
    share = log_share.exp()
    mean = _ordered_sum(torch.where(share == 0.0, 0.0, share * (mean + shift)))
    of_parts = [t.unsqueeze(-1) if several else t for t in (empty, log_share)]
    own = torch.where(own == torch.inf, 0.0, torch.where(of_parts[0], 0.0, own) + of_parts[1])

    found = torch.where(wanted, _ordered_sum(own), 0.0).float()
    kept = any_of_token(wanted, top.dim())
    h = torch.where(kept, total.log() - mean, 0.0).float() if options.entropy else None
    of_all = [torch.where(kept, x, other) for x, other in ((top, 0.0), (total, 1.0), (mean, 0.0))]
    collisions = None
    if parts.collisions is not None:
        squares = share.square() * parts.collisions.double()
        squares = torch.where(share == 0.0, 0.0, squares)
        collisions = torch.where(kept, _ordered_sum(squares), 0.0).float()
    ids = None
    if parts.ids is not None and parts.largest is not None:
        # In this order: NaN, infinity, numbers.
        order = parts.largest.double().clamp(-1e300, 1e300).nan_to_num(nan=torch.inf)
        ids = _first_of_largest(order, parts.ids)
    return LabelResults(found, h, torch.stack(of_all, -1).float(), collisions, ids)


def logit_of(logits: Tensor, ids: Tensor) -> Tensor:
    """The logit of each id [...], fp32, from logits [..., V]; -inf for a negative id or V = 0."""
    if logits.shape[-1] == 0:
        return torch.full(ids.shape, -torch.inf, device=ids.device)
    found = logits.gather(-1, ids.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(ids < 0, -torch.inf, found.float())


def _first_of_largest(order: Tensor, ids: Tensor) -> Tensor:
    """The id [...] of the part whose entry of `order` [R, ...] is largest; of such the first.

    Parts with a negative id take no part.
    """
    best, found = torch.full_like(order[0], -torch.inf), torch.full_like(ids[0], -1)
    for of_part, own in zip(order.unbind(), ids.unbind(), strict=True):
        better = (of_part > best) & (own >= 0)
        best, found = torch.where(better, of_part, best), torch.where(better, own, found)
    return found


def _ordered_sum(of_parts: Tensor) -> Tensor:
    return functools.reduce(torch.add, of_parts.unbind())
