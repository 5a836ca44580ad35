"""Problems, tokenizers and batches."""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from . import rewards
from .config import DataConfig

_SPECIAL = ("<pad>", "<eos>")


class Problem(NamedTuple):
    """A prompt, the completion to imitate, and the columns that reward functions read."""

    prompt: str
    completion: str
    columns: dict[str, Any]


@dataclass(frozen=True)
class Task:
    """Problems split into training and held-out, with their tokenizer and reward functions."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    train: list[Problem]
    held_out: list[Problem]
    reward_funcs: list[rewards.RewardFunction]
    reward_weights: list[float]


class Batch(NamedTuple):
    """Left-padded prompts followed by right-padded completions.

    `input_ids` and `attention_mask` are `[B, P + T]`. `completion_mask`, `[B, T]`, keeps each
    completion up to its end token and drops the padding.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor

    @property
    def completion_ids(self) -> Tensor:
        return self.input_ids[:, -self.completion_mask.shape[1] :]

    def rows(self, index: Tensor | slice) -> "Batch":
        return Batch(*(field[index] for field in self))


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions that count kept tokens only, so that left padding does not shift a prompt."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def pad(rows: Sequence[Sequence[int]], value: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Token lists as `[B, longest]` ids and their bool mask."""
    width = max(map(len, rows), default=0)
    ids = torch.full((len(rows), width), value)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        span = slice(width - len(row), width) if left else slice(len(row))
        ids[i, span], mask[i, span] = torch.tensor(row, dtype=torch.long), True
    return ids, mask


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Prompts as left-padded ids and mask."""
    rows = tokenizer([p.prompt for p in problems])["input_ids"]
    ids, mask = pad(rows, tokenizer.pad_token_id, left=True)
    return ids.to(device), mask.to(device)


def encode_completions(
    tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem]
) -> list[list[int]]:
    """Completions as token lists that close with the end token."""
    rows = tokenizer([p.completion for p in problems], add_special_tokens=False)["input_ids"]
    return [[*row, tokenizer.eos_token_id] for row in rows]


def supervised_batch(
    tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem], device: torch.device
) -> Batch:
    """Prompts with the completions to imitate."""
    prompt_ids, prompt_mask = encode_prompts(tokenizer, problems, device)
    ids, mask = pad(encode_completions(tokenizer, problems), tokenizer.pad_token_id, left=False)
    ids, mask = ids.to(device), mask.to(device)
    return Batch(torch.cat([prompt_ids, ids], 1), torch.cat([prompt_mask, mask], 1), mask)


class Sampler:
    """Batches of problems without end: a fresh shuffle each pass, no problem twice within one."""

    def __init__(self, problems: Sequence[Problem], batch_size: int, seed: int) -> None:
        if len(problems) < batch_size:
            raise ValueError(f"batch_size: expected at most {len(problems)}, found {batch_size}")
        self.problems, self.batch_size = problems, batch_size
        self.random = random.Random(seed)
        self.order: list[int] = []

    def __iter__(self) -> Iterator[list[Problem]]:
        return self

    def __next__(self) -> list[Problem]:
        if len(self.order) < self.batch_size:
            self.order = list(range(len(self.problems)))
            self.random.shuffle(self.order)
        chosen, self.order = self.order[: self.batch_size], self.order[self.batch_size :]
        return [self.problems[i] for i in chosen]


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    pad_token, eos_token = _SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad_token,
        eos_token=eos_token,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def character_tokenizer(characters: str) -> PreTrainedTokenizerFast:
    """One token per character."""
    vocab = {token: i for i, token in enumerate([*_SPECIAL, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=_SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return _wrap(tokenizer)


def bpe_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on the texts; numbers are split into digits."""
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


def arithmetic_problems(max_operand: int, operators: str) -> list[Problem]:
    """Every `a+b=` and `a-b=` with operands from 0 to `max_operand`."""
    signs = {"+": 1, "-": -1}
    span = range(max_operand + 1)
    return [
        Problem(f"{a}{op}{b}=", str(a + signs[op] * b), {"answer": str(a + signs[op] * b)})
        for op in operators
        for a in span
        for b in span
    ]


def read_jsonl(path: str) -> list[Problem]:
    """Problems of a GSM8K-style file: `question`, and an `answer` that ends in `#### <number>`.

    Raises:
        ValueError: naming the line that is not such an object.
    """
    problems = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: expected a JSON object, found {line[:60]!r}") from error
        if not isinstance(row, dict) or not all(
            isinstance(row.get(key), str) for key in ("question", "answer")
        ):
            raise ValueError(f"{where}: expected an object with texts 'question' and 'answer'")
        if rewards.final_number(row["answer"]) is None:
            found = row["answer"][-40:]
            raise ValueError(
                f"{where}: expected 'answer' to end in '#### <number>', found {found!r}"
            )
        problems.append(Problem(row["question"] + "\n", row["answer"], row))
    if not problems:
        raise ValueError(f"{path}: expected at least one problem, found none")
    return problems


def load_task(config: DataConfig, *, seed: int, model: str | None = None) -> Task:
    """The task of a configuration; the tokenizer is the model's own where `model` names one."""
    if config.data is None:
        problems = arithmetic_problems(config.max_operand, config.operators)
        functions: list[rewards.RewardFunction] = [rewards.exact_match]
    else:
        problems = read_jsonl(config.data)
        functions = [rewards.answer_format, rewards.answer_correct]
    random.Random(seed).shuffle(problems)
    held_out, train = problems[: config.eval_size], problems[config.eval_size :]
    if not train:
        raise ValueError(f"eval_size: expected < {len(problems)}, found {config.eval_size}")
    if model is not None:
        tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
        if tokenizer.eos_token_id is None:
            raise ValueError(f"model: expected a tokenizer with an end token, found {model!r}")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
    elif config.data is None:
        tokenizer = character_tokenizer("0123456789+-=")
    else:
        # The held-out problems must not shape the vocabulary either.
        tokenizer = bpe_tokenizer([p.prompt + p.completion for p in train], config.vocab_size)
    if config.reward_funcs:
        functions = [rewards.load_reward(path) for path in config.reward_funcs]
    weights = config.reward_weights or [1.0] * len(functions)
    if len(weights) != len(functions):
        raise ValueError(f"reward_weights: expected {len(functions)} numbers, found {len(weights)}")

    def short(problem_list: list[Problem]) -> list[Problem]:
        lengths = map(len, tokenizer([p.prompt for p in problem_list])["input_ids"])
        keep = config.max_prompt_tokens
        return [p for p, n in zip(problem_list, lengths, strict=True) if n <= keep]

    train, held_out = short(train), short(held_out)
    if not train or not held_out:
        raise ValueError(
            f"max_prompt_tokens: expected prompts of at most {config.max_prompt_tokens} tokens, "
            f"found {len(train)} for training and {len(held_out)} held out"
        )
    name = "arithmetic" if config.data is None else Path(config.data).stem
    return Task(name, tokenizer, train, held_out, functions, weights)
