"""Two processes give what one process gives on the whole batch."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.trainer_tools import one_thread, write_jsonl  # noqa: F401

from rlhf_kernels import cli

# Several updates of several micro-batches, and whatever is global: whitening, normalisers, groups.
_FLAGS = {
    "ppo": "--mini_batch_size 16 --epochs 2 --micro_batch_size 4 --kl_target 0.05",
    "grpo": "--num_generations 4 --reward_normalize --micro_batch_size 8",
    "dpo": "--max_new_tokens 8",
    "kto": "--max_new_tokens 8 --micro_batch_size 5",
}
# A process imports once and trains all stages in turn. accelerate refuses FSDP on CPU: it is told.
_SCRIPT = """
import json, sys
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from rlhf_kernels.trainer import run, stage as stages
def sharded(**options):
    accelerator = Accelerator(**options)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", reshard_after_forward=True
    )
    accelerator.state._shared_state |= {
        "distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin
    }
    return accelerator
if sys.argv[2] == "fsdp2":
    stages.Accelerator = sharded
for stage, flags in json.loads(sys.argv[1]):
    run.train(stage, flags)
run.close()
"""
# A loss of NaN on the second process, in its second micro-batch of the second step.
_POISONED = """
import math, os, sys
import torch
from rlhf_kernels import cli
from rlhf_kernels.trainer.objectives import SFT
plain, calls = SFT.loss, [0]
def loss(self, networks, items, size):
    found, metrics = plain(self, networks, items, size)
    calls[0] += torch.is_grad_enabled()
    return found * (math.nan if os.environ["RANK"] == "1" and calls[0] == 4 else 1.0), metrics
SFT.loss = loss
flags = "--device cpu --threads 1 --hidden_size 16 --num_layers 1 --num_heads 2 --batch_size 8 "
flags += "--micro_batch_size 2 --eval_size 8 --vocab_size 280 --total_steps 3"
rows = [*flags.split(), "--data", sys.argv[1], "--output_dir", sys.argv[2]]
sys.exit(cli.main(["train", "sft", *rows]))
"""
# A reward function that raises on the second process, in the last evaluation.
_ENDS = """
import os, sys
from rlhf_kernels import cli
def score(completions, trainer_state, **_):
    last = trainer_state.global_step == 2 and os.path.exists(sys.argv[1])
    if os.environ["RANK"] == "1" and last:
        raise RuntimeError("no server")
    return [1.0 * len(c) for c in completions]
if __name__ == "__main__":
    flags = "--device cpu --threads 1 --hidden_size 16 --num_layers 1 --num_heads 2 --batch_size 8 "
    flags += "--eval_size 8 --total_steps 2 --max_operand 9 --max_new_tokens 3 --sft_steps 0"
    flags += " --resume"
    rows = [*flags.split(), "--reward_funcs", f"{__file__}:score", "--output_dir", sys.argv[2]]
    sys.exit(cli.main(["train", "grpo", *rows]))
"""
_SEVENS = """
def sevens(prompts, completions, completion_ids, **columns):
    return [c.count("7") / 5 for c in completions]
"""


def jobs(folder: Path, name: str, stages: dict[str, str]) -> str:
    """Stages and their flags for `_SCRIPT`."""
    common = "--device cpu --threads 1 --hidden_size 32 --num_heads 2 --batch_size 32"
    common += " --total_steps 3 --learning_rate 3e-3 --warmup_steps 1 --eval_size 10"
    found = []
    for stage, flags in stages.items():
        own = ["--output_dir", str(folder / name / stage)]
        if stage in ("dpo", "kto"):
            own += ["--data", str(folder / "pairs.jsonl"), "--vocab_size", "280"]
        else:
            own += ["--reward_funcs", "sevens_reward:sevens", "--max_new_tokens", "5"]
            own += ["--max_operand", "20", "--save_steps", "2"]
        found.append((stage, [*common.split(), *flags.split(), *own]))
    return json.dumps(found)


def start_two(folder: Path, mode: str, wanted: str) -> list[subprocess.Popen[str]]:
    """What torchrun and accelerate start."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment |= {"PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    environment |= {"OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, str(folder / "train.py"), wanted, mode],
            env={**os.environ, **environment, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]


def same_training(folder: Path, stage: str, networks: tuple[str, ...]) -> None:
    """Metrics and weights of `one` and `two`."""
    logs = []
    for name in ("one", "two"):
        lines = (folder / name / stage / "metrics.jsonl").read_text().splitlines()
        logs.append([json.loads(line) for line in lines])
    for one, two in zip(*logs, strict=True):
        for key in ("reward", "kl", "loss", "policy/loss", "value/loss", "policy/grad_norm"):
            if key in one:
                assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-6), (stage, key)
    assert [row["step"] for row in logs[0]] == [0, 1, 2]
    for network in networks:
        one, two = (
            load_file(folder / name / stage / network / "model.safetensors")
            for name in ("one", "two")
        )
        for key, weight in one.items():
            torch.testing.assert_close(two[key], weight, atol=1e-4, rtol=1e-4)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    pairs = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": str(i)} for i in range(60)]
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    (tmp_path / "sevens_reward.py").write_text(_SEVENS)
    (tmp_path / "train.py").write_text(_SCRIPT)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def train_both(folder: Path, mode: str, stages: dict[str, str]) -> None:
    two = start_two(folder, mode, jobs(folder, "two", stages))
    for stage, flags in json.loads(jobs(folder, "one", stages)):
        assert cli.main(["train", stage, *flags]) == 0
    outputs = [run.communicate(timeout=900)[0] for run in two]
    assert [run.returncode for run in two] == [0, 0], outputs
    assert outputs[0].count("x 2;") == len(stages) and "x 2;" not in outputs[1]


def checkpoint_names(folder: Path, stage: str, step: int) -> list[set[str]]:
    paths = [folder / name / stage / f"checkpoint-{step:08d}" for name in ("one", "two")]
    return [set(load_file(path / "learner.safetensors")) for path in paths]


def test_two_processes_train_as_one(folder):
    train_both(folder, "ddp", _FLAGS)
    for stage in _FLAGS:
        same_training(folder, stage, ("policy", "critic") if stage == "ppo" else ("policy",))
    # A checkpoint of two processes is that of one.
    one, two = checkpoint_names(folder, "ppo", 2)
    assert one == two


def test_processes_agree_on_what_is_not_finite(folder):
    """One row of one process is NaN: both stop, before their weights change, and save."""
    (folder / "train.py").write_text(_POISONED)
    text = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(60)]
    data = write_jsonl(folder / "text.jsonl", text)
    runs = start_two(folder, str(folder / "out"), data)
    outputs = [run.communicate(timeout=900)[0] for run in runs]
    assert [run.returncode for run in runs] == [2, 2], outputs
    for output in outputs:
        (line,) = [n for n in output.splitlines() if n.startswith("rlhf-kernels: ")]
        assert "step 1, micro-batch 2 of 2, loss is not finite: " in line
        assert "text.jsonl:" in line
    assert "--resume continues from step 1" in outputs[0]
    held = load_file(folder / "out" / "checkpoint-00000001" / "learner.safetensors")
    assert all(weight.isfinite().all() for weight in held.values())


def test_processes_that_all_stop_at_the_end_save(folder):
    (folder / "train.py").write_text(_ENDS)
    broken, out = folder / "broken", folder / "out"
    broken.touch()
    (out / "curves.png").mkdir(parents=True)
    for said, step in (("no server", "2"), ("curves.png: cannot be written", "2")):
        runs = start_two(folder, str(out), str(broken))
        outputs = [run.communicate(timeout=900)[0] for run in runs]
        assert [run.returncode for run in runs] == [2, 2], outputs
        assert said in outputs[0] and f"--resume continues from step {step}" in outputs[0]
        assert (out / "checkpoint-00000002" / "learner.safetensors").exists()
        broken.unlink(missing_ok=True)
    (out / "curves.png").rmdir()
    runs = start_two(folder, str(out), str(broken))
    outputs = [run.communicate(timeout=900)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert (out / "policy" / "model.safetensors").exists()


@pytest.mark.slow
def test_accelerate_launches_two_processes_and_ends(tmp_path):
    """With the example's settings: on CPU as it should be, refused where nobody joins them."""
    config = Path(__file__).parents[2] / "examples" / "accelerate" / "ddp.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    launch += ["--num_processes", "2", "-m", "rlhf_kernels.trainer", "sft", "--threads", "1"]
    launch += "--max_operand 9 --eval_size 16 --hidden_size 16 --num_layers 1 --num_heads 2".split()
    launch += "--batch_size 16 --total_steps 2 --output_dir".split()
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    options = {"env": environment, "capture_output": True, "text": True, "timeout": 900}
    out = tmp_path / "cpu"
    done = subprocess.run([*launch, str(out), "--device", "cpu"], **options)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "x 2;" in done.stdout and (out / "policy" / "model.safetensors").exists()
    if not torch.cuda.is_available():
        done = subprocess.run([*launch, str(tmp_path / "gpu")], **options)
        assert done.returncode != 0 and not (tmp_path / "gpu" / "policy").exists()
        assert "the launcher started 2 processes, but on cpu each would train alone" in done.stderr


@pytest.mark.slow
def test_sharded_weights_train_as_one_process_and_resume(folder):
    """FSDP2; then the same again from the checkpoint of two steps."""
    stages = {"grpo": _FLAGS["grpo"], "ppo": _FLAGS["ppo"]}
    train_both(folder, "fsdp2", stages)
    for stage in stages:
        same_training(folder, stage, ("policy",))
        shutil.rmtree(folder / "two" / stage / "policy")
    wanted = [(stage, [*flags, "--resume"]) for stage, flags in
              json.loads(jobs(folder, "two", stages))]  # fmt: skip
    again = start_two(folder, "fsdp2", json.dumps(wanted))
    outputs = [run.communicate(timeout=900)[0] for run in again]
    assert [run.returncode for run in again] == [0, 0], outputs
    for stage in stages:
        same_training(folder, stage, ("policy",))
