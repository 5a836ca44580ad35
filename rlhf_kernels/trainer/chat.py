"""Conversations as text, through the tokenizer's chat template."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from .cells import Text, content
from .config import UserError, require

# Fields beside the content in which the formats of reasoning models keep the reasoning.
_REASONING = ("reasoning_content", "reasoning", "thinking")


def start_text(
    tokenizer: PreTrainedTokenizerBase, prompt: Text, template: Mapping[str, Any]
) -> str:
    """The text of a prompt, up to where its completion begins."""
    if isinstance(prompt, str):
        return prompt
    if not prompt:
        return ""
    return rendered(tokenizer, prompt, template, add_generation_prompt=True)


def rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    template: Mapping[str, Any],
    **options: bool,
) -> str:
    """A conversation as the chat template writes it.

    Raises:
        UserError: there is no template, it raises, or it leaves out messages, tools or calls.
    """
    if not tokenizer.chat_template:
        how = "give a model with one, set it and save the tokenizer, or give texts"
        raise UserError(f"chat template: the tokenizer has none for a conversation; {how}")
    taken = {"conversation", "tokenize", "add_generation_prompt", "continue_final_message"}
    clash = sorted(taken & template.keys())
    require(not clash, "chat_template_kwargs", "arguments of the template alone", clash)
    try:
        text = _written(tokenizer, messages, template, **options)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        roles = ", ".join(m["role"] for m in messages)
        raise UserError(
            f"chat template: {type(error).__name__}: {reason[:200]} (roles: {roles})"
        ) from error
    _require_whole(tokenizer, messages, template, text)
    return text


def _written(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    template: Mapping[str, Any],
    **options: bool,
) -> str:
    """The text that the template renders, given the messages in a form that it reads.

    Some templates read the content of calls, which have none. In OpenAI's form arguments of calls
    are JSON texts: a template that would quote them once more, or does not take them, is given the
    objects that they stand for, as servers of models do.
    """
    if _wants_parts(tokenizer):
        messages = [_in_parts(m) for m in messages]
    objects = [_with_calls(m, _parsed) for m in messages]
    forms = [messages] if objects == messages else [messages, objects]
    forms += [
        [{"content": "", **m} for m in f] for f in forms if any("content" not in m for m in f)
    ]
    texts = [f["arguments"] for f in _functions(messages) if isinstance(f.get("arguments"), str)]
    quoted = [json.dumps(text, ensure_ascii=plain) for text in texts for plain in (True, False)]
    written, raised = [], []
    for form in forms:
        try:
            written.append(
                tokenizer.apply_chat_template([*form], tokenize=False, **options, **template)
            )
        except Exception as error:
            raised.append(error)
        else:
            if not any(text in written[-1] for text in quoted):
                return written[-1]
    if not written:
        raise raised[0]
    return written[0]


def _functions(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Names of the functions that a conversation calls."""
    calls = [call for m in messages for call in m.get("tool_calls") or () if isinstance(call, dict)]
    return [f for call in calls if isinstance(f := call.get("function", call), dict)]


def _changed(form: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """A tool or a call, its function changed; some are the function itself."""
    if not isinstance(form, dict):
        return form
    function = form.get("function")
    return form | {"function": change(function)} if isinstance(function, dict) else change(form)


def _with_calls(
    message: dict[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    calls = message.get("tool_calls")
    return message | {"tool_calls": [_changed(c, change) for c in calls]} if calls else message


def _parsed(function: dict[str, Any]) -> dict[str, Any]:
    try:
        arguments = json.loads(function["arguments"])
    except (KeyError, TypeError, ValueError):
        return function
    return function | {"arguments": arguments} if isinstance(arguments, dict) else function


def _require_whole(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    template: Mapping[str, Any],
    text: str,
) -> None:
    """Raises UserError where the template leaves out tools, calls of them, or messages.

    They are written once more with a mark in each: a function's name or a short content may stand
    elsewhere in the text too. Users and assistants every template writes, and what an assistant
    said earlier it may rewrite.
    """
    marks: list[tuple[str, str, str]] = []

    def mark(what: str, value: str, start: str = "") -> str:
        marks.append((what, value, f"{start}Zebra{len(marks)}x"))
        return marks[-1][2]

    def renamed(what: str, function: dict[str, Any]) -> dict[str, Any]:
        name = function.get("name")
        return function | {"name": mark(what, name, name)} if isinstance(name, str) else function

    conversation = []
    for message in messages:
        marked = _with_calls(message, functools.partial(renamed, "'tool_calls'"))
        if message["role"] not in ("user", "assistant") and content(message).strip():
            what = f"a message of role {message['role']!r}"
            marked = marked | {"content": mark(what, content(message))}
        called = {name: new for what, name, new in marks if what == "'tool_calls'"}
        if message["role"] == "tool" and message.get("name") in called:
            marked = marked | {"name": called[message["name"]]}
        conversation.append(marked)
    tools = [
        _changed(t, functools.partial(renamed, "'tools'")) for t in template.get("tools") or ()
    ]
    if not marks:
        return
    try:
        again = _written(tokenizer, conversation, {**template, "tools": tools or None})
    except Exception:
        # It reads what is marked. A name that is nowhere is seen all the same.
        again, marks = text, [(what, name, name) for what, name, new in marks if name in new]
    for what, value, new in marks:
        expected = "a template that writes it: take another, or leave this out of the row"
        require(new in again, f"chat template: {what}", expected, value)


def holds(text: str, answer: Sequence[dict[str, Any]]) -> bool:
    """Whether a rendered text has the words of an answer, its reasoning too, white space aside."""
    said = [m.get(key) for m in answer for key in ("content", *_REASONING)]
    whole = "".join(text.split())
    return all("".join(s.split()) in whole for s in said if isinstance(s, str))


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(message.get("content"), str):
        return message
    return message | {"content": [{"type": "text", "text": message["content"]}]}


def _wants_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template reads content in parts only, as some of image models do."""
    return _probed_parts(tokenizer, str(tokenizer.chat_template))


@functools.lru_cache(maxsize=16)
def _probed_parts(tokenizer: PreTrainedTokenizerBase, _: str) -> bool:
    word = "Zebra"
    message = {"role": "user", "content": word}
    found = []
    for form in (message, _in_parts(message)):
        try:
            found.append(word in tokenizer.apply_chat_template([form], tokenize=False))
        except Exception:
            # Nothing to learn from it; a conversation that it refuses is reported with its row.
            found.append(False)
    return found == [False, True]


def stripped(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text without the space after a last special token."""
    end = text.rstrip()
    return end if end.endswith(_specials(tokenizer, len(tokenizer))) else text


@functools.lru_cache(maxsize=16)
def _specials(tokenizer: PreTrainedTokenizerBase, _: int) -> tuple[str, ...]:
    return tuple({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()} - {""})
