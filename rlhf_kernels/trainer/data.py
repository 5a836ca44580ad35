"""Rows of a dataset, their tokens, and batches of them."""

import gzip
import json
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .answers import final_number
from .config import DataConfig, UserError, require
from .tokenizers import bpe_tokenizer, character_tokenizer

#: A text, or a conversation: [{"role": "user", "content": "..."}, ...].
Text = str | list[dict[str, str]]


class Row(NamedTuple):
    """A prompt, what may follow it, and the columns that reward functions read.

    `origin` is the file and line that messages name; equal rows may come from different ones.
    """

    prompt: Text
    completion: Text | None = None
    chosen: Text | None = None
    rejected: Text | None = None
    columns: dict[str, Any] = {}  # noqa: RUF012 - a NamedTuple's default, never changed
    origin: str = ""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Row) and self[:5] == other[:5]

    def __ne__(self, other: object) -> bool:
        return not self == other


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

    @property
    def labels(self) -> Tensor:
        """The completion's tokens `[B, T]`, -100 on padding."""
        return torch.where(self.completion_mask, self.completion_ids, -100)

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


def prompt_tokens(tokenizer: PreTrainedTokenizerBase, prompt: Text) -> list[int]:
    """A prompt as tokens; a conversation through the tokenizer's chat template."""
    if isinstance(prompt, str):
        return tokenizer(prompt)["input_ids"]
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def row_tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: Text, completion: Text
) -> tuple[list[int], list[int]]:
    """Prompt and completion as tokens; the completion closes with the end token."""
    if isinstance(completion, str):
        # A text without a prompt: its first token has nothing to be predicted from.
        first = tokenizer(prompt)["input_ids"] if prompt else []
        rest = tokenizer(completion, add_special_tokens=False)["input_ids"]
        if not first:
            first, rest = rest[:1], rest[1:]
    else:
        start = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([*prompt, *completion], tokenize=False)
        if not whole.startswith(start):
            raise UserError("chat template: a conversation does not begin with its own prompt")
        texts = (start, whole[len(start) :].rstrip("\n"))
        first, rest = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    ended = rest[-1:] == [tokenizer.eos_token_id]
    return first, rest if ended else [*rest, tokenizer.eos_token_id]


def collate(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[list[int], list[int]]],
    device: torch.device,
) -> Batch:
    """Prompts and completions as one batch."""
    prompts, completions = zip(*pairs, strict=True)
    prompt_ids, prompt_mask = pad(prompts, tokenizer.pad_token_id, left=True)
    ids, mask = pad(completions, tokenizer.pad_token_id, left=False)
    batch = Batch(torch.cat([prompt_ids, ids], 1), torch.cat([prompt_mask, mask], 1), mask)
    return Batch(*(field.to(device) for field in batch))


class Sampler:
    """Batches of row numbers without end: a fresh shuffle each pass, no row twice within one."""

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        require(batch_size <= count, "batch_size", f"at most the {count} rows", batch_size)
        self.count, self.batch_size = count, batch_size
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.long)

    def __next__(self) -> list[int]:
        if len(self.order) < self.batch_size:
            self.order = torch.randperm(self.count, generator=self.generator)
        chosen, self.order = self.order.split([self.batch_size, len(self.order) - self.batch_size])
        return chosen.tolist()

    def state_dict(self) -> dict[str, Tensor]:
        return {"order": self.order.clone(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.order = state["order"]
        self.generator.set_state(state["generator"])


def arithmetic_rows(max_operand: int, operators: str) -> list[Row]:
    """Every `a+b=` and `a-b=` with operands from 0 to `max_operand`."""
    signs = {"+": 1, "-": -1}
    span = range(max_operand + 1)
    texts = [(f"{a}{o}{b}=", str(a + signs[o] * b)) for o in operators for a in span for b in span]
    return [Row(prompt, answer, columns={"answer": answer}) for prompt, answer in texts]


def _text(row: dict[str, Any], key: str) -> Text:
    """A column that must hold a text or a conversation, not empty."""
    value = row.get(key)
    conversation = isinstance(value, list) and all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str)
        for m in value
    )
    good = bool(value) and (isinstance(value, str) or conversation)
    found = value if key in row else "no such column"
    require(good, repr(key), "a text or a list of messages", found)
    return value


def _common_prompt(chosen: Text, rejected: Text) -> int:
    """Length of the prompt that two answers without a prompt column share."""
    pairs = enumerate(zip(chosen, rejected, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    if isinstance(chosen, str):
        # Back to the start of a word and the space before it, so that no token spans both.
        same = len(re.sub(r" ?\S*\Z", "", chosen[:same]))
    return same


def _preference(row: dict[str, Any], columns: dict[str, Any]) -> Row:
    chosen, rejected = _text(row, "chosen"), _text(row, "rejected")
    differ = type(chosen) is type(rejected) and chosen != rejected
    require(differ, "'chosen' and 'rejected'", "two answers of one form", chosen)
    if "prompt" in row:
        return Row(_text(row, "prompt"), None, chosen, rejected, columns)
    cut = _common_prompt(chosen, rejected)
    apart = bool(chosen[cut:]) and bool(rejected[cut:])
    require(apart, "'chosen' and 'rejected'", "that neither begins the other", chosen)
    return Row(chosen[:cut], None, chosen[cut:], rejected[cut:], columns)


def parse_row(row: Any, kind: str) -> Row:
    """A Row from TRL's columns.

    Args:
        row: object of the dataset.
        kind: "supervised" (`text`, `messages`, `prompt` + `completion`, or GSM8K's `question` +
            `answer`), "preference" (`chosen` + `rejected`, `prompt` or their common beginning) or
            "prompt" (`prompt`, `messages` or `question`).

    Raises:
        ValueError: columns are missing or hold something else.
    """
    require(isinstance(row, dict), "row", "an object", row)
    columns = {k: v for k, v in row.items() if k not in ("prompt", "completion", "messages")}
    if kind == "preference":
        return _preference(row, columns)
    if "prompt" in row:
        completes = kind == "supervised" or "completion" in row
        completion = _text(row, "completion") if completes else None
        return Row(_text(row, "prompt"), completion, columns=columns)
    if "question" in row:
        question, answer = _text(row, "question"), _text(row, "answer")
        scored = kind == "supervised" or final_number(answer) is not None
        require(scored, "'answer'", "an end in '#### <number>'", answer[-40:])
        return Row(question + "\n", answer, columns=columns)
    if "messages" in row:
        messages = _text(row, "messages")
        answered = messages[-1]["role"] == "assistant"
        require(answered or kind == "prompt", "'messages'", "an assistant's at the end", messages)
        cut = len(messages) - answered
        return Row(messages[:cut], messages[cut:] or None, columns=columns)
    if kind == "supervised" and "text" in row:
        return Row("", _text(row, "text"), columns=columns)
    return Row(_text(row, "prompt"), columns=columns)


def read_rows(path: str, kind: str) -> list[Row]:
    """The rows of a JSONL(.gz) file, or of anything else that `datasets` loads.

    Raises:
        ValueError: naming the file and line of a bad row.
    """
    rows = []
    for number, content in _objects(path):
        try:
            row = json.loads(content) if isinstance(content, str) else content
            rows.append(parse_row(row, kind)._replace(origin=f"{path}:{number}"))
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from error
    require(bool(rows), path, "at least one row", 0)
    return rows


def _objects(path: str) -> list[tuple[int, Any]]:
    """Numbered lines of a JSONL file, or rows of a dataset."""
    if path.removesuffix(".gz").endswith((".jsonl", ".json")):
        opened = gzip.open if path.endswith(".gz") else open
        with opened(path, "rt", encoding="utf-8") as file:
            return [(n, line) for n, line in enumerate(file, start=1) if line.strip()]
    # Only here: an optional package.
    import datasets

    local = Path(path).exists()
    suffix = Path(path).suffix[1:]
    options = {"path": suffix, "data_files": path} if local and suffix else {"path": path}
    return list(enumerate(datasets.load_dataset(**options, split="train"), start=1))


@dataclass(frozen=True)
class Task:
    """Rows split into training and held-out, with their tokenizer."""

    name: str
    tokenizer: PreTrainedTokenizerBase
    train: list[Row]
    held_out: list[Row]


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; the end token pads where there is no padding token."""
    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    require(tokenizer.eos_token_id is not None, "model", "a tokenizer with an end token", model)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _plain(text: Text | None) -> str:
    return text if isinstance(text, str) else "\n".join(m["content"] for m in text or [])


def load_task(config: DataConfig, kind: str, *, seed: int, model: str | None = None) -> Task:
    """The rows of a configuration; the tokenizer is the model's own where `model` names one."""
    if config.data is None:
        require(kind != "preference", "data", "a file of preferences", None)
        rows = arithmetic_rows(config.max_operand, config.operators)
    else:
        rows = read_rows(config.data, kind)
    random.Random(seed).shuffle(rows)
    if config.eval_data is not None:
        train, held_out = rows, read_rows(config.eval_data, kind)[: config.eval_size]
    else:
        held_out, train = rows[: config.eval_size], rows[config.eval_size :]
    require(bool(train), "eval_size", f"< {len(rows)}", config.eval_size)
    if model is not None:
        tokenizer = load_tokenizer(model)
    elif config.data is None:
        tokenizer = character_tokenizer("0123456789+-=")
    else:
        # The held-out rows must not shape the vocabulary either.
        texts = [_plain(r.prompt) + _plain(r.completion or r.chosen) for r in train]
        tokenizer = bpe_tokenizer(texts, config.vocab_size)

    def short(part: list[Row]) -> list[Row]:
        limit = config.max_prompt_tokens
        return [r for r in part if not r.prompt or len(prompt_tokens(tokenizer, r.prompt)) <= limit]

    train, held_out = short(train), short(held_out)
    counts = f"{len(train)} training and {len(held_out)} held-out rows that are shorter"
    require(bool(train and held_out), "max_prompt_tokens", "a limit that leaves rows", counts)
    name = "arithmetic" if config.data is None else Path(config.data).name.partition(".")[0]
    return Task(name, tokenizer, train, held_out)
