"""Row kernels over a vocabulary that is sharded over the ranks of a process group.

Each rank reduces its own columns. The results are gathered and merged in the order of the ranks
(head/parts.py), so that all ranks hold the same bits. Shards may differ in size, and be empty.

Labels and everything else per token are replicated; the ranks compare what they were given before
they begin, so that one rank's mistake raises on every rank instead of leaving the others waiting.
"""

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import data_checks, groups, temperature_rules
from ..core.layout import Memory, any_of_token
from ..core.row_options import RowOptions
from ..core.sentinels import ELSEWHERE, NOWHERE, SHARD_IGNORED
from ..kernels.rows import Kernels, LabelKernels, LabelResults, Rows
from . import logprobs
from . import policy as policy_loss
from .arguments import Batching, Operands, PolicyArguments, Targets
from .parts import Parts, logit_of, merged


class Shards(NamedTuple):
    """Columns of each rank, int64 [ranks], and which of them is this one."""

    sizes: Tensor
    rank: int

    @property
    def first(self) -> Tensor:
        """This rank's first column."""
        return self.sizes[: self.rank].sum()

    def localized(self, labels: Tensor, keep: Tensor) -> Tensor:
        """Labels as columns of this shard, ELSEWHERE, or SHARD_IGNORED where `keep` is false."""
        local = labels.long() - self.first
        owned = (local >= 0) & (local < self.sizes[self.rank])
        known = (labels >= 0) & (labels < self.sizes.sum())
        local = torch.where(owned, local, torch.where(known, ELSEWHERE, NOWHERE))
        return torch.where(keep, local, SHARD_IGNORED)


# Fields of the metadata that the ranks exchange before any work.
_FIELDS = ("vocab", "tokens", "checksum", "low", "low_at", "high", "high_at", "temperature_at")


def exchange_metadata(
    op: str,
    vocab: int,
    labels: Tensor,
    temperatures: float | Tensor | None,
    keep: Tensor,
    group: str,
) -> Shards:
    """Gathers the shards of all ranks; checks labels and temperatures where the host may read.

    Raises:
        IndexError: a label outside the whole vocabulary on any rank; so on every rank.
        ValueError: likewise a bad temperature, labels that are not the same on every rank, or
            shards that are all empty.
    """
    readable = data_checks.can_read_on_host(labels)
    metadata = torch.full((len(_FIELDS),), vocab, dtype=torch.int64, device=labels.device)
    if readable:
        metadata[1:] = metadata.new_tensor(_summary(labels, temperatures, keep))
    metadata = groups.gather(metadata, group)
    if readable:
        _check(op, [dict(zip(_FIELDS, row, strict=True)) for row in metadata.tolist()])
    return Shards(metadata[:, 0], groups.rank(group))


def _summary(labels: Tensor, temperatures: float | Tensor | None, keep: Tensor) -> list[int]:
    """The fields of a rank after its vocabulary."""
    kept = torch.where(keep, labels, 0).reshape(-1).long()
    count = kept.numel()
    if count == 0:
        return [0, 0, 0, 0, 0, 0, -1]
    place = torch.arange(1, count + 1, device=kept.device)
    # Wraps around.
    checksum = ((kept + 1) * keep.reshape(-1) * place).sum()
    low, high = kept.argmin(), kept.argmax()
    bad = torch.zeros_like(keep)
    if isinstance(temperatures, Tensor):
        bad = temperature_rules.bad(temperatures) & any_of_token(keep, temperatures.dim())
    bad = bad.reshape(-1).nonzero()
    first_bad = int(bad[0]) if bad.numel() else -1
    ends = [int(kept[low]), int(low), int(kept[high]), int(high)]
    return [count, int(checksum), *ends, first_bad]


def _check(op: str, metadata: list[dict[str, int]]) -> None:
    total = sum(t["vocab"] for t in metadata)
    if total == 0:
        raise ValueError(f"{op}: every rank's shard of the vocabulary is empty")
    for rank, t in enumerate(metadata):
        for end in ("low", "high"):
            if not 0 <= t[end] < total:
                raise IndexError(
                    f"{op}: label at flat position {t[end + '_at']} on rank {rank} is {t[end]}; "
                    f"expected 0 <= label < {total}, the vocabulary of all ranks, or ignore_index"
                )
        if t["temperature_at"] >= 0:
            raise temperature_rules.error(op, t["temperature_at"], where=f" on rank {rank}")
        for field in ("tokens", "checksum"):
            if t[field] != metadata[0][field]:
                raise ValueError(
                    f"{op}: labels must be the same on every rank of group; those of rank {rank} "
                    f"({t['tokens']}) are not those of rank 0 ({metadata[0]['tokens']})"
                )


class ShardResults(NamedTuple):
    """`LabelResults` over all shards, and the labels as columns of this one: int64, like them."""

    logprobs: Tensor
    entropy: Tensor | None
    stats: Tensor
    collision: Tensor | None
    argmax: Tensor | None
    local: Tensor

    @property
    def rows(self) -> LabelResults:
        # By name: torch.compile of torch 2.6 cannot slice a named tuple.
        return LabelResults(self.logprobs, self.entropy, self.stats, self.collision, self.argmax)


class MostLikely(NamedTuple):
    """The most likely tokens of one shard.

    ids: int64 [...] in the whole vocabulary, negative where there is none.
    logits: their logits without cap and temperature, fp32 [...].
    """

    ids: Tensor
    logits: Tensor

    @classmethod
    def of(cls, ids: Tensor, logits: Tensor, first: Tensor, columns: int) -> "MostLikely":
        """From `ids` within a shard of so many columns, which begins at column `first`."""
        if columns == 0:
            return cls(torch.full_like(ids, -1), logits)
        return cls(torch.where(ids >= 0, ids + first, -1), logits)


def combine(
    targets: Targets, of_shard: LabelResults, most_likely: MostLikely | None, group: str
) -> LabelResults:
    """Results over all shards from those over this rank's.

    Args:
        targets: labels from `Shards.localized`, [...] or [..., K], temperatures and options.
        of_shard: of the row kernel given them; its statistics are m, s, mean.
        most_likely: of this shard, or None.
        group: name of the group.
    """
    local, stats, collisions = targets.labels, of_shard.stats, of_shard.collision
    # No log-probability is positive.
    logprobs = torch.where(local == ELSEWHERE, torch.inf, of_shard.logprobs)
    several = logprobs.dim() == stats.dim()
    sent = [*stats.unbind(-1)]
    for t in (collisions, None if most_likely is None else most_likely.logits):
        sent += [] if t is None else [t]
    count = len(sent)
    sent += [*logprobs.unbind(-1)] if several else [logprobs]
    received = groups.gather(torch.stack(sent), group)
    further = [*received[:, 3:count].unbind(1)]
    parts = Parts(
        received[:, :3].movedim(1, -1),
        received[:, count:].movedim(1, -1) if several else received[:, count],
        further.pop(0) if collisions is not None else None,
        None if most_likely is None else groups.gather(most_likely.ids, group),
        further.pop(0) if most_likely is not None else None,
    )
    return merged(parts, local != SHARD_IGNORED, targets)


class ShardRows:
    """A backend's row kernels as if the whole vocabulary were here.

    Labels are from `Shards.localized`, the ignored label is SHARD_IGNORED.
    """

    def __init__(self, rows: Rows, group: str) -> None:
        self._rows, self._group = rows, group
        self.policy_loss = rows.policy_loss

    def policy_rows_for(self, *_: Any) -> None:
        """None: the ranks must exchange statistics before any has a log-probability."""

    def token_logprobs(
        self,
        logits: Tensor,
        local: Tensor,
        temperatures: Tensor | None,
        options: RowOptions,
        first: Tensor | None = None,
    ) -> LabelResults:
        """`first`: the first column of this shard; only a most likely token needs it."""
        options = options._replace(ignore_index=SHARD_IGNORED)
        rows = self._rows.token_logprobs(logits, local, temperatures, options)
        most_likely = None
        if rows.argmax is not None and first is not None:
            largest = logit_of(logits, rows.argmax)
            most_likely = MostLikely.of(rows.argmax, largest, first, logits.shape[-1])
        return combine(Targets(local, temperatures, options), rows, most_likely, self._group)

    def token_logprobs_backward_into(
        self,
        out: Tensor,
        logits: Tensor,
        local: Tensor,
        temperatures: Tensor | None,
        stats: Tensor,
        grad_logprobs: Tensor | None,
        grad_entropy: Tensor | None,
        options: RowOptions,
        *further: Tensor | None,
    ) -> None:
        options = options._replace(ignore_index=SHARD_IGNORED)
        self._rows.token_logprobs_backward_into(
            out, logits, local, temperatures, stats, grad_logprobs, grad_entropy, options, *further
        )


class ShardKernels(NamedTuple):
    """A backend's kernels for a shard of the vocabulary.

    own: over this rank's columns alone.
    whole: over all columns, for which the ranks exchange as they go; its row kernels are `rows`.
    """

    own: Kernels
    whole: LabelKernels
    rows: ShardRows


@functools.lru_cache(maxsize=64)
def kernels_of(rows: Rows, memory: Memory, group: str) -> ShardKernels:
    """The kernels of a group, made once; those of destroyed groups go in time."""
    reduce = functools.partial(groups.sum_, group=group)
    over_all = ShardRows(rows, group)
    whole = LabelKernels(over_all, memory, reduce)
    return ShardKernels(Kernels(rows, memory, reduce), whole, over_all)


def check_tokens(
    op: str,
    vocab: int,
    labels: Tensor,
    temperatures: float | Tensor | None,
    keep: Tensor,
    group: str,
) -> None:
    """Raises for bad labels and temperatures of kept tokens; with a group, those of any rank."""
    if group:
        exchange_metadata(op, vocab, labels, temperatures, keep, group)
    else:
        data_checks.token_data(op, labels, temperatures, keep, vocab)


def token_logprobs(
    kernels: Kernels,
    logits: Tensor,
    labels: Tensor,
    temperatures: Tensor | None,
    options: RowOptions,
    group: str,
) -> ShardResults:
    """`token_logprobs` of logits [..., columns of this rank]; arguments as the operator's."""
    keep = labels != options.ignore_index
    shards = exchange_metadata(
        "token_logprobs", logits.shape[-1], labels, temperatures, keep, group
    )
    local = shards.localized(labels, keep)
    rows = kernels_of(kernels.rows, kernels.memory, group).rows
    found = rows.token_logprobs(logits, local, temperatures, options, shards.first)
    return ShardResults(*found, local)


def linear_token_logprobs(
    kernels: Kernels, operands: Operands, targets: Targets, batching: Batching, group: str
) -> ShardResults:
    """As `logprobs.forward`."""
    labels, temperatures, options = targets
    op, keep = "linear_token_logprobs", labels != options.ignore_index
    vocab = operands.weight.shape[0]
    shards = exchange_metadata(op, vocab, labels, temperatures, keep, group)
    local = shards.localized(labels, keep)
    targets = Targets(local, temperatures, options._replace(ignore_index=SHARD_IGNORED))
    # Chunks need no exchange: there is one at the end.
    own = kernels_of(kernels.rows, kernels.memory, group).own
    largest = None
    if options.argmax:
        tokens = operands.hidden.shape[:-1].numel()
        largest = torch.full((tokens,), -torch.inf, device=labels.device)
    rows = logprobs.forward(own, operands, targets, batching, largest)
    most_likely = None
    if rows.argmax is not None and largest is not None:
        largest = largest.view(rows.argmax.shape)
        most_likely = MostLikely.of(rows.argmax, largest, shards.first, vocab)
    return ShardResults(*combine(targets, rows, most_likely, group), local)


def linear_token_logprobs_backward(kernels: Kernels, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As `logprobs.backward`, whose arguments come before the group's name."""
    *inputs, group = args
    return logprobs.backward(kernels_of(kernels.rows, kernels.memory, group).own, *inputs)


def linear_policy_loss(
    kernels: Kernels,
    operands: Operands,
    targets: Targets,
    policy: PolicyArguments,
    reference: Operands | None,
    batching: Batching,
    needs: list[bool],
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `policy.forward`."""
    op, keep, weight = "linear_policy_loss", policy.mask != 0, operands.weight
    shards = exchange_metadata(
        op, weight.shape[0], targets.labels, targets.temperatures, keep, group
    )
    # The ranks exchange in every chunk, so all take the chunks of the largest shard.
    columns = None
    if batching.tokens is None:
        columns = (1 if reference is None else 2) * shards.sizes.max()
    targets = targets._replace(labels=shards.localized(targets.labels, keep))
    whole = kernels_of(kernels.rows, kernels.memory, group).whole
    return policy_loss.forward(
        whole, operands, targets, policy, reference, batching, needs, columns
    )
