"""Small tokenizers of every kind, and texts and messages for them."""

import random

from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import models as vocabularies
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "[CLS]", "[SEP]", "<|User|>", "<|Assistant|>"]
TEXTS = [
    "hello world what is two plus two it is four 0 1 2 3\nQ: why? A: because it is so.",
    "the answer is 42, ok then.\n\nyes",
    "two\nit\nhello\nit\ntwo",
    "héllo wörld ﬁne 天気は晴れ",
] * 6
# Kind: vocabulary, its trainer, normalizer, pre-tokenizer.
KINDS = {
    "byte-level": (
        vocabularies.BPE(),
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
        None,
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ),
    "byte-level, prefix space": (
        vocabularies.BPE(),
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
        None,
        pre_tokenizers.ByteLevel(add_prefix_space=True),
    ),
    **{
        f"metaspace, {scheme}": (
            vocabularies.BPE(unk_token="<unk>"),
            trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False),
            None,
            pre_tokenizers.Metaspace(prepend_scheme=scheme),
        )
        for scheme in ("always", "first", "never")
    },
    "legacy metaspace": (
        vocabularies.BPE(unk_token="<unk>", fuse_unk=True),
        trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False),
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        None,
    ),
    "unigram": (
        vocabularies.Unigram(),
        trainers.UnigramTrainer(
            vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        ),
        normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]),
        pre_tokenizers.Metaspace(),
    ),
    "wordpiece": (
        vocabularies.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False),
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
    ),
}
# Templates of the special tokens that a tokenizer puts around a text; $A is the text.
AROUND = (None, "<s> $A", "<s> $A </s>", "$A </s>", "[CLS] $A [SEP]")


def made(kind, around=None, template=None):
    vocabulary, trainer, normalizer, words = KINDS[kind]
    tokenizer = Tokenizer(vocabulary)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if words is not None:
        tokenizer.pre_tokenizer = words
    if kind.startswith("byte"):
        tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(TEXTS, trainer)
    if around:
        marks = [(s, tokenizer.token_to_id(s)) for s in SPECIAL if s in around]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=around, special_tokens=marks
        )
    marks = {"bos_token": "<s>", "eos_token": "</s>"}
    if around == "[CLS] $A [SEP]":
        marks = {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=template,
        clean_up_tokenization_spaces=False,
        **marks,
    )


PIECES = (
    "hello", " world", "wor", "ld", " it", "it", "\n", "\n\n", " ", " is", "two", "plus ", "é",
    "A: ", "?", " héllo", "天気", "は晴れ", "ﬁne", "e\u0301",
)  # fmt: skip


def texts(count):
    generator = random.Random(0)
    while count:
        prompt = "".join(generator.choices(PIECES, k=generator.randint(0, 4)))
        completion = "".join(generator.choices(PIECES, k=generator.randint(1, 4)))
        if (prompt + completion).strip():
            count -= 1
            yield prompt, completion


def joined(parts):
    first, rest = parts
    return first + rest


USER, OTHER = {"role": "user", "content": "hello"}, {"role": "user", "content": "two"}
GOOD, BAD = {"role": "assistant", "content": "it is"}, {"role": "assistant", "content": "four"}
