"""Batches of tokens, the order of rows, and the task: rows with their tokenizer."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .cells import Text, spoken
from .config import DataConfig, UserError, require
from .encoding import encode_prompt, prompt_tokens, row_tokens, whole_tokens
from .rows import Row, parse_row, read_rows
from .tokenizers import bpe_tokenizer, character_tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "Row",
    "Sampler",
    "Task",
    "Text",
    "arithmetic_rows",
    "collate",
    "load_task",
    "load_tokenizer",
    "pad",
    "parse_row",
    "position_ids",
    "prompt_tokens",
    "read_rows",
    "row_tokens",
    "whole_tokens",
]


class Batch(NamedTuple):
    """Left-padded prompts followed by right-padded completions.

    `input_ids` and `attention_mask` are `[B, P + T]`. `completion_mask`, `[B, T]`, is True for each
    completion up to and including its end token, and False for padding.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor

    @property
    def completion_ids(self) -> Tensor:
        return self.input_ids[:, -self.completion_mask.shape[1] :]

    @property
    def labels(self) -> Tensor:
        """The tokens of the completions `[B, T]`, with -100 for padding."""
        return torch.where(self.completion_mask, self.completion_ids, -100)

    def rows(self, index: Tensor | slice) -> "Batch":
        return Batch(*(field[index] for field in self))


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions that count only kept tokens, so that left padding does not shift a prompt."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


def pad(rows: Sequence[Sequence[int]], value: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """Pads token lists; returns ids `[B, longest]` and their bool mask."""
    width = max(map(len, rows), default=0)
    ids = torch.full((len(rows), width), value)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        span = slice(width - len(row), width) if left else slice(len(row))
        ids[i, span], mask[i, span] = torch.tensor(row, dtype=torch.long), True
    return ids, mask


def collate(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[list[int], list[int]]],
    device: torch.device,
) -> Batch:
    """Pads and joins prompts and completions into one batch."""
    prompts, completions = zip(*pairs, strict=True)
    prompt_ids, prompt_mask = pad(prompts, tokenizer.pad_token_id, left=True)
    ids, mask = pad(completions, tokenizer.pad_token_id, left=False)
    batch = Batch(torch.cat([prompt_ids, ids], 1), torch.cat([prompt_mask, mask], 1), mask)
    return Batch(*(field.to(device) for field in batch))


class Sampler:
    """An endless iterator over batches of row numbers; each pass over the rows is a new shuffle."""

    def __init__(self, count: int, batch_size: int, seed: int) -> None:
        if batch_size > count:
            raise UserError(
                f"batch_size: expected at most the {count} training rows that there are, found "
                f"{batch_size} different ones for a step; lower it, raise max_prompt_tokens and "
                "max_new_tokens if rows were dropped, or give more rows"
            )
        self.count, self.batch_size = count, batch_size
        self.generator = torch.Generator().manual_seed(seed)
        self.order = torch.empty(0, dtype=torch.long)

    def __next__(self) -> list[int]:
        if len(self.order) < self.batch_size:
            self.order = torch.randperm(self.count, generator=self.generator)
        chosen, self.order = self.order.split([self.batch_size, len(self.order) - self.batch_size])
        rows: list[int] = chosen.tolist()
        return rows

    def state_dict(self) -> dict[str, Tensor]:
        return {"order": self.order.clone(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.order = state["order"]
        self.generator.set_state(state["generator"])


def arithmetic_rows(max_operand: int, operators: str) -> list[Row]:
    """All problems `a+b=` and `a-b=` with operands from 0 to `max_operand`."""
    signs = {"+": 1, "-": -1}
    span = range(max_operand + 1)
    texts = [(f"{a}{o}{b}=", str(a + signs[o] * b)) for o in operators for a in span for b in span]
    return [Row(prompt, answer, columns={"answer": answer}) for prompt, answer in texts]


@dataclass(frozen=True)
class Task:
    """Rows split into training and held-out, with their tokenizer.

    `dropped` counts the rows whose prompts are longer than `max_prompt_tokens`.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    train: list[Row]
    held_out: list[Row]
    dropped: int = 0


def load_task(config: DataConfig, kind: str, *, seed: int, model: str | None = None) -> Task:
    """Loads the rows of a configuration and a tokenizer: that of `model`, or a new one."""
    if config.data is None:
        needed = {
            "preference": "a file of preferences",
            "pair": "a file of preferences",
            "unpaired": "a file of labelled completions",
        }
        require(kind not in needed, "data", needed.get(kind, ""), None)
        rows = arithmetic_rows(config.max_operand, config.operators)
    else:
        rows = read_rows(config.data, kind)
    random.Random(seed).shuffle(rows)
    if config.eval_data is not None:
        train, held_out = rows, read_rows(config.eval_data, kind)[: config.eval_size]
    else:
        held_out, train = rows[: config.eval_size], rows[config.eval_size :]
    left = f"less than the {len(rows)} rows of {config.data or 'the task'}, some to train on"
    require(bool(train), "eval_size", left, config.eval_size)
    if model is not None:
        # A reward model may be an encoder, which has no end token.
        tokenizer = load_tokenizer(model, ends=kind not in ("preference", "pair"))
    elif config.data is None:
        tokenizer = character_tokenizer("0123456789+-=")
    else:
        # Only training rows may influence the vocabulary.
        texts = [spoken(r.prompt) + spoken(r.completion or r.chosen) for r in train]
        tokenizer = bpe_tokenizer(texts, config.vocab_size)
    lengths = {
        name: _prompt_lengths(tokenizer, part)
        for name, part in (("training", train), ("held-out", held_out))
    }
    limit = config.max_prompt_tokens
    for name, found in lengths.items():
        if min(found) > limit:
            raise UserError(
                f"max_prompt_tokens: expected a limit that leaves {name} rows, found {limit}; the "
                f"prompts of all {len(found)} are longer, {min(found)} to {max(found)} tokens"
            )
    kept, shown = (
        [row for row, length in zip(part, found, strict=True) if length <= limit]
        for part, found in zip((train, held_out), lengths.values(), strict=True)
    )
    dropped = len(train) + len(held_out) - len(kept) - len(shown)
    name = "arithmetic" if config.data is None else Path(config.data).name.partition(".")[0]
    return Task(name, tokenizer, kept, shown, dropped)


def _prompt_lengths(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[int]:
    return [len(encode_prompt(tokenizer, row)) if row.prompt else 0 for row in rows]
