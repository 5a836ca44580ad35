"""Rewards of the built-in tasks: arithmetic, and answers that end in `#### <number>` (GSM8K)."""

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from .cells import Text, spoken

_FINAL_NUMBER = re.compile(r"####[ \t]*(-?\$?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?)\s*\Z")


def final_number(text: str) -> Decimal | None:
    """The number after `####` at the end of the text, or None."""
    found = _FINAL_NUMBER.search(text)
    return Decimal(re.sub(r"[,$]", "", found.group(1))) if found else None


def is_numbered(answer: Any) -> bool:
    """Whether `answer_correct` can compare with this answer."""
    return isinstance(answer, str) and final_number(answer) is not None


def exact_match(
    completions: Sequence[Text], answer: Sequence[str], finished: Sequence[bool], **_: Any
) -> list[float]:
    """1 if the completion is the answer and then ends, else 0."""
    rows = zip(completions, answer, finished, strict=True)
    return [float(end and spoken(text).strip() == wanted) for text, wanted, end in rows]


def ended(completions: Sequence[Text], finished: Sequence[bool], **_: Any) -> list[float]:
    """1 if the completion ends with an end token, else 0."""
    return [float(end) for end in finished]


def answer_format(completions: Sequence[Text], finished: Sequence[bool], **_: Any) -> list[float]:
    """1 if the completion ends with `#### <number>` and an end token, else 0."""
    rows = zip(completions, finished, strict=True)
    return [float(end and final_number(spoken(text)) is not None) for text, end in rows]


def answer_correct(
    completions: Sequence[Text], answer: Sequence[str], finished: Sequence[bool], **_: Any
) -> list[float]:
    """1 if the final number equals that of the answer and the completion ends, else 0."""
    found = [final_number(spoken(text)) for text in completions]
    rows = zip(found, map(final_number, answer), finished, strict=True)
    return [float(end and own is not None and own == wanted) for own, wanted, end in rows]
