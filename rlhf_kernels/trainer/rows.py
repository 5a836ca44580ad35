"""Parses the columns of a dataset into rows: TRL's forms and those of well-known datasets."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from .answers import final_number
from .cells import (
    Text,
    content,
    ends_with_assistant,
    json_cell,
    label_cell,
    margin_cell,
    spoken,
    starts_with_assistant,
    string_cell,
    text_cell,
)
from .config import UserError, require
from .files import read_objects

# Columns of a question, of its input, and of its answer. A line break ends question and input.
_QUESTIONS = (
    ("question", ("answer", "response")),
    ("query", ("response", "answer")),
    ("instruction", ("output", "response")),
)
_INPUTS = ("input", "context")
# Columns that hold a prompt in some datasets and something else in others.
_UNMAPPED = ("input", "problem", "context", "history", "conversation")
_SYSTEMS = ("system", "system_prompt")
_SYSTEM_ROLES = ("system", "developer")
# Arguments that the trainer itself passes to reward functions.
_RESERVED = (
    *("prompts", "completions", "completion_ids", "finished"),
    *("trainer_state", "log_extra", "log_metric"),
)
# Scripts that have no spaces between words.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef"
)
_LAST_WORD = re.compile(rf" ?[^\s{_UNSPACED}]*\Z")


class Row(NamedTuple):
    """A prompt, what may follow it, the columns for reward functions, and its origin.

    `origin` is the file and the line or row, for errors; comparisons ignore it. `apart`: what
    follows an assistant's message at the prompt's end is a message of its own, as a whole
    conversation has it; otherwise it continues that message.
    """

    prompt: Text
    completion: Text | None = None
    chosen: Text | None = None
    rejected: Text | None = None
    columns: dict[str, Any] = {}  # noqa: RUF012 - a NamedTuple's default, never changed
    origin: str = ""
    apart: bool = False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Row) and (*self[:5], self.apart) == (*other[:5], other.apart)

    def __ne__(self, other: object) -> bool:
        return not self == other

    @property
    def answer(self) -> Any:
        """What the rewards compare a completion with, or the completion of the data."""
        return self.columns.get("answer", self.completion)

    @property
    def is_apart(self) -> bool:
        """`apart`, or what follows is no assistant's message and cannot continue one."""
        answers = (a for a in (self.completion, self.chosen, self.rejected) if a)
        return self.apart or not all(map(starts_with_assistant, answers))

    @property
    def template(self) -> dict[str, Any]:
        """The row's own arguments of the chat template."""
        return template_arguments(self.columns)


def template_arguments(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the chat template from the columns `tools` and `chat_template_kwargs`."""
    # With an empty list some templates still announce tools.
    tools = {"tools": columns["tools"]} if columns.get("tools") else {}
    return tools | (columns.get("chat_template_kwargs") or {})


# Of a prompt, by whether it is a text.
_FORMS = ("conversation", "text")


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
    first, *others = (isinstance(row.prompt, str) for row in rows)
    if (not first) in others:
        place = rows[1 + others.index(not first)].origin
        # The chat template is for conversations only, and reward functions expect one form.
        expected = f"a {_FORMS[first]}, as {rows[0].origin} has, or all rows in one form"
        raise UserError(f"{place}: expected {expected}; found a {_FORMS[not first]}")
    return rows


def parse_rows(row: Any, kind: str) -> list[Row]:
    """The rows of an object: one, or two where KTO is given a preference."""
    if kind == "unpaired" and isinstance(row, dict) and "label" not in row and "chosen" in row:
        pair = parse_row(row, "pair")
        answers = ((pair.chosen, True), (pair.rejected, False))
        return [
            Row(pair.prompt, answer, columns=pair.columns | {"label": label}, apart=pair.apart)
            for answer, label in answers
        ]
    return [parse_row(row, kind)]


def parse_row(row: Any, kind: str) -> Row:
    """Parses an object into a Row; docs/trainer.md has a table of the supported forms.

    Args:
        row: an object of the dataset.
        kind: "supervised", "preference" (with the column `margin`), "pair" (a preference without
            it), "unpaired" or "prompt".

    Raises:
        UserError: columns are missing or have values of another type.
    """
    require(isinstance(row, dict), "row", "an object", row)
    columns = {k: v for k, v in row.items() if k not in ("prompt", "completion", "messages")}
    if kind == "prompt":
        for name in _RESERVED:
            expected = "a column of another name: the trainer gives reward functions its own"
            require(name not in row, repr(name), expected, row.get(name))
    made = _preference if kind in ("preference", "pair") else _supervised
    parsed = made(row, "supervised" if kind == "unpaired" else kind, columns)
    if kind == "unpaired":
        columns["label"] = label_cell(row.get("label"))
    if kind == "prompt":
        require(bool(parsed.prompt), "'messages'", "something to answer", parsed.completion)
    parsed = _with_system(row, parsed)
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
        completion = text_cell(row, "completion", answers=isinstance(prompt, str))
        return Row(*_joined(prompt, completion, "completion"), columns=columns)
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
    assert not isinstance(messages, str)  # As required.
    answered = messages[-1]["role"] == "assistant"
    require(answered or kind == "prompt", f"{name!r}", "an assistant's at the end", messages)
    cut = len(messages) - answered
    # Online, what a prompt ends with is continued, whatever came after it in the data.
    apart = kind != "prompt" and ends_with_assistant(messages[:cut])
    return Row(messages[:cut], messages[cut:] or None, columns=columns, apart=apart)


def _question(row: dict[str, Any]) -> tuple[str, tuple[str, ...]] | None:
    """The prompt made from the columns of a question, and the possible names of its answer."""
    for name, answers in _QUESTIONS:
        if name in row:
            # LLaMA-Factory has earlier turns in 'history', which a text cannot hold.
            expected = "nothing: give earlier turns as 'messages'"
            require(not row.get("history"), "'history'", expected, row.get("history"))
            # Alpaca's input is empty or null if the instruction needs none.
            more = [extra for extra in _INPUTS if row.get(extra) not in (None, "")]
            parts = [string_cell(row, key) for key in (name, *more)]
            return "".join(part + "\n" for part in parts), answers
    return None


def _answered(
    prompt: str, answers: tuple[str, ...], row: dict[str, Any], kind: str, columns: dict[str, Any]
) -> Row:
    name = next((name for name in answers if name in row), answers[0])
    gsm8k = "question" in row and name == "answer"
    if kind == "prompt" and not gsm8k and row.get(name) is None:
        return Row(prompt, columns=columns)
    answer = string_cell(row, name, answers=True)
    scored = kind == "supervised" or not gsm8k or final_number(answer) is not None
    expected = "an end in '#### <number>', or a column 'prompt' in the place of 'question'"
    require(scored, "'answer'", expected, answer[-40:])
    return Row(prompt, answer, columns=columns)


def _preference(row: dict[str, Any], kind: str, columns: dict[str, Any]) -> Row:
    chosen, rejected = text_cell(row, "chosen"), text_cell(row, "rejected")
    differ = type(chosen) is type(rejected) and chosen != rejected
    require(differ, "'chosen' and 'rejected'", "two answers of one form that differ", chosen)
    columns.pop("margin", None)
    if kind == "preference" and "margin" in row:
        columns["margin"] = margin_cell(row["margin"])
    if "prompt" in row:
        prompt: Text | None = text_cell(row, "prompt")
    elif "conversations" in row:
        prompt = text_cell(row, "conversations")
    else:
        asked = _question(row)
        prompt = asked[0] if asked else None
    turns = [] if isinstance(chosen, str) else [m["role"] for m in chosen]
    if prompt is None:
        prompt = _asked_before(row, whole="user" in turns)
    if prompt is not None and not (isinstance(prompt, str) and "user" in turns):
        start, first = _joined(prompt, chosen, "chosen")
        again, second = _joined(prompt, rejected, "rejected")
        same = start == again and first != second
        require(same, "'chosen' and 'rejected'", "different answers to one prompt", chosen)
        return Row(start, None, first, second, columns)
    cut = _common_prompt(chosen, rejected)
    apart = bool(chosen[cut:]) and bool(rejected[cut:])
    require(apart, "'chosen' and 'rejected'", "that neither begins the other", chosen)
    # Ultrafeedback repeats the prompt in both conversations.
    held = prompt is None or prompt.strip() in spoken(chosen[:cut])
    require(held, "'prompt'", "a text that both conversations begin with", prompt)
    for name, rest in (("chosen", chosen[cut:]), ("rejected", rejected[cut:])):
        # Two conversations that have no common beginning begin with a question each.
        last = None if isinstance(chosen, str) else chosen[cut - 1]
        asks = prompt is not None and last is not None and last["role"] != "assistant"
        _require_answer(name, rest, anywhere=not asks)
    apart = ends_with_assistant(chosen[:cut])
    return Row(chosen[:cut], None, chosen[cut:], rejected[cut:], columns, apart=apart)


def _asked_before(row: dict[str, Any], *, whole: bool) -> Text | None:
    """The prompt of answers without own prompt: `messages` that end with a user's, or None.

    `whole`: the answers are conversations, which may have the prompt themselves.
    """
    if row.get("messages"):
        messages = text_cell(row, "messages")
        asks = isinstance(messages, list) and messages[-1]["role"] != "assistant"
        if whole and not asks:
            # Ultrafeedback repeats the chosen conversation.
            return None
        require(asks, "'messages'", "a conversation that 'chosen' and 'rejected' answer", messages)
        return messages
    found = None if whole else next((name for name in _UNMAPPED if row.get(name)), None)
    expected = "the prompt of 'chosen' and 'rejected' in a column 'prompt'; rename the column"
    require(found is None, repr(found), expected, row.get(str(found)))
    return None


def _joined(prompt: Text, answer: Text, name: str) -> tuple[Text, Text]:
    """Prompt and answer in the same form; an answer that repeats the prompt loses it.

    If only one is a text, it becomes a message of the user (prompt) or the assistant (answer).
    `name` is the answer's column, for errors.
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
            assert cut is not None  # As required.
            return answer[: cut + 1], _reply(name, answer[cut + 1 :])
        cut = sum(m["role"] == "system" for m in answer[:1])
        return [*answer[:cut], {"role": "user", "content": prompt}], _reply(name, answer[cut:])
    first = [m for m in (*answer[:1], *prompt[:1]) if m["role"] in _SYSTEM_ROLES]
    if first == answer[:1] and answer[1 : 1 + len(prompt)] == prompt:
        # A whole conversation, with a system message that the prompt column lacks.
        return [*first, *prompt], _reply(name, answer[1 + len(prompt) :])
    sizes = range(min(len(prompt), len(answer)), 0, -1)
    repeated = next((n for n in sizes if prompt[-n:] == answer[:n]), 0)
    return prompt, _reply(name, answer[repeated:])


def _reply(name: str, answer: list[dict[str, Any]]) -> list[dict[str, Any]]:
    require(bool(answer), "answer", "a message after the prompt", answer)
    _require_answer(name, answer)
    return answer


def _require_answer(name: str, answer: Text, *, anywhere: bool = False) -> None:
    """Requires that a conversation begins with an answer, or else has one `anywhere`.

    What users and systems say is learned with a completion, so none may begin with it.
    """
    if isinstance(answer, str):
        return
    answers = any(m["role"] == "assistant" for m in answer)
    require(answers, repr(name), "an assistant's message after the prompt", answer)
    asks = not anywhere and answer[0]["role"] in ("user", *_SYSTEM_ROLES)
    expected = "an answer alone, or a conversation that begins with the prompt's own messages"
    require(not asks, repr(name), expected, answer)


def _with_system(row: dict[str, Any], parsed: Row) -> Row:
    """The row with the text of a column `system` or `system_prompt` before its prompt."""
    names = [name for name in _SYSTEMS if row.get(name) not in (None, "")]
    texts = [string_cell(row, name) for name in names]
    require(len({*texts}) < 2, "'system' and 'system_prompt'", "one text, or equal ones", texts)
    if not texts:
        return parsed
    name, text = repr(names[0]), texts[0]
    answers = [a for a in (parsed.completion, parsed.chosen, parsed.rejected) if a]
    if isinstance(parsed.prompt, str):
        if "prompt" in row or _question(row) is not None:
            return parsed._replace(prompt=f"{text}\n{parsed.prompt}")
        # Whole texts, which have no place for it.
        held = all(text in f"{parsed.prompt}{answer}" for answer in answers)
        require(held, name, "a text that the row's text holds, or a column 'prompt'", text)
        return parsed
    found = [
        [content(m).strip() for m in (*parsed.prompt, *answer) if m["role"] in _SYSTEM_ROLES]
        for answer in answers or [[]]
    ]
    if any(found):
        held = all(text.strip() in said for said in found)
        require(held, name, "what the conversation's system message says, or no column", text)
        return parsed
    return parsed._replace(prompt=[{"role": "system", "content": text}, *parsed.prompt])


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
