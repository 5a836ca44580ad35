"""Tokenizers: loaded from a model, or built for a model from a configuration."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .config import UserError, require
from .errors import blamed_on
from .files import is_path

_SPECIAL = ("<pad>", "<eos>")

# Each message ends with the end token, which teaches completions to end. A role ends with a line
# break: after a space the first word of the answer would take the space into its token.
_CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '\n\n' + m['role'] + ':\n' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nassistant:\n' }}{% endif %}"
)


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    pad_token, eos_token = _SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad_token,
        eos_token=eos_token,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=_CHAT_TEMPLATE,
    )


def _check(texts: Sequence[str]) -> None:
    for number, text in enumerate(texts, start=1):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            found = f"{text[error.start]!r} at character {error.start}"
            raise UserError(f"text {number}: half of a surrogate pair, {found}") from error


def character_tokenizer(characters: str) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per character; other characters raise."""
    _check([characters])
    vocab = {token: i for i, token in enumerate([*_SPECIAL, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocab))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return _wrap(tokenizer)


def bpe_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the texts; it splits numbers into digits.

    Raises:
        UserError: a text is invalid Unicode, with half of a surrogate pair.
    """
    _check(texts)
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer)


def load_tokenizer(
    model: str, *, setting: str = "model", ends: bool = True
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; if it has no padding token, the end token is used.

    Args:
        model: folder or hub name.
        setting: the setting that error messages name.
        ends: whether an end token is required, as for generation; encoders have none.

    Raises:
        UserError: there is no tokenizer, or it lacks a required token.
    """
    missing = is_path(model) and not Path(model).expanduser().exists()
    require(not missing, setting, "a folder that exists, or the hub's 'owner/name'", model)
    # For a damaged file the library raises a bare Exception.
    with blamed_on(setting, f"no tokenizer can be loaded from {model!r}"):
        tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    drawn = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    dropout = getattr(drawn, "dropout", None)
    expected = "a tokenizer that gives a text the same tokens each time (no dropout)"
    require(not dropout, setting, expected, dropout)
    require(
        tokenizer.eos_token_id is not None or not ends,
        setting,
        "a tokenizer with an end token",
        model,
    )
    if tokenizer.pad_token_id is None:
        token = tokenizer.eos_token or tokenizer.sep_token
        require(token is not None, setting, "a tokenizer with a padding or end token", model)
        tokenizer.pad_token = token
    return tokenizer


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, rows: int, *, setting: str) -> None:
    """Requires that a model has embeddings, `rows` of them, for the tokens of its tokenizer.

    Added tokens may lie beyond: transformers adds one to tokenizers of Qwen2's class, and that of
    Gemma 3 has one for images. `tokenizer.beyond` keeps them; rows that hold one are refused.
    """
    beyond = {i: token for token, i in tokenizer.get_vocab().items() if i >= rows}
    needed = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    last = max(beyond, default=0)
    expected = f"embeddings of {last + 1} tokens, the last {beyond.get(last)!r}"
    added = beyond.keys() <= tokenizer.added_tokens_decoder.keys() and not beyond.keys() & needed
    require(added, setting, expected, rows)
    tokenizer.beyond = beyond


def check_alike(tokenizer: PreTrainedTokenizerBase, path: str, *, setting: str) -> None:
    """Requires that the tokenizer in a model's folder, if there is one, has the same tokens.

    The model will read tokens of `tokenizer`. Added tokens may differ, as names of special tokens
    and unused ones do.

    Raises:
        UserError: names a number that stands for two different tokens.
    """
    if Path(path).is_dir() and not [*Path(path).glob("*token*"), *Path(path).glob("vocab*")]:
        return
    other = load_tokenizer(path, setting=setting, ends=False)
    added = {*tokenizer.added_tokens_decoder, *other.added_tokens_decoder}
    theirs = {number: token for token, number in other.get_vocab().items()}
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        found = theirs.get(number, "no token")
        same = number in added or found == token
        expected = f"the policy's tokenizer, in which {number} is {token!r}"
        require(same, setting, f"a model with {expected}", f"{found} in that of {path}")
