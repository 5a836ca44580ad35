"""What a tokenizer does to the characters that its vocabulary lacks."""

import re
import warnings

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from tests.trainer.encoding_cases import TEXTS

from rlhf_kernels.trainer.config import UserError
from rlhf_kernels.trainer.data import prompt_tokens, row_tokens
from rlhf_kernels.trainer.tokenizers import bpe_tokenizer

SAID = ["one and two caf\u00e9", "abcdefgh ijklmnopqrstuvwxyz", "don't, 0123456789."]
LEGACY = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
# Of BPE without an unknown token: arguments of the model and its trainer, normalizer, words.
WITHOUT_UNKNOWN = {
    "metaspace": ({}, None, pre_tokenizers.Metaspace()),
    "legacy": ({}, LEGACY, None),
    "ends of words": ({"end_of_word_suffix": "</w>"}, None, pre_tokenizers.WhitespaceSplit()),
    "rest of words": ({"continuing_subword_prefix": "##"}, None, pre_tokenizers.Whitespace()),
    "joined accents": ({}, normalizers.NFC(), pre_tokenizers.Metaspace()),
    "some bytes": ({"byte_fallback": True}, LEGACY, None),
}
GIVEN = (
    *(
        "one and two",
        "caf\u00e9 two",
        "cafe\u0301",
        "wh\u00fc",
        "\u4e2d",
        "one\ntwo\t",
        "a\u2581b",
        "z9 1z",
    ),
    *("hi \U0001f469\u200d\U0001f467", "x = [1]", "one<eos>", "[u]x one", "[u] one", "'t"),
)


def _bpe(kind, special=("<eos>",), **options):
    form, normalizer, words = WITHOUT_UNKNOWN[kind]
    tokenizer = Tokenizer(models.BPE(**form, **options))
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if words is not None:
        tokenizer.pre_tokenizer = words
    own = {k: v for k, v in form.items() if k != "byte_fallback"}
    marks = [*special, "[u]", "[u]x"]
    if "byte_fallback" in form:
        marks += ["<0xC3>", "<0xBC>"]
    trainer = trainers.BpeTrainer(vocab_size=110, special_tokens=marks, show_progress=False, **own)
    tokenizer.train_from_iterator(SAID * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


@pytest.mark.parametrize("kind", WITHOUT_UNKNOWN)
def test_characters_that_a_tokenizer_would_drop_are_refused(kind):
    tokenizer = _bpe(kind)
    refused = 0
    for text in GIVEN:
        # Nothing was dropped where the tokens spell what the words do.
        spelled = "".join(tokenizer.tokenize(text))
        if kind == "rest of words":
            spelled = spelled.replace("##", "")
        if kind == "ends of words":
            spelled = spelled.replace("</w>", "")
        backend, whole = tokenizer.backend_tokenizer, ""
        for piece in re.split(r"(\[u\]x|\[u\]|<eos>)", text):
            if piece in ("[u]x", "[u]", "<eos>"):
                whole += piece
                continue
            read = backend.normalizer.normalize_str(piece) if backend.normalizer else piece
            words = (
                backend.pre_tokenizer.pre_tokenize_str(read) if backend.pre_tokenizer else [(read,)]
            )
            whole += "".join(word for word, *_ in words)
        if kind == "some bytes":
            spelled = spelled.replace("<0xC3><0xBC>", "\u00fc")
        if spelled == whole:
            assert row_tokens(tokenizer, "one", text)[1], text
            continue
        refused += 1
        with pytest.raises(UserError, match="tokenizer: expected tokens for each character of"):
            row_tokens(tokenizer, "one", text)
        with pytest.raises(UserError, match="tokenizer: expected tokens for each character of"):
            prompt_tokens(tokenizer, text)
    assert 2 < refused < len(GIVEN) - 2, refused


def test_dropped_characters_are_named():
    for kind, text, lost in (
        ("metaspace", "\u4e2d one\n", "['\\n', '\u4e2d']"),
        ("legacy", "x = [1]", "['=', '[', ']']"),
        ("joined accents", "cafe\u0301 u\u0308", "['u\u0308']"),
    ):
        with pytest.raises(UserError) as raised:
            prompt_tokens(_bpe(kind), text)
        assert str(raised.value).endswith(f"found {lost}")


def test_added_tokens_are_found_as_the_tokenizer_finds_them():
    tokenizer = _bpe("metaspace")
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_tokens(
        [
            AddedToken("<|user|>", rstrip=True, normalized=False),
            AddedToken("<u>", single_word=True, normalized=False),
            AddedToken("<THINK>", normalized=True),
        ]
    )
    for text in ("<|user|>\n one", "one <u> two", "<think> one", "<THINK> one", "one<eos>"):
        assert prompt_tokens(tokenizer, text)
    for text, lost in (("<|user|>one\n", "['\\n']"), ("one<u>two", "['<', '>']")):
        with pytest.raises(UserError) as raised:
            prompt_tokens(tokenizer, text)
        assert str(raised.value).endswith(f"found {lost}")
    tokenizer.split_special_tokens = True
    with pytest.raises(UserError, match=r"found \['<', '>'\]"):
        prompt_tokens(tokenizer, "one <eos>")


def test_characters_unknown_to_a_tokenizer_are_told():
    # The wrapper need not know of the model's unknown token.
    tokenizer = _bpe("metaspace", ("<eos>", "<unk>"), unk_token="<unk>")
    assert tokenizer.unk_token is None
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<eos>", "<unk>"]
    trainer = trainers.UnigramTrainer(
        vocab_size=60, special_tokens=special, unk_token="<unk>", show_progress=False
    )
    unigram.train_from_iterator(SAID * 3, trainer)
    for given in (tokenizer, PreTrainedTokenizerFast(tokenizer_object=unigram, eos_token="<eos>")):
        number = given.convert_tokens_to_ids("<unk>")
        for prompt, completion in (("one", " tw\u4e2d"), ("\u4e2d", " two")):
            with pytest.warns(UserWarning, match="no tokens for some characters .* unknown token"):
                found = row_tokens(given, prompt, completion)
            assert number in [*found[0], *found[1]]
        with pytest.warns(UserWarning, match="no tokens for some characters"):
            prompt_tokens(given, "\u4e2d")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row_tokens(tokenizer, "one", " two")
        # Bytes stand for every character, whether or not there is a decoder.
        bytes_alone = bpe_tokenizer(TEXTS, 400)
        row_tokens(bytes_alone, "one", " \u4e2d\U00012000")
        bytes_alone.backend_tokenizer.decoder = decoders.Fuse()
        row_tokens(bytes_alone, "one", " \u4e2d\n\u00e9")


@pytest.mark.parametrize("mark", ("pad_token", "eos_token", "both"))
def test_an_unknown_token_that_marks_something_else_too(mark):
    """As in GPT-2's settings, or a vocabulary whose first token is both."""
    words = Tokenizer(models.WordLevel({"<e>": 0, "<m>": 1, "hello": 2}, unk_token="<m>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    marks = {"unk_token": "<m>", "eos_token": "<e>"}
    marks |= dict.fromkeys(("pad_token", "eos_token") if mark == "both" else (mark,), "<m>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **marks)
    for text, ids in (("hello zebra", [2, 1]), ("zebra", [1]), ("<m> zebra", [1, 1])):
        with pytest.warns(UserWarning, match="no tokens for some characters"):
            assert prompt_tokens(tokenizer, text) == ids
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the tokenizer has no tokens")
        prompt_tokens(tokenizer, "hello <m> hello")
        row_tokens(tokenizer, "hello", " hello <m>")


def test_words_that_a_vocabulary_lacks_are_named():
    words = Tokenizer(models.WordLevel({"<e>": 0, "hello": 1, "you": 2}))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<e>")
    assert prompt_tokens(tokenizer, "hello you") == [1, 2]
    with pytest.raises(UserError, match=r"cannot encode 'hello zebra': no tokens for \['zebra'\]"):
        prompt_tokens(tokenizer, "hello zebra")


def test_a_missing_word_is_named_whose_letters_are_words():
    vocabulary = {w: i for i, w in enumerate(("<e>", "hello", "z", "e", "-", "Zebra"))}
    words = Tokenizer(models.WordLevel(vocabulary))
    words.normalizer, words.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<e>")
    with pytest.raises(UserError, match=r"no tokens for \['ze', 'zebra'\]"):
        prompt_tokens(tokenizer, "hello-Zebra z<e>e-ze z e")


ORDINARY = "Caf\u00e9 \u4e2d\u6587, e\u0301; it's 42!\t\n\u00a0<eos> \u0928\u092e"
LOST = {
    "control characters": (normalizers.BertNormalizer(lowercase=False), "\x07"),
    "zero width": (normalizers.BertNormalizer(lowercase=True), "\u200b"),
    "soft hyphen": (normalizers.BertNormalizer(lowercase=False), "\u00ad"),
    "nmt": (normalizers.Nmt(), "\u200d"),
    "vowel signs": (
        normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
        "\u0947",
    ),
    "by a space": (normalizers.Replace(Regex("[\u00a1-\u00bf]"), " "), "\u00bf"),
}


@pytest.mark.parametrize("kind", LOST)
def test_characters_that_a_normalizer_takes_out_are_told(kind):
    normalizer, lost = LOST[kind]
    tokenizer = bpe_tokenizer(TEXTS, 400)
    tokenizer.backend_tokenizer.normalizer = normalizer
    with pytest.warns(UserWarning, match="built to leave out some characters of the data"):
        prompt_tokens(tokenizer, f"one{lost} two")
    tokenizer.add_tokens([AddedToken(f"<{lost}>", normalized=False)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prompt_tokens(tokenizer, ORDINARY.replace("<eos>", tokenizer.eos_token))
        prompt_tokens(tokenizer, f"one <{lost}> two")


REMOVING = {
    "punctuation": (None, pre_tokenizers.Punctuation("removed"), "a,b", "one"),
    "split": (None, pre_tokenizers.Split("x", "removed"), "axb", "one,"),
    "delimiter": (None, pre_tokenizers.CharDelimiterSplit("_"), "a_b", "one,"),
    "replaced": (normalizers.Replace(",", ""), None, "a,b", "one."),
}


@pytest.mark.parametrize("kind", REMOVING)
def test_characters_that_a_tokenizer_is_built_to_remove_are_told(kind):
    normalizer, words, text, kept = REMOVING[kind]
    tokenizer = bpe_tokenizer(TEXTS, 400)
    backend = tokenizer.backend_tokenizer
    backend.normalizer = normalizer
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, whole] if words else [whole])
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == "ab"
    for given in ((text, "c"), ("a", text)):
        with pytest.warns(UserWarning, match="built to leave out some characters of the data"):
            row_tokens(tokenizer, *given)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row_tokens(tokenizer, "one\n ", kept)
        row_tokens(tokenizer, "one\n two", " caf\u00e9 e\u0301 \u4e2d\t")
        assert prompt_tokens(tokenizer, tokenizer.eos_token)
