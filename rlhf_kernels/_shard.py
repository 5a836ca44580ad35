"""Row kernels over a vocabulary that is sharded over the ranks of a process group.

Each rank reduces its own columns; (m, s, sum of z e, label's logit) of every rank are gathered and
combined in the order of the ranks, so that all ranks hold the same bits. Shards may differ in size.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Launchers = Mapping[str, Callable[..., object]]

# csrc/abi.h: kLabelElsewhere
ELSEWHERE = -(2**63)


def _resolve(group: str) -> "torch.distributed.ProcessGroup":
    return torch.distributed.distributed_c10d._resolve_process_group(group)


def _gather(t: Tensor, group: str) -> Tensor:
    """`t` of every rank, [ranks, *shape]."""
    ranks = _resolve(group)
    out = t.new_empty((ranks.size(), *t.shape))
    torch.distributed.all_gather(list(out.unbind()), t.contiguous(), group=ranks)
    return out


def sizes(vocab: int, device: torch.device, group: str) -> Tensor:
    """Columns of each rank, int64 [ranks], on `device`."""
    return _gather(torch.tensor([vocab], device=device), group).squeeze(-1)


def all_reduce(t: Tensor, group: str) -> Tensor:
    """The sum over the ranks, in place."""
    torch.distributed.all_reduce(t, group=_resolve(group))
    return t


class Sharded:
    """The row kernels of a backend as if the vocabulary of the whole group were here.

    Args:
        rows: a backend's launchers.
        group: name of the process group.
        sizes: columns of each rank.
    """

    def __init__(self, rows: Launchers, group: str, sizes: Tensor) -> None:
        self._rows, self._group = rows, group
        rank = _resolve(group).rank()
        self._first = sizes[:rank].sum()
        self._total = sizes.sum()
        self._own = sizes[rank]

    def _localized(self, labels: Tensor, ignore_index: int) -> Tensor:
        """Labels as columns of this shard: ELSEWHERE where another has them."""
        local = labels.long() - self._first
        owned = (local >= 0) & (local < self._own)
        local = torch.where(owned, local, ELSEWHERE)
        return torch.where(labels == ignore_index, ignore_index, local)

    def token_logprobs(
        self,
        logits: Tensor,
        labels: Tensor,
        temperatures: Tensor | None,
        temperature: float,
        softcap: float,
        entropy: bool,
        ignore_index: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `token_logprobs` of a backend, with labels of the whole vocabulary."""
        # ignore_index may be a column of this shard.
        local = self._localized(labels, ignore_index)
        ignored = labels == ignore_index
        local = torch.where(ignored, _IGNORED, local)
        _, _, stats = self._rows["token_logprobs"](
            logits, local, temperatures, temperature, softcap, True, _IGNORED
        )
        m, s, h = stats.double().unbind(-1)
        owned = local >= 0
        z = logits.gather(-1, torch.where(owned, local, 0).unsqueeze(-1)).squeeze(-1).float()
        if softcap > 0:
            z = softcap * torch.tanh(z / softcap)
        # Per rank: maximum, sum of e, mean of (z - m) / T under e, the label's logit or NaN.
        nowhere = torch.full_like(z, torch.nan)
        parts = torch.stack([m, s, s.log() - h, torch.where(owned, z, nowhere).double()])
        rate = 1.0 / temperature if temperatures is None else 1.0 / temperatures.double()
        logprobs, entropies, stats = _combine(_gather(parts, self._group), rate)
        valid = ((labels >= 0) & (labels < self._total)) | ignored
        poison = torch.where(valid, 0.0, torch.nan).unsqueeze(-1)
        stats = torch.where(
            ignored.unsqueeze(-1), stats.new_tensor([0.0, 1.0, 0.0]), stats + poison
        )
        logprobs = torch.where(ignored, 0.0, logprobs + poison.squeeze(-1))
        entropies = (
            torch.where(ignored, 0.0, entropies + poison.squeeze(-1))
            if entropy
            else (logprobs.new_empty(0))
        )
        return logprobs, entropies, stats

    def token_logprobs_backward(self, logits: Tensor, labels: Tensor, *args: object) -> Tensor:
        """As `token_logprobs_backward` of a backend: the gradient of this shard's columns."""
        return self._rows["token_logprobs_backward"](logits, *self._backward(labels, *args))

    def token_logprobs_backward_inplace(
        self, logits: Tensor, labels: Tensor, *args: object
    ) -> None:
        """As `token_logprobs_backward_inplace` of a backend."""
        self._rows["token_logprobs_backward_inplace"](logits, *self._backward(labels, *args))

    def _backward(self, labels: Tensor, *args: object) -> tuple[object, ...]:
        *args, ignore_index = args
        local = self._localized(labels, ignore_index)
        return torch.where(labels == ignore_index, _IGNORED, local), *args, _IGNORED

    def table(self) -> Launchers:
        """The backend's launchers with those over the vocabulary replaced."""
        return {
            **self._rows,
            "token_logprobs": self.token_logprobs,
            "token_logprobs_backward": self.token_logprobs_backward,
            "token_logprobs_backward_inplace": self.token_logprobs_backward_inplace,
        }


# No column of a shard, and not ELSEWHERE.
_IGNORED = -1


def _combine(parts: Tensor, rate: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, entropies, stats), fp32, from [ranks, 4, ...] in fp64, in order of the ranks."""
    top = parts[:, 0].amax(0)
    base = torch.where(top == -torch.inf, 0.0, top)
    total = torch.zeros_like(base)
    weighted = torch.zeros_like(base)
    label = torch.full_like(base, torch.nan)
    for m, s, mean, z in parts.unbind():
        shift = (m - base) * rate
        # A shard of nothing but -inf adds nothing.
        empty = m == -torch.inf
        w = torch.where(empty, 0.0, s * shift.exp())
        total = total + w
        weighted = weighted + torch.where(w == 0.0, 0.0, w * (mean + shift))
        label = torch.where(z.isnan(), label, z)
    log_s = total.log()
    entropies = log_s - weighted / total
    logprobs = (label - top) * rate - log_s
    stats = torch.stack([top, total, entropies], -1).float()
    return logprobs.float(), entropies.float(), stats
