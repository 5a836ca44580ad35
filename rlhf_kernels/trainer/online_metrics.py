"""Metrics of an online step: rewards, lengths, losses and times."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .rewards import means
from .rollout import Samples
from .timing import timed


def prefixed(prefix: str, metrics: Any) -> dict[str, Tensor]:
    """The metrics of an operation under the names "prefix/name"."""
    return {f"{prefix}/{name}": metric for name, metric in metrics.items()}


def fold(
    table: Sequence[dict[str, Tensor]], updates: int, gather: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    """Combines metrics of micro-batches and processes: sums of losses, token means of the others.

    Args:
        table: metrics of each micro-batch of this process, by name.
        updates: number of updates, by which sums of losses and tokens are divided.
        gather: collects the rows `[micro-batches, names]` of all processes.
    """
    names = list(table[0])
    whole = gather(torch.stack([torch.stack([row[name] for name in names]) for row in table]))
    weight = whole[:, names.index("policy/tokens")]
    mean = (whole * weight[:, None]).sum(0) / weight.sum().clamp(min=1.0)
    columns = []
    for i, name in enumerate(names):
        if name.endswith(("loss", "tokens")):
            columns.append(whole[:, i].sum() / updates)
        elif name.endswith("_min"):
            columns.append(whole[:, i].min())
        else:
            columns.append(whole[:, i].max() if name.endswith("_max") else mean[i])
    return dict(zip(names, torch.stack(columns).tolist(), strict=True))


def of_rewards(samples: Samples, names: Sequence[str], group: int) -> dict[str, float]:
    """Mean and deviation of the rewards, and each function's mean; `group` is the group size."""
    groups = samples.scores.view(-1, group)
    return {
        "reward": samples.scores.mean().item(),
        "reward_std": samples.scores.std().item(),
        "frac_reward_zero_std": (groups == groups[:, :1]).all(1).float().mean().item(),
        **dict(zip((f"reward/{n}" for n in names), means(samples.table), strict=True)),
    }


def of_lengths(samples: Samples) -> dict[str, float]:
    """Mean length, share of truncated completions, and total tokens."""
    lengths = samples.batch.completion_mask.sum(1)
    return {
        "length": lengths.float().mean().item(),
        "length_clipped": (~samples.finished).float().mean().item(),
        "tokens": lengths.sum().item(),
    }


def of_times(samples: Samples, clock: Sequence[float]) -> dict[str, float]:
    """Seconds between four times in `clock`: start, sampled, evaluated, updated."""
    start, sampled, evaluated, updated = clock
    return {
        "time/generate": sampled - start,
        "time/evaluate": evaluated - sampled,
        "time/update": updated - evaluated,
        # A part of the evaluate and update times.
        "time/kernels": timed.seconds(),
        "time/step": updated - start,
        "tokens_per_second": samples.batch.completion_mask.sum().item() / (updated - start),
    }
