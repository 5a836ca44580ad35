"""Output folders, what lies beside checkpoints, and runs that continue or are told why not."""

import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.trainer.trainer_tools import one_thread, rows_without_times, write_jsonl  # noqa: F401

from rlhf_kernels import cli
from rlhf_kernels.trainer import checkpoint, folder, loop, resume
from rlhf_kernels.trainer.config import UserError
from rlhf_kernels.trainer.interrupts import Interrupted, Interrupts, interrupts
from rlhf_kernels.trainer.offline import OfflineTrainer
from rlhf_kernels.trainer.report import MetricsLog

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


# --- what lies beside them -----------------------------------------------------------------------


def test_only_the_trainers_own_are_deleted_or_continued(tmp_path):
    save(tmp_path, 1)
    for name in (
        "checkpoint-00000001-mine",
        "checkpoint-best",
        "checkpoint-2",
        "checkpoint-0000003a",
    ):
        shutil.copytree(tmp_path / "checkpoint-00000001", tmp_path / name)
    (tmp_path / "checkpoint-00000090.tar").write_text("x")
    (tmp_path / "checkpoint-00000091").write_text("x")
    (tmp_path / "checkpoint-00000092").mkdir()
    (tmp_path / "checkpoint-00000093").symlink_to(tmp_path / "checkpoint-00000001")
    (tmp_path / "checkpoint-00000094").symlink_to(tmp_path / "nowhere")
    other = tmp_path / "checkpoint-00000095"
    other.mkdir()
    (other / "manifest.json").write_text('{"format": "another/1"}')
    draft = tmp_path / ".checkpoint-00000007"
    draft.mkdir()
    (draft / "learner.safetensors").write_text("")
    foreign = tmp_path / ".checkpoint-00000008"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    before = set(names(tmp_path)) - {draft.name, "checkpoint-00000001"}
    assert checkpoint.checkpoints(tmp_path) == [tmp_path / "checkpoint-00000001"]
    for step in (2, 3, 100_000_000):
        save(tmp_path, step, keep=2)
    found = [p.name for p in checkpoint.checkpoints(tmp_path)]
    assert found == ["checkpoint-00000003", "checkpoint-100000000"]
    assert set(names(tmp_path)) == before | set(found)
    assert checkpoint.newest(tmp_path).name == "checkpoint-100000000"


@pytest.mark.parametrize("kind", ["file", "link", "folder", "damaged"])
def test_what_is_in_the_way_gets_another_name(tmp_path, kind):
    path = tmp_path / "checkpoint-00000005"
    if kind == "file":
        path.write_text("x")
    elif kind == "link":
        path.symlink_to(tmp_path / "nowhere")
    elif kind == "folder":
        path.mkdir()
        (path / "notes").write_text("x")
    else:
        (save(tmp_path, 5) / "state.json").write_text("{}")
    (tmp_path / ".checkpoint-00000005").write_text("a draft's name")
    assert save(tmp_path, 5) == path and checkpoint.load(path, "sft")
    assert {f"{path.name}.aside-1", ".checkpoint-00000005.aside-1"} <= set(names(tmp_path))
    # A whole one stays as it is.
    content = (path / "learner.safetensors").read_bytes()
    save(tmp_path, 5)
    assert (path / "learner.safetensors").read_bytes() == content


def resealed(path: Path, change) -> None:
    """Changes a manifest, with a seal that fits."""
    file = path / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["seal"]
    change(manifest)
    file.write_text(json.dumps(manifest | {"seal": checkpoint._seal(manifest)}))


def rename_file(name: str):
    def change(manifest):
        manifest["files"][name] = manifest["files"].pop("learner.safetensors")

    return change


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""])
def test_files_elsewhere_are_refused(tmp_path, name):
    path = save(tmp_path, 1)
    resealed(path, rename_file(name))
    with pytest.raises(checkpoint.CheckpointError, match="names of files in this folder"):
        checkpoint.load(path, "sft")


def test_links_and_names_of_a_state_are_refused(tmp_path):
    path = save(tmp_path, 1)
    outside = tmp_path / "outside"
    (path / "learner.safetensors").rename(outside)
    (path / "learner.safetensors").symlink_to(outside)
    with pytest.raises(checkpoint.CheckpointError, match=r"learner\.safetensors: missing, or not"):
        checkpoint.load(path, "sft")
    path = save(tmp_path, 2)
    state = json.loads((path / "state.json").read_text())
    state["../../learner"] = state.pop("learner")
    rewrite_state(path, state)
    with pytest.raises(checkpoint.CheckpointError, match=r"state\.json: no states"):
        checkpoint.load(path, "sft")


def rewrite_state(path: Path, state) -> None:
    """Another state.json, with a manifest that fits."""
    (path / "state.json").write_text(json.dumps(state))
    entry = {"bytes": (path / "state.json").stat().st_size}
    entry["sha256"] = checkpoint._digest(path / "state.json")
    resealed(path, lambda manifest: manifest["files"].update({"state.json": entry}))


def mutations(tree, path=()):
    """Every entry of a JSON tree, and what may stand in its place; the deletion is `...`."""
    for key, value in list(tree.items()) if isinstance(tree, dict) else list(enumerate(tree)):
        for other in (..., None, "x", -1, 1.5, True, [], {}, {"tensor": "nowhere"}, [[1]]):
            yield (*path, key), other
        if isinstance(value, dict | list):
            # One of many equal ones (a generator's 624 numbers) stands for the others.
            yield from mutations(value[:3] if isinstance(value, list) else value, (*path, key))


def mutated(tree, path, value):
    copy = json.loads(json.dumps(tree))
    place = copy
    for key in path[:-1]:
        place = place[key]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return copy


def test_every_entry_of_manifest_and_state_may_be_wrong(tmp_path, capsys, monkeypatch):
    """A whole checkpoint of a run, every entry in turn deleted or of another kind."""
    held = {}
    monkeypatch.setattr(loop, "Loop", type("Kept", (loop.Loop,), {}))
    real = loop.Loop.begin

    def begin(self):
        held["trainer"] = self.trainer
        real(self)

    monkeypatch.setattr("rlhf_kernels.trainer.loop.Loop.begin", begin)
    monkeypatch.setattr("rlhf_kernels.trainer.run.Loop", loop.Loop)
    assert train(tmp_path, "--total_steps 2 --save_steps 2") == 0
    path, trainer = checkpoint.newest(tmp_path), held["trainer"]
    manifest = json.loads((path / "manifest.json").read_text())
    del manifest["seal"]
    refused = 0
    for place, value in mutations(manifest):
        changed = mutated(manifest, place, value)
        seal = checkpoint._seal(changed)
        (path / "manifest.json").write_text(json.dumps(changed | {"seal": seal}))
        if changed != manifest:
            with pytest.raises(checkpoint.CheckpointError):
                checkpoint.load(path, "sft")
            refused += 1
        assert checkpoint.newest(tmp_path) in (path, None)
    assert refused > 60
    (path / "manifest.json").write_text(json.dumps(manifest | {"seal": checkpoint._seal(manifest)}))
    state = json.loads((path / "state.json").read_text())
    whole, refused = checkpoint.load(path, "sft"), 0
    # The files are whole: only what is said of them changes.
    tensors = {n: checkpoint.load_file(path / f"{n}.safetensors") for n in state}
    monkeypatch.setattr(checkpoint, "_verified", lambda _: manifest)
    monkeypatch.setattr(checkpoint, "load_file", lambda file: tensors[file.stem])
    for place, value in mutations(state):
        (path / "state.json").write_text(json.dumps(mutated(state, place, value)))
        try:
            states = checkpoint.load(path, "sft")
            resume.check_same(path, states.get("run"), whole["run"], changed=False, say=print)
            resume.put(path, states, trainer, new_data=())
        except UserError as error:
            assert path.name in str(error)
            refused += 1
    assert refused > 300
    resume.put(path, whole, trainer, new_data=())


# --- the folder ----------------------------------------------------------------------------------


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
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=120
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


# --- interrupts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("moment", ["before", "save", "twice", "after", "finish"])
def test_an_interrupt_at_any_moment_is_a_line(
    request, tmp_path, capsys, monkeypatch, number, moment
):
    # Under nohup it is ignored, by the run too.
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    request.addfinalizer(lambda: signal.signal(signal.SIGHUP, hangup))
    out, calls = tmp_path / "out", [0]

    def interrupted(function, when, count=1):
        def wrapper(*args, **kwargs):
            calls[0] += 1
            if calls[0] == when:
                for _ in range(count):
                    signal.raise_signal(number)
            return function(*args, **kwargs)

        return wrapper

    target = {
        "before": (OfflineTrainer, "evaluate", 1, 1),
        "save": (checkpoint, "save_file", 2, 1),
        "twice": (checkpoint, "save_file", 2, 2),
        "after": (OfflineTrainer, "evaluate", 2, 1),
        "finish": (folder, "sync_files", 1, 1),
    }[moment]
    owner, name, when, count = target
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    flags = "--total_steps 3" + (" --save_steps 2" if count == 2 or moment == "save" else "")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted(getattr(owner, name), when, count))
        with pytest.raises(SystemExit) as stop:
            train(out, flags)
    assert stop.value.code == 130
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == handlers
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err and captured.out.count("interrupted; ") == 1
    assert not [n for n in names(out) if n.startswith(".")] and not (out / "policy").exists()
    # What comes while a checkpoint is written waits for it, and for a step.
    expected = {"save": [2, 3], "after": [3], "finish": [3]}.get(moment, [])
    assert [checkpoint.step_of(p) for p in checkpoint.checkpoints(out)] == expected
    for path in checkpoint.checkpoints(out):
        checkpoint.load(path, "sft")
    assert not expected or f"--resume continues from step {expected[-1]}" in captured.out
    assert train(out, f"{flags} --resume") == 0
    whole = tmp_path / "whole"
    assert train(whole, "--total_steps 3") == 0
    paths = [p / "policy" / "model.safetensors" for p in (out, whole)]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_signals_are_patient_only_where_they_are_told_to():
    found = Interrupts()
    with found.waiting():
        found.note()
        assert found.seen == 1
        with pytest.raises(Interrupted):
            found.note()
    with pytest.raises(Interrupted) as stop:
        found.note()
    assert stop.value.code == 130
    with contextlib.suppress(Interrupted), interrupts():
        signal.raise_signal(signal.SIGTERM)


def test_states_of_other_forms_are_refused(tmp_path):
    path = save(tmp_path, 1)
    save_file({"other": torch.zeros(2)}, path / "learner.safetensors")
    with pytest.raises(checkpoint.CheckpointError, match=r"learner\.safetensors: expected"):
        checkpoint.load(path, "sft")
