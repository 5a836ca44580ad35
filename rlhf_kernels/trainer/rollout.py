"""Completes prompts on all processes and computes their rewards."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .data import Batch, Row, Task, pad
from .encoding import encode_prompt
from .endings import end_token_ids
from .generation import Engine
from .learner import Learner
from .probe import check_length
from .rewards import Rewards, weighted_sum


class Samples(NamedTuple):
    """A rollout, complete on every process.

    Attributes:
        batch: prompts and completions, `[B, P + T]`.
        logprobs: the sampler's log-probabilities, `[B, T]`.
        finished: whether a completion ended with an end token, `[B]`.
        table: rewards `[B, functions]`, NaN where a function returned None.
        scores: weighted sums of the rewards, `[B]`.
    """

    batch: Batch
    logprobs: Tensor
    finished: Tensor
    table: Tensor
    scores: Tensor

    def select(self, rows: Tensor | slice) -> "Samples":
        return Samples(self.batch.rows(rows), *(field[rows] for field in self[1:]))

    def trimmed(self) -> "Samples":
        """The rollout without columns that are padding in every row."""
        ids, attention, completed = self.batch
        used = attention.any(0).nonzero()
        first, last = int(used[0]), int(used[-1]) + 1
        width = completed.shape[1] - (ids.shape[1] - last)
        columns = slice(first, last)
        batch = Batch(ids[:, columns], attention[:, columns], completed[:, :width])
        return self._replace(batch=batch, logprobs=self.logprobs[:, :width])


def merge(parts: Sequence[Samples], pad_token_id: int) -> Samples:
    """Joins rollouts into one; prompts are padded to the longest."""
    width = max(part.batch.input_ids.shape[1] for part in parts)
    batches = []
    for part in parts:
        left = (width - part.batch.input_ids.shape[1], 0)
        ids = functional.pad(part.batch.input_ids, left, value=pad_token_id)
        attention = functional.pad(part.batch.attention_mask, left)
        batches.append(Batch(ids, attention, part.batch.completion_mask))
    batch = Batch(*map(torch.cat, zip(*batches, strict=True)))
    return Samples(batch, *map(torch.cat, zip(*(part[1:] for part in parts), strict=True)))


def token_lists(batch: Batch) -> list[list[int]]:
    """The tokens of each completion without padding."""
    rows, lengths = batch.completion_ids.tolist(), batch.completion_mask.sum(1).tolist()
    return [row[:n] for row, n in zip(rows, lengths, strict=True)]


class Collector:
    """Completes prompts and scores the completions; every process does its share."""

    def __init__(
        self,
        learner: Learner,
        task: Task,
        rewards: Rewards,
        engine: Engine,
        *,
        max_new_tokens: int,
        seed: int,
    ) -> None:
        self.learner, self.task, self.rewards, self.engine = learner, task, rewards, engine
        self.max_new_tokens = max_new_tokens
        self.generator = torch.Generator().manual_seed(seed)
        for network in learner.networks.children():
            check_length(network, self._lengths())

    def _lengths(self) -> Iterator[int]:
        """For each prompt, its tokens plus the longest completion's."""
        for row in (*self.task.train, *self.task.held_out):
            yield len(encode_prompt(self.task.tokenizer, row)) + self.max_new_tokens

    def __call__(self, rows: Sequence[Row], *, temperature: float) -> Samples:
        """Completes and scores the rows' prompts; every row has its own random numbers.

        `temperature=0` is greedy.
        """
        learner, tokenizer = self.learner, self.task.tokenizer
        device = learner.accelerator.device
        # Every process needs the same number of rows; the added rows are removed at the end.
        count = len(rows)
        rows = [*rows, *[rows[0]] * (-count % learner.processes)]
        tokens = [encode_prompt(tokenizer, row) for row in rows]
        ids, mask = (t.to(device) for t in pad(tokens, tokenizer.pad_token_id, left=True))
        shape = (len(rows), self.max_new_tokens)
        uniforms = torch.zeros(shape, dtype=torch.float64)
        if temperature > 0:
            uniforms.uniform_(generator=self.generator)
        mine = learner.share(torch.arange(len(rows), device=device))
        own, logprobs = self.engine(
            ids[mine], mask[mine], uniforms.to(device)[mine], temperature=temperature
        )
        ends = torch.tensor(self.end_token_ids, device=device)
        finished = (torch.isin(own.completion_ids, ends) & own.completion_mask).any(1)
        table = self._rewards([rows[i] for i in mine.tolist()], own, finished)
        found, completed, logprobs, finished, table = (
            learner.collect(part, mine, len(rows))
            for part in (own.completion_ids, own.completion_mask, logprobs, finished, table)
        )
        batch = Batch(torch.cat([ids, found], 1), torch.cat([mask, completed], 1), completed)
        scores = weighted_sum(table, self.rewards.weights)
        return Samples(batch, logprobs, finished, table, scores).select(slice(count))

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        return end_token_ids(self.learner.networks.policy, self.task.tokenizer)

    def texts(self, batch: Batch) -> list[str]:
        """The completions as text, without the token that ended them.

        Padded vocabularies have tokens that the tokenizer lacks; these are left out.
        """
        tokenizer, ends = self.task.tokenizer, {*self.end_token_ids}
        known = range(len(tokenizer))
        rows = [[t for t in row if t in known and t not in ends] for row in token_lists(batch)]
        return tokenizer.batch_decode(rows, skip_special_tokens=True)

    def _rewards(self, rows: Sequence[Row], batch: Batch, finished: Tensor) -> Tensor:
        """Rewards `[B, functions]` of this process's completions."""
        completions = [
            text if isinstance(row.prompt, str) else [{"role": "assistant", "content": text}]
            for row, text in zip(rows, self.texts(batch), strict=True)
        ]
        names = dict.fromkeys(name for row in rows for name in row.columns)
        columns = {name: [row.columns.get(name) for row in rows] for name in names}
        columns["finished"] = finished.tolist()
        prompts = [row.prompt for row in rows]
        # A function may raise on one process alone; the others must not wait for it forever.
        with self.learner.together():
            table = self.rewards(prompts, completions, token_lists(batch), columns)
        return table.to(batch.input_ids.device)
