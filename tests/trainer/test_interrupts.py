"""Runs that are told to end: signals at every moment."""

import contextlib
import signal

import pytest

from tests.trainer.resume_cases import names, train
from tests.trainer.trainer_tools import one_thread, rows_without_times, write_jsonl  # noqa: F401

from rlhf_kernels.trainer import checkpoint, folder
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
