"""Short runs and small checkpoints for the tests of what continues."""

from pathlib import Path

import torch

from tests.trainer.trainer_tools import one_thread, rows_without_times, write_jsonl  # noqa: F401

from rlhf_kernels import cli
from rlhf_kernels.trainer import checkpoint

SIZES = (
    "--device cpu --threads 1 --hidden_size 16 --num_layers 1 --num_heads 2 --batch_size 8 "
    "--eval_size 8 --learning_rate 3e-3 --max_operand 9 --warmup_steps 1"
)


def train(out: Path, flags: str = "", stage: str = "sft") -> int:
    return cli.main(["train", stage, *SIZES.split(), *flags.split(), "--output_dir", str(out)])


def told(capsys) -> str:
    """The one line of the command line."""
    lines = [n for n in capsys.readouterr().err.splitlines() if n.startswith("rlhf-kernels")]
    assert len(lines) == 1, lines
    return lines[0]


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.iterdir())


def save(path: Path, step: int, **more) -> Path:
    states = {"learner": {"w": torch.randn(30)}, "trainer": {"steps_done": step}}
    return checkpoint.save(path, step, "sft", states, **more)
