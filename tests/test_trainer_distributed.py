"""Two processes give what one process gives on the whole batch."""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from trainer_tools import one_thread, write_jsonl  # noqa: F401

from rlhf_kernels import cli

# Several updates of several micro-batches, and whatever is global: whitening, normalisers, groups.
_FLAGS = {
    "ppo": "--mini_batch_size 16 --epochs 2 --micro_batch_size 4 --kl_target 0.05",
    "grpo": "--num_generations 4 --reward_normalize --micro_batch_size 8",
    "dpo": "--max_new_tokens 8",
}
# A process imports once and trains all stages in turn.
_SCRIPT = """
import json, sys
from rlhf_kernels.trainer import run
for stage, flags in json.loads(sys.argv[1]):
    run.train(stage, flags)
run.close()
"""
_SEVENS = """
def sevens(prompts, completions, completion_ids, **columns):
    return [c.count("7") / 5 for c in completions]
"""


def test_two_processes_train_as_one(tmp_path, monkeypatch):
    pairs = [{"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": str(i)} for i in range(60)]
    data = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    (tmp_path / "sevens_reward.py").write_text(_SEVENS)
    (tmp_path / "train.py").write_text(_SCRIPT)

    def jobs(name: str) -> str:
        common = "--device cpu --threads 1 --hidden_size 32 --num_heads 2 --batch_size 32"
        common += " --total_steps 3 --learning_rate 3e-3 --warmup_steps 1 --eval_size 10"
        found = []
        for stage, flags in _FLAGS.items():
            own = ["--output_dir", str(tmp_path / name / stage)]
            if stage == "dpo":
                own += ["--data", data, "--vocab_size", "280"]
            else:
                own += ["--reward_funcs", "sevens_reward:sevens", "--max_new_tokens", "5"]
                own += ["--max_operand", "20", "--save_steps", "2"]
            found.append((stage, [*common.split(), *flags.split(), *own]))
        return json.dumps(found)

    # What torchrun and accelerate set for each process.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment |= {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    environment |= {"OMP_NUM_THREADS": "1"}
    two = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "train.py"), jobs("two")],
            env={**os.environ, **environment, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    monkeypatch.syspath_prepend(str(tmp_path))
    for stage, flags in json.loads(jobs("one")):
        assert cli.main(["train", stage, *flags]) == 0
    outputs = [run.communicate(timeout=300)[0] for run in two]
    assert [run.returncode for run in two] == [0, 0], outputs
    assert outputs[0].count("x 2;") == len(_FLAGS) and "x 2;" not in outputs[1]
    for stage in _FLAGS:
        logs = []
        for name in ("one", "two"):
            lines = (tmp_path / name / stage / "metrics.jsonl").read_text().splitlines()
            logs.append([json.loads(line) for line in lines])
        for one, two in zip(*logs, strict=True):
            for key in ("reward", "kl", "loss", "policy/loss", "value/loss", "policy/grad_norm"):
                if key in one:
                    assert two[key] == pytest.approx(one[key], rel=1e-3, abs=1e-6), (stage, key)
        assert [row["step"] for row in logs[0]] == [0, 1, 2]
        for network in ("policy", "critic") if stage == "ppo" else ("policy",):
            one, two = (
                load_file(tmp_path / name / stage / network / "model.safetensors")
                for name in ("one", "two")
            )
            for key, weight in one.items():
                torch.testing.assert_close(two[key], weight, atol=1e-4, rtol=1e-4)
    # A checkpoint of two processes is that of one.
    paths = [tmp_path / name / "ppo" / "checkpoint-00000002" for name in ("one", "two")]
    states = [load_file(path / "learner.safetensors") for path in paths]
    assert states[0].keys() == states[1].keys()
