"""Renders conversations as text with the tokenizer's chat template."""

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from .cells import Text, content, ends_with_assistant
from .config import UserError, require
from .marks import Conversation, require_whole

# Fields in which datasets keep a model's reasoning beside the content.
_REASONING = ("reasoning_content", "reasoning", "thinking")


def start_text(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Text,
    template: Mapping[str, Any],
    *,
    apart: bool = False,
) -> str:
    """The text of a prompt, up to the start of its completion.

    A completion continues an assistant's message at the end of the prompt, as in TRL, unless it is
    `apart`, a message of its own.
    """
    if isinstance(prompt, str):
        return prompt
    if not prompt:
        return ""
    if apart or not ends_with_assistant(prompt):
        return rendered(tokenizer, prompt, template, add_generation_prompt=True)
    # Without options first, so that what is wrong with the conversation itself is told as ever.
    rendered(tokenizer, prompt, template)
    last = prompt[-1]
    called = last.get("tool_calls")
    expected = "text alone in an assistant's message at its end, for the completion to continue"
    require(not called, "prompt", f"{expected}, without tool calls", called)
    try:
        return _written(tokenizer, prompt, template, continue_final_message=True)
    except Exception as error:
        raise UserError(
            "chat template: expected one that writes the assistant's message at the prompt's end "
            "as it is, for the completion to continue: take another, or end the prompt with a "
            f"user's message, found {last.get('content')!r:.80}"
        ) from error


def continued(
    prompt: list[dict[str, Any]], answer: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The prompt without its last message, and the answer with that message's beginning."""
    last, first = prompt[-1], answer[0]
    other = [k for k in last.keys() & first.keys() - {"role", "content"} if last[k] != first[k]]
    expected = "one value in the prompt's last message and in the answer that continues it"
    require(not other, repr(next(iter(other), "")), expected, [first.get(k) for k in other])
    text = content(last) + content(first)
    return prompt[:-1], [{**last, **first, "content": text}, *answer[1:]]


def rendered(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    template: Mapping[str, Any],
    **options: bool,
) -> str:
    """A conversation as text of the chat template.

    Raises:
        UserError: there is no template, it raises, or it drops messages, tools or tool calls.
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
    require_whole(
        lambda messages, tools: _written(tokenizer, messages, {**template, "tools": tools}),
        Conversation(messages, template.get("tools") or ()),
    )
    return text


def _written(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    template: Mapping[str, Any],
    **options: Any,
) -> str:
    """The rendered text, after converting the messages to a form that the template reads.

    Some templates need the content of tool calls, which have none. In OpenAI's format the arguments
    of a call are JSON strings. If the template would quote them again, or rejects them, it gets the
    parsed objects instead, as inference servers do.
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
            text = tokenizer.apply_chat_template([*form], tokenize=False, **options, **template)
            written.append(str(text))
        except Exception as error:
            raised.append(error)
        else:
            if not any(text in written[-1] for text in quoted):
                return written[-1]
    if not written:
        raise raised[0]
    return written[0]


def _functions(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The functions that a conversation calls, with name and arguments."""
    calls = [call for m in messages for call in m.get("tool_calls") or () if isinstance(call, dict)]
    return [f for call in calls if isinstance(f := call.get("function", call), dict)]


def _changed(form: Any, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
    """A tool or tool call with its function changed; some forms are the function itself."""
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


def holds(text: str, answer: Sequence[dict[str, Any]]) -> bool:
    """Whether a rendered text contains an answer with its reasoning, white space aside."""
    said = [m.get(key) for m in answer for key in ("content", *_REASONING)]
    whole = "".join(text.split())
    return all("".join(s.split()) in whole for s in said if isinstance(s, str))


def _in_parts(message: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(message.get("content"), str):
        return message
    return message | {"content": [{"type": "text", "text": message["content"]}]}


def _wants_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template reads only content in parts, as some templates of image models do."""
    return _probed_parts(tokenizer, str(tokenizer.chat_template))


@functools.lru_cache(maxsize=16)
def _probed_parts(tokenizer: PreTrainedTokenizerBase, _: str) -> bool:
    word, other, extra = "Zebra", "Okapi", "Quagga"

    def text(value: Any) -> str:
        try:
            message = {"role": "user", "content": value}
            return str(tokenizer.apply_chat_template([message], tokenize=False))
        except Exception:
            # A conversation that the template rejects is reported later, with its row.
            return ""

    # A template that reads strings, if only their first letters, is given strings. The words are
    # equally long: one that takes letters for parts may write something for each.
    if text(word) != text(other):
        return False
    # Python's or JSON's form of the parts holds the word too: it shows a field that no template
    # reads, or else the names of the fields.
    found = text([{extra: extra, "type": "text", "text": word}])
    plain = text(word) + text([])
    traces = (extra, "'type'", '"type"', "{'", '{"')
    return word in found and not any(t in found and t not in plain for t in traces)


def stripped(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text without white space after a final special token."""
    end = text.rstrip()
    return end if end.endswith(_specials(tokenizer, len(tokenizer))) else text


@functools.lru_cache(maxsize=16)
def _specials(tokenizer: PreTrainedTokenizerBase, _: int) -> tuple[str, ...]:
    return tuple({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()} - {""})
