"""Settings: dataclasses whose field names are the YAML keys and the command-line flags."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


def _doc(text: str, default: Any) -> Any:
    return field(default=default, metadata={"help": text})


def _require(ok: bool, name: str, expected: str, found: object) -> None:
    if not ok:
        raise ValueError(f"{name}: expected {expected}, found {found!r}")


@dataclass
class RunConfig:
    """What every subcommand shares: where it writes and how it repeats."""

    output_dir: str = _doc("folder for metrics, curves, samples and checkpoints", "runs/ppo")
    seed: int = _doc("seed of weights, data order and sampling", 0)
    device: str = _doc("'auto' (cuda when there is one), or any torch device", "auto")
    threads: int = _doc("CPU threads; 0 keeps torch's own choice", 0)
    save_model: bool = _doc("save policy, critic and tokenizer at the end", True)


@dataclass
class ModelConfig:
    """The policy: a Hugging Face path, or a small Llama built from these sizes."""

    model: str | None = _doc("path or hub name of a causal LM; unset builds one", None)
    hidden_size: int = _doc("built model: width", 128)
    num_layers: int = _doc("built model: layers", 2)
    num_heads: int = _doc("built model: attention heads", 4)


@dataclass
class DataConfig:
    """The problems, their tokenizer and their rewards."""

    data: str | None = _doc("JSONL with 'question' and 'answer'; unset = arithmetic", None)
    max_operand: int = _doc("arithmetic: largest operand", 99)
    operators: str = _doc("arithmetic: any of + and -", "+-")
    vocab_size: int = _doc("JSONL: size of the BPE vocabulary trained on the file", 4096)
    eval_size: int = _doc("problems held out from every training phase", 512)
    max_prompt_tokens: int = _doc("longer prompts are dropped", 256)
    max_new_tokens: int = _doc("longest completion, end token included", 8)
    reward_funcs: list[str] = field(
        default_factory=list,
        metadata={"help": "'module:function' paths; empty = the task's own"},
    )
    reward_weights: list[float] = field(
        default_factory=list,
        metadata={"help": "one weight per reward function; empty = ones"},
    )

    def __post_init__(self) -> None:
        _require(self.max_operand >= 1, "max_operand", ">= 1", self.max_operand)
        ops = self.operators
        _require(bool(ops) and set(ops) <= set("+-"), "operators", "'+', '-' or '+-'", ops)
        _require(self.eval_size >= 1, "eval_size", ">= 1", self.eval_size)
        _require(self.max_new_tokens >= 1, "max_new_tokens", ">= 1", self.max_new_tokens)


@dataclass
class SFTConfig:
    """The supervised phase before PPO."""

    sft_steps: int = _doc("most optimizer steps; 0 skips the phase", 0)
    sft_stop_loss: float = _doc("stop when the running token loss is below; 0 = never", 0.0)
    sft_batch_size: int = _doc("problems per step", 256)
    sft_learning_rate: float = _doc("peak learning rate of AdamW", 2e-3)
    sft_warmup_steps: int = _doc("linear warm-up", 50)


@dataclass
class PPOConfig:
    """PPO-clip with a critic and a KL penalty to a frozen reference."""

    total_steps: int = _doc("rollouts", 100)
    batch_size: int = _doc("completions per rollout", 512)
    mini_batch_size: int = _doc("completions per optimizer step; divides batch_size", 128)
    epochs: int = _doc("passes over each rollout", 2)
    learning_rate: float = _doc("policy", 3e-4)
    critic_learning_rate: float = _doc("critic", 1e-3)
    lr_schedule: str = _doc("'constant' or 'linear' (to zero at the last step)", "constant")
    warmup_steps: int = _doc("rollouts over which the learning rates rise", 10)
    max_grad_norm: float = _doc("global gradient norm, policy and critic each", 1.0)
    temperature: float = _doc("sampling temperature, also of the loss", 1.0)
    gamma: float = _doc("discount", 1.0)
    lam: float = _doc("lambda of generalised advantage estimation", 0.95)
    whiten_advantages: bool = _doc("zero mean, unit variance over the rollout", True)
    clip_low: float = _doc("the ratio's clip below 1", 0.2)
    clip_high: float = _doc("the ratio's clip above 1", 0.2)
    value_clip: float = _doc("clip range of the value update; 0 = off", 0.2)
    entropy_coef: float = _doc("entropy bonus", 0.0)
    kl_coef: float = _doc("penalty on the KL to the reference, per token", 0.02)
    kl_estimator: str = _doc("k1, k2, k3 or abs", "k1")
    kl_target: float = _doc("KL per completion the coefficient adapts to; 0 = fixed", 0.0)
    kl_horizon: float = _doc("horizon of the adaptive coefficient, in completions", 10000.0)
    replay_steps: int = _doc("steps whose kernel inputs are kept to time both backends", 3)
    num_samples: int = _doc("completions shown in the sample table", 8)

    def __post_init__(self) -> None:
        for name in ("total_steps", "batch_size", "mini_batch_size", "epochs"):
            _require(getattr(self, name) >= 1, name, ">= 1", getattr(self, name))
        divides = self.batch_size % self.mini_batch_size == 0
        _require(
            divides,
            "mini_batch_size",
            f"a divisor of batch_size={self.batch_size}",
            self.mini_batch_size,
        )
        _require(self.temperature > 0, "temperature", "> 0", self.temperature)
        schedules = ("constant", "linear")
        known = self.lr_schedule in schedules
        _require(known, "lr_schedule", f"one of {schedules}", self.lr_schedule)


def _yaml_as_flags(path: str) -> list[str]:
    """The YAML file as command-line flags, so that both are parsed by the same rules."""
    content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a mapping of settings, found {type(content).__name__}")
    flags: list[str] = []
    for key, value in content.items():
        if isinstance(value, dict):
            raise ValueError(f"{path}: {key!r} holds a mapping; settings are flat")
        if value not in (None, []):
            values = value if isinstance(value, list) else [value]
            flags += [f"--{key}", *map(str, values)]
    return flags


def parse_config(classes: Sequence[type], argv: Sequence[str], *, prog: str) -> tuple[Any, ...]:
    """Dataclass instances from `--config file.yaml` and flags; a flag wins over the file.

    Args:
        classes: dataclasses with disjoint field names.
        argv: arguments after the subcommand.
        prog: name shown by `--help`.
    """
    parser = HfArgumentParser(classes, prog=prog, allow_abbrev=False)
    parser.add_argument("--config", help="YAML file of the settings below")
    config_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config_parser.add_argument("--config")
    path = config_parser.parse_known_args(argv)[0].config
    flags = _yaml_as_flags(path) if path else []
    return parser.parse_args_into_dataclasses([*flags, *argv])[: len(classes)]
