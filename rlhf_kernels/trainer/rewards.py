"""Reward functions and reward models together: their table, its weighted sum and its means."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerState

from .config import ModelConfig, UserError
from .data import collate, load_tokenizer, whole_tokens
from .models import load_reward_model, sequence_rewards
from .reward_functions import (
    RewardFunction,
    check_arguments,
    check_path,
    is_function,
    load_reward,
    numbers,
    results,
    reward_name,
)


def _distinct(names: Sequence[str]) -> list[str]:
    """Names with a number behind the second and later ones that are equal."""
    found: list[str] = []
    for name in names:
        count = 2
        unique = name
        while unique in found:
            unique, count = f"{name}_{count}", count + 1
        found.append(unique)
    return found


@dataclass
class Rewards:
    """Reward functions with their weights.

    Attributes:
        functions: in the order of the table's columns.
        weights: one each.
        labels: their names in metrics and errors; empty: the functions' own.
        state: what functions see as `trainer_state`.
        metrics: values of `log_metric` since `forget`.
        extra: values of `log_extra` for the `seen` samples since `forget`, a list per column.
    """

    functions: list[RewardFunction]
    weights: list[float]
    labels: Sequence[str] = ()
    state: TrainerState = field(default_factory=TrainerState)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)
    seen: int = 0

    @property
    def names(self) -> list[str]:
        return _distinct(self.labels or [reward_name(f) for f in self.functions])

    def check(self, columns: Sequence[str]) -> None:
        """Raises UserError where a function needs a column that the data lacks."""
        given = ("prompts", "completions", "completion_ids", "finished")
        given += ("trainer_state", "log_extra", "log_metric")
        for name, function in zip(self.names, self.functions, strict=True):
            check_arguments(name, function, [*given, *columns])

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: dict[str, list[Any]],
    ) -> Tensor:
        """Rewards `[B, functions]` of a batch, fp32; NaN where a function said None.

        Raises:
            UserError: a function raised, or returned another number of rewards or one that is not
                a finite number of fp32; or no function scored some sample.
        """
        count = len(prompts)
        given = columns | {
            "prompts": list(prompts),
            "completions": list(completions),
            "completion_ids": list(completion_ids),
            "trainer_state": self.state,
        }
        arguments = [
            given
            | {
                "log_metric": functools.partial(self._log_metric, name),
                "log_extra": functools.partial(self._log_extra, name, count),
            }
            for name in self.names
        ]
        found = results(self.functions, arguments)
        self.seen += count
        parts = zip(self.names, self.functions, found, arguments, strict=True)
        rows = [numbers(name, f, result, own, count) for name, f, result, own in parts]
        table = torch.tensor(rows, dtype=torch.float32).view(len(rows), count).T
        unscored = table.isnan().all(1).nonzero()
        if len(unscored):
            raise UserError(f"reward_funcs: no function scored sample {int(unscored[0])}")
        return table.contiguous()

    def _log_metric(self, function: str, name: str, value: float) -> None:
        """`log_metric` of TRL: averaged over a step, in the metrics as `logged/<name>`."""
        if isinstance(value, Tensor) and value.ndim == 0:
            value = value.item()
        if not (isinstance(value, Real) and math.isfinite(value)):
            raise UserError(
                f"{function}: log_metric {name!r}: expected a finite number, found {value!r}"
            )
        self.metrics.setdefault(name, []).append(float(value))

    def _log_extra(self, function: str, count: int, column: str, values: Sequence[Any]) -> None:
        """`log_extra` of TRL: a column of the table of samples."""
        if len(values) != count:
            raise UserError(
                f"{function}: log_extra {column!r}: expected {count} values, found {len(values)}"
            )
        # None for samples of calls that did not log it; the last value where it is logged twice.
        known = [*self.extra.get(column, ()), *[None] * self.seen][: self.seen]
        self.extra[column] = [*known, *values]

    def forget(self) -> None:
        """Drops what functions logged so far."""
        self.metrics, self.extra, self.seen = {}, {}, 0


def weighted_sum(table: Tensor, weights: Sequence[float]) -> Tensor:
    """Sum `[B]` over the functions of `table`, `[B, functions]`, that scored a sample.

    Raises:
        UserError: a sum is infinite in fp32.
    """
    scores = (table * torch.tensor(weights, device=table.device)).nansum(1)
    bad = (~scores.isfinite()).nonzero()
    if len(bad):
        found = f"{scores[bad[0]].item()} for sample {int(bad[0])}"
        raise UserError(f"reward_weights: expected a finite sum of rewards, found {found}")
    return scores


def means(table: Tensor) -> list[float]:
    """Mean of each function where it scored; 0 where it never did."""
    return table.nanmean(0).nan_to_num().tolist()


class RewardModel:
    """A reward model as a reward function: the whole text in, its scalar out."""

    def __init__(self, path: str, config: ModelConfig, device: torch.device) -> None:
        self.__name__ = Path(path).name
        self.tokenizer = load_tokenizer(path, setting="reward_funcs", ends=False)
        self.model = load_reward_model(path, config).requires_grad_(False).to(device)

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], finished: Sequence[bool], **_: Any
    ) -> list[float | None]:
        samples = zip(prompts, completions, finished, strict=True)
        rows = [
            ([], whole_tokens(self.tokenizer, prompt, completion, ended=end))
            for prompt, completion, end in samples
        ]
        batch = collate(self.tokenizer, rows, self.model.device)
        return sequence_rewards(self.model, batch).tolist()


def load_rewards(
    paths: Sequence[str],
    weights: Sequence[float],
    *,
    default: Sequence[RewardFunction],
    config: ModelConfig,
    device: torch.device,
) -> Rewards:
    """Functions by import path and reward models by path; `default` where there are none."""
    for path in paths:
        check_path(path)
    functions = [
        load_reward(path) if is_function(path) else RewardModel(path, config, device)
        for path in paths
    ] or list(default)
    weights = list(weights) or [1.0] * len(functions)
    if len(weights) != len(functions):
        raise UserError(f"reward_weights: expected {len(functions)} numbers, found {len(weights)}")
    # As the user wrote them: a lambda or a partial has no name of its own.
    labels = [
        path.rpartition(":")[2] if is_function(path) else reward_name(function)
        for path, function in zip(paths, functions, strict=False)
    ]
    return Rewards(functions, weights, labels)
