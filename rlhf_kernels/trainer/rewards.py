"""Reward functions in TRL's signature, and their weighted sum.

A reward function is `f(prompts, completions, completion_ids, **columns) -> list[float | None]`:
texts, token ids without padding, and one list per data column. `None` means that the function has
nothing to say about a sample. The trainer adds the column `finished`: whether the completion ended
with the end token.
"""

import importlib
import math
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

RewardFunction = Callable[..., list[float | None]]

_FINAL_NUMBER = re.compile(r"####[ \t]*(-?\$?\d[\d,]*(?:\.\d+)?)\s*\Z")


def final_number(text: str) -> Decimal | None:
    """The number after `####` at the very end of the text, or None."""
    found = _FINAL_NUMBER.search(text)
    return Decimal(re.sub(r"[,$]", "", found.group(1))) if found else None


def exact_match(
    prompts: Sequence[str],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    *,
    answer: Sequence[str],
    finished: Sequence[bool],
    **columns: Any,
) -> list[float | None]:
    """1 where the completion is the answer and then ends, else 0."""
    return [
        float(end and text.strip() == want)
        for text, want, end in zip(completions, answer, finished, strict=True)
    ]


def answer_format(
    prompts: Sequence[str],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    *,
    finished: Sequence[bool],
    **columns: Any,
) -> list[float | None]:
    """1 where the completion closes with `#### <number>` and then ends, else 0."""
    return [
        float(end and final_number(text) is not None)
        for text, end in zip(completions, finished, strict=True)
    ]


def answer_correct(
    prompts: Sequence[str],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    *,
    answer: Sequence[str],
    finished: Sequence[bool],
    **columns: Any,
) -> list[float | None]:
    """1 where the final number is that of the answer, else 0."""
    return [
        float(end and final_number(text) is not None and final_number(text) == final_number(want))
        for text, want, end in zip(completions, answer, finished, strict=True)
    ]


def load_reward(path: str) -> RewardFunction:
    """The function at `package.module:name`."""
    module, _, name = path.partition(":")
    if not module or not name:
        raise ValueError(f"reward_funcs: expected 'module:function', found {path!r}")
    function = getattr(importlib.import_module(module), name, None)
    if not callable(function):
        raise ValueError(f"reward_funcs: {module!r} has no function {name!r}")
    return function


class Scores(NamedTuple):
    """Weighted sum per sample, and the mean of each function where it applied."""

    total: list[float]
    means: dict[str, float]


def score(
    functions: Sequence[RewardFunction],
    weights: Sequence[float],
    prompts: Sequence[str],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    columns: dict[str, list[Any]],
) -> Scores:
    """Every reward function over a batch.

    Raises:
        ValueError: a function returned another number of rewards or one that is not finite, or no
            function scored some sample.
    """
    given = {"prompts": prompts, "completions": completions, "completion_ids": completion_ids}
    total: list[float | None] = [None] * len(prompts)
    means: dict[str, float] = {}
    for function, weight in zip(functions, weights, strict=True):
        name = getattr(function, "__name__", type(function).__name__)
        rewards = function(**(columns | given))
        if len(rewards) != len(prompts):
            raise ValueError(f"{name}: expected {len(prompts)} rewards, found {len(rewards)}")
        known = [float(r) for r in rewards if r is not None]
        if not all(map(math.isfinite, known)):
            raise ValueError(f"{name}: expected finite rewards, found {known}")
        means[name] = sum(known) / len(known) if known else 0.0
        total = [
            t if r is None else (t or 0.0) + weight * float(r)
            for t, r in zip(total, rewards, strict=True)
        ]
    if None in total:
        raise ValueError(f"reward_funcs: no function scored sample {total.index(None)}")
    return Scores([t for t in total if t is not None], means)
