"""What a tokenizer does to the characters of a text that it has no tokens for.

For those that its vocabulary lacks most have bytes, or an unknown token, or raise. BPE with neither
leaves them out. A pre-tokenizer or a normalizer may take out others.
"""

import functools
import itertools
import json
import unicodedata

from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase

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


def removed(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The characters but for white space that no token comes from, as the tokenizer is built so."""
    if not _removes(tokenizer):
        return ""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    end, between = 0, []
    for start, stop in [*found["offset_mapping"], (len(text), len(text))]:
        between.append(text[end:start])
        end = max(end, stop)
    lost = set("".join(between))
    return "".join(sorted(c for c in lost if not c.isspace() and not unicodedata.combining(c)))


@functools.lru_cache(maxsize=16)
def _removes(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether what comes before the vocabulary leaves out characters that a pattern finds."""
    if not hasattr(tokenizer, "backend_tokenizer"):
        return False
    form = json.loads(tokenizer.backend_tokenizer.to_str())
    steps, deletes = [form["pre_tokenizer"], form["normalizer"]], False
    while steps:
        step = steps.pop() or {}
        steps += step.get("pretokenizers", []) + step.get("normalizers", [])
        deletes |= step.get("behavior") == "Removed" or step.get("type") == "CharDelimiterSplit"
        deletes |= step.get("type") == "Replace" and step["content"] == ""
    return deletes


def unknown(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that stand for what the vocabulary lacks, and for nothing else."""
    return _unknown(tokenizer) - {tokenizer.eos_token_id, tokenizer.pad_token_id}


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
