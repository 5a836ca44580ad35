"""The end of a run: what it leaves where its report cannot be told, and what it says of itself."""

import datetime
import decimal
import json
import math
import os
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator

from tests.trainer.resume_cases import names, told, train
from tests.trainer.trainer_tools import one_thread, write_jsonl  # noqa: F401

from rlhf_kernels.trainer import answers, report
from rlhf_kernels.trainer.learner import Learner
from rlhf_kernels.trainer.stage import Stage

WHOLE = ["curves.png", "metrics.jsonl", "policy", "summary.json"]
SMALL = (
    "--device cpu --threads 1 --hidden_size 16 --num_layers 1 --num_heads 2 --batch_size 8 "
    "--eval_size 8 --max_operand 9 --total_steps 2"
)


def test_models_are_saved_before_anything_is_told(tmp_path, capsys, monkeypatch):
    say = Stage.say

    def unread(self, text):
        if "held-out rows  " in text:
            raise BrokenPipeError(32, "Broken pipe")
        say(self, text)

    monkeypatch.setattr(Stage, "say", unread)
    assert train(tmp_path / "out", "--total_steps 2") == 2
    assert "nobody reads it any more; what the output folder has is whole" in told(capsys)
    assert names(tmp_path / "out") == WHOLE


@pytest.mark.parametrize("name", ("curves.png", "summary.json"))
def test_a_report_that_cannot_be_written_costs_no_step(tmp_path, capsys, name):
    (tmp_path / name).mkdir()
    assert train(tmp_path, "--total_steps 2") == 2
    line = told(capsys)
    assert "cannot be written" in line and line.endswith("--resume continues from step 2")
    (tmp_path / name).rmdir()
    assert train(tmp_path, "--total_steps 2 --resume") == 0
    assert set(names(tmp_path)) == {*WHOLE, "checkpoint-00000002"}


@pytest.mark.parametrize("encoding", ("ascii", "latin-1"))
def test_texts_that_the_terminal_has_no_characters_for(tmp_path, encoding):
    rows = [{"prompt": f"é世🙂 {i}", "answer": "世"} for i in range(24)]
    data, code = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "rewards.py"
    code.write_text(
        "def score(completions, **_):\n    return [1.0 * len(c) for c in completions]\n"
    )
    more = f"--data {data} --vocab_size 300 --reward_funcs {code}:score --max_new_tokens 3"
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_kernels.cli", "train", "grpo", *SMALL.split(), *more.split(),
         "--sft_steps", "0", "--output_dir", out],
        capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"\\u4e16" in done.stdout and names(out) == WHOLE


def test_columns_that_json_has_no_form_for(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    day = datetime.date(2026, 11, 30)
    cells = {"decimal": decimal.Decimal("1.50"), "date": day, "number": math.nan, "bytes": b"\xff"}
    code = tmp_path / "rewards.py"
    code.write_text(
        "def score(completions, **_):\n    return [1.0 * len(c) for c in completions]\n"
    )
    for name, cell in cells.items():
        table = pyarrow.table({"prompt": [f"a {i}" for i in range(24)], "answer": [cell] * 24})
        parquet.write_table(table, tmp_path / f"{name}.parquet")
        out = tmp_path / name
        more = f"--data {tmp_path / name}.parquet --vocab_size 300 --max_new_tokens 3"
        assert train(out, f"{more} --reward_funcs {code}:score --total_steps 1", "grpo") == 0
        summary = json.loads((out / "summary.json").read_text(), parse_constant=pytest.fail)
        answer = summary["samples"][0]["answer"]
        assert answer == (None if name == "number" else str(cell)), name


def test_a_reward_function_that_raises_loses_no_step(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards_that_raise.py").write_text(
        "import os\n"
        "calls = []\n"
        "def score(completions, trainer_state, **_):\n"
        "    if trainer_state.global_step == 2 and not os.path.exists('mended'):\n"
        "        raise RuntimeError('no server')\n"
        "    return [1.0 * len(c) for c in completions]\n"
    )
    flags = "--reward_funcs rewards_that_raise:score --max_new_tokens 3 --total_steps 4"
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert train(out, flags, "grpo") == 2
    line = told(capsys)
    assert "no server" in line and line.endswith("--resume continues from step 2")
    (tmp_path / "mended").touch()
    assert train(out, f"{flags} --resume", "grpo") == 0
    assert train(whole, flags, "grpo") == 0
    weights = [p / "policy" / "model.safetensors" for p in (out, whole)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize("updates", (1, 2))
def test_an_error_of_ours_or_of_memory_loses_no_finished_step(
    tmp_path, capsys, monkeypatch, updates
):
    flags = "--total_steps 4 --max_new_tokens 3"
    flags += f" --mini_batch_size {8 // updates}"
    out, whole = tmp_path / "out", tmp_path / "whole"
    assert train(whole, flags, "grpo") == 0
    step, calls = Learner.step, []

    def failing(self, number, **options):
        calls.append(number)
        # In the third step, before its first update.
        if len(calls) == 2 * updates + 1:
            raise torch.OutOfMemoryError("none left")
        return step(self, number, **options)

    monkeypatch.setattr(Learner, "step", failing)
    capsys.readouterr()
    assert train(out, flags, "grpo") == 2
    text = capsys.readouterr().err
    assert "--resume continues from step 2" in text and "out of memory; try" in text
    assert train(out, f"{flags} --resume", "grpo") == 0
    weights = [p / "policy" / "model.safetensors" for p in (out, whole)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_weights_within_a_step_are_not_saved_as_its_beginning(tmp_path, capsys, monkeypatch):
    flags = "--total_steps 4 --max_new_tokens 3 --mini_batch_size 4"
    step, calls = Learner.step, []

    def failing(self, number, **options):
        calls.append(number)
        # In the third step, after its first update.
        if len(calls) == 6:
            raise torch.OutOfMemoryError("none left")
        return step(self, number, **options)

    monkeypatch.setattr(Learner, "step", failing)
    assert train(tmp_path, flags, "grpo") == 2
    assert "out of memory; try" in told(capsys) and names(tmp_path) == ["metrics.jsonl"]


def test_an_unexpected_error_at_the_end_leaves_a_checkpoint(tmp_path, capsys, monkeypatch):
    def failing(*_):
        raise KeyError("a fault of ours")

    monkeypatch.setattr(report, "plot_curves", failing)
    assert train(tmp_path, "--total_steps 2") == 1
    text = capsys.readouterr().err
    assert "--resume continues from step 2" in text and "a fault of ours" in text
    monkeypatch.undo()
    assert train(tmp_path, "--total_steps 2 --resume") == 0
    assert set(names(tmp_path)) == {*WHOLE, "checkpoint-00000002"}


def test_a_final_evaluation_that_fails_is_begun_anew(tmp_path, capsys, monkeypatch):
    """With the same random numbers, as that of a run that did not fail."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "drawn_rewards.py").write_text(
        "import os, random\n"
        "def score(completions, trainer_state, **_):\n"
        "    drawn = [random.random() for _ in completions]\n"
        "    if trainer_state.global_step == 2 and os.path.exists('broken'):\n"
        "        raise RuntimeError('no server')\n"
        "    return drawn\n"
    )
    flags = "--reward_funcs drawn_rewards:score --max_new_tokens 3 --total_steps 2"
    (tmp_path / "broken").touch()
    assert train(tmp_path / "out", flags, "grpo") == 2
    assert told(capsys).endswith("; --resume continues from step 2")
    (tmp_path / "broken").unlink()
    assert train(tmp_path / "out", f"{flags} --resume", "grpo") == 0
    assert train(tmp_path / "whole", flags, "grpo") == 0
    one, two = (
        json.loads((tmp_path / out / "summary.json").read_text()) for out in ("out", "whole")
    )
    for key in ("held_out_before", "held_out_after", "samples"):
        assert one[key] == two[key]


@pytest.mark.parametrize("place", ("step", "end"))
def test_a_keyboard_interrupt_of_a_function_loses_no_step(tmp_path, capsys, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    # In the third step of four, or after the last one.
    (tmp_path / f"{place}_rewards.py").write_text(
        "import os\n"
        "def score(completions, trainer_state, **_):\n"
        f"    wanted = {2 if place == 'step' else 4}\n"
        "    if trainer_state.global_step == wanted and os.path.exists('pressed'):\n"
        "        raise KeyboardInterrupt\n"
        "    return [1.0 * len(c) for c in completions]\n"
    )
    flags = f"--reward_funcs {place}_rewards:score --max_new_tokens 3 --total_steps 4"
    (tmp_path / "pressed").touch()
    assert train(tmp_path / "out", flags, "grpo") == 130
    said = "--resume continues from step " + ("2" if place == "step" else "4")
    assert said in capsys.readouterr().err
    (tmp_path / "pressed").unlink()
    assert train(tmp_path / "out", f"{flags} --resume", "grpo") == 0
    assert train(tmp_path / "whole", flags, "grpo") == 0
    weights = [tmp_path / out / "policy" / "model.safetensors" for out in ("out", "whole")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_tracker_that_fails_loses_no_step(tmp_path, capsys, monkeypatch):
    log = Accelerator.log

    def failing(self, values, step, **options):
        if step == 2:
            raise ConnectionError("tracker down")
        return log(self, values, step=step, **options)

    monkeypatch.setattr(Accelerator, "log", failing)
    assert train(tmp_path, "--total_steps 4") == 2
    line = told(capsys)
    assert "report_to: step 2 is not logged: ConnectionError: tracker down" in line
    assert line.endswith("--resume continues from step 3")
    monkeypatch.undo()
    assert train(tmp_path, "--total_steps 4 --resume") == 0


def test_an_update_passed_over_is_counted_once(tmp_path, capsys, monkeypatch):
    """Where the step that passed it over failed later and is taken again."""
    flags = "--total_steps 4 --max_new_tokens 3 --mini_batch_size 4 --skip_nonfinite 1"
    pick, calls, broken = Learner._not_finite, [], [True]

    def not_finite(self, norms):
        calls.append(1)
        found = pick(self, norms)
        # In the third step the first update is not finite, whenever it is taken.
        return "loss" if len(calls) == 5 else found

    step, steps = Learner.step, []

    def failing(self, number, **options):
        steps.append(1)
        if len(steps) == 6 and broken[0]:
            raise torch.OutOfMemoryError("none left")
        return step(self, number, **options)

    monkeypatch.setattr(Learner, "_not_finite", not_finite)
    monkeypatch.setattr(Learner, "_explain", lambda self, what: what)
    monkeypatch.setattr(Learner, "step", failing)
    assert train(tmp_path, flags, "grpo") == 2
    assert "--resume continues from step 2" in capsys.readouterr().err
    broken[0] = False
    calls[:] = [1] * 4
    assert train(tmp_path, f"{flags} --resume", "grpo") == 0


# Answers of rows of their own: a text, a number, none, a conversation's.
@pytest.mark.parametrize("answer", ["42", 42, None])
def test_answers_that_the_built_in_rewards_cannot_read(tmp_path, capsys, answer):
    rows = [{"prompt": f"a {i}", "answer": "#### 1" if i < 20 else answer} for i in range(24)]
    data, code = write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path / "lengths.py"
    code.write_text(
        "def score(completions, **_):\n    return [1.0 * len(c) for c in completions]\n"
    )
    flags = f"--data {data} --vocab_size 300 --max_new_tokens 3 --total_steps 2 --sft_steps 0"
    assert train(tmp_path / "out", flags, "grpo") == 2
    line = told(capsys)
    assert "reward_funcs: expected one: the built-in rewards need an 'answer' that ends in" in line
    assert "rows.jsonl:2" in line
    assert train(tmp_path / "out", f"{flags} --reward_funcs {code}:score", "grpo") == 0
    # Distillation learns from no reward.
    teacher = tmp_path / "out" / "policy"
    more = f"{flags} --model {teacher} --teacher_model {teacher}"
    assert train(tmp_path / "distilled", more, "distill") == 0
    assert (
        "ended"
        in json.loads((tmp_path / "distilled" / "summary.json").read_text())["held_out_after"]
    )


def test_built_in_rewards_read_conversations():
    said = ["it is #### 4", "it is 4", "#### 5"]
    for form in (said, [[{"role": "assistant", "content": text}] for text in said]):
        given = {"answer": ["so\n#### 4"] * 3, "finished": [True] * 3}
        assert answers.answer_correct(form, **given) == [1.0, 0.0, 0.0]
        assert answers.answer_format(form, given["finished"]) == [1.0, 0.0, 1.0]
        assert answers.exact_match(form, ["it is 4"] * 3, given["finished"]) == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--learning_rate 1e-30", "no weight has changed in 2 steps"),
        ("--max_grad_norm 1e-37 --weight_decay 0", "no weight has changed in 2 steps"),
        ("--dtype bfloat16", "trained weights of 16 bits: an update below 0.004 of a weight"),
        ("--warmup_steps 8", "warmup_steps 8 are more than total_steps 2"),
        ("", None),
    ],
)
def test_what_cannot_train_is_said(tmp_path, capsys, flags, said):
    assert train(tmp_path, f"--total_steps 2 {flags}") == 0
    text = capsys.readouterr().out
    if said is not None:
        assert said in text
    else:
        assert "no weight" not in text and "16 bits" not in text and "warmup" not in text


@pytest.mark.parametrize("named", ("module://matplotlib_inline.backend_inline", "none such"))
def test_a_notebooks_backend_is_not_looked_for(named):
    code = f"import os, rlhf_kernels.trainer.report; assert os.environ['MPLBACKEND'] == {named!r}"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"MPLBACKEND": named})


def test_finite():
    value = {1: [math.nan, 2.0, (math.inf, "NaN")], "b": None}
    assert report.finite(value) == {"1": [None, 2.0, [None, "NaN"]], "b": None}
