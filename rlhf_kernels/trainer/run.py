"""The subcommands: train, evaluate and report a model according to the settings."""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm

from . import answers, folder, models, resume
from .algorithms import ALGORITHMS
from .config import OnlineConfig, PPOConfig, UserError, require
from .data import read_rows
from .generation import Engine, TransformersEngine
from .interrupts import Interrupted, Interrupts, interrupts
from .learner import Learner
from .loop import Loop
from .objectives import DPO, KTO, SFT, RewardModelling
from .offline import OfflineTrainer
from .online import OnlineTrainer
from .reward_functions import RewardFunction
from .rewards import load_rewards
from .rollout import Collector
from .stage import OFFLINE, Stage
from .tokenizers import check_alike
from .vllm_engine import VLLMEngine


def train(name: str, argv: Sequence[str]) -> dict[str, Any] | None:
    """Runs `rlhf-kernels train NAME`: trains, evaluates before and after, and reports.

    Returns:
        The content of `summary.json` in the output folder; None after a dry run.
    """
    with interrupts() as signals:
        try:
            stage = Stage(name, argv)
            if stage.run.dry_run:
                _dry_run(stage)
                return None
            with folder.opened(stage.out, stage.accelerator):
                return _train(stage, signals)
        except Interrupted as stop:
            if not stop.told:
                print(
                    "interrupted; --resume continues from the last checkpoint, if there is one",
                    flush=True,
                )
            raise


def _dry_run(stage: Stage) -> None:
    stage.out.mkdir(parents=True, exist_ok=True)
    stage.announce(make_trainer(stage, fresh=False))
    stage.say(json.dumps(stage.settings, indent=2))


def _train(stage: Stage, signals: Interrupts) -> dict[str, Any]:
    run = stage.run
    found = None
    if run.resume or run.resume_from:
        found = resume.find(stage.out, stage.name, run.resume_from)
        if found is None:
            stage.say(f"no checkpoint in {stage.out}: starting at step 0")
    trainer = make_trainer(stage, fresh=found is None)
    stage.announce(trainer)
    loop = Loop(stage, trainer, signals)
    if found is None:
        loop.begin()
    else:
        loop.continue_from(*found)
    return loop.run()


def close() -> None:
    """Leaves the group of processes; training is not possible afterwards."""
    PartialState().destroy_process_group()


def make_trainer(stage: Stage, *, fresh: bool) -> OfflineTrainer | OnlineTrainer:
    """The stage's trainer; the policy of a `fresh` online run has its supervised phase here."""
    return _offline(stage) if stage.name in OFFLINE else _online(stage, fresh=fresh)


def _offline(stage: Stage) -> OfflineTrainer:
    tokenizer, limit = stage.task.tokenizer, stage.data.max_new_tokens
    device, length = stage.accelerator.device, stage.max_length
    if stage.name == "reward":
        network = models.build_reward_model(stage.model, tokenizer, max_length=length).to(device)
    else:
        network = models.build_policy(stage.model, tokenizer, max_length=length, device=device)
    objective: Any = SFT(tokenizer, limit)
    if stage.name == "reward":
        objective = RewardModelling(tokenizer, limit, *stage.own)
    elif stage.name == "dpo":
        (config,) = stage.own
        reference = models.Reference(network) if config.has_reference else None
        objective = DPO(tokenizer, limit, config, reference)
    elif stage.name == "kto":
        (config,) = stage.own
        objective = KTO(tokenizer, limit, config, models.Reference(network))
    networks = {"reward" if stage.name == "reward" else "policy": network}
    rates = dict.fromkeys(networks, stage.optim.learning_rate)
    learner = Learner(stage.accelerator, networks, rates, stage.optim)
    train, held_out, seed = stage.task.train, stage.task.held_out, stage.run.seed
    return OfflineTrainer(learner, objective, train, held_out, stage.optim, seed=seed)


def _online(stage: Stage, *, fresh: bool) -> OnlineTrainer:
    (config,) = stage.own
    accelerator, task, seed = stage.accelerator, stage.task, stage.run.seed
    # Read all files before building any model, because a bad file is then found early.
    columns = list(dict.fromkeys(name for row in task.train for name in row.columns))
    default: list[RewardFunction] = [answers.exact_match]
    if stage.data.data is not None:
        default = _of_answers(stage, config)
    ptx_rows = task.train
    if config.ptx_data is not None:
        ptx_rows = read_rows(config.ptx_data, "supervised")
        size = config.mini_batch_size or stage.optim.batch_size
        expected = f"at least a mini-batch of {size} rows"
        require(len(ptx_rows) >= size, "ptx_data", expected, len(ptx_rows))
    rewards = load_rewards(
        config.reward_funcs,
        config.reward_weights,
        default=default,
        config=stage.model,
        device=accelerator.device,
    )
    held_out = (name for row in task.held_out for name in row.columns)
    rewards.check(list(dict.fromkeys([*columns, *held_out])))
    others = {"critic_model": getattr(config, "critic_model", None)}
    others["teacher_model"] = config.teacher_model
    for setting, path in others.items():
        if path is not None:
            check_alike(task.tokenizer, path, setting=setting)
    policy = models.build_policy(
        stage.model, task.tokenizer, max_length=stage.max_length, device=accelerator.device
    )
    if config.sft_steps and fresh:
        _warm_start(stage, config, policy)
    reference, teacher = None, None
    if config.teacher_model is not None:
        # A teacher has no new adapter, and keeps no activations.
        own = {"model": config.teacher_model, "lora_rank": 0, "gradient_checkpointing": False}
        teacher = models.build_policy(
            dataclasses.replace(stage.model, **own),
            task.tokenizer,
            max_length=stage.max_length,
            device=accelerator.device,
            setting="teacher_model",
        )
    if config.kl_coef:
        reference = models.Reference(policy, moved=bool(config.sft_steps), teacher=teacher)
    networks, rates = {"policy": policy}, {"policy": stage.optim.learning_rate}
    joint_clip = False
    if isinstance(config, PPOConfig):
        networks["critic"] = models.build_critic(policy, stage.model, config.critic_model)
        rates["critic"], joint_clip = config.critic_learning_rate, config.joint_grad_clip
    learner = Learner(accelerator, networks, rates, stage.optim, joint_clip=joint_clip)
    ptx = None
    if config.ptx_coef:
        size = config.mini_batch_size or stage.optim.batch_size
        optim = dataclasses.replace(stage.optim, batch_size=size)
        ptx = OfflineTrainer(learner, SFT(task.tokenizer, None), ptx_rows, [], optim, seed=seed)
    size = config.generation_batch_size
    engine: Engine = TransformersEngine(learner, task.tokenizer, batch_size=size)
    if config.engine == "vllm" and not stage.run.dry_run:
        engine = VLLMEngine(
            learner,
            task.tokenizer,
            stage.out / "vllm",
            max_length=stage.max_length,
            memory=config.vllm_memory,
        )
    sample = Collector(
        learner, task, rewards, engine, max_new_tokens=stage.data.max_new_tokens, seed=seed
    )
    return OnlineTrainer(
        stage.name, learner, sample, reference, stage.optim, config, seed=seed, ptx=ptx
    )


def _of_answers(stage: Stage, config: OnlineConfig) -> list[Any]:
    """The built-in rewards for answers of a file, where no others are given."""
    rows = [*stage.task.train, *stage.task.held_out]
    other = next((row for row in rows if not answers.is_numbered(row.columns.get("answer"))), None)
    if other is not None and ALGORITHMS[stage.name].teacher:
        # Nothing is learnt from it; the table shows it.
        return [answers.ended]
    if not config.reward_funcs and other is not None:
        if any("answer" in row.columns for row in rows):
            found = f"{other.columns.get('answer')!r:.80} in {other.origin}"
            needed = "the built-in rewards need an 'answer' that ends in '#### <number>'"
            raise UserError(f"reward_funcs: expected one: {needed}, found {found}")
        expected = f"one: {stage.data.data} has no column 'answer' for the built-in rewards"
        require(False, "reward_funcs", expected, config.reward_funcs)
    return [answers.answer_format, answers.answer_correct]


def _warm_start(stage: Stage, config: OnlineConfig, policy: torch.nn.Module) -> None:
    """Runs the supervised phase with its own optimizer."""
    rows, rate = stage.task.train, config.sft_learning_rate
    optim = dataclasses.replace(
        stage.optim,
        total_steps=config.sft_steps,
        batch_size=min(config.sft_batch_size, len(rows)),
        lr_schedule="constant",
        warmup_steps=50,
    )
    learner = Learner(stage.accelerator, {"policy": policy}, {"policy": rate}, optim)
    objective = SFT(stage.task.tokenizer, None)
    trainer = OfflineTrainer(learner, objective, rows, [], optim, seed=stage.run.seed)
    running = None
    for _ in (bar := tqdm(range(config.sft_steps), desc="supervised")):
        loss = trainer.step()["loss"]
        if math.isnan(loss):
            # The update was skipped.
            continue
        running = loss if running is None else 0.9 * running + 0.1 * loss
        bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
        if running < config.sft_stop_loss:
            break
    policy.zero_grad(set_to_none=True)
