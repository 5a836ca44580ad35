"""Arithmetic on two numbers, asked in words: the problems, and the rewards of an answer."""

import itertools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

# Those of a child's first tables, where the model answers some right, and sums that it cannot do.
TASKS = ("tables", "sums")
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def problems(task: str) -> Iterator[tuple[str, int]]:
    """Questions and their answers."""
    if task == "sums":
        for a, b in itertools.product(range(10, 100), repeat=2):
            yield f"{a} plus {b}", a + b
        return
    for a, b in itertools.product(range(1, 10), repeat=2):
        yield f"{a} plus {b}", a + b
        yield f"{a + b} minus {b}", a
        yield f"{a} times {b}", a * b


def rows(task: str, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of the trainer, in random order: a conversation `prompt` and its `answer`."""
    found = [
        {"prompt": [{"role": "user", "content": f"What is {asked}?"}], "answer": answer}
        for asked, answer in problems(task)
    ]
    random.Random(seed).shuffle(found)
    return found


def last_number(text: str) -> float | None:
    """The last number of a text, with or without thousands separators; None without one."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def right(
    completions: Sequence[Sequence[Mapping[str, str]]], answer: Sequence[int], **_: Any
) -> list[float]:
    """1 where the last number of the completion is the answer, else 0."""
    said = [last_number(messages[-1]["content"]) for messages in completions]
    return [float(found == wanted) for found, wanted in zip(said, answer, strict=True)]


def ended(finished: Sequence[bool], **_: Any) -> list[float]:
    """1 where the completion ended before it was cut off, else 0."""
    return [float(end) for end in finished]
