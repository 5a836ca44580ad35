"""The online step: sample, score, estimate advantages, update. Every algorithm is this one."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import rlhf_kernels as rk

from . import models
from .algorithms import ALGORITHMS, Estimate, Outcome, loss_config
from .config import CriticConfig, OnlineConfig, OptimConfig, require
from .data import Batch, Row, Sampler, Task
from .learner import Learner
from .offline import OfflineTrainer
from .recorder import kernel
from .rewards import Rewards, means
from .rollout import Samples, merge, sample


class Plan(NamedTuple):
    """What the updates of a rollout aim at; `old` is None where they are the update's own."""

    old: Tensor | None
    values: Tensor | None
    estimate: Estimate


class OnlineTrainer:
    """The state of an online run; `step()` is one rollout and its updates.

    Every process holds the whole rollout and works on its part of each mini-batch, so that
    statistics, normalisers and whitening are those of the whole batch.
    """

    def __init__(
        self,
        name: str,
        learner: Learner,
        task: Task,
        rewards: Rewards,
        reference: models.Reference | None,
        optim: OptimConfig,
        config: OnlineConfig,
        critic: CriticConfig,
        *,
        max_new_tokens: int,
        seed: int,
        ptx: OfflineTrainer | None = None,
    ) -> None:
        self.algorithm, self.learner, self.task, self.rewards = (
            ALGORITHMS[name], learner, task, rewards,
        )  # fmt: skip
        self.reference, self.optim, self.config, self.critic = reference, optim, config, critic
        self.max_new_tokens, self.ptx = max_new_tokens, ptx
        self.mini_batch_size = config.mini_batch_size or optim.batch_size
        self._check()
        self.sampler = Sampler(len(task.train), optim.batch_size // config.num_generations, seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.shuffler = torch.Generator().manual_seed(seed)
        if config.kl_target > 0:
            self.kl: rk.FixedKLController | rk.AdaptiveKLController = rk.AdaptiveKLController(
                config.kl_coef, config.kl_target, config.kl_horizon
            )
        else:
            self.kl = rk.FixedKLController(config.kl_coef)
        self.moments = rk.RunningMoments()
        self.loss = loss_config(self.algorithm, config)
        self.steps_done = 0

    def _check(self) -> None:
        size, mini, config = self.optim.batch_size, self.mini_batch_size, self.config
        require(size % mini == 0, "mini_batch_size", f"a divisor of batch_size={size}", mini)
        group = config.num_generations
        require(size % group == 0, "num_generations", f"a divisor of batch_size={size}", group)
        self.learner.require_divisible("mini_batch_size", mini)
        grouped = config.dynamic_sampling == 1 or group > 1
        require(
            grouped, "dynamic_sampling", "1 where num_generations is 1", config.dynamic_sampling
        )
        several = config.penalty_target == 0 or config.epochs * size > mini
        require(
            several,
            "penalty_target",
            "0 with one update per rollout, whose KL is 0",
            config.penalty_target,
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps_done": self.steps_done,
            "kl": self.kl.state_dict(),
            "moments": self.moments.state_dict(),
            "penalty_coef": self.loss.penalty_coef,
            "sampler": self.sampler.state_dict(),
            "generator": self.generator.get_state(),
            "shuffler": self.shuffler.get_state(),
            "ptx": self.ptx.state_dict() if self.ptx else {},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps_done = state["steps_done"]
        self.kl.load_state_dict(state["kl"])
        self.moments.load_state_dict(state["moments"])
        self.loss = dataclasses.replace(self.loss, penalty_coef=state["penalty_coef"])
        self.sampler.load_state_dict(state["sampler"])
        self.generator.set_state(state["generator"])
        self.shuffler.set_state(state["shuffler"])
        if self.ptx:
            self.ptx.load_state_dict(state["ptx"])

    # --- sampling ----------------------------------------------------------------------------

    def sample(self, rows: Sequence[Row], *, temperature: float) -> Samples:
        """Completions of the rows and their rewards; `temperature=0` is greedy."""
        return sample(
            self.learner, self.task, self.rewards, rows, max_new_tokens=self.max_new_tokens,
            temperature=temperature, generator=self.generator,
            decoded_at_once=self.config.generation_batch_size,
        )  # fmt: skip

    def rollout(self) -> tuple[list[Row], Samples]:
        """A batch of groups of completions.

        Dynamic sampling (DAPO): groups whose rewards are all equal teach nothing, so up to
        `dynamic_sampling` rounds look for others; what is still missing then are equal groups.
        """
        group, parts, rows = self.config.num_generations, [], []
        needed = self.optim.batch_size // group
        differs = torch.zeros(0, dtype=torch.bool)
        for _ in range(self.config.dynamic_sampling):
            prompts = [self.task.train[i] for i in next(self.sampler)]
            rows += prompts
            repeated = [row for row in prompts for _ in range(group)]
            parts.append(self.sample(repeated, temperature=self.config.temperature))
            scores = parts[-1].scores.view(-1, group)
            differs = torch.cat([differs, (scores != scores[:, :1]).any(1).cpu()])
            if differs.sum() >= needed:
                break
        chosen = torch.argsort(~differs, stable=True)[:needed].sort().values
        if len(parts) == 1:
            return rows, parts[0].trimmed()
        index = (chosen[:, None] * group + torch.arange(group)).flatten()
        merged = merge(parts, self.task.tokenizer.pad_token_id)
        chosen_rows = [rows[i] for i in chosen.tolist()]
        return chosen_rows, merged.select(index.to(merged.scores.device)).trimmed()

    def _shaped(self, samples: Samples) -> Tensor:
        """Scores with the overlong penalty, normalised and clipped as configured."""
        config, scores = self.config, samples.scores
        if config.overlong_buffer:
            # DAPO (2503.14476), equation 13; what was cut off counts as beyond the limit.
            soft = self.max_new_tokens - config.overlong_buffer
            lengths = samples.batch.completion_mask.sum(1)
            penalty = ((soft - lengths) / config.overlong_buffer).clamp(-1.0, 0.0)
            scores = scores + torch.where(samples.finished, penalty, -1.0)
        if config.reward_normalize:
            self.moments.update(scores)
            # Equal rewards have deviation 0.
            scores = (scores - self.moments.mean) / (self.moments.std or 1.0)
        if config.reward_clip:
            scores = scores.clamp(-config.reward_clip, config.reward_clip)
        return scores

    # --- passes over a rollout ---------------------------------------------------------------

    def _gather(self, batch: Batch, rows: Tensor, own: Tensor) -> Tensor:
        """Values `[B, T]` of the whole batch from those of this process's rows."""
        everyone = own.new_zeros(batch.completion_mask.shape)
        everyone[rows] = own.detach()
        return self.learner.total(everyone)

    def _evaluate(
        self,
        batch: Batch,
        parts: Sequence[Tensor],
        function: Callable[[models.Networks, Batch], Tensor],
    ) -> Tensor:
        """`function` of the whole batch, in the very micro-batches of the first epoch.

        So the first update sees the same shapes, and its ratio is exactly 1.
        """
        micro = [m for part in parts for m in self.learner.micro(self.learner.share(part))]
        found = [self.learner.forward(lambda n, m=m: function(n, batch.rows(m))) for m in micro]
        return self._gather(batch, torch.cat(micro), torch.cat(found))

    def _logprobs(self, head: models.Head, batch: Batch) -> Tensor:
        with torch.no_grad():
            detached = head._replace(hidden=head.hidden.detach())
            return detached.logprobs(batch.labels, temperature=self.config.temperature)

    def step(self) -> dict[str, float]:
        """One rollout, its advantages and its updates; returns the step's metrics."""
        config, clock = self.config, [time.perf_counter()]
        kernel.begin_step(self.steps_done)
        rows, samples = self.rollout()
        greedy = self._greedy(rows) if self.algorithm.greedy else None
        scores = self._shaped(samples)
        clock.append(time.perf_counter())

        batch = samples.batch
        parts = torch.arange(len(scores)).split(self.mini_batch_size)
        reference = None
        if self.reference is not None:
            ask = self.reference
            reference = self._evaluate(batch, parts, lambda n, b: self._logprobs(ask(n, b), b))
        coefficient = self.kl.value if self.algorithm.kl == "reward" else 0.0
        running_mean = 0.0 if config.reward_normalize else self.moments.mean
        outcome = Outcome(
            scores, batch.completion_mask, None, reference, None, greedy, running_mean
        )

        def plan(logprobs: Tensor | None, values: Tensor | None) -> Plan:
            done = outcome._replace(logprobs=logprobs, values=values)
            estimate = self.algorithm.advantages(done, config, self.critic, coefficient)
            return Plan(logprobs, values, estimate)

        once = len(parts) * config.epochs == 1
        beforehand = self.algorithm.critic or coefficient != 0 or not once
        # The only update of a rollout computes the old log-probabilities itself, unless advantages
        # need them and it comes in several micro-batches.
        alone = once and len(self.learner.micro(self.learner.share(parts[0]))) == 1
        made: list[Plan] = []
        if not beforehand:
            made.append(plan(None, None))
        elif not alone:
            old = self._evaluate(
                batch, parts, lambda n, b: self._logprobs(models.lm_head(n.policy, b), b)
            )
            values = None
            if self.algorithm.critic:
                values = self._evaluate(batch, parts, lambda n, b: models.values(n.critic, b))
            made.append(plan(old, values))
        clock.append(time.perf_counter())

        def planned(part: Batch, index: Tensor, head: models.Head, values: Tensor | None) -> Plan:
            if not made:
                old = self._gather(batch, index, self._logprobs(head, part))
                made.append(
                    plan(old, None if values is None else self._gather(batch, index, values))
                )
            return made[0]

        table: list[dict[str, Tensor]] = []
        norms: list[Tensor] = []
        self.loss = self._loss_of_step()
        for epoch in range(config.epochs):
            if epoch:
                order = torch.randperm(len(scores), generator=self.shuffler)
                parts = order.split(self.mini_batch_size)
            last_epoch = len(table)
            for part in parts:
                table += self._update(samples, reference, part, planned)
                frozen = ("policy",) if self.steps_done < self.critic.critic_warmup_steps else ()
                norms.append(self.learner.step(self.steps_done, frozen=frozen))
        clock.append(time.perf_counter())
        if not config.reward_normalize:
            self.moments.update(samples.scores)

        lengths = batch.completion_mask.sum(1)
        folded = self._fold(table, len(norms))
        kl = None
        if reference is not None:
            old = made[0].old
            if old is None:
                # The only update, by the policy that sampled.
                kl = folded["policy/k1_ref"] * lengths.sum().item() / len(lengths)
            else:
                difference = torch.where(batch.completion_mask, old - reference, 0.0)
                kl = difference.sum(1).mean().item()
        kernel.active = False
        groups = samples.scores.view(-1, config.num_generations)
        rate, named = self.learner.optimizer.param_groups[0]["lr"], torch.stack(norms).mean(0)
        metrics = {
            "step": self.steps_done,
            "reward": samples.scores.mean().item(),
            "reward_std": samples.scores.std().item(),
            "frac_reward_zero_std": (groups == groups[:, :1]).all(1).float().mean().item(),
            **dict(zip(self._reward_names(), means(samples.table), strict=True)),
            **({} if kl is None else {"kl": kl, "kl_coef": self.kl.value}),
            "entropy": folded["policy/entropy"],
            "length": lengths.float().mean().item(),
            "length_clipped": (~samples.finished).float().mean().item(),
            "tokens": lengths.sum().item(),
            **folded,
            **dict(zip(("policy/grad_norm", "value/grad_norm"), named.tolist(), strict=False)),
            "learning_rate": rate,
            "time/generate": clock[1] - clock[0],
            "time/evaluate": clock[2] - clock[1],
            "time/update": clock[3] - clock[2],
            "tokens_per_second": lengths.sum().item() / (clock[3] - clock[0]),
        }
        if kl is not None:
            self.kl.update(kl, len(scores))
        self._adapt_penalty(self._fold(table[last_epoch:], 1)["policy/k3_old"])
        self.steps_done += 1
        return metrics

    def _reward_names(self) -> list[str]:
        return [f"reward/{name}" for name in self.rewards.names]

    def _greedy(self, rows: Sequence[Row]) -> Tensor:
        """Score of the greedy completion of each prompt, once per completion."""
        scores = self.sample(rows, temperature=0).scores
        return scores.repeat_interleave(self.config.num_generations)

    def _loss_of_step(self) -> rk.PolicyLossConfig:
        if self.algorithm.kl == "reward" or self.loss.kl_coef == self.kl.value:
            return self.loss
        return dataclasses.replace(self.loss, kl_coef=self.kl.value)

    def _adapt_penalty(self, kl: float) -> None:
        """Schulman et al. 2017 (1707.06347), section 4."""
        target, beta = self.config.penalty_target, self.loss.penalty_coef
        if target and kl < target / 1.5:
            beta /= 2
        elif target and kl > target * 1.5:
            beta *= 2
        if beta != self.loss.penalty_coef:
            self.loss = dataclasses.replace(self.loss, penalty_coef=beta)

    # --- updates -----------------------------------------------------------------------------

    def _update(
        self,
        samples: Samples,
        reference: Tensor | None,
        part: Tensor,
        planned: Callable[..., Plan],
    ) -> list[dict[str, Tensor]]:
        """Gradients of one mini-batch; metrics of each of this process's micro-batches."""
        normalizer = self._normalizer(samples.batch.completion_mask[part])
        tokens = float(samples.batch.completion_mask[part].sum())

        def micro(index: Tensor) -> Callable[[models.Networks], tuple[Tensor, dict[str, Tensor]]]:
            def function(networks: models.Networks) -> tuple[Tensor, dict[str, Tensor]]:
                rows = samples.batch.rows(index)
                head = models.lm_head(networks.policy, rows)
                values = models.values(networks.critic, rows) if self.algorithm.critic else None
                plan = planned(rows, index, head, values)
                old = self._logprobs(head, rows) if plan.old is None else plan.old[index]
                loss, metrics = head.policy_loss(
                    rows.labels,
                    old,
                    plan.estimate.advantages[index],
                    rows.completion_mask,
                    temperature=self.config.temperature,
                    ref_logprobs=None if reference is None else reference[index],
                    rollout_logprobs=samples.logprobs[index],
                    normalizer=normalizer,
                    config=self.loss,
                )
                named = _named("policy", metrics)
                if values is not None:
                    value = kernel(
                        rk.value_loss,
                        values,
                        (values.detach() if plan.values is None else plan.values[index]),
                        plan.estimate.returns[index],
                        rows.completion_mask,
                        clip_range=self.critic.value_clip or None,
                        normalizer=max(1.0, tokens),
                    )
                    loss = loss + self.critic.value_coef * value.loss
                    named |= _named("value", value.metrics)
                return loss, named

            return function

        functions = [micro(m) for m in self.learner.micro(self.learner.share(part))]
        if self.ptx is None:
            return self.learner.accumulate(functions)
        # Before them: the last one has to reach the critic too.
        extra = self.ptx.losses(self.ptx.next_items(), weight=self.config.ptx_coef)
        return self.learner.accumulate([*extra, *functions])[len(extra) :]

    def _normalizer(self, mask: Tensor) -> float:
        """The divisor of the loss over a whole mini-batch, wherever its rows are."""
        if self.loss.aggregation == "token-mean":
            count = float(mask.sum())
        elif self.loss.aggregation == "constant":
            count = float(len(mask) * self.max_new_tokens)
        else:
            count = float(mask.any(1).sum())
        return max(1.0, count)

    def _fold(self, table: Sequence[dict[str, Tensor]], updates: int) -> dict[str, float]:
        """Metrics over micro-batches and processes: losses are sums, the others token means."""
        names = list(table[0])
        own = torch.stack([torch.stack([row[name] for name in names]) for row in table])
        whole = self.learner.accelerator.gather(own)
        weight = whole[:, names.index("policy/tokens")]
        mean = (whole * weight[:, None]).sum(0) / weight.sum().clamp(min=1.0)
        columns = []
        for i, name in enumerate(names):
            if name.endswith(("loss", "tokens")):
                columns.append(whole[:, i].sum() / updates)
            elif name.endswith("_min"):
                columns.append(whole[:, i].min())
            else:
                columns.append(whole[:, i].max() if name.endswith("_max") else mean[i])
        return dict(zip(names, torch.stack(columns).tolist(), strict=True))


def _named(prefix: str, metrics: Any) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": metrics[name] for name in metrics.fields}
