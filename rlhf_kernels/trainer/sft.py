"""Supervised phase: imitate the completions of the training problems."""

import math
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

import rlhf_kernels as rk

from .config import SFTConfig
from .data import Sampler, Task, supervised_batch
from .models import completion_labels, completion_logits


def sft_steps(
    policy: PreTrainedModel, task: Task, config: SFTConfig, *, seed: int, max_grad_norm: float
) -> Iterator[float]:
    """Train the policy in place; yields the mean token loss of every step."""
    rate = config.sft_learning_rate
    optimizer = torch.optim.AdamW(policy.parameters(), lr=rate, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / max(1, config.sft_warmup_steps))
    )
    sampler = Sampler(task.train, min(config.sft_batch_size, len(task.train)), seed)
    running = math.inf
    for step in range(config.sft_steps):
        batch = supervised_batch(task.tokenizer, next(sampler), policy.device)
        logits, labels = completion_logits(policy, batch), completion_labels(batch)
        loss = -rk.token_logprobs(logits, labels).logprobs.sum() / batch.completion_mask.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), max_grad_norm)
        optimizer.step()
        schedule.step()
        value = loss.item()
        running = value if step == 0 else 0.9 * running + 0.1 * value
        yield value
        if running < config.sft_stop_loss:
            return
