"""What the trainer's tests share; importing it skips a module where the trainer's packages lack."""

# ruff: noqa: E402 - the imports need the packages that are looked for first.

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

_NEEDED = ("transformers", "tokenizers", "accelerate", "safetensors", "matplotlib", "yaml", "tqdm")
for _name in _NEEDED:
    if importlib.util.find_spec(_name) is None:
        pytest.skip(f"needs rlhf_kernels[trainer]: no {_name}", allow_module_level=True)

from accelerate import Accelerator

from rlhf_kernels.trainer import models
from rlhf_kernels.trainer.algorithms import ALGORITHMS
from rlhf_kernels.trainer.config import (
    DataConfig,
    ModelConfig,
    OnlineConfig,
    OptimConfig,
    PPOConfig,
)
from rlhf_kernels.trainer.data import Task, collate, load_task, row_tokens
from rlhf_kernels.trainer.generation import TransformersEngine
from rlhf_kernels.trainer.learner import Learner
from rlhf_kernels.trainer.objectives import SFT
from rlhf_kernels.trainer.offline import OfflineTrainer
from rlhf_kernels.trainer.online import OnlineTrainer
from rlhf_kernels.trainer.rewards import Rewards
from rlhf_kernels.trainer.rollout import Collector

CPU = torch.device("cpu")
DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(autouse=True)
def one_thread():
    # Threads cost more than they bring on models of this size.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_task(**options: Any) -> Task:
    return load_task(DataConfig(max_operand=30, eval_size=64, **options), "prompt", seed=0)


def tiny_policy(task: Task, seed: int = 0, **options: Any):
    torch.manual_seed(seed)
    config = ModelConfig(hidden_size=32, num_layers=2, num_heads=2, **options)
    return models.build_policy(config, task.tokenizer, max_length=64)


def sevens(prompts, completions, completion_ids, **columns):
    """A reward that a random policy meets now and then, so that its advantages are not 0."""
    return [c.count("7") / 5 for c in completions]


def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def supervised(policy, task: Task, steps: int, rate: float, batch_size: int = 64, seed: int = 0):
    """Losses of a few supervised steps."""
    optim = OptimConfig(
        total_steps=steps, batch_size=batch_size, learning_rate=rate, warmup_steps=5
    )
    learner = Learner(accelerator(), {"policy": policy}, {"policy": rate}, optim)
    trainer = OfflineTrainer(learner, SFT(task.tokenizer, None), task.train, [], optim, seed=seed)
    return [trainer.step()["loss"] for _ in range(steps)]


def supervised_batch(task: Task, rows):
    pairs = [row_tokens(task.tokenizer, r.prompt, r.completion) for r in rows]
    return collate(task.tokenizer, pairs, CPU)


_OPTIM = OptimConfig.__dataclass_fields__


def online_trainer(name: str = "ppo", *, policy=None, teacher=None, seed: int = 0, **options: Any):
    """An OnlineTrainer on `sevens`; options of its configurations."""
    task = tiny_task()
    policy = policy or tiny_policy(task, seed)
    settings = {"batch_size": 32, "total_steps": 3, "learning_rate": 3e-4} | options
    optim = OptimConfig(**{k: v for k, v in settings.items() if k in _OPTIM})
    own = {k: v for k, v in settings.items() if k not in _OPTIM}
    made = PPOConfig if ALGORITHMS[name].critic else OnlineConfig
    config = made(**ALGORITHMS[name].defaults | own)
    networks, rates = {"policy": policy}, {"policy": optim.learning_rate}
    reference = models.Reference(policy, teacher=teacher) if config.kl_coef else None
    joint = False
    if ALGORITHMS[name].critic:
        networks["critic"] = models.build_critic(policy, ModelConfig())
        rates["critic"], joint = config.critic_learning_rate, config.joint_grad_clip
    learner = Learner(accelerator(), networks, rates, optim, joint_clip=joint)
    ptx = None
    if config.ptx_coef:
        ptx = OfflineTrainer(learner, SFT(task.tokenizer, None), task.train, [], optim, seed=seed)
    engine = TransformersEngine(learner, task.tokenizer, batch_size=config.generation_batch_size)
    rewards = Rewards([sevens], [1.0])
    sample = Collector(learner, task, rewards, engine, max_new_tokens=5, seed=seed)
    return OnlineTrainer(name, learner, sample, reference, optim, config, seed=seed, ptx=ptx)


def rows_without_times(path: Path) -> list[dict[str, float]]:
    return [timeless(json.loads(line)) for line in path.read_text().splitlines()]


def timeless(row: dict[str, float]) -> dict[str, float]:
    """Without what differs between equal runs."""
    return {k: v for k, v in row.items() if not k.startswith(("time/", "tokens_per", "peak_"))}


def write_jsonl(path: Path, rows) -> str:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return str(path)


def reward_table(*functions, count=3, columns=None, weights=None):
    """Rewards of `count` samples."""
    rewards = Rewards(list(functions), weights or [1.0] * len(functions))
    prompts = [f"p{i}" for i in range(count)]
    completions = [f"c{i}" for i in range(count)]
    return rewards(prompts, completions, [[i] for i in range(count)], columns or {})
