"""Reward functions in TRL's signature, reward models, and their weighted sum.

A reward function is `f(prompts, completions, completion_ids, **columns) -> list[float | None]`:
texts, token ids without padding, and one list per data column. `None` means that the function has
nothing to say about a sample. The trainer adds the column `finished`: whether the completion ended
with the end token.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import ModelConfig, UserError, require
from .data import collate, load_tokenizer, row_tokens
from .models import load_reward_model, sequence_rewards

RewardFunction = Callable[..., list[float | None]]


def load_reward(path: str) -> RewardFunction:
    """The function at `package.module:name`."""
    module, _, name = path.partition(":")
    function = getattr(importlib.import_module(module), name, None) if module and name else None
    require(callable(function), "reward_funcs", "'module:function' or a reward model's path", path)
    return function


def reward_name(function: RewardFunction) -> str:
    """How a reward function is called in metrics and errors."""
    return getattr(function, "__name__", type(function).__name__)


class Rewards(NamedTuple):
    """Reward functions with their weights."""

    functions: list[RewardFunction]
    weights: list[float]

    @property
    def names(self) -> list[str]:
        return [reward_name(f) for f in self.functions]

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        columns: dict[str, list[Any]],
    ) -> Tensor:
        """Rewards `[B, functions]` of a batch; NaN where a function said None.

        Raises:
            RuntimeError: a function raised.
            ValueError: a function returned another number of rewards or one that is not a finite
                number, or no function scored some sample.
        """
        given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
        table = torch.tensor([_call(f, columns | given, len(prompts)) for f in self.functions]).T
        unscored = table.isnan().all(1).nonzero()
        if len(unscored):
            raise UserError(f"reward_funcs: no function scored sample {int(unscored[0])}")
        return table.contiguous()


def _call(function: RewardFunction, arguments: dict[str, Any], count: int) -> list[float]:
    name = reward_name(function)
    try:
        rewards = function(**arguments)
    except Exception as error:
        raise RuntimeError(f"reward function {name} raised {error!r}") from error
    if rewards is None:
        raise UserError(f"{name}: expected a list of {count} rewards, found None")
    if len(rewards) != count:
        raise UserError(f"{name}: expected {count} rewards, found {len(rewards)}")
    for i, reward in enumerate(rewards):
        if reward is not None and not math.isfinite(reward):
            raise UserError(f"{name}: expected finite rewards, found {reward} for sample {i}")
    return [math.nan if reward is None else float(reward) for reward in rewards]


def weighted_sum(table: Tensor, weights: Sequence[float]) -> Tensor:
    """Sum `[B]` over the functions of `table`, `[B, functions]`, that scored a sample."""
    return (table * torch.tensor(weights, device=table.device)).nansum(1)


def means(table: Tensor) -> list[float]:
    """Mean of each function where it scored; 0 where it never did."""
    return table.nanmean(0).nan_to_num().tolist()


class RewardModel:
    """A reward model as a reward function: the whole text in, its scalar out."""

    def __init__(self, path: str, config: ModelConfig, device: torch.device) -> None:
        self.__name__ = Path(path).name
        self.tokenizer = load_tokenizer(path)
        self.model = load_reward_model(path, config).requires_grad_(False).to(device)

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], finished: Sequence[bool], **_: Any
    ) -> list[float | None]:
        rows = []
        for prompt, completion, end in zip(prompts, completions, finished, strict=True):
            first, rest = row_tokens(self.tokenizer, prompt, completion)
            rows.append((first, rest if end else rest[:-1]))
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
    functions = [
        load_reward(path) if ":" in path else RewardModel(path, config, device) for path in paths
    ] or list(default)
    weights = list(weights) or [1.0] * len(functions)
    if len(weights) != len(functions):
        raise UserError(f"reward_weights: expected {len(functions)} numbers, found {len(weights)}")
    return Rewards(functions, weights)
