"""Checkpoints: whole or absent, refused where damaged, and runs that continue bitwise."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.trainer.trainer_tools import (
    one_thread,  # noqa: F401
    online_trainer,
    rows_without_times,
    timeless,
    write_jsonl,
)

from rlhf_kernels import cli
from rlhf_kernels.trainer import checkpoint
from rlhf_kernels.trainer.learner import Learner

# Everything that has a state: adaptive KL, penalty, moments, supervised rows, several updates.
STATEFUL = (
    "--objective penalty --penalty_target 1e-4 --kl_target 0.05 --reward_normalize --ptx_coef 0.1 "
    "--mini_batch_size 16 --epochs 2"
)
SIZES = (
    "--hidden_size 32 --num_heads 2 --eval_size 16 --batch_size 32 --sft_steps 4 "
    "--sft_batch_size 32 --threads 1 --max_new_tokens 4 --learning_rate 5e-3 "
    "--max_operand 20"
)


def states_of(trainer):
    return {
        "learner": trainer.learner.state_dict(),
        "trainer": trainer.state_dict(),
        "generators": checkpoint.generator_states(),
    }


def put(states, trainer):
    trainer.learner.load_state_dict(states["learner"])
    trainer.load_state_dict(states["trainer"])
    checkpoint.set_generator_states(states["generators"])


OPTIONS = {"ppo": {"kl_target": 0.05, "mini_batch_size": 16, "epochs": 2, "ptx_coef": 0.1}}


@pytest.mark.parametrize("name", ["ppo", "reinforce", "remax"])
def test_continues_bitwise(name, tmp_path):
    options = {"learning_rate": 5e-3, "warmup_steps": 1} | OPTIONS.get(name, {})
    whole = online_trainer(name, **options)
    for _ in range(2):
        whole.step()
    path = checkpoint.save(tmp_path, whole.steps_done, name, states_of(whole))
    expected = [timeless(whole.step()) for _ in range(2)]
    other = online_trainer(name, **options)
    other.step()
    if other.reference is not None:
        other.reference.model.load_state_dict(whole.reference.model.state_dict())
    put(checkpoint.load(path, name), other)
    assert [timeless(other.step()) for _ in range(2)] == expected
    for a, b in zip(
        whole.learner.networks.parameters(), other.learner.networks.parameters(), strict=True
    ):
        assert torch.equal(a, b)


def test_nested_states_come_back(tmp_path):
    state = {
        "a": [1, 2.5, None, "x", (3, (4, True))],
        "b": {7: {"t": torch.arange(3), "empty": {}}, "n": torch.tensor(2.0, dtype=torch.bfloat16)},
    }
    path = checkpoint.save(tmp_path, 3, "sft", {"s": state, "none": {}})
    found = checkpoint.load(path, "sft")
    assert found["none"] == {} and found["s"]["a"] == state["a"]
    assert torch.equal(found["s"]["b"][7]["t"], torch.arange(3))
    assert found["s"]["b"]["n"].dtype == torch.bfloat16
    assert not [p for p in path.iterdir() if p.suffix not in (".json", ".safetensors")]


def saved(tmp_path: Path) -> Path:
    state = {"weights": {"w": torch.randn(300)}, "n": 1}
    return checkpoint.save(tmp_path, 5, "grpo", {"learner": state, "trainer": {"step": 5}})


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("file", "damage", "match"),
    [
        ("learner.safetensors", truncate, r"learner\.safetensors: expected \d+ bytes, found \d+"),
        ("learner.safetensors", flip, r"learner\.safetensors: altered"),
        ("learner.safetensors", Path.unlink, r"learner\.safetensors: missing"),
        ("state.json", flip, r"state\.json: altered"),
        ("manifest.json", Path.unlink, "no manifest"),
        ("manifest.json", truncate, "no manifest"),
        ("manifest.json", lambda p: p.write_text('{"model": 1}'), "no manifest"),
        ("manifest.json", lambda p: p.write_text("[]"), "no manifest"),
        (
            "manifest.json",
            lambda p: p.write_text(p.read_text().replace('"step": 5', '"step": 6')),
            r"manifest\.json: altered",
        ),
    ],
)
def test_damaged_checkpoint_is_refused(tmp_path, file, damage, match):
    path = saved(tmp_path)
    assert checkpoint.load(path, "grpo")["trainer"] == {"step": 5}
    damage(path / file)
    with pytest.raises(checkpoint.CheckpointError, match=match) as error:
        checkpoint.load(path, "grpo")
    assert str(path) in str(error.value)


def test_checkpoint_of_another_stage_or_model_is_refused(tmp_path):
    path = saved(tmp_path)
    with pytest.raises(checkpoint.CheckpointError, match="a checkpoint of 'grpo', not of 'ppo'"):
        checkpoint.load(path, "ppo")
    trainer = online_trainer("grpo")
    with pytest.raises(ValueError, match="expected in both checkpoint and model"):
        trainer.learner.load_state_dict(checkpoint.load(path, "grpo")["learner"])
    state = trainer.learner.state_dict()
    name = next(iter(state["weights"]))
    state["weights"][name] = torch.zeros(3)
    with pytest.raises(ValueError, match=f"{name}: expected shape"):
        trainer.learner.load_state_dict(state)


def test_old_checkpoints_go_and_drafts_are_cleaned_up(tmp_path):
    (tmp_path / ".checkpoint-00000001").mkdir()
    for step in (1, 2, 3, 10):
        checkpoint.save(tmp_path, step, "sft", {"s": {}}, keep=2)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["checkpoint-00000003", "checkpoint-00000010"]


# Every call of the saving that changes something on the disk.
_KILLED_AT = """
import os, signal, sys, pathlib, shutil, torch
from rlhf_kernels.trainer import checkpoint
folder = pathlib.Path(sys.argv[1])
def state(step):
    return {"learner": {"w": torch.full((50,), float(step))}, "trainer": {"step": step}}
def child(kill_at):
    calls = [0]
    def counted(function):
        def wrapper(*args, **kwargs):
            calls[0] += 1
            if calls[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return wrapper
    for owner, name in ((checkpoint, "save_file"), (checkpoint, "_sync"), (shutil, "rmtree"),
                        (pathlib.Path, "mkdir"), (pathlib.Path, "write_text"),
                        (pathlib.Path, "rename")):
        setattr(owner, name, counted(getattr(owner, name)))
    checkpoint.save(folder, 2, "sft", state(2), keep=1)
    os._exit(0)
checkpoint.save(folder, 1, "sft", state(1))
killed = 0
for kill_at in range(1, 60):
    pid = os.fork()
    if pid == 0:
        child(kill_at)
    _, status = os.waitpid(pid, 0)
    newest = checkpoint.checkpoints(folder)[-1]
    found = checkpoint.load(newest, "sft")
    step = found["trainer"]["step"]
    assert step in (1, 2) and (found["learner"]["w"] == step).all()
    assert newest.name == f"checkpoint-{step:08d}"
    if not os.WIFSIGNALED(status):
        assert step == 2
        break
    killed += 1
    if step == 2:
        for path in checkpoint.checkpoints(folder):
            shutil.rmtree(path)
        checkpoint.save(folder, 1, "sft", state(1))
print(killed)
"""


def test_kill_at_every_write_of_a_save_leaves_a_whole_checkpoint(tmp_path):
    command = [sys.executable, "-c", _KILLED_AT, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 10


# The runs of one process each, forked so that the packages are imported once.
_RUNS = """
import os, pathlib, signal, sys, time
os.environ["MKL_CBWR"] = "AUTO,STRICT"
import rlhf_kernels.trainer.run
from rlhf_kernels import cli
from rlhf_kernels.trainer import checkpoint
folder, flags = pathlib.Path(sys.argv[1]), sys.argv[2:]
def start(name, *more):
    pid = os.fork()
    if pid:
        return pid
    # Other addresses than the other runs'.
    padding = bytearray(len(name) * 100_003)
    code = 1
    try:
        with open(folder / (name + ".out"), "a") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
            code = cli.main(["train", "ppo", *flags, "--output_dir", str(folder / name), *more])
    except SystemExit as error:
        code = error.code
    finally:
        sys.stdout.flush()
        os._exit(code)
def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
def wait_for(condition):
    deadline = time.monotonic() + 600
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
assert ended(start("whole")) == 0
# Killed while a draft is written.
pid = start("killed", "--save_steps", "1")
killed = folder / "killed"
wait_for(lambda: checkpoint.checkpoints(killed) and list(killed.glob(".checkpoint-*")))
os.kill(pid, signal.SIGKILL)
assert ended(pid) == -signal.SIGKILL
assert ended(start("killed", "--save_steps", "1", "--resume")) == 0
pid = start("stopped")
log = folder / "stopped" / "metrics.jsonl"
wait_for(lambda: log.exists() and log.read_text().count("\\n") >= 2)
os.kill(pid, signal.SIGINT)
assert ended(pid) == 130
assert len(checkpoint.checkpoints(folder / "stopped")) == 1
assert ended(start("stopped", "--resume")) == 0
"""


def test_interrupted_and_killed_runs_end_as_the_uninterrupted(tmp_path):
    """Three runs: whole; killed while it saves, then resumed; Ctrl-C, then resumed."""
    steps = 8
    command = [sys.executable, "-c", _RUNS, str(tmp_path), *SIZES.split(), *STATEFUL.split()]
    done = subprocess.run(
        [*command, "--total_steps", str(steps)], capture_output=True, text=True, timeout=900
    )
    outputs = {p.name: p.read_text()[-2000:] for p in tmp_path.glob("*.out")}
    assert done.returncode == 0, (done.stderr, outputs)
    assert "--resume continues from step" in (tmp_path / "stopped.out").read_text()
    expected = rows_without_times(tmp_path / "whole" / "metrics.jsonl")
    assert [row["step"] for row in expected] == list(range(steps))
    assert len({row["kl_coef"] for row in expected}) > 2
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    for name in ("killed", "stopped"):
        assert rows_without_times(tmp_path / name / "metrics.jsonl") == expected, name
        other = json.loads((tmp_path / name / "summary.json").read_text())
        for key in ("held_out_before", "held_out_after", "samples"):
            assert other[key] == summary[key]
        for network in ("policy", "critic"):
            paths = [tmp_path / n / network / "model.safetensors" for n in ("whole", name)]
            assert paths[0].read_bytes() == paths[1].read_bytes()


def test_a_used_folder_needs_resume(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "out")
    assert cli.main(["train", "grpo", "--output_dir", "out"]) == 2
    assert "output_dir: expected a folder without checkpoints (--resume continues them)" in (
        capsys.readouterr().err
    )
    flags = "--output_dir out --resume --max_operand 9 --eval_size 10 --batch_size 8"
    data = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "1+1=", "completion": "2"}] * 40)
    assert cli.main(["train", "sft", *flags.split(), "--data", data]) == 2
    assert "a checkpoint of 'grpo', not of 'sft'" in capsys.readouterr().err


def test_learner_state_covers_every_weight():
    learner: Learner = online_trainer("ppo").learner
    assert len(learner.state_dict()["weights"]) == len(list(learner.networks.parameters()))


# Tiny models: what is tried are moments, not sizes.
_TINY = (
    "--device cpu --threads 1 --hidden_size 16 --num_layers 1 --num_heads 2 --batch_size 8 "
    "--eval_size 8 --vocab_size 280 --max_new_tokens 8 --total_steps 12 --save_steps 1 "
    "--learning_rate 3e-3"
)


def killed(folder: Path, stage: str, moments: int) -> dict[str, int]:
    """Kills of a stage's runs, how often they were resumed, and how many ended as they should."""
    rows = [
        {"prompt": f"{i}+1=", "chosen": str(i + 1), "rejected": str(i)}
        if stage != "sft"
        else {"prompt": f"{i}+1=", "completion": str(i + 1)}
        for i in range(60)
    ]
    data = write_jsonl(folder / "rows.jsonl", rows)
    script = Path(__file__).with_name("killed_runs.py")
    command = [sys.executable, str(script), str(folder), str(moments), stage, *_TINY.split()]
    done = subprocess.run(
        [*command, "--data", data], capture_output=True, text=True, timeout=900 + 60 * moments
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_offline_runs_killed_at_random_moments_end_as_the_uninterrupted(stage, tmp_path):
    found = killed(tmp_path, stage, 4)
    assert found["kills"] >= 4 and found["resumes"] >= 1 and found["ends"] >= 1


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "dpo", "reward"])
def test_offline_runs_killed_at_sixty_moments(stage, tmp_path):
    found = killed(tmp_path, stage, 60)
    assert found["kills"] >= 60 and found["resumes"] >= 20 and found["ends"] >= 12
