"""The minimal trainer: data, rewards, generation, the PPO step and the command line."""

# ruff: noqa: E402 - the imports need the packages that are looked for first.

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

_NEEDED = ("transformers", "tokenizers", "matplotlib", "yaml", "tqdm")
for _name in _NEEDED:
    if importlib.util.find_spec(_name) is None:
        pytest.skip(f"needs rlhf_kernels[trainer]: no {_name}", allow_module_level=True)

from transformers import (
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    GPT2Config,
)

import rlhf_kernels as rk
from rlhf_kernels import cli
from rlhf_kernels.trainer import rewards
from rlhf_kernels.trainer.config import (
    DataConfig,
    ModelConfig,
    PPOConfig,
    RunConfig,
    SFTConfig,
    parse_config,
)
from rlhf_kernels.trainer.data import (
    Problem,
    Sampler,
    Task,
    bpe_tokenizer,
    character_tokenizer,
    encode_prompts,
    load_task,
    pad,
    position_ids,
    read_jsonl,
    supervised_batch,
)
from rlhf_kernels.trainer.generation import generate
from rlhf_kernels.trainer.models import (
    build_critic,
    build_policy,
    completion_labels,
    completion_logits,
    completion_values,
)
from rlhf_kernels.trainer.ppo import PPOTrainer, sample_completions
from rlhf_kernels.trainer.report import table, time_kernels
from rlhf_kernels.trainer.run import evaluate
from rlhf_kernels.trainer.sft import sft_steps

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k_train.jsonl"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    # Threads cost more than they bring on models of this size.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_task(**options) -> Task:
    return load_task(DataConfig(max_operand=30, eval_size=64, **options), seed=0)


def tiny_policy(task: Task, seed: int = 0):
    torch.manual_seed(seed)
    return build_policy(
        ModelConfig(hidden_size=32, num_layers=2, num_heads=2), task.tokenizer, max_length=64
    )


# --- rewards ---------------------------------------------------------------------------------


def test_final_number():
    assert rewards.final_number("so\n#### 1,234") == 1234
    assert rewards.final_number("#### -3.50\n") == rewards.final_number("####-3.5")
    assert rewards.final_number("#### $12") == 12
    for text in ("12", "#### ", "#### 12 apples", "#### 12\nmore", "#### 12 #### x", "#### 1\n2"):
        assert rewards.final_number(text) is None, text


def test_reward_functions_need_the_end():
    texts = ["46", " 46", "47", "46"]
    given = {"prompts": ["12+34="] * 4, "completions": texts, "completion_ids": [[1]] * 4}
    ends = [True, True, True, False]
    assert rewards.exact_match(**given, answer=["46"] * 4, finished=ends) == [1, 1, 0, 0]

    texts = ["x\n#### 46", "x\n#### 46.0", "x\n#### 47", "46", "#### 46"]
    given = {"prompts": ["q"] * 5, "completions": texts, "completion_ids": [[1]] * 5}
    ends = [True, True, True, True, False]
    answers = ["why\n#### 46"] * 5
    assert rewards.answer_format(**given, finished=ends, answer=answers) == [1, 1, 1, 0, 0]
    assert rewards.answer_correct(**given, finished=ends, answer=answers) == [1, 1, 0, 0, 0]


def _length(prompts, completions, completion_ids, **columns):
    return [float(len(c)) for c in completions]


def _only_first(prompts, completions, completion_ids, bonus, **columns):
    return [b if i == 0 else None for i, b in enumerate(bonus)]


def test_score_sums_weights_and_skips_none():
    given = (["p", "q"], ["a", "bcd"], [[1], [2, 3]])
    scores = rewards.score([_length, _only_first], [1.0, 10.0], *given, {"bonus": [2.0, 5.0]})
    assert scores.total == [21.0, 3.0]
    assert scores.means == {"_length": 2.0, "_only_first": 2.0}


def test_score_refuses():
    given = (["p", "q"], ["a", "b"], [[1], [2]], {"bonus": [1.0, 1.0]})
    with pytest.raises(ValueError, match="no function scored sample 1"):
        rewards.score([_only_first], [1.0], *given)
    with pytest.raises(ValueError, match="expected 2 rewards, found 1"):
        rewards.score([lambda **_: [0.0]], [1.0], *given)
    with pytest.raises(ValueError, match="finite"):
        rewards.score([lambda **_: [0.0, math.nan]], [1.0], *given)


def test_load_reward():
    path = "rlhf_kernels.trainer.rewards:exact_match"
    assert rewards.load_reward(path) is rewards.exact_match
    for bad in ("exact_match", "rlhf_kernels.trainer.rewards:nothing"):
        with pytest.raises(ValueError, match="reward_funcs"):
            rewards.load_reward(bad)


# --- data ------------------------------------------------------------------------------------


def test_arithmetic_is_right_and_held_out_problems_stay_out():
    task = tiny_task()
    assert len(task.train) + len(task.held_out) == 2 * 31 * 31
    assert not {p.prompt for p in task.train} & {p.prompt for p in task.held_out}
    for problem in task.train[:200]:
        assert eval(problem.prompt.rstrip("=")) == int(problem.completion)  # digits and a sign
        assert problem.columns["answer"] == problem.completion
    assert [p.prompt for p in task.held_out] == [p.prompt for p in tiny_task().held_out]


def test_tokenizers_round_trip():
    texts = ["12+34=46", "7-9=-2"]
    bpe = bpe_tokenizer(["Janet has 16 eggs.\n#### 18"] * 3, 300)
    cases = [
        (character_tokenizer("0123456789+-="), texts),
        (bpe, ["Janet has 42 eggs,\n  é ✓ #### 18"]),
    ]
    for tokenizer, lines in cases:
        for line, ids in zip(lines, tokenizer(lines)["input_ids"], strict=True):
            assert (
                tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == line
            )
    assert len(cases[0][0]("12+34=")["input_ids"]) == 6
    # Digits stay single, so that a number's tokens do not depend on its length.
    assert len(bpe("18")["input_ids"]) == 2


def write_jsonl(path: Path, rows) -> str:
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return str(path)


def test_read_jsonl(tmp_path):
    row = {"question": "How many?", "answer": "Two plus two.\n#### 4", "level": 3}
    problem = read_jsonl(write_jsonl(tmp_path / "a", [row, ""]))[0]
    assert problem == Problem("How many?\n", "Two plus two.\n#### 4", row)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{", "a:2: expected a JSON object"),
        ("[]", "a:2: expected an object"),
        ({"question": "q"}, "a:2: expected an object"),
        ({"question": "q", "answer": "four"}, "a:2: expected 'answer' to end in"),
    ],
)
def test_read_jsonl_names_the_line(tmp_path, line, match):
    path = write_jsonl(tmp_path / "a", [{"question": "q", "answer": "#### 1"}, line])
    with pytest.raises(ValueError, match=match):
        read_jsonl(path)


def test_read_jsonl_empty(tmp_path):
    with pytest.raises(ValueError, match="at least one"):
        read_jsonl(write_jsonl(tmp_path / "a", []))


@pytest.mark.skipif(not GSM8K.exists(), reason="gsm8k_train.jsonl is not beside the checkout")
def test_gsm8k_is_parsed_whole():
    problems = read_jsonl(str(GSM8K))
    assert len(problems) == 7473
    answers = [p.completion for p in problems]
    given = {"prompts": answers, "completions": answers, "completion_ids": [[1]] * len(answers)}
    columns = {"answer": answers, "finished": [True] * len(answers)}
    assert all(rewards.answer_correct(**given, **columns))
    # Their neighbours' answers are another number, mostly.
    columns["answer"] = [*answers[1:], answers[0]]
    assert sum(rewards.answer_correct(**given, **columns)) < 300


def test_sampler_visits_every_problem_once_per_pass():
    problems = [Problem(str(i), "", {}) for i in range(10)]
    sampler = Sampler(problems, 5, seed=1)
    first, second = [{p.prompt for p in next(sampler) + next(sampler)} for _ in range(2)]
    assert first == second == {p.prompt for p in problems}
    with pytest.raises(ValueError, match="batch_size"):
        Sampler(problems, 11, seed=0)


def test_supervised_batch_masks():
    task = tiny_task()
    problems = [Problem("1+2=", "3", {}), Problem("10-22=", "-12", {})]
    batch = supervised_batch(task.tokenizer, problems, CPU)
    eos, padding = task.tokenizer.eos_token_id, task.tokenizer.pad_token_id
    assert batch.input_ids.shape == (2, 10)
    assert batch.completion_mask.tolist() == [[True, True, False, False], [True] * 4]
    assert batch.attention_mask.long().tolist() == [[0, 0, 1, 1, 1, 1, 1, 1, 0, 0], [1] * 10]
    assert batch.input_ids[0, :2].tolist() == [padding] * 2
    assert batch.completion_ids[:, 1].tolist()[0] == eos
    assert batch.completion_ids[1, 3] == eos
    assert completion_labels(batch)[0, 2:].tolist() == [-100, -100]
    assert position_ids(batch.attention_mask)[0].tolist() == [0, 0, 0, 1, 2, 3, 4, 5, 5, 5]


def test_pad_of_ragged_rows():
    ids, mask = pad([[1, 2], [], [3]], 9, left=False)
    assert ids.tolist() == [[1, 2], [9, 9], [3, 9]]
    assert mask.tolist() == [[True, True], [False, False], [True, False]]


# --- models and generation -------------------------------------------------------------------


def test_padding_does_not_change_logits_and_values():
    task = tiny_task()
    policy = tiny_policy(task)
    critic = build_critic(policy)
    torch.nn.init.normal_(critic.score.weight)
    problems = [Problem("1+2=", "3", {}), Problem("10-22=", "-12", {})]
    together = supervised_batch(task.tokenizer, problems, CPU)
    for i, problem in enumerate(problems):
        alone = supervised_batch(task.tokenizer, [problem], CPU)
        width = alone.completion_mask.shape[1]
        for function, model in ((completion_logits, policy), (completion_values, critic)):
            inside = function(model, together)[i, :width]
            torch.testing.assert_close(inside, function(model, alone)[0], atol=1e-5, rtol=1e-5)
        # The first value and the first row of logits are those of the prompt's last token.
        ids = torch.tensor([task.tokenizer(problem.prompt)["input_ids"]])
        prompt_logits = policy(input_ids=ids).logits[0, -1]
        torch.testing.assert_close(
            completion_logits(policy, together)[i, 0], prompt_logits, atol=1e-5, rtol=1e-5
        )


def test_greedy_generation_is_that_of_transformers():
    task = tiny_task()
    policy = tiny_policy(task)
    # A few supervised steps: a random model would emit one token for ever.
    list(
        sft_steps(
            policy,
            task,
            SFTConfig(sft_steps=60, sft_batch_size=64, sft_learning_rate=3e-3, sft_warmup_steps=5),
            seed=0,
            max_grad_norm=1.0,
        )
    )
    ids, mask = encode_prompts(task.tokenizer, task.held_out, CPU)
    assert not mask.all()
    options = {"max_new_tokens": 8, "eos_token_id": task.tokenizer.eos_token_id}
    options["pad_token_id"] = task.tokenizer.pad_token_id
    ours = generate(policy, ids, mask, temperature=0, **options)
    theirs = policy.generate(input_ids=ids, attention_mask=mask, do_sample=False, **options)
    assert torch.equal(ours.input_ids, theirs)
    lengths = ours.completion_mask.sum(1)
    assert lengths.min() < lengths.max()
    for row, length in zip(ours.completion_ids, lengths, strict=True):
        assert (row[: length - 1] != options["eos_token_id"]).all()
        assert (row[length:] == options["pad_token_id"]).all()


def test_sampling_follows_the_model():
    task = tiny_task()
    policy = tiny_policy(task)
    with torch.no_grad():
        policy.lm_head.weight.mul_(20)
    ids, mask = encode_prompts(task.tokenizer, [Problem("1+2=", "3", {})] * 4096, CPU)
    batch = generate(
        policy,
        ids,
        mask,
        max_new_tokens=1,
        eos_token_id=task.tokenizer.eos_token_id,
        pad_token_id=task.tokenizer.pad_token_id,
        temperature=2.0,
        generator=torch.Generator().manual_seed(0),
    )
    logits = policy(input_ids=ids[:1]).logits[0, -1]
    expected = torch.softmax(logits / 2.0, -1)
    found = batch.completion_ids[:, 0].bincount(minlength=len(expected)) / 4096
    assert expected.max() > 2 * expected.mean()
    torch.testing.assert_close(found, expected.detach(), atol=0.04, rtol=0)


def test_critic_starts_at_zero_and_holds_the_policys_weights():
    policy = tiny_policy(tiny_task())
    critic = build_critic(policy)
    batch = supervised_batch(tiny_task().tokenizer, [Problem("1+2=", "3", {})], CPU)
    assert torch.equal(completion_values(critic, batch), torch.zeros(1, 2))
    weights = dict(critic.model.named_parameters())
    for name, weight in policy.model.named_parameters():
        assert torch.equal(weight, weights[name])
        assert weight.data_ptr() != weights[name].data_ptr()


# --- PPO -------------------------------------------------------------------------------------


def _sevens(prompts, completions, completion_ids, **columns):
    return [c.count("7") / 5 for c in completions]


def sevens_task() -> Task:
    """A reward that a random policy meets now and then, so that its advantages are not 0."""
    return tiny_task(reward_funcs=[f"{__name__}:_sevens"])


def tiny_trainer(seed: int = 0, **options) -> PPOTrainer:
    task = sevens_task()
    settings = {"batch_size": 32, "mini_batch_size": 8, "epochs": 2, "total_steps": 3}
    config = PPOConfig(**settings | options)
    return PPOTrainer(tiny_policy(task, seed), task, config, max_new_tokens=5, seed=seed)


@pytest.mark.parametrize(("mini_batch_size", "epochs"), [(8, 1), (16, 2), (32, 1), (32, 2)])
def test_first_ratio_is_exactly_one(mini_batch_size, epochs):
    torch.set_num_threads(2)
    trainer = tiny_trainer(mini_batch_size=mini_batch_size, epochs=epochs)
    trainer.step()
    trainer.kernel.active = True
    trainer.step()
    calls = [c for c in trainer.kernel.calls if c.function is rk.policy_loss]
    assert len(calls) == epochs * 32 // mini_batch_size
    logprobs, old = calls[0].args[:2]
    assert logprobs.requires_grad and not old.requires_grad
    assert torch.equal(logprobs, old) and (old < 0).any()
    # With one update per rollout nothing is computed twice.
    forwards = [c for c in trainer.kernel.calls if c.function is rk.token_logprobs]
    parts = 32 // mini_batch_size
    updates = 0 if parts * epochs == 1 else parts * epochs
    assert len(forwards) == 2 * parts + updates


def test_first_ratio_is_one_in_a_model_with_dropout():
    task = sevens_task()
    torch.manual_seed(0)
    sizes = {"vocab_size": len(task.tokenizer), "n_embd": 32, "n_layer": 2, "n_head": 2}
    config = GPT2Config(**sizes, bos_token_id=1, eos_token_id=1, pad_token_id=0)
    assert config.resid_pdrop > 0 and config.attn_pdrop > 0
    policy = AutoModelForCausalLM.from_config(config).eval()
    options = PPOConfig(batch_size=16, mini_batch_size=8, epochs=1, total_steps=2)
    row = PPOTrainer(policy, task, options, max_new_tokens=5, seed=0).step()
    assert row["kl"] == pytest.approx(0.0, abs=1e-5)
    trainer = PPOTrainer(policy, task, options, max_new_tokens=5, seed=0)
    trainer.kernel.active = True
    assert math.isfinite(trainer.step()["policy/loss"])
    logprobs, old = next(c for c in trainer.kernel.calls if c.function is rk.policy_loss).args[:2]
    assert torch.equal(logprobs, old)


def test_first_step_metrics():
    trainer = tiny_trainer(
        kl_coef=0.5, epochs=1, mini_batch_size=32, learning_rate=5e-3, warmup_steps=1
    )
    row = trainer.step()
    # Two copies of the weights: MKL may round by their addresses (see cli.py).
    assert row["kl"] == pytest.approx(0.0, abs=1e-5)
    assert row["policy/ratio_min"] == row["policy/ratio_max"] == 1.0
    assert 0.8 * math.log(15) < row["entropy"] < math.log(15)
    assert row["tokens"] == 32 * row["length"]
    assert abs(trainer.step()["kl"]) > 1e-4


def test_only_policy_and_critic_move():
    trainer = tiny_trainer()
    models = (trainer.policy, trainer.critic, trainer.reference)
    before = [torch.cat([p.detach().flatten().clone() for p in m.parameters()]) for m in models]
    trainer.step()
    after = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in models]
    moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert moved == [True, True, False]


def test_runs_repeat_bitwise():
    def run(seed: int) -> list[dict[str, float]]:
        trainer = tiny_trainer(seed=seed, kl_target=1.0)
        # Unrelated use of the global generator must not matter.
        torch.rand(seed + 1)
        rows = [trainer.step() for _ in range(3)]
        return [{k: v for k, v in r.items() if not k.startswith("time/")} for r in rows]

    first, second, other = run(0), run(0), run(1)
    assert first == second
    assert first != other
    assert all(math.isfinite(v) for row in first for v in row.values())


def test_command_repeats_bitwise_in_another_process(tmp_path):
    flags = "--sft_steps 5 --sft_batch_size 64 --total_steps 3 --batch_size 32 --mini_batch_size 16"
    flags += " --hidden_size 32 --num_heads 2 --eval_size 32 --replay_steps 0 --save_model false"
    command = [sys.executable, "-m", "rlhf_kernels.trainer", "ppo", *flags.split()]
    # Another environment, hence other addresses.
    runs = [
        subprocess.Popen(
            [*command, "--threads", "1", "--output_dir", str(tmp_path / name)],
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PADDING": padding},
        )
        for name, padding in (("a", ""), ("b", "x" * 3000))
    ]
    assert [run.wait(timeout=300) for run in runs] == [0, 0]
    logs = []
    for name in ("a", "b"):
        text = (tmp_path / name / "metrics.jsonl").read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        logs.append([{k: v for k, v in r.items() if not k.startswith("time/")} for r in rows])
    assert len(logs[0]) == 3
    assert logs[0] == logs[1]


def test_adaptive_kl_follows_its_target():
    trainer = tiny_trainer(kl_target=1e-6, kl_horizon=320.0, total_steps=4)
    coefficients = [trainer.step()["kl_coef"] for _ in range(4)]
    # The first KL is 0, below any target; the later ones are above this one.
    assert coefficients[1] == pytest.approx(0.02 * (1 - 0.2 * 0.1))
    assert coefficients[2] == pytest.approx(coefficients[1] * (1 + 0.2 * 0.1))


@pytest.mark.parametrize("mini_batch_size", [64, 32])
def test_ppo_raises_the_reward(mini_batch_size):
    trainer = tiny_trainer(
        batch_size=64,
        mini_batch_size=mini_batch_size,
        epochs=1,
        learning_rate=5e-3,
        critic_learning_rate=5e-3,
        warmup_steps=1,
        total_steps=25,
        kl_coef=0.0,
    )
    rows = [trainer.step()["reward"] for _ in range(25)]
    assert rows[0] < 0.15
    assert sum(rows[-3:]) / 3 > 0.6


def test_kl_penalty_holds_the_policy_back():
    def final_kl(kl_coef: float) -> float:
        options = {"learning_rate": 5e-3, "warmup_steps": 1, "epochs": 1}
        trainer = tiny_trainer(kl_coef=kl_coef, **options)
        return [trainer.step()["kl"] for _ in range(10)][-1]

    assert final_kl(1.0) < 0.5 * final_kl(0.0)


def test_truncated_completions_are_not_finished():
    task = tiny_task()
    seen = {}

    def spy(prompts, completions, completion_ids, answer, finished, **columns):
        seen.update(ids=completion_ids, finished=finished, answer=answer, prompts=prompts)
        return [0.0] * len(prompts)

    task.reward_funcs[:] = [spy]
    options = {"max_new_tokens": 3, "generator": torch.Generator().manual_seed(0)}
    sample_completions(tiny_policy(task), task, task.train[:64], **options)
    eos = task.tokenizer.eos_token_id
    assert seen["finished"] == [ids[-1] == eos for ids in seen["ids"]]
    assert {True, False} == set(seen["finished"])
    assert all(eos not in ids[:-1] and len(ids) <= 3 for ids in seen["ids"])
    assert seen["answer"] == [p.completion for p in task.train[:64]]


# --- report ----------------------------------------------------------------------------------


def test_replay_covers_every_kernel_and_changes_nothing():
    trainer = tiny_trainer()
    trainer.kernel.active = True
    trainer.step()
    copies = [
        [t.clone() for t in c.args if isinstance(t, torch.Tensor)] for c in trainer.kernel.calls
    ]
    timing = {t["function"]: t for t in time_kernels(trainer.kernel.calls, steps=1, device=CPU)}
    assert {k: t["calls_per_step"] for k, t in timing.items()} == {
        "token_logprobs": 16,
        "ppo_advantages": 1,
        "policy_loss": 8,
        "value_loss": 8,
    }
    for row in timing.values():
        assert row["ms_per_step"] > 0 and row["reference_ms_per_step"] > 0
    for call, copy in zip(trainer.kernel.calls, copies, strict=True):
        tensors = [t for t in call.args if isinstance(t, torch.Tensor)]
        assert all(torch.equal(a, b) for a, b in zip(tensors, copy, strict=True))


def test_table():
    text = table(("a", "long"), [(1, "x\ny"), ("zz", "w" * 100)])
    lines = text.splitlines()
    assert lines[:3] == ["a   long", "--  " + "-" * 48, "1   x\\ny"]
    assert lines[3].endswith("…") and len(lines[3]) == 52


def test_evaluate_weighs_a_short_last_batch():
    task = tiny_task()
    task.reward_funcs[:] = [_prompt_is_first]
    _prompt_is_first.prompt = task.held_out[-1].prompt
    scores, texts = evaluate(
        tiny_policy(task), task, task.held_out[-9:], max_new_tokens=2, batch_size=8
    )
    assert scores == {"_prompt_is_first": pytest.approx(1 / 9)}
    assert len(texts) == 9


def _prompt_is_first(prompts, completions, completion_ids, **columns):
    return [float(p == _prompt_is_first.prompt) for p in prompts]


# --- command line ----------------------------------------------------------------------------


def test_flags_win_over_yaml(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "learning_rate: 1e-4\nepochs: 3\nsave_model: false\nreward_funcs: [a:b, c:d]\nkl_coef: 1\n"
        "data: null\n"
    )
    classes = (RunConfig, ModelConfig, DataConfig, SFTConfig, PPOConfig)
    argv = ["--config", str(path), "--epochs", "5", "--batch-size", "256"]
    run, _, data, _, ppo = parse_config(classes, argv, prog="test")
    assert (ppo.learning_rate, ppo.epochs, ppo.batch_size) == (1e-4, 5, 256)
    assert isinstance(ppo.kl_coef, float) and ppo.kl_coef == 1.0
    assert data.reward_funcs == ["a:b", "c:d"] and data.data is None
    assert run.save_model is False


@pytest.mark.parametrize("text", ["learning_rat: 1e-4", "ppo: {epochs: 3}", "- epochs"])
def test_bad_yaml_is_refused(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"learning_rat|mapping"):
        parse_config((PPOConfig,), ["--config", str(path)], prog="test")


def test_bad_values_are_refused():
    with pytest.raises(ValueError, match="mini_batch_size: expected a divisor of batch_size=512"):
        PPOConfig(mini_batch_size=100)
    with pytest.raises(ValueError, match="lr_schedule"):
        PPOConfig(lr_schedule="cosine")
    with pytest.raises(ValueError, match="operators"):
        DataConfig(operators="*")
    with pytest.raises(ValueError, match="reward_weights: expected 1 numbers, found 2"):
        tiny_task(reward_weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="max_prompt_tokens"):
        tiny_task(max_prompt_tokens=2)


def test_cli_usage(capsys):
    assert cli.main([]) == 2
    assert cli.main(["train", "unknown"]) == 2
    assert "ppo" in capsys.readouterr().err
    assert cli.main(["--help"]) == 0


def test_cli_trains_on_a_file_and_continues_from_its_checkpoint(tmp_path):
    rows = [
        {"question": f"Ann has {i} nuts and finds {j}.", "answer": f"{i}+{j}={i + j}\n#### {i + j}"}
        for i in range(9)
        for j in range(9)
    ]
    data, config = write_jsonl(tmp_path / "nuts.jsonl", rows), tmp_path / "c.yaml"
    config.write_text(
        f"data: {data}\nvocab_size: 300\nhidden_size: 32\nnum_heads: 2\nmax_new_tokens: 24\n"
        "eval_size: 16\nsft_steps: 2\nsft_batch_size: 16\nbatch_size: 16\nmini_batch_size: 8\n"
        "total_steps: 5\nreplay_steps: 1\n"
    )
    out = tmp_path / "out"
    flags = ["--config", str(config), "--output_dir", str(out), "--total_steps", "2"]
    assert cli.main(["train", "ppo", *flags]) == 0

    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [0, 1]
    assert {"reward/answer_format", "reward/answer_correct", "kl", "entropy"} <= log[0].keys()
    summary = json.loads((out / "summary.json").read_text())
    assert summary["config"]["total_steps"] == 2
    assert summary["held_out_after"].keys() == {"answer_format", "answer_correct"}
    assert {t["function"] for t in summary["kernel_timing"]} >= {"token_logprobs", "policy_loss"}
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert 256 < len(AutoTokenizer.from_pretrained(out / "policy")) <= 300
    critic = AutoModelForTokenClassification.from_pretrained(out / "critic")
    assert critic.score.weight.shape == (1, 32)

    again = tmp_path / "again"
    flags = ["--config", str(config), "--output_dir", str(again), "--model", str(out / "policy")]
    flags += ["--sft_steps", "0", "--total_steps", "1"]
    assert cli.main(["train", "ppo", *flags]) == 0
    resumed = json.loads((again / "summary.json").read_text())
    was, now = summary["samples"][:4], resumed["samples"][:4]
    assert [s["after PPO"] for s in was] == [s["before PPO"] for s in now]
    assert AutoModelForCausalLM.from_pretrained(again / "policy").config.vocab_size <= 300


def test_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(cli.TRAINERS, "none", ("no_such_package.run", "main", ""))
    assert cli.main(["train", "none"]) == 1
    assert "rlhf_kernels[trainer]" in capsys.readouterr().err
