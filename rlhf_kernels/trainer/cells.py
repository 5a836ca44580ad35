"""Checks the cells of a dataset: texts, conversations, JSON and numbers."""

import json
import math
import re
from decimal import Decimal
from typing import Any

from .config import UserError, require

#: A text, or a conversation: [{"role": "user", "content": "..."}, ...].
Text = str | list[dict[str, Any]]

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "observation": "tool",
    "function_response": "tool",
}

# A list of messages as text: JSON, or as Python or NumPy print it.
_PRINTED = re.compile(r"\s*\[\s*\{.*\}\s*\]\s*", re.DOTALL)
_PRINTED_ROLE = re.compile(
    rf"[\"'](?:role|from)[\"']\s*:\s*[\"'](user|assistant|system|developer|tool|{'|'.join(_ROLES)})[\"']"
)
_PRINTED_CONTENT = re.compile(r"[\"'](content|value)[\"']\s*:")
_ASKING = ("user", "human", "system", "developer")

_LARGEST = float.fromhex("0x1.fffffep+127")


def content(message: dict[str, Any]) -> str:
    return str(message.get("content") or "")


def starts_with_assistant(answer: Text) -> bool:
    """Whether an answer may continue an assistant's message."""
    return isinstance(answer, str) or answer[0]["role"] == "assistant"


def ends_with_assistant(prompt: Text) -> bool:
    """Whether a prompt is a conversation whose last message may be continued."""
    return bool(prompt) and not isinstance(prompt, str) and prompt[-1]["role"] == "assistant"


def _found(row: dict[str, Any], key: str) -> Any:
    return row[key] if key in row else "no such column"


def string_cell(row: dict[str, Any], key: str, *, answers: bool = False) -> str:
    """A cell that must hold a non-empty text, which `answers` a text or asks."""
    value = row.get(key)
    require(isinstance(value, str) and bool(value), repr(key), "a text", _found(row, key))
    return _plain(repr(key), str(value), answers=answers)


def _plain(name: str, text: str, *, answers: bool = False) -> str:
    """A text of a cell. Tables export a conversation as its text, which no template would see.

    What answers a text may be JSON of people with roles, or a request, which a user's message ends.
    """
    roles = _PRINTED_ROLE.findall(text) if _PRINTED.fullmatch(text) else []
    printed = bool(roles) and len(_PRINTED_CONTENT.findall(text)) >= len(roles)
    asks = answers and bool(roles) and roles[-1] in _ASKING
    require(not printed or asks, name, "a list of messages, not the text of one", text)
    return _encodable(name, text)


def _encodable(name: str, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"{text[error.start]!r} at character {error.start}"
        raise UserError(f"{name}: expected text, found half a surrogate pair, {found}") from error
    return text


def text_cell(row: dict[str, Any], key: str, *, answers: bool = False) -> Text:
    """A cell that must hold a non-empty text or conversation; `answers` as in `string_cell`."""
    value: Any = row.get(key)
    # LLaMA-Factory's preference data has a single message here.
    value = [value] if isinstance(value, dict) else value
    conversation = isinstance(value, list) and all(isinstance(m, dict) for m in value)
    good = bool(value) and (isinstance(value, str) or conversation)
    require(good, repr(key), "a text or a list of messages", _found(row, key))
    if isinstance(value, str):
        return _plain(repr(key), value, answers=answers)
    return [_message(repr(key), f" in message {i}", m) for i, m in enumerate(value, start=1)]


def _message(name: str, where: str, message: dict[str, Any]) -> dict[str, Any]:
    """A message with `role` and `content`, also from ShareGPT's `from` and `value`.

    Parts of content are joined to one text. Null fields, which tables fill in, are removed.
    """
    message = {k: v for k, v in message.items() if v is not None}
    for theirs, ours in (("from", "role"), ("value", "content")):
        if theirs in message and ours not in message:
            message = {ours if k == theirs else k: v for k, v in message.items()}
    role: Any = message.get("role")
    require(isinstance(role, str) and bool(role), name, f"a 'role'{where}", message)
    message["role"] = _ROLES.get(role, role)
    if message.get("tool_calls"):
        message["tool_calls"] = _pruned(message["tool_calls"])
    if "content" not in message:
        called = bool(message.get("tool_calls"))
        require(called, name, f"'content' or 'tool_calls'{where}", message)
        return message
    found = message["content"]
    if isinstance(found, list):
        found = "".join(_part(name, where, part) for part in found)
    require(isinstance(found, str), name, f"a text as 'content'{where}", message)
    message["content"] = _encodable(name + where, found)
    return message


def _part(name: str, where: str, part: Any) -> str:
    text = part.get("text") if isinstance(part, dict) else part
    good = isinstance(text, str) and (isinstance(part, str) or part.get("type", "text") == "text")
    require(good, name, f"parts of type 'text'{where}", part)
    return str(text)


def _pruned(value: Any) -> Any:
    """The value without nulls, which tables fill in for missing fields of a struct."""
    if isinstance(value, dict):
        return {k: _pruned(v) for k, v in value.items() if v is not None}
    return [_pruned(v) for v in value] if isinstance(value, list) else value


def json_cell(name: str, value: Any, form: type) -> Any:
    """A cell that holds a list or an object, or JSON of one; null stays null."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise UserError(f"{name!r}: expected JSON, found {value[:40]!r}: {error}") from error
    what = "a list of JSON schemas" if form is list else "an object"
    require(value is None or isinstance(value, form), repr(name), what, value)
    good = form is dict or all(isinstance(tool, dict) for tool in value or ())
    require(good, repr(name), what, value)
    return _pruned(value)


def margin_cell(value: Any) -> float:
    number = isinstance(value, int | float | Decimal) and not isinstance(value, bool)
    try:
        found = float(value) if number else math.nan
    except OverflowError:
        found = math.inf
    # Larger numbers are infinite in fp32.
    require(abs(found) <= _LARGEST, "'margin'", "a finite number of fp32", value)
    return found


def label_cell(value: Any) -> bool:
    """Whether a completion is desirable: a bool, 0 or 1, or one of these as text."""
    text = value.strip().lower() if isinstance(value, str) else value
    known = {"true": True, "false": False, "1": True, "0": False, 1: True, 0: False}
    found = known.get(text) if isinstance(text, str | int | float) else None
    require(found is not None, "'label'", "true or false", value)
    return bool(found)


def transcript(value: Any) -> Any:
    """A conversation as lines `role: content`; any other value as it is."""
    if not (isinstance(value, list) and value and all(isinstance(m, dict) for m in value)):
        return value
    return "\n".join(f"{m.get('role')}: {content(m)}" for m in value)


def spoken(text: Text | None) -> str:
    """The text, or the joined contents of a conversation."""
    if text is None or isinstance(text, str):
        return text or ""
    return "\n".join(map(content, text))
