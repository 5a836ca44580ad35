"""Rewards of the built-in tasks: arithmetic, and answers that end in `#### <number>` (GSM8K)."""

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

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
