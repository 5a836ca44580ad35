"""The trainer's report and its command line."""

import importlib.util
import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.trainer.trainer_tools import (
    CPU,
    one_thread,  # noqa: F401
    online_trainer,
    tiny_policy,
    tiny_task,
    write_jsonl,
)

from rlhf_kernels import cli
from rlhf_kernels.trainer import answers, models, rewards, timing
from rlhf_kernels.trainer.algorithms import ALGORITHMS
from rlhf_kernels.trainer.config import (
    DataConfig,
    ModelConfig,
    OptimConfig,
    PPOConfig,
    RunConfig,
    parse_config,
)
from rlhf_kernels.trainer.optimizer import rate_factor
from rlhf_kernels.trainer.report import MetricsLog, table
from rlhf_kernels.trainer.stage import OFFLINE

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_stopwatch_adds_up_and_starts_anew(monkeypatch):
    now = 100.0

    def work(seconds, result):
        nonlocal now
        now += seconds
        return result

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    watch = timing.Stopwatch()
    assert watch(work, 0.5, result=3) == 3
    now += 8.0
    watch(work, 0.25, None)
    assert watch.seconds() == 0.75 and watch.seconds() == 0


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0, {0: 1.0, 7: 1.0}),
        ("constant", 4, {0: 0.25, 1: 0.5, 3: 1.0, 7: 1.0}),
        ("linear", 0, {0: 1.0, 1: 0.875, 7: 0.125}),
        ("linear", 4, {0: 0.25, 1: 0.4375, 3: 0.625, 7: 0.125}),
        ("cosine", 4, {0: 0.25, 2: 0.64016504, 4: 0.5, 7: 0.03806023}),
    ],
)
def test_rates_rise_and_fall_from_the_first_step_to_the_last(schedule, warmup, expected):
    config = OptimConfig(total_steps=8, warmup_steps=warmup, lr_schedule=schedule)
    found = {step: rate_factor(config, step) for step in expected}
    assert found == pytest.approx(expected, rel=1e-7)


def test_table():
    text = table(("a", "long"), [(1, "x\ny"), ("zz", "w" * 100)])
    lines = text.splitlines()
    assert lines[:3] == ["a   long", "--  " + "-" * 48, "1   x\\ny"]
    assert lines[3].endswith("…") and len(lines[3]) == 52


def test_log_continues_without_later_or_broken_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0, "x": 1}\n{"step": 1, "x": 2}\n{"step": 2, "x')
    log = MetricsLog(path, steps_done=1)
    log.write({"step": 1, "x": 3})
    assert [json.loads(line) for line in path.read_text().splitlines()] == log.rows
    assert [row["x"] for row in log.rows] == [1, 3]


def test_evaluate_weighs_a_short_last_batch():
    trainer = online_trainer("ppo", batch_size=8)
    task = trainer.sample.task
    last = task.held_out[-1].prompt

    def is_last(prompts, completions, completion_ids, **columns):
        return [float(p == last) for p in prompts]

    trainer.sample.rewards = rewards.Rewards([is_last], [1.0])
    trainer.sample.task = type(task)(task.name, task.tokenizer, task.train, task.held_out[-9:])
    found = trainer.evaluate()
    assert found["scores"] == {"is_last": pytest.approx(1 / 9)}
    assert len(found["texts"]) == 9


# --- command line ----------------------------------------------------------------------------


def test_flags_win_over_yaml_and_yaml_over_the_algorithms_defaults(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "learning_rate: 1e-4\nepochs: 3\nsave_model: false\nreward_funcs: [a:b, c:d]\nkl_coef: 1\n"
        "data: null\n"
    )
    classes = (RunConfig, ModelConfig, DataConfig, OptimConfig, PPOConfig)
    argv = ["--config", str(path), "--epochs", "5", "--batch-size", "256"]
    defaults = {"epochs": 2, "num_generations": 8}
    run, _, data, optim, online = parse_config(classes, argv, prog="test", defaults=defaults)
    assert (optim.learning_rate, online.epochs, optim.batch_size) == (1e-4, 5, 256)
    assert online.num_generations == 8
    assert isinstance(online.kl_coef, float) and online.kl_coef == 1.0
    assert online.reward_funcs == ["a:b", "c:d"] and data.data is None
    assert run.save_model is False


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda p: p.stem)
def test_settings_of_the_examples(path):
    classes = (RunConfig, ModelConfig, DataConfig, OptimConfig, PPOConfig)
    run, *_ = parse_config(classes, ["--config", str(path)], prog="test", defaults={})
    assert run.output_dir == f"runs/{path.stem}"


@pytest.mark.parametrize("text", ["learning_rat: 1e-4", "ppo: {epochs: 3}", "- epochs"])
def test_bad_yaml_is_refused(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"learning_rat|mapping"):
        parse_config((OptimConfig,), ["--config", str(path)], prog="test", defaults={})


def test_bad_values_are_refused():
    with pytest.raises(ValueError, match="lr_schedule"):
        OptimConfig(lr_schedule="exponential")
    with pytest.raises(ValueError, match="operators"):
        DataConfig(operators="*")
    with pytest.raises(ValueError, match="reward_weights: expected 1 numbers, found 2"):
        rewards.load_rewards(
            [], [1.0, 2.0], default=[answers.exact_match], config=ModelConfig(), device=CPU
        )
    with pytest.raises(ValueError, match="max_prompt_tokens"):
        tiny_task(max_prompt_tokens=2)


def test_cli_usage(capsys):
    assert cli.main([]) == 2
    assert cli.main(["train", "unknown"]) == 2
    assert "reinforce++" in capsys.readouterr().err
    assert cli.main(["--help"]) == 0


def test_cli_knows_every_stage():
    assert cli.TRAINERS.keys() == ALGORITHMS.keys() | OFFLINE.keys()


def test_dry_run_tells_and_trains_nothing(tmp_path, capsys):
    flags = ["--output_dir", str(tmp_path / "out"), "--dry_run", "--batch_size", "64"]
    assert cli.main(["train", "grpo", *flags, "--device", "cpu", "--threads", "1"]) == 0
    text = capsys.readouterr().out
    policy = models.build_policy(ModelConfig(), tiny_task().tokenizer, max_length=264)
    weights = sum(p.numel() for p in policy.parameters())
    assert f"policy of {weights:,} weights" in text and "MiB" in text and "100 steps" in text
    settings = json.loads(text[text.index("\n{") :])
    assert settings["num_generations"] == 8 and settings["kl_coef"] == 0.04
    assert list((tmp_path / "out").iterdir()) == []


def test_cli_trains_on_a_file_and_continues_from_its_model(tmp_path):
    rows = [
        {"question": f"Ann has {i} nuts and finds {j}.", "answer": f"{i}+{j}={i + j}\n#### {i + j}"}
        for i in range(9)
        for j in range(9)
    ]
    data, config = write_jsonl(tmp_path / "nuts.jsonl", rows), tmp_path / "c.yaml"
    config.write_text(
        f"data: {data}\nvocab_size: 300\nhidden_size: 32\nnum_heads: 2\nmax_new_tokens: 24\n"
        "eval_size: 16\nsft_steps: 2\nsft_batch_size: 16\nbatch_size: 16\nmini_batch_size: 8\n"
        "total_steps: 5\nthreads: 1\n"
    )
    out = tmp_path / "out"
    flags = ["--config", str(config), "--output_dir", str(out), "--total_steps", "2"]
    if importlib.util.find_spec("tensorboard"):
        flags += ["--report_to", "tensorboard"]
    assert cli.main(["train", "ppo", *flags]) == 0

    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [0, 1]
    assert {"reward/answer_format", "reward/answer_correct", "kl", "entropy"} <= log[0].keys()
    if importlib.util.find_spec("tensorboard"):
        assert list(out.rglob("events.out.tfevents.*"))
    summary = json.loads((out / "summary.json").read_text())
    assert summary["config"]["total_steps"] == 2
    assert summary["held_out_after"].keys() == {"answer_format", "answer_correct"}
    seconds = summary["seconds_per_step"]
    assert 0 < seconds["kernels"] < seconds["evaluate"] + seconds["update"]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert 256 < len(AutoTokenizer.from_pretrained(out / "policy")) <= 300
    critic = AutoModelForSequenceClassification.from_pretrained(out / "critic")
    assert critic.score.weight.shape == (1, 32)

    again = tmp_path / "again"
    flags = ["--config", str(config), "--output_dir", str(again), "--model", str(out / "policy")]
    flags += ["--sft_steps", "0", "--total_steps", "1"]
    assert cli.main(["train", "ppo", *flags]) == 0
    resumed = json.loads((again / "summary.json").read_text())
    was, now = summary["samples"][:4], resumed["samples"][:4]
    assert [s["after"] for s in was] == [s["before"] for s in now]
    assert AutoModelForCausalLM.from_pretrained(again / "policy").config.vocab_size <= 300


def test_distillation_from_a_path(tmp_path, capsys):
    """The teacher stays what its folder holds, no reward is needed, and a run continues."""
    task = tiny_task()
    teacher = tiny_policy(task, seed=3)
    for name, model in (("teacher", teacher), ("student", tiny_policy(task))):
        model.save_pretrained(tmp_path / name)
        task.tokenizer.save_pretrained(tmp_path / name)
    data = write_jsonl(tmp_path / "sums.jsonl", [{"prompt": f"{i}+{i}="} for i in range(40)])
    flags = ["--model", str(tmp_path / "student"), "--data", data, "--eval_size", "4"]
    flags += ["--batch_size", "8", "--threads", "1", "--device", "cpu", "--save_steps", "1"]
    taught = ["--teacher_model", str(tmp_path / "teacher")]

    def run(name, *more):
        out = ["--output_dir", str(tmp_path / name), *more]
        assert cli.main(["train", "distill", *flags, *out]) == 0
        return (tmp_path / name / "policy" / "model.safetensors").read_bytes()

    whole = run("whole", *taught, "--total_steps", "3")
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["held_out_after"].keys() == {"ended"}
    log = [json.loads(x) for x in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["kl"] > 0 and row["policy/grad_norm"] > 0 for row in log)
    earlier = ("--total_steps", "3", "--resume_from", "checkpoint-00000002")
    assert run("whole", *taught, *earlier) == whole
    capsys.readouterr()
    for words, args in (
        ("teacher_model: expected a path or hub name, found None", ["distill", *flags]),
        ("teacher_model: expected no value with grpo", ["grpo", *flags, *taught]),
        ("kl_coef: expected > 0 with distill", ["distill", *flags, *taught, "--kl_coef", "0"]),
        ("teacher_model: expected a folder", ["distill", *flags, "--teacher_model", "./none"]),
    ):
        assert cli.main(["train", *args, "--output_dir", str(tmp_path / "wrong")]) == 2
        assert words in capsys.readouterr().err


def test_what_a_run_on_conversations_shows(tmp_path, capsys):
    """Conversations as text, the answer that was scored, and what to do next."""
    task = tiny_task()
    task.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    model = tmp_path / "model"
    tiny_policy(task).save_pretrained(model)
    task.tokenizer.save_pretrained(model)
    rows = [
        {"prompt": [{"role": "user", "content": f"{i}+{j}="}], "answer": f"{i + j}"}
        for i in range(6)
        for j in range(6)
    ]
    (tmp_path / "score.py").write_text(
        "def score(completions, answer, **_):\n    return [float(len(a)) for a in answer]\n"
    )
    flags = ["--model", str(model), "--data", str(write_jsonl(tmp_path / "sums.jsonl", rows))]
    flags += ["--eval_size", "4", "--batch_size", "8", "--num_generations", "2"]
    flags += ["--total_steps", "1", "--num_samples", "3", "--threads", "1", "--device", "cpu"]
    flags += ["--reward_funcs", f"{tmp_path / 'score.py'}:score"]
    out = tmp_path / "out"
    assert cli.main(["train", "dr_grpo", *flags, "--output_dir", str(out)]) == 0
    text, samples = capsys.readouterr().out, json.loads((out / "summary.json").read_text())
    header, _, *shown = next(
        part for part in text.split("\n\n") if part.lstrip().startswith("prompt")
    ).splitlines()
    assert header.split()[:2] == ["prompt", "answer"] and len(shown) == 3
    for line, sample in zip(shown, samples["samples"], strict=True):
        ((message),) = sample["prompt"]
        first, second = message["content"].rstrip("=").split("+")
        answer = str(int(first) + int(second))
        assert line.split()[:3] == ["user:", message["content"], answer]
        assert sample["answer"] == answer
    assert "'role'" not in text and '"kl_coef"' not in text
    assert f"rlhf-kernels train STAGE --model {out / 'policy'}" in text


def test_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr(cli, "MODULE", "no_such_package.run")
    assert cli.main(["train", "ppo"]) == 2
    assert "rlhf_kernels[trainer]" in capsys.readouterr().err
