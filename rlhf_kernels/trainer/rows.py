"""Parses the columns of a dataset into rows: TRL's forms and those of well-known datasets."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from .answers import final_number
from .cells import Text, content, json_cell, label_cell, margin_cell, spoken, string_cell, text_cell
from .config import UserError, require
from .files import read_objects

# Columns of a question, of its input, and of its answer. A line break ends question and input.
_QUESTIONS = (
    ("question", (), ("answer", "response")),
    ("query", (), ("response", "answer")),
    ("instruction", ("input", "context"), ("output", "response")),
)
# Columns that hold a prompt in some datasets and something else in others.
_UNMAPPED = ("input", "problem", "context", "history", "conversation")
_SYSTEMS = ("system", "system_prompt")
# Arguments that the trainer itself passes to reward functions.
_RESERVED = ("prompts", "completions", "completion_ids", "finished", "trainer_state")
_RESERVED += ("log_extra", "log_metric")
# Scripts that have no spaces between words.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef"
)
_LAST_WORD = re.compile(rf" ?[^\s{_UNSPACED}]*\Z")


class Row(NamedTuple):
    """A prompt, what may follow it, the columns for reward functions, and its origin.

    `origin` is the file and the line or row, for errors; comparisons ignore it.
    """

    prompt: Text
    completion: Text | None = None
    chosen: Text | None = None
    rejected: Text | None = None
    columns: dict[str, Any] = {}  # noqa: RUF012 - a NamedTuple's default, never changed
    origin: str = ""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Row) and self[:5] == other[:5]

    def __ne__(self, other: object) -> bool:
        return not self == other

    @property
    def answer(self) -> Any:
        """What the rewards compare a completion with, or the completion of the data."""
        return self.columns.get("answer", self.completion)

    @property
    def template(self) -> dict[str, Any]:
        """The row's own arguments of the chat template."""
        return template_arguments(self.columns)


def template_arguments(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the chat template from the columns `tools` and `chat_template_kwargs`."""
    # With an empty list some templates still announce tools.
    tools = {"tools": columns["tools"]} if columns.get("tools") else {}
    return tools | (columns.get("chat_template_kwargs") or {})


def read_rows(path: str, kind: str) -> list[Row]:
    """The rows of a file, a folder, a glob pattern or a hub dataset.

    Raises:
        UserError: names the file and the line or row of a bad row.
    """
    rows = []
    for place, found in read_objects(path):
        try:
            rows += [row._replace(origin=place) for row in parse_rows(found, kind)]
        except UserError as error:
            raise UserError(f"{place}: {error}") from error
    require(bool(rows), path, "at least one row", 0)
    return rows


def parse_rows(row: Any, kind: str) -> list[Row]:
    """The rows of an object: one, or two where KTO is given a preference."""
    if kind == "unpaired" and isinstance(row, dict) and "label" not in row and "chosen" in row:
        pair = parse_row(row, "preference")
        answers = ((pair.chosen, True), (pair.rejected, False))
        return [
            Row(pair.prompt, answer, columns=pair.columns | {"label": label})
            for answer, label in answers
        ]
    return [parse_row(row, kind)]


def parse_row(row: Any, kind: str) -> Row:
    """Parses an object into a Row; docs/trainer.md has a table of the supported forms.

    Args:
        row: an object of the dataset.
        kind: "supervised", "preference", "unpaired" or "prompt".

    Raises:
        UserError: columns are missing or have values of another type.
    """
    require(isinstance(row, dict), "row", "an object", row)
    columns = {k: v for k, v in row.items() if k not in ("prompt", "completion", "messages")}
    if kind == "prompt":
        for name in _RESERVED:
            expected = "a column of another name: the trainer gives reward functions its own"
            require(name not in row, repr(name), expected, row.get(name))
    made = _preference if kind == "preference" else _supervised
    parsed = made(row, "supervised" if kind == "unpaired" else kind, columns)
    if kind == "unpaired":
        columns["label"] = label_cell(row.get("label"))
    if kind == "prompt":
        require(bool(parsed.prompt), "'messages'", "something to answer", parsed.completion)
    if not isinstance(parsed.prompt, str):
        for name, form in (("tools", list), ("chat_template_kwargs", dict)):
            if name in row:
                columns[name] = json_cell(name, row[name], form)
    return parsed


def _supervised(row: dict[str, Any], kind: str, columns: dict[str, Any]) -> Row:
    """A prompt, with its completion if the row has one."""
    # UltraChat repeats the first message as 'prompt'; such a row is read from 'messages'.
    if "prompt" in row and not (kind == "supervised" and _lacks_completion(row)):
        prompt = text_cell(row, "prompt")
        if kind != "supervised" and row.get("completion") is None:
            return Row(prompt, columns=columns)
        return Row(*_joined(prompt, text_cell(row, "completion")), columns=columns)
    for name in ("messages", "conversations"):
        if name in row:
            columns.pop(name, None)
            return _dialogue(name, row, kind, columns)
    asked = _question(row)
    if asked is not None:
        return _answered(*asked, row, kind, columns)
    if kind == "supervised" and "text" in row:
        return Row("", string_cell(row, "text"), columns=columns)
    needed = "'prompt', 'messages', 'conversations', 'question', 'query', 'instruction'"
    needed += " or 'text'" if kind == "supervised" else ""
    require(False, "'prompt'", f"one of the columns {needed}", list(row))
    raise AssertionError


def _lacks_completion(row: dict[str, Any]) -> bool:
    return "completion" not in row and "messages" in row


def _dialogue(name: str, row: dict[str, Any], kind: str, columns: dict[str, Any]) -> Row:
    messages = text_cell(row, name)
    require(isinstance(messages, list), repr(name), "a list of messages", messages)
    system = row.get("system")
    if name == "conversations" and isinstance(system, str) and system:
        if messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
    answered = messages[-1]["role"] == "assistant"
    require(answered or kind == "prompt", f"{name!r}", "an assistant's at the end", messages)
    cut = len(messages) - answered
    return Row(messages[:cut], messages[cut:] or None, columns=columns)


def _question(row: dict[str, Any]) -> tuple[str, tuple[str, ...]] | None:
    """The prompt made from the columns of a question, and the possible names of its answer."""
    for name, more, answers in _QUESTIONS:
        if name in row:
            # LLaMA-Factory has earlier turns in 'history', which a text cannot hold.
            expected = "nothing: give earlier turns as 'messages'"
            require(not row.get("history"), "'history'", expected, row.get("history"))
            # Orca has a system prompt, which precedes the question.
            first = [key for key in _SYSTEMS if row.get(key) not in (None, "")]
            parts = [string_cell(row, key) for key in (*first, name)]
            # Alpaca's input is empty or null if the instruction needs none.
            parts += [string_cell(row, extra) for extra in more if row.get(extra) not in (None, "")]
            return "".join(part + "\n" for part in parts), answers
    return None


def _answered(
    prompt: str, answers: tuple[str, ...], row: dict[str, Any], kind: str, columns: dict[str, Any]
) -> Row:
    name = next((name for name in answers if name in row), answers[0])
    gsm8k = "question" in row and name == "answer"
    if kind == "prompt" and not gsm8k and row.get(name) is None:
        return Row(prompt, columns=columns)
    answer = string_cell(row, name)
    scored = kind == "supervised" or not gsm8k or final_number(answer) is not None
    require(scored, "'answer'", "an end in '#### <number>'", answer[-40:])
    return Row(prompt, answer, columns=columns)


def _preference(row: dict[str, Any], kind: str, columns: dict[str, Any]) -> Row:
    chosen, rejected = text_cell(row, "chosen"), text_cell(row, "rejected")
    differ = type(chosen) is type(rejected) and chosen != rejected
    require(differ, "'chosen' and 'rejected'", "two answers of one form that differ", chosen)
    if "margin" in row:
        columns["margin"] = margin_cell(row["margin"])
    if "prompt" in row:
        prompt: Text | None = text_cell(row, "prompt")
    elif "conversations" in row:
        prompt = text_cell(row, "conversations")
    else:
        asked = _question(row)
        prompt = asked[0] if asked else None
    turns = [] if isinstance(chosen, str) else [m["role"] for m in chosen]
    if prompt is None and "user" not in turns:
        prompt = _asked_before(row)
    if prompt is not None and not (isinstance(prompt, str) and "user" in turns):
        (asked, first), (again, second) = _joined(prompt, chosen), _joined(prompt, rejected)
        same = asked == again and first != second
        require(same, "'chosen' and 'rejected'", "different answers to one prompt", chosen)
        return Row(asked, None, first, second, columns)
    cut = _common_prompt(chosen, rejected)
    apart = bool(chosen[cut:]) and bool(rejected[cut:])
    require(apart, "'chosen' and 'rejected'", "that neither begins the other", chosen)
    # Ultrafeedback repeats the prompt in both conversations.
    held = prompt is None or prompt.strip() in spoken(chosen[:cut])
    require(held, "'prompt'", "a text that both conversations begin with", prompt)
    return Row(chosen[:cut], None, chosen[cut:], rejected[cut:], columns)


def _asked_before(row: dict[str, Any]) -> Text | None:
    """The prompt of answers without own prompt: `messages` that end with a user's, or None."""
    if row.get("messages"):
        messages = text_cell(row, "messages")
        asks = isinstance(messages, list) and messages[-1]["role"] != "assistant"
        require(asks, "'messages'", "a conversation that 'chosen' and 'rejected' answer", messages)
        return messages
    found = next((name for name in _UNMAPPED if row.get(name)), None)
    expected = "the prompt of 'chosen' and 'rejected' in a column 'prompt'; rename the column"
    require(found is None, repr(found), expected, row.get(str(found)))
    return None


def _joined(prompt: Text, answer: Text) -> tuple[Text, Text]:
    """Prompt and answer in the same form; an answer that repeats the prompt loses it.

    If only one is a text, it becomes a message of the user (prompt) or the assistant (answer).
    """
    if isinstance(prompt, str) and isinstance(answer, str):
        return prompt, answer
    if isinstance(answer, str):
        return prompt, [{"role": "assistant", "content": answer}]
    if isinstance(prompt, str):
        users = [i for i, m in enumerate(answer) if m["role"] == "user"]
        if users:
            cut = next((i for i in reversed(users) if prompt.strip() in content(answer[i])), None)
            require(cut is not None, "'prompt'", "a text that the conversation repeats", prompt)
            return answer[: cut + 1], _reply(answer[cut + 1 :])
        cut = sum(m["role"] == "system" for m in answer[:1])
        return [*answer[:cut], {"role": "user", "content": prompt}], _reply(answer[cut:])
    sizes = range(min(len(prompt), len(answer)), 0, -1)
    repeated = next((n for n in sizes if prompt[-n:] == answer[:n]), 0)
    return prompt, _reply(answer[repeated:])


def _reply(answer: list[dict[str, Any]]) -> list[dict[str, Any]]:
    require(bool(answer), "answer", "a message after the prompt", answer)
    return answer


def _common_prompt(chosen: Text, rejected: Text) -> int:
    """The length of the prompt that two answers without a prompt column share."""
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shorter = min(len(chosen), len(rejected))
    same = next((i for i, (a, b) in pairs if a != b), shorter)
    if isinstance(chosen, str):
        # Go back to the start of the word, before the space.
        return len(_LAST_WORD.sub("", chosen[:same]))
    if same == shorter and chosen[same - 1]["role"] == "assistant":
        # One conversation continues the other, whose last message is therefore its answer.
        return same - 1
    return same
