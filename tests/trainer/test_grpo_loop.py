"""examples/grpo_loop.py, which users copy: run short, and what it samples and trains on."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.trainer.trainer_tools import one_thread  # noqa: F401

import rlhf_kernels as rk

FILE = Path(__file__).parents[2] / "examples" / "grpo_loop.py"
SHORT = ["--prompts", "4", "--group", "4"]


@pytest.fixture
def loop(one_thread):  # noqa: F811
    """The names of the file. Its random seeds are not those of the tests that follow."""
    with torch.random.fork_rng():
        yield SimpleNamespace(**runpy.run_path(str(FILE)))


def test_stays_one_readable_file():
    assert len(FILE.read_text().splitlines()) <= 120


def test_labels_are_trained_on_up_to_the_first_end_token(loop):
    torch.manual_seed(0)
    model, tokenizer = loop.small_model()
    texts = ["1+2=", "+", "3+4="] * 20
    ids, attention, mask = loop.sample(model, tokenizer, texts, 4)
    start = ids.shape[1] - 4
    for text, row, read, kept in zip(texts, ids.tolist(), attention, mask, strict=True):
        answer = row[start:]
        length = answer.index(1) + 1 if 1 in answer else 4
        assert kept.tolist() == [0 <= j < length for j in range(1 - start, 4)]
        assert read.sum() == len(text) + length
        assert read[start - len(text) :].sum() == read.sum()
    lengths = mask.sum(1)
    assert lengths.min() < 4 and lengths.max() == 4


def test_first_update_of_a_rollout_has_ratio_one_and_the_second_has_not(loop, monkeypatch):
    seen = []

    def recorded(*args, **options):
        result = original(*args, **options)
        seen.append(result.metrics.as_dict())
        return result

    original = rk.linear_policy_loss
    monkeypatch.setattr(rk, "linear_policy_loss", recorded)
    curve = loop.main([*SHORT, "--steps", "8"])
    assert len(curve) == 8 and all(0 <= value <= 1 for value in curve)
    first, second = seen[::2], seen[1::2]
    assert all(m["ratio_min"] == m["ratio_max"] == 1 for m in first)
    assert any(m["ratio_max"] > 1 for m in second)


def test_takes_a_model_from_a_path(loop, tmp_path, capsys):
    model, tokenizer = loop.small_model()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loop.main([*SHORT, "--steps", "1", "--updates", "1", "--model", str(tmp_path)])
    assert "step    0  reward" in capsys.readouterr().out


@pytest.mark.slow
def test_reward_rises(loop):
    curve = loop.main([])
    assert sum(curve[:5]) / 5 < 0.1 and sum(curve[-10:]) / 10 > 0.8
