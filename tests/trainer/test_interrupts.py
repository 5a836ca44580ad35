"""Runs that are told to end: signals at every moment."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.trainer.resume_cases import names, train
from tests.trainer.trainer_tools import one_thread, rows_without_times, write_jsonl  # noqa: F401

from rlhf_kernels.trainer import checkpoint, folder
from rlhf_kernels.trainer.config import UserError
from rlhf_kernels.trainer.interrupts import Interrupted, Interrupts, interrupts
from rlhf_kernels.trainer.offline import OfflineTrainer


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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_process_that_a_reward_function_forks_dies_of_signals(request, number):
    """A limit of time for code that is run, as its parent waits for the end of it."""
    # Who started the tests may ignore it, as nohup does SIGHUP.
    before = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
    started = signal.signal(number, before)
    request.addfinalizer(lambda: signal.signal(number, started))
    with interrupts() as state, state.waiting():
        ready, writes = os.pipe()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(KeyboardInterrupt):
                os.write(writes, b"1")
                for _ in range(3000):
                    time.sleep(0.01)
                os._exit(9)
            os._exit(7)
        os.read(ready, 1)
        os.kill(child, number)
        _, status = os.waitpid(child, 0)
        assert state.seen == 0
    ended = os.waitstatus_to_exitcode(status)
    assert ended == (7 if before is signal.default_int_handler else -number)
    assert signal.getsignal(number) is before


KILLED = """
import os, pathlib, signal, sys, time
import accelerate
from rlhf_kernels.trainer import folder
with folder.opened(pathlib.Path(sys.argv[1]), accelerate.Accelerator(cpu=True)):
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(100)
        os._exit(0)
    sys.stdin.readline()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_that_outlives_a_killed_run_does_not_hold_its_folder(tmp_path):
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    run = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    helper = int(run.stdout.readline())
    try:
        # The helper has not let go the lock of the run.
        with pytest.raises(UserError, match=rf"another run \(process {run.pid} on"):
            folder._lock(tmp_path)
        run.stdin.write(b"\n")
        run.stdin.flush()
        # Not to the end of its output, which the helper holds open.
        assert run.wait() == -signal.SIGKILL
        os.kill(helper, 0)
        os.close(folder._lock(tmp_path))
    finally:
        os.kill(helper, signal.SIGKILL)
        run.stdin.close()
        run.stdout.close()
