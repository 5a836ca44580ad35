"""The command line: stages, help, and how an error is told."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.trainer.trainer_tools import accelerator, online_trainer

from rlhf_kernels import __main__ as doctor
from rlhf_kernels import cli
from rlhf_kernels.trainer import learner, run
from rlhf_kernels.trainer.config import UserError
from rlhf_kernels.trainer.rewards import Rewards

ROOT = Path(__file__).parents[2]


def lines(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.strip()]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["trian", "ppo"], "unknown command 'trian'; did you mean 'train'?"),
        (["ppo"], "unknown command 'ppo'; did you mean 'train ppo'?"),
        (["docter"], "unknown command 'docter'; did you mean 'doctor'?"),
        (["train"], "expected a stage, found none; one of: sft, reward, dpo, kto, ppo"),
        (["train", "gropo"], "found 'gropo'; did you mean 'grpo'?"),
        (["train", "--config", "x.yaml"], "found '--config'; one of: sft"),
        (["train", ""], "expected a stage, found ''"),
    ],
)
def test_commands_and_stages_that_are_not_there(args, words, capsys):
    assert cli.main(args) == 2
    (line,) = lines(capsys)
    assert line.startswith("rlhf-kernels: ") and words in line


@pytest.mark.parametrize("stage", cli.TRAINERS)
def test_help_of_each_stage(stage, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", stage, "--help"])
    text = capsys.readouterr().out
    assert stopped.value.code == 0
    assert f"rlhf-kernels train {stage}" in text and "--learning_rate" in text
    assert ("--critic_model" in text) == (stage == "ppo")


def test_help_is_in_groups_and_shows_the_stages_own_values(capsys):
    def help_of(stage):
        with pytest.raises(SystemExit):
            cli.main(["train", stage, "--help"])
        return " ".join(capsys.readouterr().out.split())

    names = ("model", "data", "optimisation", "algorithm", "run and output")
    for stage in ("sft", "dpo", "ppo", "dapo"):
        text = help_of(stage)
        # sft has no settings of its own.
        own = [name for name in names if (stage, name) != ("sft", "algorithm")]
        places = [text.index(f" {name}: --") for name in own]
        assert places == sorted(places)
        assert "(default: None)" not in text and "(default: [])" not in text
        assert f"(default: runs/{stage})" in text
    assert "--clip_high X the ratio's clip above 1 (default: 0.28)" in help_of("dapo")
    assert "--clip_high X the ratio's clip above 1 (default: 0.2)" in help_of("ppo")
    assert "--objective TEXT clip, penalty, reinforce, cispo or sapo (default: cispo)" in (
        help_of("cispo")
    )
    assert "--learning_rate X peak rate of the trained model (default: 1e-06)" in help_of("dpo")
    assert "--no_save_model the same as --save_model false" in help_of("sft")


def test_help_of_all(capsys):
    for args in (["--help"], ["-h"], ["train", "--help"]):
        assert cli.main(args) == 0
        text = capsys.readouterr().out
        assert "reinforce++_baseline" in text
        assert ("doctor" in text and "make bench" in text) == (args[0] != "train")


def test_the_doctor_is_a_command(monkeypatch, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["doctor", "--help"])
    assert stopped.value.code == 0 and "--integrations" in capsys.readouterr().out
    given = []
    monkeypatch.setattr(doctor, "main", lambda args: given.append(args) or 1)
    assert cli.main(["doctor", "--json"]) == 1 and given == [["--json"]]


@pytest.mark.parametrize("position", [0, 1, 2, 4])
def test_traceback_is_shown_where_it_is_asked_for(position, capsys):
    args = ["train", "ppo", "--seed", "-1"]
    args.insert(position, "--traceback")
    assert cli.main(args) == 2
    found = lines(capsys)
    assert found[0].startswith("Traceback") and found[-2].startswith("rlhf_kernels.trainer.")
    assert found[-1] == "rlhf-kernels: seed: expected a number from 0 to 2**32 - 1, found -1"


def raising(error):
    def train(*_):
        raise error

    return train


def test_an_unexpected_error_keeps_its_traceback(monkeypatch, capsys):
    monkeypatch.setattr(run, "train", raising(RuntimeError("size mismatch")))
    assert cli.main(["train", "ppo"]) == 1
    found = lines(capsys)
    assert found[0].startswith("Traceback") and found[-2] == "RuntimeError: size mismatch"
    assert "please report it" in found[-1]


def test_an_interrupt_before_the_run(monkeypatch, capsys):
    monkeypatch.setattr(run, "train", raising(KeyboardInterrupt()))
    assert cli.main(["train", "ppo"]) == 130
    assert lines(capsys) == ["rlhf-kernels: interrupted"]


MENDABLE = [
    (UserError("two\nlines  here"), "rlhf-kernels: two lines here"),
    (torch.OutOfMemoryError("CUDA out of memory"), "out of memory; try a smaller micro_batch_size"),
    (MemoryError(), "out of memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory"),
    (OSError(errno.ENOSPC, "No space left on device", "out/x"), "out/x: No space left on device"),
    (PermissionError(errno.EACCES, "Permission denied", "out"), "out: Permission denied"),
]


@pytest.mark.parametrize(("error", "words"), MENDABLE, ids=range(len(MENDABLE)))
def test_what_can_be_mended_is_one_line(error, words, monkeypatch, capsys):
    monkeypatch.setattr(run, "train", raising(error))
    assert cli.main(["train", "ppo"]) == 2
    (line,) = lines(capsys)
    assert words in line


def test_a_model_larger_than_the_memory(tmp_path, capsys):
    args = ["--hidden_size", str(2**20), "--num_heads", "4", "--output_dir", str(tmp_path / "out")]
    assert cli.main(["train", "ppo", "--device", "cpu", *args]) == 2
    assert "hidden_size: expected weights within this machine's " in lines(capsys)[-1]


def test_other_processes_leave_the_telling_to_the_main_one(monkeypatch, capsys):
    slept = []
    monkeypatch.setattr(cli.time, "sleep", slept.append)
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["train", "ppo", "--lam", "2"]) == 2
    assert len(lines(capsys)) == 1 and slept == []
    # Its launcher ends it while it waits; what it alone found it tells.
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["train", "ppo", "--lam", "2"]) == 2
    (line,) = lines(capsys)
    assert line.startswith("rlhf-kernels: process 1: lam: expected") and slept[0] >= 1


def test_an_error_of_one_process_is_raised_on_all(monkeypatch, capsys):
    trainer = online_trainer("ppo")
    monkeypatch.setattr(type(trainer.learner), "processes", 2)
    monkeypatch.setattr(learner, "gather_object", lambda own: [*own, "score: raised on the other"])
    with pytest.raises(UserError, match=r"^score: raised on the other \(process 1\)") as raised:
        with trainer.learner.together():
            pass
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(run, "train", raising(raised.value))
    assert cli.main(["train", "ppo"]) == 2 and lines(capsys) == []
    monkeypatch.setattr(learner, "gather_object", lambda own: [None, *own])
    with pytest.raises(UserError, match=r"^own: expected a list .*\(process 1\)$"):
        with trainer.learner.together():
            Rewards([_own], [1.0], ["own"])(["p"], ["c"], [[1]], {})
    monkeypatch.setattr(learner, "gather_object", lambda own: [*own, None])
    with trainer.learner.together():
        pass
    assert accelerator().num_processes == 1


def _own(**_):
    return 1.0


def test_module_is_the_command(tmp_path):
    """`python -m rlhf_kernels.trainer` says what `rlhf-kernels train` says."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = "import sys; from rlhf_kernels.cli import main; sys.exit(main())"
    found = []
    for start in (["-m", "rlhf_kernels.trainer"], ["-c", script, "train"]):
        done = subprocess.run(
            [sys.executable, *start, "ppo", "--lam", "2"],
            cwd=tmp_path, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        found.append((done.returncode, done.stdout, done.stderr))
    assert found[0] == found[1]
    assert found[0] == (2, "", "rlhf-kernels: lam: expected a number from 0 to 1, found 2.0\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("own", [False, True])
def test_two_processes_tell_once(own, tmp_path):
    """A setting that both find wrong, and a reward function that raises on the second alone."""
    (tmp_path / "mine.py").write_text(
        "import os\ndef score(completions):\n"
        "    return 1.0 if os.environ['RANK'] == '1' else [1.0] * len(completions)\n"
    )
    flags = ["--reward_funcs", "mine:score"] if own else ["--lam", "2"]
    launch = "torch.distributed.run --nproc_per_node 2 -m rlhf_kernels.trainer ppo"
    size = "--device cpu --hidden_size 32 --max_operand 20 --eval_size 10 --batch_size 16"
    done = subprocess.run(
        [sys.executable, "-m", *launch.split(), *size.split(), *flags],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("rlhf-kernels: ")]
    expected = r"score: expected a list of 5 rewards, found float 1.0 (process 1)"
    assert len(told) == 1, done.stderr[-3000:]
    assert expected in told[0] if own else "lam: expected" in told[0]
