"""Conversations as text, through the tokenizer's chat template."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from .cells import Text
from .config import UserError, require


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
        UserError: there is no template, it raises, or it leaves out tools or their calls.
    """
    if not tokenizer.chat_template:
        how = "give a model with one, set it and save the tokenizer, or give texts"
        raise UserError(f"chat template: the tokenizer has none for a conversation; {how}")
    taken = {"conversation", "tokenize", "add_generation_prompt", "continue_final_message"}
    clash = sorted(taken & template.keys())
    require(not clash, "chat_template_kwargs", "arguments of the template alone", clash)
    given = [_in_parts(m) for m in messages] if _wants_parts(tokenizer) else [*messages]
    write = functools.partial(tokenizer.apply_chat_template, tokenize=False, **options, **template)
    try:
        try:
            text = write(given)
        except Exception:
            if all("content" in m for m in given):
                raise
            # Calls without content: some templates read it all the same.
            text = write([{"content": "", **m} for m in given])
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        roles = ", ".join(m["role"] for m in messages)
        raise UserError(
            f"chat template: {type(error).__name__}: {reason[:200]} (roles: {roles})"
        ) from error
    tools = [tool.get("function", tool) for tool in template.get("tools") or ()]
    calls = [call.get("function", call) for m in messages for call in m.get("tool_calls") or ()]
    for column, functions in (("tools", tools), ("tool_calls", calls)):
        names = [str(f["name"]) for f in functions if isinstance(f, dict) and "name" in f]
        lost = [name for name in names if name not in text]
        require(not lost, f"chat template: {column!r}", "a template that writes them", lost)
    return text


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
    """Without the space after a last special token."""
    end = text.rstrip()
    return end if end.endswith(_specials(tokenizer, len(tokenizer))) else text


@functools.lru_cache(maxsize=16)
def _specials(tokenizer: PreTrainedTokenizerBase, _: int) -> tuple[str, ...]:
    return tuple({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()} - {""})
