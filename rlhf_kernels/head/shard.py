"""Row kernels over a vocabulary that is sharded over the ranks of a process group.

Each rank reduces its own columns to (m, s, log p(y), mean): maximum, sum of e = exp((z - m) / T),
log-probability of the label among these columns and mean of (z - m) / T over them. These are
gathered and combined in the order of the ranks, so that all ranks hold the same bits. With P the
share of a shard, log p(y) = log P + log p(y | shard), and the mean over all, whose distance to
log s is the entropy, is sum P (mean_shard + its distance to the common maximum): neither cancels.
Shards may differ in size, and be empty.

Labels and everything else per token are replicated; the ranks compare what they were given before
they begin, so that one rank's mistake raises on every rank instead of leaving the others waiting.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..core import checks, groups, temperature_rules
from ..core.sentinels import ELSEWHERE, NOWHERE, SHARD_IGNORED
from . import chunks, row_launchers


class Shards(NamedTuple):
    """Columns of each rank, int64 [ranks], and which of them is this one."""

    sizes: Tensor
    rank: int

    def localized(self, labels: Tensor, keep: Tensor) -> Tensor:
        """Labels as columns of this shard, ELSEWHERE, or SHARD_IGNORED where `keep` is false."""
        local = labels.long() - self.sizes[: self.rank].sum()
        owned = (local >= 0) & (local < self.sizes[self.rank])
        known = (labels >= 0) & (labels < self.sizes.sum())
        local = torch.where(owned, local, torch.where(known, ELSEWHERE, NOWHERE))
        return torch.where(keep, local, SHARD_IGNORED)


# What a rank tells the others before it begins.
_FIELDS = ("vocab", "tokens", "checksum", "low", "low_at", "high", "high_at", "temperature_at")


def meet(
    op: str,
    vocab: int,
    labels: Tensor,
    temperatures: float | Tensor | None,
    keep: Tensor,
    group: str,
) -> Shards:
    """Tells the ranks each other's shard; where data may be looked at, also whether it is good.

    Raises:
        IndexError: a label outside the whole vocabulary on any rank; so on every rank.
        ValueError: likewise a bad temperature, labels that are not the same on every rank, or
            shards that are all empty.
    """
    looked = checks.may_look(labels)
    told = torch.full((len(_FIELDS),), vocab, dtype=torch.int64, device=labels.device)
    if looked:
        told[1:] = told.new_tensor(_summary(labels, temperatures, keep))
    told = groups.gather(told, group)
    if looked:
        _judge(op, [dict(zip(_FIELDS, row, strict=True)) for row in told.tolist()])
    return Shards(told[:, 0], groups.rank(group))


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
        bad = temperature_rules.bad(temperatures) & keep
    bad = bad.reshape(-1).nonzero()
    first_bad = int(bad[0]) if bad.numel() else -1
    return [
        count, int(checksum), int(kept[low]), int(low), int(kept[high]), int(high), first_bad
    ]  # fmt: skip


def _judge(op: str, told: list[dict[str, int]]) -> None:
    total = sum(t["vocab"] for t in told)
    if total == 0:
        raise ValueError(f"{op}: every rank's shard of the vocabulary is empty")
    for rank, t in enumerate(told):
        for end in ("low", "high"):
            if not 0 <= t[end] < total:
                raise IndexError(
                    f"{op}: label at flat position {t[end + '_at']} on rank {rank} is {t[end]}; "
                    f"expected 0 <= label < {total}, the vocabulary of all ranks, or ignore_index"
                )
        if t["temperature_at"] >= 0:
            raise temperature_rules.error(op, t["temperature_at"], where=f" on rank {rank}")
        for field in ("tokens", "checksum"):
            if t[field] != told[0][field]:
                raise ValueError(
                    f"{op}: labels must be the same on every rank of group; those of rank {rank} "
                    f"({t['tokens']}) are not those of rank 0 ({told[0]['tokens']})"
                )


def combine(
    local: Tensor,
    logprobs: Tensor,
    stats: Tensor,
    temperatures: Tensor | None,
    temperature: float,
    entropy: bool,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probabilities, entropies, stats) over all shards from those over this rank's.

    Args:
        local: labels from `Shards.localized`, [...].
        logprobs: of the row kernel given them, fp32 [...].
        stats: of the row kernel, fp32 [..., 3]: m, s, mean.
        temperatures: per token [...], or None.
        temperature: of all tokens, where `temperatures` is None.
        entropy: whether entropies are wanted, and the mean is one.
        group: name of the group.
    """
    # No log-probability is positive.
    logprobs = torch.where(local == ELSEWHERE, torch.inf, logprobs)
    parts = torch.stack([*stats.unbind(-1), logprobs])
    m, s, mean, own = groups.gather(parts, group).double().unbind(1)
    rate = 1.0 / temperature if temperatures is None else 1.0 / temperatures.float().double()

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
    own = torch.where(own == torch.inf, 0.0, torch.where(empty, 0.0, own) + log_share)

    kept = local != SHARD_IGNORED
    logprobs = torch.where(kept, _ordered_sum(own), 0.0).float()
    h = torch.where(kept, total.log() - mean, 0.0).float() if entropy else logprobs.new_empty(0)
    stats = [torch.where(kept, x, other) for x, other in ((top, 0.0), (total, 1.0), (mean, 0.0))]
    return logprobs, h, torch.stack(stats, -1).float()


def _ordered_sum(of_ranks: Tensor) -> Tensor:
    return functools.reduce(torch.add, of_ranks.unbind())


def _rows_of(rows: chunks.Launchers, group: str) -> chunks.Launchers:
    """The row kernels as if the whole vocabulary were here; labels are from `Shards.localized`."""

    def token_logprobs(
        logits: Tensor,
        local: Tensor,
        temperatures: Tensor | None,
        temperature: float,
        softcap: float,
        entropy: bool,
        _: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        logprobs, _, stats = rows["token_logprobs"](
            logits, local, temperatures, temperature, softcap, entropy, SHARD_IGNORED
        )
        return combine(local, logprobs, stats, temperatures, temperature, entropy, group)

    def backward_inplace(logits: Tensor, *args: object) -> None:
        *args, _ = args
        rows["token_logprobs_backward_inplace"](logits, *args, SHARD_IGNORED)

    return {
        **rows,
        "token_logprobs": token_logprobs,
        "token_logprobs_backward_inplace": backward_inplace,
    }


def launchers(rows: chunks.Launchers, empty: chunks.Empty) -> dict[str, Callable[..., object]]:
    """Launchers of the sharded operators over a backend's row kernels; empty as in `_head`."""
    if "token_logprobs" not in rows:
        return {}

    def head_of(group: str, rows: chunks.Launchers) -> chunks.Launchers:
        return row_launchers.launchers(rows, empty, functools.partial(groups.sum_, group=group))

    def sharded_token_logprobs(
        logits: Tensor,
        labels: Tensor,
        temperatures: Tensor | None,
        temperature: float,
        softcap: float,
        entropy: bool,
        ignore_index: int,
        group: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        keep = labels != ignore_index
        shards = meet("token_logprobs", logits.shape[-1], labels, temperatures, keep, group)
        local = shards.localized(labels, keep)
        of_rank = _rows_of(rows, group)["token_logprobs"]
        options = (temperatures, temperature, softcap, entropy, ignore_index)
        return *of_rank(logits, local, *options), local

    def sharded_linear_token_logprobs(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        temperatures: Tensor | None,
        temperature: float,
        softcap: float,
        entropy: bool,
        ignore_index: int,
        chunk: int,
        group: str,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        op, keep = "linear_token_logprobs", labels != ignore_index
        local = meet(op, weight.shape[0], labels, temperatures, keep, group).localized(labels, keep)
        # The chunks are this rank's own affair: one exchange at the end.
        logprobs, _, stats = head_of(group, rows)[op](
            hidden,
            weight,
            bias,
            local,
            temperatures,
            temperature,
            softcap,
            entropy,
            SHARD_IGNORED,
            chunk,
        )
        found = combine(local, logprobs, stats, temperatures, temperature, entropy, group)
        return *found, local

    def sharded_linear_token_logprobs_backward(
        *args: object,
    ) -> tuple[Tensor, Tensor, Tensor]:
        *args, group = args
        return head_of(group, rows)["linear_token_logprobs_backward"](*args)

    def sharded_linear_policy_loss(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        temperatures: Tensor | None,
        old: Tensor,
        advantages: Tensor,
        mask: Tensor,
        ref: Tensor | None,
        rollout: Tensor | None,
        ref_head: list[Tensor],
        *args: object,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        *args, chunk, needs, group = args
        op, keep = "linear_policy_loss", mask != 0
        shards = meet(op, weight.shape[0], labels, temperatures, keep, group)
        # Chunk by chunk the ranks meet: their chunks are those of the largest shard, whose size is
        # a host synchronisation on a GPU.
        if chunk == 0:
            columns = (2 if ref_head else 1) * int(shards.sizes.max())
            chunk = chunks.chunk_size(weight.device, columns, weight.dtype)
        return head_of(group, _rows_of(rows, group))[op](
            hidden, weight, bias, shards.localized(labels, keep), temperatures, old, advantages,
            mask, ref, rollout, ref_head, *args, chunk, needs,
        )  # fmt: skip

    return {
        f.__name__: f
        for f in (
            sharded_token_logprobs,
            sharded_linear_token_logprobs,
            sharded_linear_token_logprobs_backward,
            sharded_linear_policy_loss,
        )
    }
