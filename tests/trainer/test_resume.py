"""Output folders, what lies beside checkpoints, and runs that continue or are told why not."""

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.trainer.resume_cases import names, save, told, train
from tests.trainer.trainer_tools import one_thread, rows_without_times, write_jsonl  # noqa: F401

from rlhf_kernels import cli
from rlhf_kernels.trainer import checkpoint, folder, loop, resume
from rlhf_kernels.trainer.report import MetricsLog
from rlhf_kernels.trainer.rows import parse_row


def test_a_damaged_newest_checkpoint_names_the_whole_ones(tmp_path, capsys):
    out = tmp_path / "out"
    assert train(out, "--total_steps 3 --save_steps 1 --save_total_limit 0") == 0
    flip = out / "checkpoint-00000003" / "learner.safetensors"
    flip.write_bytes(flip.read_bytes()[:-9] + b"123456789")
    (out / "checkpoint-00000001" / "state.json").unlink()
    capsys.readouterr()
    assert train(out, "--total_steps 4 --resume") == 2
    line = told(capsys)
    assert "checkpoint-00000003/learner.safetensors: altered" in line
    assert "whole: checkpoint-00000002; --resume_from checkpoint-00000002 continues from it" in line
    # The log keeps what is before it, and the damaged one is not in the way.
    assert train(out, "--total_steps 4 --save_steps 1 --resume_from checkpoint-00000002") == 0
    assert [row["step"] for row in rows_without_times(out / "metrics.jsonl")] == [0, 1, 2, 3]
    assert {"checkpoint-00000003.aside-1", "checkpoint-00000004"} <= set(names(out))
    whole = tmp_path / "whole"
    assert train(whole, "--total_steps 4") == 0
    paths = [p / "policy" / "model.safetensors" for p in (out, whole)]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert train(out, "--resume_from nowhere") == 2
    assert "resume_from: expected a checkpoint in" in capsys.readouterr().err


@pytest.mark.parametrize("manifest", ("{}", "[]", "null", '{"step": 2}', None))
@pytest.mark.parametrize("every", (False, True))
def test_a_manifest_without_its_entries_is_not_passed_over(tmp_path, capsys, manifest, every):
    """Neither does the run start again, nor go on from an older checkpoint."""
    out = tmp_path / "out"
    for step in (1, 2):
        save(out, step)
        file = out / f"checkpoint-{step:08d}" / "manifest.json"
        if step == 2 or every:
            file.write_text(manifest) if manifest else file.unlink()
    assert train(out, "--total_steps 4 --resume") == 2
    line = told(capsys)
    assert "checkpoint-00000002: no manifest of a checkpoint" in line
    assert ("whole: checkpoint-00000001" in line) != every
    assert names(out) == ["checkpoint-00000001", "checkpoint-00000002"]


@pytest.mark.parametrize(
    "flags", ["--output_dir N", "--model N", "--model a/N", "--resume_from N", "--data N"]
)
def test_names_that_are_too_long_are_one_line(tmp_path, capsys, monkeypatch, flags):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "sft", *flags.replace("N", "n" * 300).split()]) == 2
    assert "n" * 60 in told(capsys)


def test_an_output_that_nobody_reads_is_one_line(tmp_path, capsys, monkeypatch):
    def say(*_):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr("rlhf_kernels.trainer.stage.Stage.say", say)
    assert train(tmp_path, "--total_steps 1") == 2
    assert "standard output: nobody reads it" in told(capsys)


def test_a_current_folder_that_is_gone_is_one_line(tmp_path, capsys, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert cli.main(["train", "sft"]) == 2
    assert "the current folder: it was deleted" in told(capsys)


@pytest.mark.parametrize("kind", ["copy", "link", "renamed"])
def test_a_checkpoint_of_any_name_continues(tmp_path, kind):
    flags = "--total_steps 3 --save_steps 1 --save_total_limit 0 --no_save_model"
    assert train(tmp_path, flags) == 0
    whole = checkpoint.load(tmp_path / "checkpoint-00000003", "sft")
    first, best = tmp_path / "checkpoint-00000001", tmp_path / "best"
    if kind == "copy":
        shutil.copytree(first, best)
    elif kind == "link":
        best.symlink_to(first.name)
    else:
        first.rename(best)
    assert train(tmp_path, f"{flags} --resume_from best") == 0
    assert {"checkpoint-00000002.aside-1", "checkpoint-00000003.aside-1"} <= set(names(tmp_path))
    again = checkpoint.load(tmp_path / "checkpoint-00000003", "sft")
    for name, weight in whole["learner"]["weights"].items():
        assert torch.equal(weight, again["learner"]["weights"][name])


@pytest.mark.parametrize("name", ["checkpoint-00000001/manifest.json", ".lock"])
def test_pipes_are_not_waited_for(tmp_path, capsys, name):
    (save(tmp_path, 1) / "manifest.json").unlink()
    os.mkfifo(tmp_path / name)
    assert train(tmp_path, "--resume") == 2
    assert "is not a file" in told(capsys)


def test_rows_that_begin_after_an_assistants_message_are_other_rows():
    """The same messages: continued as they stand, or a message of their own after it."""
    user, first, second = (
        {"role": role, "content": text}
        for role, text in (("user", "hi"), ("assistant", "a"), ("assistant", "b"))
    )
    apart = parse_row({"messages": [user, first, second]}, "supervised")
    joined = parse_row({"prompt": [user, first], "completion": [second]}, "supervised")
    assert apart[:5] == joined[:5] and apart.apart and not joined.apart
    assert resume.identity([apart]) != resume.identity([joined])
    assert resume.identity([joined]) == resume.identity([joined._replace(origin="elsewhere")])


def test_settings_and_data_have_to_be_the_same(tmp_path, capsys):
    def rows(count):
        content = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(count)]
        return write_jsonl(tmp_path / f"d{count}.jsonl", content)

    out, first = tmp_path / "out", rows(40)
    common = f"--save_steps 1 --vocab_size 300 --data {first} --total_steps"
    assert train(out, f"{common} 2") == 0
    changes = {
        "--learning_rate 1e-3": "learning_rate was 0.003, is 0.001",
        "--seed 3": "seed was 0, is 3",
        "--lr_schedule linear": "lr_schedule was 'constant', is 'linear'",
        "--batch_size 4 --weight_decay 0.1": "batch_size was 8, is 4; weight_decay was 0.0, is 0.1",
        f"--data {rows(60)}": "data has other rows",
        f"--data {rows(24)}": "data has other rows",
    }
    for change, expected in changes.items():
        capsys.readouterr()
        assert train(out, f"{common} 4 --resume {change}") == 2, change
        line = told(capsys)
        assert expected in line and "--resume_changed goes on" in line
    assert train(out, f"{common} 1 --resume") == 2
    assert "total_steps: expected at least the 2 steps" in capsys.readouterr().err
    # What may change: where the same rows lie, how often is saved, how far it goes.
    copy = shutil.copy(first, tmp_path / "copy.jsonl")
    same = f"--vocab_size 300 --data {copy} --total_steps 3 --save_steps 3 --skip_nonfinite 2"
    assert train(out, f"{same} --resume --micro_batch_size 4") == 0
    assert "not bitwise as if uninterrupted: micro_batch_size 0 -> 4" in capsys.readouterr().out
    # Other rows, fewer or more, and another rate: a fresh order.
    for count, steps in ((24, 5), (60, 8)):
        more = f"--vocab_size 300 --data {rows(count)} --total_steps {steps} --save_steps 1"
        assert train(out, f"{more} --resume --resume_changed --learning_rate 1e-3") == 0
        text = capsys.readouterr().out
        assert "the order of the rows begins anew" in text and "data has other rows" in text
    assert len(rows_without_times(out / "metrics.jsonl")) == 8
    # A finished run again, and a run without a checkpoint.
    assert train(out, f"{more} --resume --learning_rate 1e-3") == 0
    assert train(tmp_path / "new", f"{common} 1 --resume") == 0
    assert "no checkpoint in" in capsys.readouterr().out


def test_models_have_to_be_the_same(tmp_path, capsys):
    base, out = tmp_path / "base", tmp_path / "out"
    assert train(base, "--total_steps 1") == 0
    flags = f"--model {base / 'policy'} --lora_rank 2 --save_steps 1 --total_steps"
    assert train(out, f"{flags} 1") == 0
    assert train(out, f"{flags} 2 --resume") == 0
    # Another training wrote the base model anew: the checkpoint has the adapter alone.
    assert train(base, "--total_steps 2") == 0
    capsys.readouterr()
    assert train(out, f"{flags} 3 --resume") == 2
    line = told(capsys)
    assert f"{base / 'policy'} has other weights or settings; --resume needs" in line
    assert train(out, f"{flags} 3 --resume --resume_changed") == 0


def test_a_changed_reward_function_goes_on_and_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out = tmp_path / "rewards_of_a_run.py", tmp_path / "out"
    code.write_text(
        "def score(completions, **_):\n    return [float(len(c)) for c in completions]\n"
    )
    flags = (
        f"--reward_funcs {code}:score --sft_steps 1 --max_new_tokens 3 --save_steps 1 --total_steps"
    )
    assert train(out, f"{flags} 1", "grpo") == 0
    capsys.readouterr()
    assert train(out, f"{flags} 2 --resume", "grpo") == 0
    assert "has changed since" not in capsys.readouterr().out
    code.write_text(code.read_text() + "# mended\n")
    assert train(out, f"{flags} 3 --resume", "grpo") == 0
    said = f"reward_funcs: the file of '{code}:score' has changed since"
    assert said in capsys.readouterr().out


def test_a_second_run_in_a_folder_is_refused(tmp_path, capsys):
    out = tmp_path / "out"
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, os, sys\n"
         "os.makedirs(sys.argv[1]); f = open(sys.argv[1] + '/.lock', 'w')\n"
         "fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()", str(out)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout.readline() == b"held\n"
    capsys.readouterr()
    assert train(out, "--total_steps 1") == 2
    assert f"writes into '{out}'" in told(capsys)
    holder.kill()
    holder.communicate()
    # Its death frees the folder, whatever lies there.
    assert train(out, "--total_steps 1") == 0
    assert ".lock" not in names(out)


def test_a_folder_without_locks_is_said(tmp_path, capsys, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(folder.fcntl, "flock", refuse)
    assert train(tmp_path, "--total_steps 1") == 0
    assert "cannot be locked (No locks available)" in capsys.readouterr().err


def test_a_launcher_whose_processes_do_not_know_of_each_other(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train(tmp_path, "--total_steps 1") == 2
    assert "the launcher started 2 processes, but on cpu each would train alone" in told(capsys)


def full(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("what", ["tensors", "state", "sync", "log", "curves", "model", "summary"])
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path, capsys, monkeypatch, what):
    out = tmp_path / "out"
    assert train(out, "--total_steps 2 --save_steps 1") == 0
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file() and "check" in str(p)}
    models = (out / "policy" / "model.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        if what == "tensors":
            patch.setattr(checkpoint, "save_file", full)
        elif what in ("state", "sync"):
            patch.setattr(*((Path, "write_text", full) if what == "state" else
                            (checkpoint, "_sync", full)))  # fmt: skip
        elif what == "log":
            patch.setattr(MetricsLog, "write", lambda self, row: folder_error(self.path))
        elif what == "curves":
            patch.setattr(loop.report, "plot_curves", full)
        elif what == "model":
            patch.setattr(folder, "sync_files", full)
        else:
            real = folder.write_whole
            patch.setattr(
                folder, "write_whole", lambda p, c: full() if "summary" in p.name else real(p, c)
            )
        capsys.readouterr()
        assert train(out, "--total_steps 4 --save_steps 2 --resume") == 2
        line = told(capsys)
        assert "No space left on device" in line and "--resume continues" in line
    for path, content in before.items():
        if "checkpoint-00000002" in str(path):
            assert path.read_bytes() == content
    assert (out / "policy" / "model.safetensors").read_bytes() == models or what == "summary"
    assert not [n for n in names(out) if n.startswith(".")]
    assert train(out, "--total_steps 4 --save_steps 2 --resume") == 0
    assert [row["step"] for row in rows_without_times(out / "metrics.jsonl")] == [0, 1, 2, 3]


def folder_error(path: Path) -> None:
    with folder.writing(path):
        full()


def test_a_file_too_large_is_the_same(tmp_path):
    """A real limit of the system, in a process of its own."""
    code = (
        "import resource, sys\nfrom rlhf_kernels.trainer import checkpoint\nimport torch\n"
        "from pathlib import Path\nfrom rlhf_kernels.trainer.config import UserError\n"
        "out = Path(sys.argv[1])\nstate = {'learner': {'w': torch.zeros(9000)}}\n"
        "checkpoint.save(out, 1, 'sft', state)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "try:\n    checkpoint.save(out, 2, 'sft', state)\nexcept UserError as e:\n    print(e)\n"
        "print(sorted(p.name for p in out.iterdir()), len(checkpoint.load("
        "out / 'checkpoint-00000001', 'sft')))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    first, last = done.stdout.splitlines()
    assert "checkpoint-00000002: cannot be written (" in first and "too large" in first
    assert last == "['checkpoint-00000001'] 1"


def test_folders_are_replaced_whole(tmp_path):
    target = tmp_path / "policy"

    def write(content, *files):
        def function(draft):
            draft.mkdir()
            for name in files:
                (draft / name).write_text(content)

        return function

    folder.replace_folder(target, write("1", "a", "b"))
    folder.replace_folder(target, write("2", "a", "b", "c"))
    assert names(tmp_path) == ["policy"] and (target / "a").read_text() == "2"
    with pytest.raises(RuntimeError):
        folder.replace_folder(target, lambda draft: (write("3", "a")(draft), bad())[1])
    assert names(tmp_path) == ["policy"] and (target / "a").read_text() == "2"
    # What the new one lacks is kept.
    folder.replace_folder(target, write("4", "a"))
    assert names(tmp_path) == ["policy", "policy.aside-1"] and names(target) == ["a"]


def bad():
    raise RuntimeError


def test_lines_that_are_no_metrics_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = '{"step": 0, "loss": 2.5, "tokens": 3, "mine": "x", "list": [1], "norm": null}'
    bad = ("[" * 100_000, "\0" * 9, '{"step": true}', '{"step": "0"}', "7", '{"step": 1, "lo')
    path.write_text("\n".join([*bad, good, '{"step": 1, "loss": ' + "9" * 400 + "}", ""]))
    rows = MetricsLog(path, steps_done=2).rows
    assert rows[1] == {"step": 1}
    assert rows[0].keys() == {"step", "loss", "tokens", "norm"}
    kept = '{"step": 0, "loss": 2.5, "tokens": 3, "norm": null}'
    assert path.read_text() == f'{kept}\n{{"step": 1}}\n'


def test_a_finished_run_continues_without_its_metrics(tmp_path):
    flags = "--total_steps 1 --save_steps 1"
    assert train(tmp_path, flags) == 0
    shutil.rmtree(tmp_path / "policy")
    (tmp_path / "metrics.jsonl").unlink()
    assert train(tmp_path, f"{flags} --resume") == 0
    assert (tmp_path / "policy" / "model.safetensors").exists()


def test_metrics_survive_a_kill_during_resume(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    for step in range(4):
        log.write({"step": step, "x": float("nan") if step == 1 else 0.5})
    assert "NaN" not in path.read_text() and '"x": null' in path.read_text()
    with path.open("ab") as file:
        file.write(b'{"step": 4, "x": 0.\xff')
    content = path.read_bytes()
    for step in ("write", "fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

            def killed(*_, **__):
                raise KeyboardInterrupt

            if step == "fsync":
                patch.setattr(folder.os, "fsync", killed)
            elif step == "replace":
                patch.setattr(Path, "replace", killed)
            else:
                patch.setattr("rlhf_kernels.trainer.report.write_whole", killed)
            MetricsLog(path, steps_done=3)
        assert path.read_bytes() == content and names(tmp_path) == ["metrics.jsonl"]
    log = MetricsLog(path, steps_done=3)
    assert [row["step"] for row in log.rows] == [0, 1, 2] and log.rows[1]["x"] != log.rows[1]["x"]
    log.write({"step": 3, "x": 1.0})
    assert [json.loads(line)["x"] for line in path.read_text().splitlines()] == [
        0.5,
        None,
        0.5,
        1.0,
    ]
