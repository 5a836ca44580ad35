"""Completions of prompts, shared among the processes, and their rewards."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from .data import Batch, Row, Task, pad, prompt_tokens
from .generation import Generation, generate
from .learner import Learner
from .models import Networks, causal_lm
from .rewards import Rewards, weighted_sum


class Samples(NamedTuple):
    """A rollout, whole on every process.

    Attributes:
        batch: prompts and completions, `[B, P + T]`.
        logprobs: the sampler's own, `[B, T]`.
        finished: whether a completion ended with the end token, `[B]`.
        table: rewards `[functions, B]`, NaN where a function said None.
        scores: their weighted sum, `[B]`.
    """

    batch: Batch
    logprobs: Tensor
    finished: Tensor
    table: Tensor
    scores: Tensor

    def select(self, rows: Tensor) -> "Samples":
        batch = self.batch.rows(rows)
        return Samples(
            batch,
            self.logprobs[rows],
            self.finished[rows],
            self.table[:, rows],
            self.scores[rows],
        )

    def trimmed(self) -> "Samples":
        """Without columns that are padding in every row."""
        batch, width = self.batch, self.batch.completion_mask.shape[1]
        kept = int(batch.completion_mask.any(0).sum())
        whole = batch.attention_mask.shape[1]
        skipped = int((~batch.attention_mask.any(0))[: whole - width].sum())
        columns = slice(skipped, whole - width + kept)
        ids, attention = batch.input_ids[:, columns], batch.attention_mask[:, columns]
        batch = Batch(ids, attention, batch.completion_mask[:, :kept])
        return self._replace(batch=batch, logprobs=self.logprobs[:, :kept])


def merge(parts: Sequence[Samples], pad_token_id: int) -> Samples:
    """Rollouts with prompts of different widths, one below the other."""
    width = max(p.batch.input_ids.shape[1] for p in parts)
    batches = []
    for part in parts:
        left = (width - part.batch.input_ids.shape[1], 0)
        ids = functional.pad(part.batch.input_ids, left, value=pad_token_id)
        attention = functional.pad(part.batch.attention_mask, left)
        batches.append(Batch(ids, attention, part.batch.completion_mask))
    return Samples(
        Batch(*(torch.cat(field) for field in zip(*batches, strict=True))),
        torch.cat([p.logprobs for p in parts]),
        torch.cat([p.finished for p in parts]),
        torch.cat([p.table for p in parts], 1),
        torch.cat([p.scores for p in parts]),
    )


def texts(task: Task, batch: Batch) -> list[str]:
    """The completions, decoded."""
    return task.tokenizer.batch_decode(_token_lists(batch), skip_special_tokens=True)


def _token_lists(batch: Batch) -> list[list[int]]:
    rows, lengths = batch.completion_ids.tolist(), batch.completion_mask.sum(1).tolist()
    return [row[:n] for row, n in zip(rows, lengths, strict=True)]


def sample(
    learner: Learner,
    task: Task,
    rewards: Rewards,
    rows: Sequence[Row],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
    decoded_at_once: int = 0,
) -> Samples:
    """Completes the rows' prompts and scores the completions; `temperature=0` is greedy.

    Every process completes and scores its own part, with random numbers that belong to the row.
    """
    tokenizer, device = task.tokenizer, learner.accelerator.device
    # Every process needs as many rows as the others; the added ones are cut off again.
    count, added = len(rows), -len(rows) % learner.processes
    rows = [*rows, *[rows[0]] * added]
    tokens = [prompt_tokens(tokenizer, row.prompt) for row in rows]
    ids, mask = (t.to(device) for t in pad(tokens, tokenizer.pad_token_id, left=True))
    uniforms = None
    if temperature > 0:
        shape = (len(rows), max_new_tokens)
        uniforms = torch.rand(shape, dtype=torch.float64, generator=generator).to(device)
    mine = learner.share(torch.arange(len(rows), device=device))

    def decode(networks: Networks) -> list[Generation]:
        return [
            generate(
                causal_lm(networks.policy).eval(),
                ids[part],
                mask[part],
                max_new_tokens=max_new_tokens,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
                temperature=temperature,
                uniforms=None if uniforms is None else uniforms[part],
                any_alive=learner.any_alive,
            )
            for part in mine.split(decoded_at_once or len(mine))
        ]

    parts = learner.forward(decode)
    local = Batch(*(torch.cat(field) for field in zip(*(p.batch for p in parts), strict=True)))
    finished = local.completion_ids.eq(tokenizer.eos_token_id) & local.completion_mask
    table = _rewards(task, rewards, [rows[i] for i in mine.tolist()], local, finished.any(1))

    def whole(own: Tensor) -> Tensor:
        everyone = own.new_zeros(len(rows), *own.shape[1:])
        everyone[mine] = own
        return learner.total(everyone)

    completed = whole(local.completion_mask.long()).bool()
    batch = Batch(
        torch.cat([ids, whole(local.completion_ids)], 1), torch.cat([mask, completed], 1), completed
    )
    table = whole(table.T.contiguous()).T
    samples = Samples(
        batch,
        whole(torch.cat([p.logprobs for p in parts])),
        whole(finished.any(1).long()).bool(),
        table,
        weighted_sum(table, rewards.weights),
    )
    return samples.select(torch.arange(count, device=device))


def _rewards(
    task: Task, rewards: Rewards, rows: Sequence[Row], batch: Batch, finished: Tensor
) -> Tensor:
    """Rewards `[functions, B]` of this process's completions."""
    completions = [
        text if isinstance(row.prompt, str) else [{"role": "assistant", "content": text}]
        for row, text in zip(rows, texts(task, batch), strict=True)
    ]
    names = dict.fromkeys(name for row in rows for name in row.columns)
    columns = {name: [row.columns.get(name) for row in rows] for name in names}
    columns["finished"] = finished.tolist()
    table = rewards([row.prompt for row in rows], completions, _token_lists(batch), columns)
    return torch.tensor(table, dtype=torch.float32, device=batch.input_ids.device)
