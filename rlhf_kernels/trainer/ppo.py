"""PPO-clip with a critic: sample, score, estimate advantages, update."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

import rlhf_kernels as rk

from .config import PPOConfig
from .data import Batch, Problem, Sampler, Task, encode_prompts
from .generation import generate
from .models import (
    build_critic,
    build_reference,
    completion_labels,
    completion_logits,
    completion_values,
)
from .rewards import Scores, score


class Rollout(NamedTuple):
    """Completions of a batch of problems, and what the reward functions said."""

    batch: Batch
    completions: list[str]
    scores: Scores


class Forward(NamedTuple):
    """What one pass over a batch gives, `[B, T]` each."""

    logprobs: Tensor
    entropy: Tensor
    values: Tensor


def sample_completions(
    policy: PreTrainedModel,
    task: Task,
    problems: Sequence[Problem],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Rollout:
    """Complete the problems' prompts and score the completions; `temperature=0` is greedy."""
    tokenizer = task.tokenizer
    prompt_ids, prompt_mask = encode_prompts(tokenizer, problems, policy.device)
    batch = generate(
        policy,
        prompt_ids,
        prompt_mask,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        temperature=temperature,
        generator=generator,
    )
    rows = batch.completion_ids.tolist()
    lengths = batch.completion_mask.sum(1).tolist()
    completion_ids = [row[:n] for row, n in zip(rows, lengths, strict=True)]
    completions = tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
    names = dict.fromkeys(name for p in problems for name in p.columns)
    columns = {name: [p.columns.get(name) for p in problems] for name in names}
    columns["finished"] = [ids[-1] == tokenizer.eos_token_id for ids in completion_ids]
    scores = score(
        task.reward_funcs,
        task.reward_weights,
        [p.prompt for p in problems],
        completions,
        completion_ids,
        columns,
    )
    return Rollout(batch, completions, scores)


class Call(NamedTuple):
    """A kernel call with copies of its inputs; `grad`: whether autograd was on."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    grad: bool


class Recorder:
    """Calls kernels, and keeps copies of the inputs of the calls made while `active`."""

    def __init__(self) -> None:
        self.active = False
        self.calls: list[Call] = []

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.active:
            named = {key: _snapshot(value) for key, value in kwargs.items()}
            grad = torch.is_grad_enabled()
            self.calls.append(Call(function, tuple(map(_snapshot, args)), named, grad))
        return function(*args, **kwargs)


def _snapshot(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


class PPOTrainer:
    """The state of a PPO run; `step()` is one rollout and its updates.

    Schulman et al. 2017 (PPO), with Ziegler et al. 2019's KL penalty inside the reward:
    R_t = -beta * KL_t + [t last] * score.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        task: Task,
        config: PPOConfig,
        *,
        max_new_tokens: int,
        seed: int,
    ) -> None:
        self.policy, self.task, self.config = policy, task, config
        self.critic = build_critic(policy)
        self.reference = build_reference(policy)
        self.max_new_tokens = max_new_tokens
        self.sampler = Sampler(task.train, config.batch_size, seed)
        self.generator = torch.Generator(policy.device).manual_seed(seed)
        self.shuffler = torch.Generator().manual_seed(seed)
        self.optimizers = [
            torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
            for model, lr in (
                (self.policy, config.learning_rate),
                (self.critic, config.critic_learning_rate),
            )
        ]
        self.schedules = [
            torch.optim.lr_scheduler.LambdaLR(optimizer, self._learning_rate_factor)
            for optimizer in self.optimizers
        ]
        if config.kl_target > 0:
            self.kl: rk.FixedKLController | rk.AdaptiveKLController = rk.AdaptiveKLController(
                config.kl_coef, config.kl_target, config.kl_horizon
            )
        else:
            self.kl = rk.FixedKLController(config.kl_coef)
        self.loss_config = rk.PolicyLossConfig.ppo(
            clip_low=config.clip_low,
            clip_high=config.clip_high,
            entropy_coef=config.entropy_coef,
        )
        self.kernel = Recorder()
        self.steps_done = 0

    def _learning_rate_factor(self, step: int) -> float:
        config = self.config
        fade = 1.0 - step / config.total_steps if config.lr_schedule == "linear" else 1.0
        return min(1.0, (step + 1) / max(1, config.warmup_steps)) * fade

    def forward(self, batch: Batch) -> Forward:
        """Log-probabilities and entropy of the policy, values of the critic."""
        logprobs, entropy = self._logprobs(self.policy, batch, entropy=True)
        return Forward(logprobs, entropy, completion_values(self.critic, batch))

    def _logprobs(self, model: PreTrainedModel, batch: Batch, *, entropy: bool) -> rk.TokenLogprobs:
        return self.kernel(
            rk.token_logprobs,
            completion_logits(model, batch),
            completion_labels(batch),
            temperature=self.config.temperature,
            entropy=entropy,
        )

    def step(self) -> dict[str, float]:
        """One rollout, its advantages and its updates; returns the step's metrics."""
        config, clock = self.config, [time.perf_counter()]
        rollout = sample_completions(
            self.policy,
            self.task,
            next(self.sampler),
            max_new_tokens=self.max_new_tokens,
            temperature=config.temperature,
            generator=self.generator,
        )
        batch, mask = rollout.batch, rollout.batch.completion_mask
        scores = torch.tensor(rollout.scores.total, device=mask.device)
        clock.append(time.perf_counter())

        # The old log-probabilities come from the very mini-batches of the first epoch, so that the
        # first ratio is exactly 1. With one update per rollout that pass is the update's own.
        parts = torch.arange(config.batch_size).split(config.mini_batch_size)
        single = len(parts) * config.epochs == 1
        with torch.set_grad_enabled(single):
            passes = [self.forward(batch.rows(part)) for part in parts]
        with torch.no_grad():
            old = Forward(*(torch.cat(field) for field in zip(*passes, strict=True)))
            reference_passes = [
                self._logprobs(self.reference, batch.rows(part), entropy=False) for part in parts
            ]
            reference = torch.cat([p.logprobs for p in reference_passes])
            estimate = self.kernel(
                rk.ppo_advantages,
                scores,
                old.logprobs,
                reference,
                old.values,
                mask,
                kl_coef=self.kl.value,
                kl_estimator=config.kl_estimator,
                gamma=config.gamma,
                lam=config.lam,
                whiten=config.whiten_advantages,
            )
        clock.append(time.perf_counter())

        updates = []
        for epoch in range(config.epochs):
            if epoch:
                order = torch.randperm(config.batch_size, generator=self.shuffler)
                parts = order.split(config.mini_batch_size)
            for part in parts:
                current = passes[0] if single else self.forward(batch.rows(part))
                updates.append(self._update(current, old, estimate, mask, part))
        for schedule in self.schedules:
            schedule.step()
        clock.append(time.perf_counter())

        lengths = mask.sum(1)
        kl = torch.where(mask, old.logprobs - reference, 0.0).sum(1).mean().item()
        metrics = {
            "step": self.steps_done,
            "reward": scores.mean().item(),
            **{f"reward/{name}": value for name, value in rollout.scores.means.items()},
            "kl": kl,
            "kl_coef": self.kl.value,
            "entropy": (torch.where(mask, old.entropy, 0.0).sum() / lengths.sum()).item(),
            "length": lengths.float().mean().item(),
            "tokens": lengths.sum().item(),
            **_mean_metrics(updates),
            "learning_rate": self.schedules[0].get_last_lr()[0],
            "time/generate": clock[1] - clock[0],
            "time/evaluate": clock[2] - clock[1],
            "time/update": clock[3] - clock[2],
        }
        self.kl.update(kl, config.batch_size)
        self.steps_done += 1
        return metrics

    def _update(
        self, current: Forward, old: Forward, estimate: rk.PPOAdvantages, mask: Tensor, part: Tensor
    ) -> dict[str, Tensor]:
        """One optimizer step of policy and critic on the rows `part`."""
        policy = self.kernel(
            rk.policy_loss,
            current.logprobs,
            old.logprobs[part],
            estimate.advantages[part],
            mask[part],
            entropy=current.entropy,
            config=self.loss_config,
        )
        value = self.kernel(
            rk.value_loss,
            current.values,
            old.values[part],
            estimate.returns[part],
            mask[part],
            clip_range=self.config.value_clip or None,
        )
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        # Policy and critic share no weights, so one backward pass serves both.
        (policy.loss + value.loss).backward()
        norms = [
            torch.nn.utils.clip_grad_norm_(model.parameters(), self.config.max_grad_norm)
            for model in (self.policy, self.critic)
        ]
        for optimizer in self.optimizers:
            optimizer.step()
        return {
            **_named("policy", policy.metrics),
            **_named("value", value.metrics),
            "policy/grad_norm": norms[0],
            "value/grad_norm": norms[1],
        }


def _named(prefix: str, metrics: Any) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": metrics[name] for name in metrics.fields}


def _mean_metrics(updates: Sequence[dict[str, Tensor]]) -> dict[str, float]:
    """Means over the updates (extremes of `_min` and `_max`), brought to the host in one copy."""
    names = list(updates[0])
    table = torch.stack([torch.stack([update[name] for name in names]) for update in updates])
    fold = {"_min": table.amin(0), "_max": table.amax(0)}
    columns = torch.stack([fold.get(n[-4:], table.mean(0))[i] for i, n in enumerate(names)])
    return dict(zip(names, columns.tolist(), strict=True))
