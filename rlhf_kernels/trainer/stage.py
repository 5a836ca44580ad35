"""The setup of a training stage: settings, accelerator, data and output folder."""

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator

import rlhf_kernels as rk

from . import checkpoint, checks
from .algorithms import ALGORITHMS, LOSS_SETTINGS
from .config import (
    DataConfig,
    DPOConfig,
    KTOConfig,
    ModelConfig,
    OnlineConfig,
    OptimConfig,
    PPOConfig,
    RewardConfig,
    RunConfig,
    parse_config,
    require,
)
from .data import Task, load_task
from .errors import blamed_on
from .offline import OfflineTrainer
from .online import OnlineTrainer
from .reward_functions import is_function, load_reward

# Offline stages: their own settings classes, the kind of rows, and defaults of shared settings.
OFFLINE: dict[str, tuple[tuple[type, ...], str, dict[str, Any]]] = {
    "sft": ((), "supervised", {"learning_rate": 2e-5}),
    "reward": ((RewardConfig,), "preference", {"learning_rate": 1e-4}),
    "dpo": ((DPOConfig,), "pair", {"learning_rate": 1e-6}),
    "kto": ((KTOConfig,), "unpaired", {"learning_rate": 1e-6}),
}


def settings_of(name: str) -> tuple[tuple[type, ...], str, dict[str, Any]]:
    """The settings classes, the kind of rows and the defaults of a stage."""
    if name in OFFLINE:
        extra, kind, defaults = OFFLINE[name]
        defaults = {"batch_size": 64, "max_new_tokens": 512} | defaults
    else:
        algorithm, kind = ALGORITHMS[name], "prompt"
        extra = (PPOConfig if algorithm.critic else OnlineConfig,)
        defaults = dict(algorithm.defaults)
    classes = (RunConfig, ModelConfig, DataConfig, OptimConfig, *extra)
    return classes, kind, {"output_dir": f"runs/{name}"} | defaults


def _implied(name: str) -> dict[str, Any]:
    """What an online algorithm takes for settings of its loss that are unset."""
    if name in OFFLINE:
        return {}
    loss = ALGORITHMS[name].loss()
    return {key: getattr(loss, key) for key in LOSS_SETTINGS}


class Stage:
    """The settings, accelerator, data and output folder of a stage."""

    def __init__(self, name: str, argv: Sequence[str]) -> None:
        self.name, self.started = name, time.perf_counter()
        classes, kind, defaults = settings_of(name)
        found = parse_config(
            classes,
            argv,
            prog=f"rlhf-kernels train {name}",
            defaults=defaults,
            implied=_implied(name),
        )
        self.run: RunConfig
        self.model: ModelConfig
        self.data: DataConfig
        self.optim: OptimConfig
        self.run, self.model, self.data, self.optim, *self.own = found
        self.settings = {k: v for group in found for k, v in dataclasses.asdict(group).items()}
        self.out = Path(self.run.output_dir)
        # These checks need neither data nor models, so they run before any reading or writing.
        checks.check_settings(name, self.run, self.model, self.data, self.optim, self.own)
        checks.check_output(self.out)
        newest = checkpoint.newest(self.out)
        continued = self.run.resume or self.run.resume_from or self.run.dry_run
        expected = "a folder without checkpoints (--resume continues them)"
        require(newest is None or bool(continued), "output_dir", expected, str(newest))
        checks.check_models(self.model, self.own)
        if self.run.save_model:
            checks.check_base(self.out, self.model)
        for path in self.settings.get("reward_funcs", ()):
            if is_function(path):
                load_reward(path)
        if self.run.threads:
            torch.set_num_threads(self.run.threads)
        with blamed_on("accelerate", "cannot start"):
            self.accelerator = Accelerator(
                cpu=self.run.device == "cpu",
                mixed_precision=self.run.mixed_precision,
                log_with=self.run.report_to or None,
                project_dir=self.out,
            )
        engine = str(self.accelerator.distributed_type.value)
        expected = "processes of DDP or FSDP (no other engine's checkpoints are written)"
        require(engine not in ("DEEPSPEED", "MEGATRON_LM"), "accelerate", expected, engine)
        steps = self.accelerator.gradient_accumulation_steps
        expected = "gradient_accumulation_steps 1 (micro_batch_size cuts a batch)"
        require(steps == 1, "accelerate", expected, steps)
        dynamo = str(self.accelerator.state.dynamo_plugin.backend.value)
        expected = "no dynamo backend: models are not compiled here"
        require(dynamo == "NO", "accelerate", expected, dynamo)
        # The accelerator knows the precision that accelerate launch chose for an unset setting.
        self.settings["mixed_precision"] = str(self.accelerator.mixed_precision)
        transformers.set_seed(self.run.seed)
        self.task: Task = load_task(self.data, kind, seed=self.run.seed, model=self.model.model)
        checks.check_rows(self.task.train, self.data, self.optim, self.own)
        self.max_length = self.data.max_prompt_tokens + self.data.max_new_tokens

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            print(text, flush=True)

    def announce(self, trainer: OfflineTrainer | OnlineTrainer) -> None:
        """Prints networks, rows, device, steps and a lower bound of the memory for training."""
        learner, reference = trainer.learner, trainer.reference
        # An offline trainer drops rows with too long completions and has its own lists of rows.
        train, held_out = (
            len(getattr(trainer, part, getattr(self.task, part))) for part in ("train", "held_out")
        )
        networks = dict(learner.networks.named_children())
        frozen = reference.model if reference is not None else None
        weights = [*learner.networks.parameters(), *(frozen.parameters() if frozen else ())]
        # A trained weight also has a gradient and the two moments of AdamW.
        memory = sum(p.nbytes * (4 if p.requires_grad else 1) for p in weights)
        parts = ", ".join(
            f"{name} of {sum(p.numel() for p in m.parameters()):,} weights"
            for name, m in networks.items()
        )
        dropped = (
            ("max_prompt_tokens", self.task.dropped),
            ("max_new_tokens", getattr(trainer, "dropped", 0)),
        )
        for setting, rows in dropped:
            if rows:
                limit = getattr(self.data, setting)
                self.say(f"{rows} rows are longer than {setting} {limit} and are dropped")
        short = {p.dtype for p in weights if p.requires_grad and p.element_size() < 4}
        if short:
            # Half of a step between neighbours.
            lost = max(torch.finfo(dtype).eps / 2 for dtype in short)
            self.say(
                f"trained weights of 16 bits: an update below {lost:.1g} of a weight is lost; "
                "mixed_precision bf16 keeps them in float32"
            )
        steps, rising = self.optim.total_steps, self.optim.warmup_steps
        if steps < rising:
            self.say(
                f"warmup_steps {rising} are more than total_steps {steps}: the rate reaches no "
                f"more than {steps / rising:.2g} of learning_rate"
            )
        self.say(
            f"{self.name} on {self.task.name}: {train} training and {held_out} held-out rows that "
            f"are not too long; {parts}, vocabulary "
            f"{len(self.task.tokenizer)}, on {self.accelerator.device} x {learner.processes}; "
            f"{memory / 2**20:,.0f} MiB of weights, gradients and optimizer state, "
            f"activations not counted; {self.optim.total_steps} steps; "
            f"kernels: {', '.join(map(str, rk.available_backends()))}"
        )
