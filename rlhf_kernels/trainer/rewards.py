"""Combines reward functions and reward models: a table of rewards, weighted sums, means."""

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
from .forward import causal_lm, vocabulary
from .models import load_reward_model, sequence_rewards
from .modes import moved
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
from .tokenizers import check_vocabulary


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, with a number appended to repeated ones."""
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
        weights: the weight of each function.
        labels: names of the functions in metrics and errors; if empty, their own names.
        state: the `trainer_state` that functions see.
        metrics: values of `log_metric` since `forget`.
        extra: values of `log_extra` for the `seen` samples since `forget`, a list per column.
        columns: names of the data's columns, which functions get even if no row of a batch has
            them: what they are called with must not depend on the order of the rows.
    """

    functions: list[RewardFunction]
    weights: list[float]
    labels: Sequence[str] = ()
    state: TrainerState = field(default_factory=TrainerState)
    metrics: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)
    columns: tuple[str, ...] = ()
    seen: int = 0

    @property
    def names(self) -> list[str]:
        return _distinct(self.labels or [reward_name(f) for f in self.functions])

    def check(self, columns: Sequence[str]) -> None:
        """Notes the data's columns.

        Raises:
            UserError: a function needs a column that the data lacks.
        """
        given = ["prompts", "completions", "completion_ids", "finished"]
        given += ["trainer_state", "log_extra", "log_metric"]
        self.columns = tuple(columns)
        for name, function in zip(self.names, self.functions, strict=True):
            check_arguments(name, function, given, columns)

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: dict[str, list[Any]],
    ) -> Tensor:
        """Rewards `[B, functions]` of a batch, fp32, with NaN where a function returned None.

        Raises:
            UserError: a function raised, or returned a wrong number of rewards or a reward that
                is not finite in fp32; or no function scored some sample.
        """
        count = len(prompts)
        absent = {name: [None] * count for name in self.columns}
        given = (
            absent
            | columns
            | {
                "prompts": list(prompts),
                "completions": list(completions),
                "completion_ids": list(completion_ids),
                "trainer_state": self.state,
            }
        )
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
        """TRL's `log_metric`: averaged over a step and logged as `logged/<name>`."""
        if isinstance(value, Tensor) and value.ndim == 0:
            value = value.item()
        if not (isinstance(value, Real) and math.isfinite(value)):
            raise UserError(
                f"{function}: log_metric {name!r}: expected a finite number, found {value!r}"
            )
        self.metrics.setdefault(name, []).append(float(value))

    def _log_extra(self, function: str, count: int, column: str, values: Sequence[Any]) -> None:
        """TRL's `log_extra`: a column in the table of samples."""
        if len(values) != count:
            raise UserError(
                f"{function}: log_extra {column!r}: expected {count} values, found {len(values)}"
            )
        # Samples of calls that did not log the column get None; a second log replaces the first.
        known = [*self.extra.get(column, ()), *[None] * self.seen][: self.seen]
        self.extra[column] = [*known, *values]

    def forget(self) -> None:
        """Drops everything that functions have logged."""
        self.metrics, self.extra, self.seen = {}, {}, 0


def weighted_sum(table: Tensor, weights: Sequence[float]) -> Tensor:
    """The weighted sum `[B]` over the functions that scored a sample; `table` is `[B, functions]`.

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
    """The mean of each function over the samples that it scored; 0 if there are none."""
    return table.nanmean(0).nan_to_num().tolist()


class RewardModel:
    """A reward model as a reward function: it scores the whole text with one number."""

    def __init__(self, path: str, config: ModelConfig, device: torch.device) -> None:
        self.__name__ = Path(path).name
        self.tokenizer = load_tokenizer(path, setting="reward_funcs", ends=False)
        self.model = moved(load_reward_model(path, config).requires_grad_(False), device)

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], finished: Sequence[bool], **_: Any
    ) -> list[float | None]:
        samples = zip(prompts, completions, finished, strict=True)
        rows: list[tuple[list[int], list[int]]] = [
            ([], whole_tokens(self.tokenizer, prompt, completion, ended=end))
            for prompt, completion, end in samples
        ]
        batch = collate(self.tokenizer, rows, self.model.device)
        try:
            return sequence_rewards(self.model, batch).tolist()
        except UserError as error:
            raise UserError(f"reward_funcs: {self.__name__}: {error}") from error


def load_rewards(
    paths: Sequence[str],
    weights: Sequence[float],
    *,
    default: Sequence[RewardFunction],
    config: ModelConfig,
    device: torch.device,
) -> Rewards:
    """Loads reward functions by import path and reward models by path; or takes `default`."""
    for path in paths:
        check_path(path)
    functions = [
        load_reward(path) if is_function(path) else RewardModel(path, config, device)
        for path in paths
    ] or list(default)
    for function in functions:
        if isinstance(function, RewardModel):
            rows = vocabulary(causal_lm(function.model))
            check_vocabulary(function.tokenizer, rows, setting="reward_funcs")
    weights = list(weights) or [1.0] * len(functions)
    if len(weights) != len(functions):
        raise UserError(f"reward_weights: expected {len(functions)} numbers, found {len(weights)}")
    # Use the names that the user wrote, because a lambda or a partial has no name of its own.
    labels = [
        path.rpartition(":")[2] if is_function(path) else reward_name(function)
        for path, function in zip(paths, functions, strict=False)
    ]
    return Rewards(functions, weights, labels)
