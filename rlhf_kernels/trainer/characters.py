"""What a tokenizer does to the characters of a text that its vocabulary lacks.

Most have bytes for them, or an unknown token, or raise. BPE with neither leaves them out.
"""

import functools
import json
import re
from collections.abc import Iterable, Iterator

from tokenizers import models, pre_tokenizers
from transformers import PreTrainedTokenizerBase

_BYTES = frozenset(pre_tokenizers.ByteLevel.alphabet())


def dropped(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """The characters of a text that the tokenizer leaves out, as its vocabulary has them."""
    return sorted(set(_lost(tokenizer, text))) if _may_drop(tokenizer) else []


def unknown(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that stand for what the vocabulary lacks, and for nothing else."""
    return _unknown(tokenizer) - {tokenizer.eos_token_id, tokenizer.pad_token_id, None}


@functools.lru_cache(maxsize=16)
def _unknown(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    found = {tokenizer.unk_token_id}
    if hasattr(tokenizer, "backend_tokenizer"):
        # The library's tokenizer may have one that the wrapper was not told of.
        backend = tokenizer.backend_tokenizer
        if isinstance(backend.model, models.Unigram):
            found.add(json.loads(backend.to_str())["model"]["unk_id"])
        elif backend.model.unk_token is not None:
            found.add(backend.token_to_id(backend.model.unk_token))
    return frozenset(found - {None})


@functools.lru_cache(maxsize=16)
def _may_drop(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it is BPE without an unknown token whose vocabulary lacks some bytes."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        return False
    backend = tokenizer.backend_tokenizer
    model = backend.model
    if not isinstance(model, models.BPE) or model.unk_token is not None:
        return False
    if model.byte_fallback:
        return not _has_bytes(tokenizer, range(256))
    # Without bytes this letter stands for itself.
    letters = {*"".join(_words(tokenizer, "\u4e2d"))}
    if not letters or not letters <= _BYTES:
        return True
    places = ((True, False), (False, False), (False, True), (True, True))
    forms = (_form(model, byte, *place) for byte in _BYTES for place in places)
    return any(backend.token_to_id(form) is None for form in forms)


def _lost(tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[str]:
    """The characters for which BPE finds no symbol to begin its merges with."""
    backend = tokenizer.backend_tokenizer
    model = backend.model
    for piece in _added(tokenizer, len(tokenizer)).split(text):
        for word in _words(tokenizer, piece):
            if model.ignore_merges and backend.token_to_id(word) is not None:
                continue
            last = len(word) - 1
            for place, character in enumerate(word):
                form = _form(model, character, place == 0, place == last)
                if backend.token_to_id(form) is None and not (
                    model.byte_fallback and _has_bytes(tokenizer, form.encode())
                ):
                    yield character


def _has_bytes(tokenizer: PreTrainedTokenizerBase, numbers: Iterable[int]) -> bool:
    names = (f"<0x{number:02X}>" for number in numbers)
    return all(tokenizer.backend_tokenizer.token_to_id(name) is not None for name in names)


def _form(model: models.BPE, character: str, first: bool, last: bool) -> str:
    """A character as the vocabulary spells it at a place in a word."""
    before = "" if first else model.continuing_subword_prefix or ""
    return before + character + ((model.end_of_word_suffix or "") if last else "")


def _words(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    backend = tokenizer.backend_tokenizer
    if backend.normalizer is not None:
        text = backend.normalizer.normalize_str(text)
    if backend.pre_tokenizer is None:
        return [text]
    return [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]


@functools.lru_cache(maxsize=16)
def _added(tokenizer: PreTrainedTokenizerBase, _: int) -> re.Pattern[str]:
    """Added tokens, which stand for themselves before anything else is read; longest first."""
    tokens = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, filter(None, tokens))) or r"(?!)")
