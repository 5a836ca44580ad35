"""What a tokenizer does to the characters of a text that it has no tokens for.

For those that its vocabulary lacks most have bytes, or an unknown token, or raise. BPE with neither
leaves them out. A pre-tokenizer or a normalizer may take out others.
"""

import functools
import itertools
import json
import re
import unicodedata
from collections.abc import Sequence

from tokenizers import Tokenizer, models
from transformers import BatchEncoding, PreTrainedTokenizerBase

# In UTF-8 every byte that there is: the first two rows of its table, and a character of each first
# byte of longer ones.
_EVERY_BYTE = "".join(
    map(
        chr,
        [*range(0x800), *range(0x800, 0xD800, 0x800), 0xE000, *range(0x10000, 0x110000, 0x10000)],
    )
)


def dropped(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """The characters of a text that the tokenizer leaves out, sorted."""
    return _dropped(tokenizer, text) if _may_drop(tokenizer, len(tokenizer)) else []


def removes(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether the tokenizer is built to leave out characters of the text, white space aside."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return False
    vanishes = _Vanishing.of(tokenizer)
    if any(map(vanishes.__getitem__, set(text))):
        outside = set("".join(_between_added(tokenizer, text)))
        if any(map(vanishes.__getitem__, outside)):
            return True
    return _removes(tokenizer) and _has_gaps(tokenizer, text)


def missing_words(tokenizer: PreTrainedTokenizerBase, text: str) -> set[str] | None:
    """Of a vocabulary of whole words: those of the text that it lacks; None for others."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(backend.model, models.WordLevel):
        return None
    parts = _between_added(tokenizer, text)
    if backend.normalizer is not None:
        parts = [backend.normalizer.normalize_str(part) for part in parts]
    if backend.pre_tokenizer is not None:
        split = backend.pre_tokenizer.pre_tokenize_str
        parts = [word for part in parts for word, _ in split(part)]
    return {word for word in parts if word and backend.model.token_to_id(word) is None}


def _between_added(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """The parts of a text between added tokens, which are found before anything else is done."""
    added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    return re.split("|".join(map(re.escape, added)), text) if added else [text]


class _Vanishing(dict[str, bool]):
    """By character: whether a tokenizer's normalizer takes it out, or puts a space in its place."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._normalizer = tokenizer.backend_tokenizer.normalizer
        self._none = {self._normalized("ab"), self._normalized("a b")}

    @staticmethod
    @functools.lru_cache(maxsize=16)
    def of(tokenizer: PreTrainedTokenizerBase) -> "_Vanishing":
        return _Vanishing(tokenizer)

    def _normalized(self, text: str) -> str:
        found: str = text if self._normalizer is None else self._normalizer.normalize_str(text)
        return found

    def __missing__(self, character: str) -> bool:
        # An accent that is taken off leaves its letter.
        kept = character.isspace() or bool(unicodedata.combining(character))
        found = self[character] = not kept and self._normalized(f"a{character}b") in self._none
        return found


@functools.lru_cache(maxsize=16)
def _removes(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether what comes before the vocabulary leaves out what a pattern finds."""
    form = json.loads(tokenizer.backend_tokenizer.to_str())
    steps, deletes = [form["pre_tokenizer"], form["normalizer"]], False
    while steps:
        step = steps.pop() or {}
        steps += step.get("pretokenizers", []) + step.get("normalizers", [])
        deletes |= step.get("behavior") == "Removed" or step.get("type") == "CharDelimiterSplit"
        deletes |= step.get("type") == "Replace" and step["content"] == ""
    return deletes


def _has_gaps(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """Whether no token comes from some characters, white space and accents aside."""
    end = 0
    for start, stop in [*_encoded(tokenizer, text)["offset_mapping"], (len(text), len(text))]:
        if any(not c.isspace() and not unicodedata.combining(c) for c in text[end:start]):
            return True
        end = max(end, stop)
    return False


def _encoded(tokenizer: PreTrainedTokenizerBase, text: str) -> BatchEncoding:
    options = {"return_offsets_mapping": True, "verbose": False}
    found: BatchEncoding = tokenizer(text, add_special_tokens=False, **options)
    return found


def unknown(tokenizer: PreTrainedTokenizerBase, text: str, ids: Sequence[int]) -> bool:
    """Whether a token of a text, whose tokens are `ids`, stands for what the vocabulary lacks."""
    found = _unknown(tokenizer)
    if found.isdisjoint(ids):
        return False
    if not hasattr(tokenizer, "backend_tokenizer"):
        return not (found - {tokenizer.eos_token_id, tokenizer.pad_token_id}).isdisjoint(ids)
    # The same token may be another thing too, such as the end, which a text may hold as that.
    names = {i: tokenizer.convert_ids_to_tokens(i) for i in found}
    tokens = _encoded(tokenizer, text)
    places = zip(tokens["input_ids"], tokens["offset_mapping"], strict=True)
    return any(i in names and text[slice(*place)].strip() != names[i] for i, place in places)


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
def _may_drop(tokenizer: PreTrainedTokenizerBase, _: int) -> bool:
    """Whether it is BPE without an unknown token whose vocabulary lacks some bytes."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if not isinstance(model, models.BPE) or model.unk_token is not None:
        return False
    # Within a word a byte has another form than alone.
    varies = model.continuing_subword_prefix or model.end_of_word_suffix
    return bool(varies) or bool(_dropped(tokenizer, _EVERY_BYTE))


def _dropped(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    copy, number = _with_unknown(tokenizer, len(tokenizer))
    copy.encode_special_tokens = bool(getattr(tokenizer, "split_special_tokens", False))
    found = copy.encode(text, add_special_tokens=False)
    places = zip(found.ids, found.offsets, strict=True)
    lost = [place for i, place in places if i == number]
    # A normalizer may have joined a letter and what follows it.
    return sorted({text[start:end] + _accents(text[end:]) for start, end in lost})


def _accents(text: str) -> str:
    return "".join(itertools.takewhile(unicodedata.combining, text[:8]))


@functools.lru_cache(maxsize=16)
def _with_unknown(tokenizer: PreTrainedTokenizerBase, _: int) -> tuple[Tokenizer, int]:
    """A copy of the tokenizer that has an unknown token, and that token."""
    form = json.loads(tokenizer.backend_tokenizer.to_str())
    name, vocabulary = "\0unknown", form["model"]["vocab"]
    # Added tokens are numbered anew, behind it.
    vocabulary[name] = number = max(vocabulary.values(), default=-1) + 1
    form["model"] |= {"unk_token": name, "fuse_unk": False}
    form |= {"truncation": None, "padding": None, "post_processor": None}
    return Tokenizer.from_str(json.dumps(form)), number
