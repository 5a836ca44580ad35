"""The subcommands: from settings to a trained, evaluated and reported model."""

import dataclasses
import json
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator, PartialState
from tqdm import tqdm

import rlhf_kernels as rk

from . import answers, checkpoint, models, report
from .algorithms import ALGORITHMS
from .config import (
    CriticConfig,
    DataConfig,
    DPOConfig,
    ModelConfig,
    OnlineConfig,
    OptimConfig,
    RewardConfig,
    RunConfig,
    WarmStartConfig,
    parse_config,
    require,
)
from .data import Task, load_task, read_rows
from .learner import Learner
from .offline import DPO, SFT, OfflineTrainer, RewardModelling
from .online import OnlineTrainer
from .recorder import kernel
from .rewards import load_rewards, means
from .rollout import texts

_COMMON = (RunConfig, ModelConfig, DataConfig, OptimConfig)
# Offline stages: settings of their own, kind of rows, and defaults that are not OptimConfig's.
_OFFLINE: dict[str, tuple[tuple[type, ...], str, dict[str, Any]]] = {
    "sft": ((), "supervised", {"learning_rate": 2e-5}),
    "reward": ((RewardConfig,), "preference", {"learning_rate": 1e-4}),
    "dpo": ((DPOConfig,), "preference", {"learning_rate": 1e-6}),
}


class Stage:
    """What every stage does: settings, engine, data, loop, checkpoints and report."""

    def __init__(self, name: str, argv: Sequence[str]) -> None:
        self.name, self.started = name, time.perf_counter()
        defaults: dict[str, Any] = {"output_dir": f"runs/{name}"}
        if name in _OFFLINE:
            extra, self.kind, more = _OFFLINE[name]
            defaults |= {"batch_size": 64, "max_new_tokens": 512} | more
        else:
            self.kind = "prompt"
            extra = (WarmStartConfig, OnlineConfig)
            extra += (CriticConfig,) if ALGORITHMS[name].critic else ()
            defaults |= ALGORITHMS[name].defaults
        classes = (*_COMMON, *extra)
        prog = f"rlhf-kernels train {name}"
        self.configs = dict(
            zip(classes, parse_config(classes, argv, prog=prog, defaults=defaults), strict=True)
        )
        self.run: RunConfig = self.configs[RunConfig]
        self.model: ModelConfig = self.configs[ModelConfig]
        self.data: DataConfig = self.configs[DataConfig]
        self.optim: OptimConfig = self.configs[OptimConfig]
        if self.run.threads:
            torch.set_num_threads(self.run.threads)
        self.out = Path(self.run.output_dir)
        self.accelerator = Accelerator(
            cpu=self.run.device == "cpu",
            mixed_precision=self.run.mixed_precision,
            log_with=self.run.report_to or None,
            project_dir=self.out,
        )
        self.newest = (checkpoint.checkpoints(self.out) or [None])[-1]
        if self.newest is not None and not (self.run.resume or self.run.dry_run):
            raise ValueError(
                f"output_dir: {self.newest} is there; --resume continues it, another folder starts "
                "anew"
            )
        transformers.set_seed(self.run.seed)
        self.task: Task = load_task(
            self.data, self.kind, seed=self.run.seed, model=self.model.model
        )
        self.max_length = self.data.max_prompt_tokens + self.data.max_new_tokens

    @property
    def settings(self) -> dict[str, Any]:
        groups = self.configs.values()
        return {k: v for group in groups for k, v in dataclasses.asdict(group).items()}

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            print(text, flush=True)

    def announce(self, learner: Learner, frozen: Sequence[torch.nn.Module]) -> None:
        """What is trained, on what, and how much memory it takes at least."""
        trained = [p for p in learner.networks.parameters() if p.requires_grad]
        whole = [*learner.networks.parameters()]
        fixed = [p for model in frozen for p in model.parameters()]
        sizes = {n: sum(p.numel() for p in m.parameters()) for n, m in _named(learner)}
        weights = sum(p.numel() * p.element_size() for p in (*whole, *fixed))
        # Gradients, and AdamW's two moments.
        state = sum(3 * p.numel() * p.element_size() for p in trained)
        parts = ", ".join(f"{name} of {size:,} weights" for name, size in sizes.items())
        rows = f"{len(self.task.train)} training and {len(self.task.held_out)} held-out"
        self.say(
            f"{self.name} on {self.task.name}: {rows} rows; {parts}, vocabulary "
            f"{len(self.task.tokenizer)}, on {self.accelerator.device} x {learner.processes}; "
            f"{(weights + state) / 2**20:,.0f} MiB of weights, gradients and optimizer state, "
            f"activations not counted; {self.optim.total_steps} steps; "
            f"kernels: {', '.join(map(str, rk.available_backends()))}"
        )

    def fit(
        self,
        learner: Learner,
        trainer: OfflineTrainer | OnlineTrainer,
        shown: Sequence[str],
        extra: dict[str, Any],
    ) -> list[dict[str, float]]:
        """Steps until the last or an interrupt, which saves; returns the metrics of all steps."""
        main = self.accelerator.is_main_process
        log = None
        if main:
            log = report.MetricsLog(self.out / "metrics.jsonl", steps_done=trainer.steps_done)
        if self.run.report_to:
            # Trackers take plain values only.
            plain = {
                k: v if isinstance(v, int | float) else str(v) for k, v in self.settings.items()
            }
            self.accelerator.init_trackers("rlhf_kernels", config=plain)
        total = self.optim.total_steps
        bar = tqdm(total=total, initial=trainer.steps_done, desc=self.name, disable=not main)
        with Interrupt(learner) as interrupt, bar:
            while trainer.steps_done < total:
                row = trainer.step()
                if torch.cuda.is_available():
                    row["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
                if log is not None:
                    log.write(row)
                self.accelerator.log(row, step=int(row["step"]))
                values = ", ".join(f"{k} {row[k]:.3f}" for k in shown if k in row)
                bar.set_postfix_str(values, refresh=False)
                bar.update()
                stop = interrupt.wanted()
                due = self.run.save_steps and trainer.steps_done % self.run.save_steps == 0
                if stop or due:
                    self.save(learner, trainer, extra)
                if stop:
                    self.say(f"interrupted; --resume continues from step {trainer.steps_done}")
                    raise SystemExit(130)
        if log is not None:
            log.close()
        return log.rows if log is not None else []

    def save(
        self, learner: Learner, trainer: OfflineTrainer | OnlineTrainer, extra: dict[str, Any]
    ) -> None:
        """Writes a checkpoint; every process has to call it."""
        states = {
            "learner": learner.state_dict(),
            "trainer": trainer.state_dict(),
            "generators": checkpoint.generator_states(),
            **extra,
        }
        if self.accelerator.is_main_process:
            keep = self.run.save_total_limit
            checkpoint.save(self.out, trainer.steps_done, self.name, states, keep=keep)
        self.accelerator.wait_for_everyone()

    def restore(self) -> dict[str, Any] | None:
        """The newest checkpoint's states where `resume` asks for them."""
        if not self.run.resume or self.newest is None:
            if self.run.resume:
                self.say(f"no checkpoint in {self.out}: starting at step 0")
            return None
        return checkpoint.load(self.newest, self.name)

    def continue_from(
        self, states: dict[str, Any], learner: Learner, trainer: OfflineTrainer | OnlineTrainer
    ) -> None:
        """Puts a checkpoint's states in place, the generators' last."""
        try:
            learner.load_state_dict(states["learner"])
            trainer.load_state_dict(states["trainer"])
        except (KeyError, ValueError) as error:
            message = f"{self.newest}: of other settings than these: {error}"
            raise checkpoint.CheckpointError(message) from error
        checkpoint.set_generator_states(states["generators"])

    def finish(
        self, learner: Learner, rows: list[dict[str, float]], summary: dict[str, Any]
    ) -> Any:
        """Saves models and summary, draws the curves."""
        summary = {
            "stage": self.name,
            "task": self.task.name,
            **summary,
            "total_seconds": time.perf_counter() - self.started,
            "config": self.settings,
        }
        weights = self.accelerator.get_state_dict(learner.module) if self.run.save_model else {}
        if self.accelerator.is_main_process:
            report.plot_curves(rows, self.out / "curves.png")
            for name, network in _named(learner) if self.run.save_model else ():
                own = {k.removeprefix(f"{name}."): v for k, v in weights.items()
                       if k.startswith(f"{name}.")}  # fmt: skip
                network.save_pretrained(self.out / name, state_dict=own)
                self.task.tokenizer.save_pretrained(self.out / name)
            text = json.dumps(summary, indent=2) + "\n"
            (self.out / "summary.json").write_text(text, encoding="utf-8")
        self.say(
            f"\n{summary['total_seconds']:.0f} s in all; curves, samples and metrics in {self.out}/"
        )
        return summary


def _named(learner: Learner) -> list[tuple[str, torch.nn.Module]]:
    return list(learner.networks.named_children())


class Interrupt:
    """Ctrl-C and SIGTERM as a wish to stop after the step; a second one stops at once."""

    def __init__(self, learner: Learner) -> None:
        self.learner, self.seen = learner, False
        self.before: dict[int, Any] = {}

    def __enter__(self) -> "Interrupt":
        for number in (signal.SIGINT, signal.SIGTERM):
            self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: object) -> None:
        self.seen = True
        signal.signal(number, self.before[number])

    def wanted(self) -> bool:
        """Whether any process was interrupted."""
        flag = torch.tensor(int(self.seen), device=self.learner.accelerator.device)
        return bool(self.learner.total(flag))


def train(name: str, argv: Sequence[str]) -> dict[str, Any] | None:
    """`rlhf-kernels train NAME`: trains, evaluates before and after, and reports.

    Returns:
        The summary that `summary.json` in the output folder holds; None after a dry run.
    """
    stage = Stage(name, argv)
    stage.out.mkdir(parents=True, exist_ok=True)
    summary = _offline(stage) if name in _OFFLINE else _online(stage)
    for tracker in stage.accelerator.trackers:
        tracker.finish()
    return summary


def close() -> None:
    """Leaves the other processes: nothing can be trained afterwards."""
    PartialState().destroy_process_group()


def _offline(stage: Stage) -> dict[str, Any] | None:
    tokenizer, limit = stage.task.tokenizer, stage.data.max_new_tokens
    device = stage.accelerator.device
    frozen: list[torch.nn.Module] = []
    extra: dict[str, Any] = {}
    states = None if stage.run.dry_run else stage.restore()
    if stage.name == "reward":
        network = models.build_reward_model(stage.model, tokenizer, max_length=stage.max_length)
        networks = {"reward": network}
        objective: Any = RewardModelling(tokenizer, limit, stage.configs[RewardConfig])
    else:
        network = models.build_policy(stage.model, tokenizer, max_length=stage.max_length)
        networks = {"policy": network}
        objective = SFT(tokenizer, limit)
    network.to(device)
    if stage.name == "dpo":
        reference = models.Reference.of(network)
        frozen += [reference.model] if reference.model is not None else []
        objective = DPO(tokenizer, limit, stage.configs[DPOConfig], reference)
    rates = dict.fromkeys(networks, stage.optim.learning_rate)
    learner = Learner(stage.accelerator, networks, rates, stage.optim)
    stage.announce(learner, frozen)
    if stage.run.dry_run:
        stage.say(json.dumps(stage.settings, indent=2))
        return None
    trainer = OfflineTrainer(
        learner, objective, stage.task.train, stage.task.held_out, stage.optim, seed=stage.run.seed
    )
    if states is None:
        extra = {"before": trainer.evaluate()}
    else:
        extra = {"before": states["before"]}
        stage.continue_from(states, learner, trainer)
    rows = stage.fit(learner, trainer, ("loss", "accuracy", "margin"), extra)
    before, after = extra["before"], trainer.evaluate()
    scores = [(key, f"{before[key]:.4f}", f"{after[key]:.4f}") for key in after]
    stage.say("\n" + report.table(("held-out rows", "before", "after"), scores))
    return stage.finish(learner, rows, {"held_out_before": before, "held_out_after": after})


def _online(stage: Stage) -> dict[str, Any] | None:
    algorithm, device = ALGORITHMS[stage.name], stage.accelerator.device
    config: OnlineConfig = stage.configs[OnlineConfig]
    critic: CriticConfig = stage.configs.get(CriticConfig) or CriticConfig()
    warm: WarmStartConfig = stage.configs[WarmStartConfig]
    default = [answers.exact_match]
    if stage.data.data is not None:
        default = [answers.answer_format, answers.answer_correct]
    rewards = load_rewards(
        config.reward_funcs, config.reward_weights, default=default, config=stage.model,
        device=device,
    )  # fmt: skip
    states = None if stage.run.dry_run else stage.restore()
    policy = models.build_policy(stage.model, stage.task.tokenizer, max_length=stage.max_length)
    policy.to(device)
    if warm.sft_steps and states is None and not stage.run.dry_run:
        one = stage.accelerator.num_processes == 1
        require(one, "sft_steps", "0 with several processes; use the sft stage", warm.sft_steps)
        _warm_start(stage, warm, policy)
    reference = models.Reference.of(policy) if config.kl_coef else None
    networks, rates = {"policy": policy}, {"policy": stage.optim.learning_rate}
    if algorithm.critic:
        networks["critic"] = models.build_critic(policy, stage.model, critic.critic_model)
        rates["critic"] = critic.critic_learning_rate
    learner = Learner(
        stage.accelerator, networks, rates, stage.optim, joint_clip=critic.joint_grad_clip
    )
    copied = reference.model if reference is not None else None
    stage.announce(learner, [copied] if copied is not None else [])
    if stage.run.dry_run:
        stage.say(json.dumps(stage.settings, indent=2))
        return None
    ptx = None
    if config.ptx_coef:
        supervised = read_rows(config.ptx_data, "supervised") if config.ptx_data else None
        size = dataclasses.replace(
            stage.optim, batch_size=config.mini_batch_size or stage.optim.batch_size
        )
        ptx = OfflineTrainer(
            learner, SFT(stage.task.tokenizer, None), supervised or stage.task.train, [], size,
            seed=stage.run.seed,
        )  # fmt: skip
    trainer = OnlineTrainer(
        stage.name, learner, stage.task, rewards, reference, stage.optim, config, critic,
        max_new_tokens=stage.data.max_new_tokens, seed=stage.run.seed, ptx=ptx,
    )  # fmt: skip
    # What the reference was before this run's own training is nowhere else.
    own = copied is not None and (stage.model.model is None or warm.sft_steps > 0)
    if states is None:
        extra = {"before": dict(zip(("scores", "texts"), _evaluate(trainer), strict=True))}
        extra["before"]["seconds"] = time.perf_counter() - stage.started
        extra |= {"reference": dict(copied.state_dict())} if own else {}
    else:
        extra = {"before": states["before"]}
        if own:
            copied.load_state_dict(states["reference"])
            extra["reference"] = states["reference"]
        stage.continue_from(states, learner, trainer)

    # Steps spread over the run, the first and the last excluded.
    total, replays = stage.optim.total_steps, config.replay_steps
    replayed = {int(total / (replays + 1) * (i + 1)) for i in range(min(replays, total))}
    kernel.record_steps(replayed if stage.accelerator.is_main_process else ())
    rows = stage.fit(learner, trainer, ("reward", "kl", "entropy"), extra)
    after, texts_after = _evaluate(trainer)
    return stage.finish(
        learner, rows, _online_summary(stage, config, rows, extra["before"], after, texts_after)
    )


def _warm_start(stage: Stage, warm: WarmStartConfig, policy: torch.nn.Module) -> None:
    """The supervised phase, with an optimizer of its own."""
    rows = stage.task.train
    optim = OptimConfig(
        total_steps=warm.sft_steps,
        batch_size=min(warm.sft_batch_size, len(rows)),
        learning_rate=warm.sft_learning_rate,
        warmup_steps=warm.sft_warmup_steps,
        max_grad_norm=stage.optim.max_grad_norm,
        micro_batch_size=stage.optim.micro_batch_size,
    )
    learner = Learner(stage.accelerator, {"policy": policy}, {"policy": optim.learning_rate}, optim)
    trainer = OfflineTrainer(
        learner, SFT(stage.task.tokenizer, None), rows, [], optim, seed=stage.run.seed
    )
    running = None
    with tqdm(total=warm.sft_steps, desc="supervised") as bar:
        while trainer.steps_done < warm.sft_steps:
            loss = trainer.step()["loss"]
            running = loss if running is None else 0.9 * running + 0.1 * loss
            bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
            bar.update()
            if running < warm.sft_stop_loss:
                break
    policy.zero_grad(set_to_none=True)


def _evaluate(trainer: OnlineTrainer) -> tuple[dict[str, float], list[str]]:
    """Greedy completions of the held-out rows: mean of every reward function, and the texts."""
    rows, size = trainer.task.held_out, trainer.optim.batch_size
    parts = [
        trainer.sample(rows[start : start + size], temperature=0)
        for start in range(0, len(rows), size)
    ]
    table = torch.cat([part.table for part in parts], 1)
    scores = dict(zip(trainer.rewards.names, means(table), strict=True))
    return scores, [text for part in parts for text in texts(trainer.task, part.batch)]


def _online_summary(
    stage: Stage,
    config: OnlineConfig,
    rows: list[dict[str, float]],
    before: dict[str, Any],
    after: dict[str, float],
    texts_after: list[str],
) -> dict[str, Any]:
    """Samples, timing and scores, printed and as a dict."""
    shown = zip(stage.task.held_out, before["texts"], texts_after, strict=True)
    samples = [
        {"prompt": row.prompt, "answer": row.completion, "before": b, "after": a}
        for row, b, a in list(shown)[: config.num_samples]
    ]
    if samples:
        stage.say("\n" + report.table(list(samples[0]), [list(s.values()) for s in samples]))
    seconds = [value for row in rows for key, value in row.items() if key.startswith("time/")]
    step_ms = 1e3 * sum(seconds) / max(1, len(rows))
    timing = []
    if kernel.calls:
        device = stage.accelerator.device
        timing = report.time_kernels(kernel.calls, steps=kernel.steps, device=device)
        stage.say("\n" + report.timing_table(timing, step_ms))
    scores = [(name, f"{before['scores'][name]:.3f}", f"{after[name]:.3f}") for name in after]
    stage.say("\n" + report.table(("held-out rows, greedy", "before", "after"), scores))
    return {
        "held_out_before": before["scores"],
        "held_out_after": after,
        "supervised_seconds": before["seconds"],
        "kernel_timing": timing,
        "step_ms": step_ms,
        "samples": samples,
    }
