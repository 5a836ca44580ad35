"""Encodes rows as tokens: texts directly, conversations through the chat template.

A prompt and its completion are tokenised together, as text was in pretraining. The completion's
tokens begin where the joint tokens differ from those of the prompt alone, as in TRL: a token that
spans the boundary belongs to the completion.
"""

import contextlib
import functools
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from . import characters
from .cells import Text, content, ends_with_assistant, starts_with_assistant
from .chat import continued, holds, rendered, start_text, stripped
from .config import UserError, require
from .rows import Row

# The text never varies, so that Python shows the warning once.
_DIFFERS = (
    "a prompt has other tokens at its end where its completion follows: the completion is learned "
    "from where they differ, but generated after the whole prompt; end prompts at a word's end, "
    "without a space, or use a chat template that writes a prompt and its continuation alike"
)
_DROPS = (
    "the chat template leaves out a part of an answer, mostly its reasoning: what it leaves out is "
    "not learned; use a template that writes it"
)
_ENDS = (
    "a text has the tokenizer's end token before its end: it is learned as an end; take it out "
    "where no end is meant"
)
_SPECIAL = (
    "a message has a special token of the tokenizer in its content: it is read as that token, as "
    "where the chat template writes it; take it out where it is meant as text"
)
_UNKNOWN = (
    "the tokenizer has no tokens for some characters of the data: they become its unknown token"
)
_REMOVES = (
    "the tokenizer is built to leave out some characters of the data (its normalizer or "
    "pre-tokenizer removes them): they are neither read nor learned"
)
_NO_ARGUMENTS: Mapping[str, Any] = {}


def prompt_tokens(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Text,
    template: Mapping[str, Any] = _NO_ARGUMENTS,
    *,
    apart: bool = False,
) -> list[int]:
    """The tokens of a prompt, with the tokenizer's opening tokens but no closing ones.

    A conversation is rendered with the chat template, up to the start of the answer, which
    continues an assistant's message at its end unless it is `apart`; `template` has further
    arguments of the chat template.
    """
    start = start_text(tokenizer, prompt, template, apart=apart)
    _warn_of_special(tokenizer, prompt)
    return _tokens(tokenizer, [start], isinstance(prompt, str))[0]


def row_tokens(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Text,
    completion: Text,
    template: Mapping[str, Any] = _NO_ARGUMENTS,
    *,
    apart: bool = False,
) -> tuple[list[int], list[int]]:
    """The tokens of prompt and completion; the completion ends with the end token.

    Without a prompt, the tokenizer's opening tokens serve as the prompt, or else the first token,
    because nothing predicts it.
    """
    first, (rest,) = _split(tokenizer, prompt, [completion], template, apart=apart)
    if not first:
        first, rest = rest[:1], rest[1:]
    return first, rest + _closing(tokenizer, rest)


def pair_tokens(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Text,
    chosen: Text,
    rejected: Text,
    template: Mapping[str, Any] = _NO_ARGUMENTS,
    *,
    scored: bool = False,
    apart: bool = False,
) -> tuple[list[int], list[int], list[int]]:
    """The tokens of a prompt and its two completions, with end tokens.

    The prompt is empty if the completions have no common beginning. `scored` closes them for a
    reward model, as `whole_tokens` does.
    """
    first, rests = _split(tokenizer, prompt, [chosen, rejected], template, apart=apart)
    text = isinstance(chosen, str)
    close = functools.partial(_ending, tokenizer, text=text) if scored else None
    one, two = (r + (close(r) if close else _closing(tokenizer, r)) for r in rests)
    expected = "answers that differ as tokens: drop the row, or see to what makes them equal"
    require(one != two, "'chosen' and 'rejected'", expected, chosen)
    return first, one, two


def whole_tokens(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Text,
    completion: Text,
    *,
    ended: bool = True,
    template: Mapping[str, Any] = _NO_ARGUMENTS,
) -> list[int]:
    """The tokens of a prompt with its completion, as a reward model reads them.

    Tokenizers of encoders open and close every text ([CLS] ... [SEP]). Others add one end token to
    a completion that `ended`, and none to one that was truncated.
    """
    first, (rest,) = _split(tokenizer, prompt, [completion], template)
    ids = first + rest
    closing = _ending(tokenizer, ids, text=isinstance(completion, str))
    if ended or _frames(tokenizer):
        return ids + closing
    return ids[:-1] if ids[-1:] == [tokenizer.eos_token_id] else ids


def encode_prompt(tokenizer: PreTrainedTokenizerBase, row: Row) -> list[int]:
    """`prompt_tokens` of a row; errors name the row."""
    with naming(row):
        return prompt_tokens(tokenizer, row.prompt, row.template, apart=row.is_apart)


def encode_row(tokenizer: PreTrainedTokenizerBase, row: Row) -> tuple[list[int], list[int]]:
    """`row_tokens` of a row; errors name the row."""
    with naming(row):
        expected = "a completion: without it nothing can be learned"
        require(row.completion is not None, "row", expected, row.prompt)
        assert row.completion is not None  # As required.
        return row_tokens(tokenizer, row.prompt, row.completion, row.template, apart=row.is_apart)


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, row: Row, *, scored: bool = False
) -> tuple[list[int], list[int], list[int]]:
    """`pair_tokens` of a row; errors name the row."""
    assert row.chosen is not None and row.rejected is not None  # Every preference has both.
    with naming(row):
        return pair_tokens(
            tokenizer,
            row.prompt,
            row.chosen,
            row.rejected,
            row.template,
            scored=scored,
            apart=row.is_apart,
        )


@contextlib.contextmanager
def naming(row: Row) -> Iterator[None]:
    """Puts the row's origin in front of error messages."""
    try:
        yield
    except UserError as error:
        if not row.origin:
            raise
        raise UserError(f"{row.origin}: {error}") from error


# --- texts -----------------------------------------------------------------------------------


def _split(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Text,
    completions: Sequence[Text],
    template: Mapping[str, Any],
    *,
    apart: bool = False,
) -> tuple[list[int], list[list[int]]]:
    """The common first tokens, at most the prompt's, and the rest of each text; not closed."""
    text = isinstance(completions[0], str)
    apart = apart or not all(starts_with_assistant(c) for c in completions)
    start = start_text(tokenizer, prompt, template, apart=apart)
    if text:
        wholes = [f"{prompt}{completion}" for completion in completions]
    else:
        open_end = ends_with_assistant(prompt) and not apart
        assert not isinstance(prompt, str)  # Prompt and completions have one form.
        messages = [c for c in completions if not isinstance(c, str)]
        parts = [continued(prompt, c) if open_end else (prompt, c) for c in messages]
        # After the end token of an answer, templates add more, usually a line break.
        found = (rendered(tokenizer, [*before, *answer], template) for before, answer in parts)
        wholes = [stripped(tokenizer, whole) for whole in found]
        if not all(holds(whole, answer) for whole, (_, answer) in zip(wholes, parts, strict=True)):
            warnings.warn(_DROPS, stacklevel=2)
    alone, *ids = _tokens(tokenizer, [start, *wholes], text)
    require(all(ids), "text", "at least one token", completions[0])
    size = min(_common(alone, whole) for whole in ids)
    if size < len(alone):
        warnings.warn(_DIFFERS, stacklevel=2)
    rests = [whole[size:] for whole in ids]
    _warn_of_special(tokenizer, prompt, *completions)
    if text and any(tokenizer.eos_token_id in rest[:-1] for rest in rests):
        warnings.warn(_ENDS, stacklevel=2)
    return alone[:size], rests


def _warn_of_special(tokenizer: PreTrainedTokenizerBase, *texts: Text) -> None:
    """Warns of special tokens in messages, which no template keeps from being read as such."""
    if getattr(tokenizer, "split_special_tokens", False):
        return
    special = _special(tokenizer, len(tokenizer))
    said = (content(m) for text in texts if not isinstance(text, str) for m in text)
    if any(map(special.search, said)):
        warnings.warn(_SPECIAL, stacklevel=2)


@functools.lru_cache(maxsize=16)
def _special(tokenizer: PreTrainedTokenizerBase, _: int) -> re.Pattern[str]:
    added = tokenizer.added_tokens_decoder.values()
    marks = {str(token) for token in added if getattr(token, "special", False)}
    tokens = filter(None, {*tokenizer.all_special_tokens, *marks})
    return re.compile("|".join(map(re.escape, tokens)) or r"(?!)")


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the common beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))


def _tokens(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], text: bool
) -> list[list[int]]:
    """The tokens of texts with the tokenizer's opening; chat templates have written their own."""
    try:
        rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    except Exception as error:
        reason = _outside(tokenizer, texts) or (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"tokenizer: cannot encode {texts[-1][:80]!r}: {reason}") from error
    for given in texts:
        lost = characters.dropped(tokenizer, given)
        require(not lost, "tokenizer", f"tokens for each character of {given[:40]!r}", lost)
    if any(characters.removes(tokenizer, given) for given in texts):
        warnings.warn(_REMOVES, stacklevel=2)
    if any(characters.unknown(tokenizer, *given) for given in zip(texts, rows, strict=True)):
        warnings.warn(_UNKNOWN, stacklevel=2)
    beyond = getattr(tokenizer, "beyond", {})
    found = next((beyond[i] for row in rows for i in row if i in beyond), None) if beyond else None
    require(found is None, "tokenizer", "only tokens that the model has embeddings for", found)
    opening = _edges(tokenizer)[0] if text else []
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    # The text or the tokenizer may have written the opening tokens already: never repeat them.
    rows = [row[1:] if bos and row[:2] == bos * 2 else row for row in rows]
    return [row if row[: len(opening)] == opening else [*opening, *row] for row in rows]


def _outside(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> str:
    """A message about the words, or characters of them, that the tokenizer cannot encode."""

    def refuses(text: str) -> bool:
        try:
            tokenizer(text, add_special_tokens=False)
        except Exception:
            return True
        return False

    refused = set()
    for text in texts:
        missing = characters.missing_words(tokenizer, text)
        if missing is not None:
            refused |= missing
            continue
        for word in filter(refuses, set(text.split())):
            bad = {c for c in word if refuses(c)}
            refused |= {word} if bad == set(word) else bad
    return f"no tokens for {sorted(refused)}" if refused else ""


def _edges(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after every text."""
    flags = (getattr(tokenizer, f"add_{name}_token", None) for name in ("bos", "eos"))
    return _probed(tokenizer, *flags)


@functools.lru_cache(maxsize=16)
def _probed(tokenizer: PreTrainedTokenizerBase, *_: Any) -> tuple[list[int], list[int]]:
    if not tokenizer("")["input_ids"]:
        return [], []
    for probe in ("a", "0", "."):
        inner = tokenizer(probe, add_special_tokens=False)["input_ids"]
        whole = tokenizer(probe)["input_ids"]
        for start in range(len(whole) - len(inner) + 1):
            if inner and whole[start : start + len(inner)] == inner:
                return whole[:start], whole[start + len(inner) :]
    raise UserError("tokenizer: expected special tokens before and after a text, found others")


def _frames(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer is that of an encoder, whose closing token is part of every text."""
    opening, closing = _edges(tokenizer)
    marks = {tokenizer.cls_token_id, tokenizer.sep_token_id} - {None}
    return bool(closing) and (bool(marks & {*opening, *closing}) or tokenizer.eos_token_id is None)


def _closing(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    """The end token, unless `ids` already end with it."""
    end = tokenizer.eos_token_id
    if end is None:
        raise UserError("model: expected a tokenizer with an end token, found none")
    return [] if list(ids[-1:]) == [end] else [end]


def _ending(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, text: bool) -> list[int]:
    """The tokens that close a text for a reward model."""
    if _frames(tokenizer):
        return _edges(tokenizer)[1] if text else []
    return [] if tokenizer.eos_token_id is None else _closing(tokenizer, ids)
