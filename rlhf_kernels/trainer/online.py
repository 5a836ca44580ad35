"""The online step of all algorithms: sample, score, estimate advantages, update."""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import rlhf_kernels as rk

from . import models
from .algorithms import ALGORITHMS, Outcome, adapted, loss_config, normalizer_of
from .checks import check_online
from .config import OnlineConfig, OptimConfig, PPOConfig
from .data import Batch, Row, Sampler
from .finite import Micro, NonFinite, check_rows, excerpt, row_name
from .learner import Learner
from .offline import OfflineTrainer
from .online_metrics import fold, of_lengths, of_rewards, of_times, prefixed
from .rewards import means
from .rollout import Collector, Samples, merge
from .timing import timed

# The types that JSON can represent.
_PLAIN = (str, int, float, bool, type(None))
# Names, for messages, of the tensors that the updates read.
_SPOKEN = {
    "old": "the policy's log-probability",
    "advantages": "the advantage",
    "reference": "the reference's log-probability",
    "rollout": "the sampler's log-probability",
    "values": "the critic's value",
    "returns": "the return",
}


class OnlineTrainer:
    """The state of an online run; `step()` samples one rollout and trains on it.

    Every process holds the whole rollout and trains on its share of each mini-batch. Statistics,
    normalisers and whitening therefore cover the whole batch.
    """

    def __init__(
        self,
        name: str,
        learner: Learner,
        sample: Collector,
        reference: models.Reference | None,
        optim: OptimConfig,
        config: OnlineConfig,
        *,
        seed: int,
        ptx: OfflineTrainer | None = None,
    ) -> None:
        self.algorithm, self.learner, self.sample = ALGORITHMS[name], learner, sample
        self.reference, self.optim, self.config, self.ptx = reference, optim, config, ptx
        self.mini_batch_size = config.mini_batch_size or optim.batch_size
        check_online(name, config, optim, learner.processes)
        prompts = optim.batch_size // config.num_generations
        self.sampler = Sampler(len(sample.task.train), prompts, seed)
        self.shuffler = torch.Generator().manual_seed(seed)
        self.kl: rk.FixedKLController | rk.AdaptiveKLController = rk.FixedKLController(
            config.kl_coef
        )
        if config.kl_target > 0:
            self.kl = rk.AdaptiveKLController(config.kl_coef, config.kl_target, config.kl_horizon)
        self.moments = rk.RunningMoments()
        self.loss = loss_config(self.algorithm, config)
        self.steps_done = 0

    def _stateful(self) -> dict[str, Any]:
        parts = {"kl": self.kl, "moments": self.moments, "sampler": self.sampler}
        return parts | ({"ptx": self.ptx} if self.ptx else {})

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps_done": self.steps_done,
            "penalty_coef": self.loss.penalty_coef,
            "generator": self.sample.generator.get_state(),
            "shuffler": self.shuffler.get_state(),
            **{name: part.state_dict() for name, part in self._stateful().items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps_done = state["steps_done"]
        self.loss = dataclasses.replace(self.loss, penalty_coef=state["penalty_coef"])
        self.sample.generator.set_state(state["generator"])
        self.shuffler.set_state(state["shuffler"])
        for name, part in self._stateful().items():
            part.load_state_dict(state[name])

    # --- sampling ----------------------------------------------------------------------------

    def rollout(self) -> tuple[list[Row], Samples]:
        """Samples a batch of prompt groups.

        Dynamic sampling (DAPO): a group with equal rewards has no gradient. Up to
        `dynamic_sampling` rounds sample more groups; groups with equal rewards fill what remains.
        """
        self._tell_rewards()
        group, parts, rows = self.config.num_generations, [], []
        needed = self.optim.batch_size // group
        for _ in range(self.config.dynamic_sampling):
            rows += [self.sample.task.train[i] for i in next(self.sampler)]
            repeated = [row for row in rows[-needed:] for _ in range(group)]
            parts.append(self.sample(repeated, temperature=self.config.temperature))
            samples = parts[0] if len(parts) == 1 else merge(parts, self._pad_token_id)
            scores = samples.scores.view(-1, group)
            differs = (scores != scores[:, :1]).any(1)
            if differs.sum() >= needed:
                break
        chosen = torch.argsort(~differs, stable=True)[:needed].sort().values
        members = torch.arange(group, device=chosen.device)
        index = (chosen[:, None] * group + members).flatten()
        return [rows[i] for i in chosen.tolist()], samples.select(index).trimmed()

    def _tell_rewards(self) -> None:
        """Updates the `trainer_state` that reward functions see, and drops their earlier logs."""
        self.sample.rewards.forget()
        state, optim = self.sample.rewards.state, self.optim
        passes = optim.batch_size / self.config.num_generations / len(self.sample.task.train)
        state.global_step, state.max_steps = self.steps_done, optim.total_steps
        state.epoch = self.steps_done * passes
        state.num_train_epochs = math.ceil(optim.total_steps * passes)
        state.train_batch_size = optim.batch_size
        state.is_world_process_zero = self.learner.accelerator.is_main_process
        state.is_local_process_zero = self.learner.accelerator.is_local_main_process

    @property
    def _pad_token_id(self) -> int:
        return int(self.sample.task.tokenizer.pad_token_id)

    def _greedy(self, rows: Sequence[Row]) -> Tensor:
        """The score of each prompt's greedy completion, repeated for every completion."""
        scores = self.sample(rows, temperature=0).scores
        return scores.repeat_interleave(self.config.num_generations)

    def evaluate(self) -> dict[str, Any]:
        """Completes the held-out rows greedily; returns mean rewards as `scores`, and `texts`."""
        self._tell_rewards()
        rows, size = self.sample.task.held_out, self.optim.batch_size
        parts = [
            self.sample(rows[start : start + size], temperature=0)
            for start in range(0, len(rows), size)
        ]
        scores = means(torch.cat([part.table for part in parts]))
        texts = [text for part in parts for text in self.sample.texts(part.batch)]
        good = torch.cat([part.logprobs.isfinite().all(1) for part in parts])
        what = "the policy's log-probability"
        told = check_rows(good, lambda i: row_name(rows[i], i, "held-out"), what, "evaluation")
        if told:
            raise NonFinite(told)
        # Samples are shown for the main process's rows, which are the first of a batch.
        shown = min(self.config.num_samples, -(-min(size, len(rows)) // self.learner.processes))
        logged = {
            column: [v if isinstance(v, _PLAIN) else repr(v) for v in values[:shown]]
            for column, values in self.sample.rewards.extra.items()
        }
        names = self.sample.rewards.names
        return {"scores": dict(zip(names, scores, strict=True)), "texts": texts, "logged": logged}

    def _shaped(self, samples: Samples) -> Tensor:
        """The scores with the overlong penalty, normalised and clipped as configured."""
        config, scores = self.config, samples.scores
        if config.overlong_buffer:
            # DAPO (2503.14476), equation 13. A truncated completion counts as beyond the limit.
            soft = self.sample.max_new_tokens - config.overlong_buffer
            lengths = samples.batch.completion_mask.sum(1)
            penalty = ((soft - lengths) / config.overlong_buffer).clamp(-1.0, 0.0)
            scores = scores + torch.where(samples.finished, penalty, -1.0)
        if config.reward_normalize:
            self.moments.update(scores)
            # The deviation of equal rewards is 0.
            scores = (scores - self.moments.mean) / (self.moments.std or 1.0)
        if config.reward_clip:
            scores = scores.clamp(-config.reward_clip, config.reward_clip)
        return scores

    # --- passes over a rollout ---------------------------------------------------------------

    def _evaluate(
        self,
        batch: Batch,
        parts: Sequence[Tensor],
        function: Callable[[models.Networks, Batch], Tensor],
    ) -> Tensor:
        """`function` of the whole batch, computed in the micro-batches of the first epoch.

        The first update then has the same shapes, so its ratio is exactly 1.
        """
        micro = [m for part in parts for m in self.learner.micro(self.learner.share(part))]

        def of(rows: Tensor) -> Tensor:
            return self.learner.forward(lambda networks: function(networks, batch.rows(rows)))

        found = [of(rows) for rows in micro]
        return self.learner.collect(torch.cat(found), torch.cat(micro), len(batch.input_ids))

    def _logprobs(self, head: models.Head, batch: Batch) -> Tensor:
        with torch.no_grad():
            detached = head._replace(hidden=head.hidden.detach())
            return detached.logprobs(batch.labels, temperature=self.config.temperature)

    def step(self) -> dict[str, float]:
        """Samples a rollout, estimates advantages and updates; returns the step's metrics."""
        config, clock = self.config, [time.perf_counter()]
        timed.seconds()
        rows, samples = self._rollout = self.rollout()
        greedy = self._greedy(rows) if self.algorithm.greedy else None
        found = {"reward": samples.scores, "greedy reward": greedy}
        found["the sampler's log-probability"] = samples.logprobs
        if message := self._not_finite(found):
            return self._pass_over(message, clock)
        scores = self._shaped(samples)
        clock.append(time.perf_counter())

        parts = torch.arange(len(scores)).split(self.mini_batch_size)
        tensors, sampled = self._estimate(samples, scores, greedy, parts)
        reference = tensors["reference"]
        if message := self._not_finite({_SPOKEN.get(k, k): t for k, t in tensors.items()}):
            return self._pass_over(message, clock)
        clock.append(time.perf_counter())

        if self.algorithm.kl == "loss":
            self.loss = dataclasses.replace(self.loss, kl_coef=self.kl.value)
        frozen = ("policy",) if self.steps_done < getattr(config, "critic_warmup_steps", 0) else ()
        table: list[dict[str, Tensor]] = []
        passed_over: list[dict[str, Tensor]] = []
        norms: list[Tensor] = []
        for epoch in range(config.epochs):
            if epoch:
                order = torch.randperm(len(scores), generator=self.shuffler)
                parts = order.split(self.mini_batch_size)
            last_epoch = len(table)
            for part in parts:
                metrics = self._update(samples.batch, part, tensors)
                norms.append(self.learner.step(self.steps_done, frozen=frozen))
                (passed_over if self.learner.skipped else table).extend(metrics)
        clock.append(time.perf_counter())

        folded = fold(table or passed_over, len(norms), self.learner.accelerator.gather)
        row = self._metrics(samples, folded, norms, clock)
        if not config.reward_normalize:
            self.moments.update(samples.scores)
        if reference is not None:
            difference = torch.where(samples.batch.completion_mask, sampled - reference, 0.0)
            row |= {"kl": difference.sum(1).mean().item(), "kl_coef": self.kl.value}
            self.kl.update(row["kl"], len(scores))
        if config.penalty_target and table[last_epoch:]:
            last = fold(table[last_epoch:], 1, self.learner.accelerator.gather)
            self.loss = adapted(self.loss, last["policy/k3_old"], config.penalty_target)
        self.steps_done += 1
        return row

    def _estimate(
        self, samples: Samples, scores: Tensor, greedy: Tensor | None, parts: Sequence[Tensor]
    ) -> tuple[dict[str, Tensor | None], Tensor]:
        """The tensors that the updates read, by name, and the sampled log-probabilities."""
        config, batch = self.config, samples.batch
        old, reference, values = None, None, None
        if self.reference is not None:
            ask = self.reference
            reference = self._evaluate(batch, parts, lambda n, b: self._logprobs(ask(n, b), b))
        if self.algorithm.critic:
            values = self._evaluate(batch, parts, lambda n, b: models.values(n.critic, b))
        # A single update per rollout starts from the policy that sampled, and needs no `old`.
        if len(parts) * config.epochs > 1:
            old = self._evaluate(
                batch, parts, lambda n, b: self._logprobs(models.lm_head(n.policy, b), b)
            )
        sampled = samples.logprobs if old is None else old
        advantages, returns = self.algorithm.advantages(
            Outcome(
                config=config,
                kl_coef=self.kl.value if self.algorithm.kl == "reward" else 0.0,
                scores=scores,
                mask=batch.completion_mask,
                logprobs=sampled,
                ref_logprobs=reference,
                values=values,
                greedy_scores=greedy,
                running_mean=0.0 if config.reward_normalize else self.moments.mean,
            )
        )
        # Causes come before effects, because a message names the first tensor that is not finite.
        tensors = {"old": old, "reference": reference, "rollout": samples.logprobs}
        tensors |= {"values": values, "advantages": advantages, "returns": returns}
        return tensors, sampled

    # --- values that are not finite ----------------------------------------------------------

    def _not_finite(self, tensors: dict[str, Tensor | None]) -> str:
        """Describes the first of some tensors, `[B]` or `[B, T]`, that is not finite.

        Returns "" if all are finite. The tensors, and so the result, are equal on every process.
        """
        kept = self._rollout[1].batch.completion_mask
        good = {
            name: x.isfinite() if x.dim() == 1 else (x.isfinite() | ~kept).all(1)
            for name, x in tensors.items()
            if x is not None
        }
        if bool(torch.stack(list(good.values())).all()):
            return ""
        where = f"step {self.steps_done}, rollout"
        found = (check_rows(rows, self._row_name, what, where) for what, rows in good.items())
        return next(message for message in found if message)

    def _row_name(self, number: int) -> str:
        """The name of a completion of the rollout in messages."""
        rows, samples = self._rollout
        row = rows[number // self.config.num_generations]
        (text,) = self.sample.texts(samples.batch.rows(slice(number, number + 1)))
        where = f" of {row.origin}" if row.origin else ""
        return f"completion {number}{where} ({excerpt(row.prompt)} -> {excerpt(text)})"

    def _pass_over(self, message: str, clock: Sequence[float]) -> dict[str, float]:
        """Skips a rollout that is not finite; returns the row of its step."""
        self.learner.pass_over(message)
        seconds = time.perf_counter() - clock[0]
        row = {"step": self.steps_done, "skipped": 1.0, "time/step": seconds}
        self.steps_done += 1
        return row

    def _metrics(
        self,
        samples: Samples,
        folded: dict[str, float],
        norms: Sequence[Tensor],
        clock: Sequence[float],
    ) -> dict[str, float]:
        logged = self.learner.means(self.sample.rewards.metrics)
        passed_over = sum(bool(norm.isnan().any()) for norm in norms)
        skipped = {"skipped": float(passed_over)} if self.optim.skip_nonfinite else {}
        mean_norms = torch.stack(list(norms)).nanmean(0).tolist()
        group, names = self.config.num_generations, self.sample.rewards.names
        return {
            "step": self.steps_done,
            **of_rewards(samples, names, group),
            **{f"logged/{name}": value for name, value in logged.items()},
            "entropy": folded["policy/entropy"],
            **of_lengths(samples),
            **folded,
            **skipped,
            **dict(zip(("policy/grad_norm", "value/grad_norm"), mean_norms, strict=False)),
            "learning_rate": self.learner.optimizer.param_groups[0]["lr"],
            **of_times(samples, clock),
        }

    # --- updates -----------------------------------------------------------------------------

    def _update(
        self, batch: Batch, part: Tensor, tensors: dict[str, Tensor | None]
    ) -> list[dict[str, Tensor]]:
        """Accumulates a mini-batch's gradients; metrics of this process's micro-batches."""
        mask = batch.completion_mask[part]
        normalizer = normalizer_of(self.loss, mask, self.sample.max_new_tokens)
        tokens = max(1.0, float(mask.sum()))

        def function(networks: models.Networks, index: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            rows = batch.rows(index)
            own = {name: None if t is None else t[index] for name, t in tensors.items()}
            head = models.lm_head(networks.policy, rows)
            loss, metrics = head.policy_loss(
                rows.labels,
                own["old"],
                own["advantages"],
                mask=rows.completion_mask,
                temperature=self.config.temperature,
                ref_logprobs=own["reference"],
                rollout_logprobs=own["rollout"],
                normalizer=normalizer,
                config=self.loss,
            )
            named = prefixed("policy", metrics)
            if isinstance(self.config, PPOConfig):
                value, value_metrics = timed(
                    rk.value_loss,
                    models.values(networks.critic, rows),
                    own["values"],
                    own["returns"],
                    mask=rows.completion_mask,
                    clip_range=self.config.value_clip or None,
                    normalizer=tokens,
                )
                loss = loss + self.config.value_coef * value
                named |= prefixed("value", value_metrics)
            return loss, named

        functions = [
            Micro(function, index, lambda number: self._row_name(int(number)))
            for index in self.learner.micro(self.learner.share(part))
        ]
        if self.ptx is None:
            return self.learner.accumulate(functions)
        # The last function has to reach the critic too, so these come first.
        extra = self.ptx.losses(self.ptx.next_items(), weight=self.config.ptx_coef)
        return self.learner.accumulate([*extra, *functions])[len(extra) :]
