"""The minimal trainer: data, rewards, generation, models, report and the command line."""

import gzip
import importlib.util
import json
import math

import pytest
import torch
from trainer_tools import (
    CPU,
    DATA,
    one_thread,  # noqa: F401
    online_trainer,
    supervised,
    tiny_policy,
    tiny_task,
    write_jsonl,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
)

from rlhf_kernels import cli
from rlhf_kernels.trainer import answers, models, rewards
from rlhf_kernels.trainer.config import (
    CriticConfig,
    DataConfig,
    ModelConfig,
    OnlineConfig,
    OptimConfig,
    RunConfig,
    parse_config,
)
from rlhf_kernels.trainer.data import (
    Row,
    Sampler,
    bpe_tokenizer,
    character_tokenizer,
    collate,
    pad,
    parse_row,
    position_ids,
    prompt_tokens,
    read_rows,
    row_tokens,
)
from rlhf_kernels.trainer.generation import generate
from rlhf_kernels.trainer.recorder import kernel
from rlhf_kernels.trainer.report import MetricsLog, table, time_kernels
from rlhf_kernels.trainer.rollout import sample
from rlhf_kernels.trainer.run import _evaluate

GSM8K, HH = DATA / "gsm8k_train.jsonl", DATA / "hh_rlhf_harmless_test.jsonl.gz"


def supervised_batch(task, rows):
    return collate(
        task.tokenizer, [row_tokens(task.tokenizer, r.prompt, r.completion) for r in rows], CPU
    )


# --- rewards ---------------------------------------------------------------------------------


def test_final_number():
    assert answers.final_number("so\n#### 1,234") == 1234
    assert answers.final_number("#### -3.50\n") == answers.final_number("####-3.5")
    assert answers.final_number("#### $12") == 12
    for text in ("12", "#### ", "#### 12 apples", "#### 12\nmore", "#### 12 #### x", "#### 1\n2"):
        assert answers.final_number(text) is None, text


def test_reward_functions_need_the_end():
    texts = ["46", " 46", "47", "46"]
    given = {"prompts": ["12+34="] * 4, "completions": texts, "completion_ids": [[1]] * 4}
    ends = [True, True, True, False]
    assert answers.exact_match(**given, answer=["46"] * 4, finished=ends) == [1, 1, 0, 0]

    texts = ["x\n#### 46", "x\n#### 46.0", "x\n#### 47", "46", "#### 46"]
    given = {"prompts": ["q"] * 5, "completions": texts, "completion_ids": [[1]] * 5}
    ends = [True, True, True, True, False]
    wanted = ["why\n#### 46"] * 5
    assert answers.answer_format(**given, finished=ends, answer=wanted) == [1, 1, 1, 0, 0]
    assert answers.answer_correct(**given, finished=ends, answer=wanted) == [1, 1, 0, 0, 0]


def _length(prompts, completions, completion_ids, **columns):
    return [float(len(c)) for c in completions]


def _only_first(prompts, completions, completion_ids, bonus, **columns):
    return [b if i == 0 else None for i, b in enumerate(bonus)]


def test_rewards_sum_weights_and_skip_none():
    both = rewards.Rewards([_length, _only_first], [1.0, 10.0])
    found = torch.tensor(both(["p", "q"], ["a", "bcd"], [[1], [2, 3]], {"bonus": [2.0, 5.0]}))
    assert rewards.weighted_sum(found, both.weights).tolist() == [21.0, 3.0]
    assert rewards.means(found) == [2.0, 2.0]
    assert both.names == ["_length", "_only_first"]


def _raises(**_):
    raise KeyError("no such column")


@pytest.mark.parametrize(
    ("function", "error", "match"),
    [
        (_only_first, ValueError, "no function scored sample 1"),
        (lambda **_: [0.0], ValueError, "expected 2 rewards, found 1"),
        (lambda **_: [0.0, math.nan], ValueError, "finite rewards, found nan for sample 1"),
        (lambda **_: None, ValueError, "expected a list of 2 rewards, found None"),
        (_raises, RuntimeError, "reward function _raises raised KeyError.*no such column"),
    ],
)
def test_bad_rewards_are_refused(function, error, match):
    given = (["p", "q"], ["a", "b"], [[1], [2]], {"bonus": [1.0, 1.0]})
    with pytest.raises(error, match=match):
        rewards.Rewards([function], [1.0])(*given)


def test_load_reward():
    path = "rlhf_kernels.trainer.answers:exact_match"
    assert rewards.load_reward(path) is answers.exact_match
    for bad in ("exact_match", "rlhf_kernels.trainer.answers:nothing"):
        with pytest.raises(ValueError, match="reward_funcs"):
            rewards.load_reward(bad)


def test_reward_model_reads_the_last_token(tmp_path):
    task = tiny_task()
    config = ModelConfig(hidden_size=32, num_heads=2)
    torch.manual_seed(1)
    model = models.build_reward_model(config, task.tokenizer, max_length=64)
    model.save_pretrained(tmp_path / "rm")
    task.tokenizer.save_pretrained(tmp_path / "rm")
    loaded = rewards.load_rewards(
        [str(tmp_path / "rm")], [2.0], default=[], config=config, device=CPU
    )
    assert loaded.names == ["rm"] and loaded.weights == [2.0]
    given = (["1+2=", "10+20="], ["3", "30"], [[1], [1]])
    (found,) = loaded(*given, {"finished": [True, False]})
    for text, reward in (("1+2=3<eos>", found[0]), ("10+20=30", found[1])):
        ids = torch.tensor([task.tokenizer(text.replace("<eos>", ""))["input_ids"]])
        if "<eos>" in text:
            ids = torch.cat([ids, torch.tensor([[task.tokenizer.eos_token_id]])], 1)
        theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
        with torch.no_grad():
            hidden = theirs.base_model(input_ids=ids).last_hidden_state
            assert reward == pytest.approx(theirs.score(hidden)[0, -1, 0].item(), abs=1e-5)


# --- data ------------------------------------------------------------------------------------


def test_arithmetic_is_right_and_held_out_rows_stay_out():
    task = tiny_task()
    assert len(task.train) + len(task.held_out) == 2 * 31 * 31
    assert not {r.prompt for r in task.train} & {r.prompt for r in task.held_out}
    for row in task.train[:200]:
        assert eval(row.prompt.rstrip("=")) == int(row.completion)  # digits and a sign
        assert row.columns["answer"] == row.completion
    assert [r.prompt for r in task.held_out] == [r.prompt for r in tiny_task().held_out]


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


CHAT = [{"role": "user", "content": "Hi"}]
ANSWER = [{"role": "assistant", "content": "Hello"}]


@pytest.mark.parametrize(
    ("kind", "row", "expected"),
    [
        ("supervised", {"text": "abc"}, Row("", "abc")),
        ("supervised", {"prompt": "a", "completion": "b", "x": 1}, Row("a", "b", columns={"x": 1})),
        ("supervised", {"prompt": CHAT, "completion": ANSWER}, Row(CHAT, ANSWER)),
        ("supervised", {"messages": CHAT + ANSWER}, Row(CHAT, ANSWER)),
        ("prompt", {"messages": CHAT}, Row(CHAT)),
        ("prompt", {"prompt": "a", "y": [2]}, Row("a", columns={"y": [2]})),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": "c"}, Row("a", None, "b", "c")),
        # The common beginning, back to the space before the first word that differs.
        (
            "preference",
            {"chosen": "Q: why? A: sunny day", "rejected": "Q: why? A: sun is up"},
            Row("Q: why? A:", None, " sunny day", " sun is up"),
        ),
        (
            "preference",
            {"chosen": CHAT + ANSWER, "rejected": [*CHAT, {"role": "assistant", "content": "No"}]},
            Row(CHAT, None, ANSWER, [{"role": "assistant", "content": "No"}]),
        ),
    ],
)
def test_columns(kind, row, expected):
    found = parse_row(row, kind)
    assert found[:4] == expected[:4]
    assert expected.columns.items() <= found.columns.items()
    assert not {"prompt", "completion", "messages"} & found.columns.keys()


def test_read_gsm8k_rows(tmp_path):
    row = {"question": "How many?", "answer": "Two plus two.\n#### 4", "level": 3}
    path = write_jsonl(tmp_path / "a.jsonl", [row, ""])
    assert read_rows(path, "prompt") == [Row("How many?\n", "Two plus two.\n#### 4", columns=row)]


BAD_ROWS = [
    ("prompt", "{", "a.jsonl.gz:2: expected a JSON object"),
    ("prompt", "[]", "a.jsonl.gz:2: expected an object"),
    ("prompt", {"question": "q"}, "a.jsonl.gz:2: expected 'answer'.*found nothing"),
    ("prompt", {"question": "q", "answer": "four"}, "a.jsonl.gz:2: expected 'answer' to end in"),
    ("prompt", {"prompt": ""}, "a.jsonl.gz:2: expected 'prompt'.*found ''"),
    ("prompt", {"prompt": 3}, "a.jsonl.gz:2: expected 'prompt'.*found 3"),
    ("supervised", {"prompt": "p", "completion": ""}, "a.jsonl.gz:2: expected 'completion'"),
    ("supervised", {"messages": CHAT}, "a.jsonl.gz:2: expected 'messages' to end"),
    ("supervised", {"messages": [{"role": "user"}]}, "a.jsonl.gz:2: expected 'messages'"),
    ("preference", {"chosen": "a"}, "a.jsonl.gz:2: expected 'rejected'.*found nothing"),
    ("preference", {"chosen": "a", "rejected": "a"}, "a.jsonl.gz:2: .*to differ"),
    ("preference", {"chosen": "a b", "rejected": CHAT}, "a.jsonl.gz:2: .*one form"),
]
GOOD = {
    "prompt": {"prompt": "p"},
    "supervised": {"text": "t"},
    "preference": {"chosen": "a", "rejected": "b"},
}


@pytest.mark.parametrize(("kind", "line", "match"), BAD_ROWS)
def test_bad_rows_are_named(tmp_path, kind, line, match):
    rows = [json.dumps(GOOD[kind]), line if isinstance(line, str) else json.dumps(line)]
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(rows).encode()))
    with pytest.raises(ValueError, match=match):
        read_rows(str(path), kind)


def test_empty_file(tmp_path):
    with pytest.raises(ValueError, match="at least one row"):
        read_rows(write_jsonl(tmp_path / "a.jsonl", []), "prompt")


def test_other_formats_go_through_datasets(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "a.csv").write_text("prompt,completion\nx,y\n")
    assert read_rows(str(tmp_path / "a.csv"), "supervised") == [Row("x", "y")]


@pytest.mark.skipif(not GSM8K.exists(), reason="gsm8k_train.jsonl is not beside the checkout")
def test_gsm8k_is_parsed_whole():
    rows = read_rows(str(GSM8K), "prompt")
    assert len(rows) == 7473
    texts = [r.completion for r in rows]
    given = {"prompts": texts, "completions": texts, "completion_ids": [[1]] * len(texts)}
    columns = {"answer": texts, "finished": [True] * len(texts)}
    assert all(answers.answer_correct(**given, **columns))
    # Their neighbours' answers are another number, mostly.
    columns["answer"] = [*texts[1:], texts[0]]
    assert sum(answers.answer_correct(**given, **columns)) < 300


@pytest.mark.skipif(not HH.exists(), reason="hh_rlhf_harmless_test.jsonl.gz is not there")
def test_hh_rlhf_is_parsed_whole():
    rows = read_rows(str(HH), "preference")
    assert len(rows) == 2312
    for row in rows:
        # Whole dialogues come back, and the prompt holds the last question at least.
        assert row.columns["chosen"] == row.prompt + row.chosen
        assert row.columns["rejected"] == row.prompt + row.rejected
    assert sum("Human:" in r.prompt for r in rows) == len(rows)


def test_conversations_through_the_chat_template():
    tokenizer = bpe_tokenizer(["user: Hi assistant: Hello"] * 3, 300)
    prompt, completion = row_tokens(tokenizer, CHAT, ANSWER)
    assert tokenizer.decode(prompt) == "\n\nuser: Hi<eos>\n\nassistant: "
    assert tokenizer.decode(completion) == "Hello<eos>"
    assert prompt == prompt_tokens(tokenizer, CHAT)


def test_text_without_prompt_predicts_all_but_its_first_token():
    tokenizer = character_tokenizer("abc")
    prompt, completion = row_tokens(tokenizer, "", "abc")
    assert tokenizer.decode(prompt) == "a" and tokenizer.decode(completion) == "bc<eos>"


def test_sampler_visits_every_row_once_per_pass_and_continues():
    sampler = Sampler(10, 5, seed=1)
    first, second = [set(next(sampler) + next(sampler)) for _ in range(2)]
    assert first == second == set(range(10))
    next(sampler)
    state = sampler.state_dict()
    expected = [next(sampler) for _ in range(5)]
    other = Sampler(10, 5, seed=7)
    other.load_state_dict(state)
    assert [next(other) for _ in range(5)] == expected
    with pytest.raises(ValueError, match="batch_size"):
        Sampler(10, 11, seed=0)


def test_supervised_batch_masks():
    task = tiny_task()
    batch = supervised_batch(task, [Row("1+2=", "3"), Row("10-22=", "-12")])
    eos, padding = task.tokenizer.eos_token_id, task.tokenizer.pad_token_id
    assert batch.input_ids.shape == (2, 10)
    assert batch.completion_mask.tolist() == [[True, True, False, False], [True] * 4]
    assert batch.attention_mask.long().tolist() == [[0, 0, 1, 1, 1, 1, 1, 1, 0, 0], [1] * 10]
    assert batch.input_ids[0, :2].tolist() == [padding] * 2
    assert batch.completion_ids[:, 1].tolist()[0] == eos
    assert batch.completion_ids[1, 3] == eos
    assert batch.labels[0, 2:].tolist() == [-100, -100]
    assert position_ids(batch.attention_mask)[0].tolist() == [0, 0, 0, 1, 2, 3, 4, 5, 5, 5]


def test_pad_of_ragged_rows():
    ids, mask = pad([[1, 2], [], [3]], 9, left=False)
    assert ids.tolist() == [[1, 2], [9, 9], [3, 9]]
    assert mask.tolist() == [[True, True], [False, False], [True, False]]


# --- models and generation -------------------------------------------------------------------


def test_padding_does_not_change_hidden_states_values_and_rewards():
    task = tiny_task()
    policy = tiny_policy(task)
    critic = models.build_critic(policy, ModelConfig())
    torch.nn.init.normal_(critic.score.weight)
    rows = [Row("1+2=", "3"), Row("10-22=", "-12")]
    together = supervised_batch(task, rows)
    rewards_together = models.sequence_rewards(critic, together)
    for i, row in enumerate(rows):
        alone = supervised_batch(task, [row])
        width = alone.completion_mask.shape[1]
        for function, model in (
            (lambda m, b: models.lm_head(m, b).hidden, policy),
            (models.values, critic),
        ):
            inside = function(model, together)[i, :width]
            torch.testing.assert_close(inside, function(model, alone)[0], atol=1e-5, rtol=1e-5)
        # The first value and hidden state are those of the prompt's last token.
        ids = torch.tensor([task.tokenizer(row.prompt)["input_ids"]])
        head = models.lm_head(policy, together)
        logits = torch.nn.functional.linear(head.hidden[i, 0], head.weight)
        expected = policy(input_ids=ids).logits[0, -1]
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        reward = models.sequence_rewards(critic, alone)[0]
        torch.testing.assert_close(rewards_together[i], reward, atol=1e-5, rtol=1e-5)


_SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
_SIZES |= {"intermediate_size": 32, "vocab_size": 50, "num_key_value_heads": 2, "pad_token_id": 0}


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**_SIZES, head_dim=16, final_logit_softcapping=3.0),
        GraniteConfig(**_SIZES, logits_scaling=4.0),
        GPT2Config(vocab_size=50, n_embd=32, n_layer=1, n_head=2),
    ],
)
def test_head_of_other_architectures(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    ids = torch.randint(50, (2, 7))
    batch = models.Batch(ids, torch.ones_like(ids, dtype=torch.bool), ids[:, 3:] >= 0)
    with torch.no_grad():
        found = models.lm_head(model, batch).logprobs(batch.labels)
        logits = model(input_ids=ids).logits[:, 2:-1]
    expected = torch.log_softmax(logits, -1).gather(2, ids[:, 3:, None])[..., 0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    models._check_head(model)


def test_head_that_does_more_is_refused():
    task = tiny_task()
    policy = tiny_policy(task)
    forward = policy.forward

    def doubled(*args, **kwargs):
        found = forward(*args, **kwargs)
        return type(found)(logits=found.logits * 2)

    policy.forward = doubled
    with pytest.raises(ValueError, match="LlamaForCausalLM does more"):
        models._check_head(policy)


def test_lora_trains_adapters_and_switches_them_off_as_reference():
    pytest.importorskip("peft")
    task = tiny_task()
    policy = tiny_policy(task, lora_rank=4)
    trained = [n for n, p in policy.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in n for n in trained)
    reference = models.Reference.of(policy)
    assert reference.model is None
    trainer = online_trainer("grpo", policy=policy, learning_rate=5e-2, warmup_steps=1)
    first, second = trainer.step(), trainer.step()
    assert first["kl"] == pytest.approx(0.0, abs=1e-5) and abs(second["kl"]) > 1e-3


def test_gradient_checkpointing_changes_no_gradient():
    task = tiny_task()
    batch = supervised_batch(task, task.train[:8])
    found = []
    for checkpointing in (False, True):
        policy = tiny_policy(task, gradient_checkpointing=checkpointing)
        seen = []
        layer = policy.model.layers[0].input_layernorm
        layer.register_forward_hook(lambda *_, seen=seen: seen.append(1))
        models.lm_head(policy, batch).logprobs(batch.labels).sum().backward()
        assert len(seen) == 1 + checkpointing
        # Decoding keeps its cache.
        logprobs = online_trainer("ppo", policy=policy).rollout()[1].logprobs
        assert logprobs.isfinite().all() and not policy.training
        found.append([p.grad for p in policy.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_greedy_generation_is_that_of_transformers():
    task = tiny_task()
    policy = tiny_policy(task)
    # A few supervised steps: a random model would emit one token for ever.
    supervised(policy, task, 60, 3e-3)
    ids, mask = pad([prompt_tokens(task.tokenizer, r.prompt) for r in task.held_out], 0, left=True)
    assert not mask.all()
    options = {"max_new_tokens": 8, "eos_token_id": task.tokenizer.eos_token_id}
    options["pad_token_id"] = task.tokenizer.pad_token_id
    ours = generate(policy, ids, mask, temperature=0, **options).batch
    theirs = policy.generate(input_ids=ids, attention_mask=mask, do_sample=False, **options)
    width = theirs.shape[1]
    assert torch.equal(ours.input_ids[:, :width], theirs)
    assert (ours.input_ids[:, width:] == options["pad_token_id"]).all()
    lengths = ours.completion_mask.sum(1)
    assert lengths.min() < lengths.max()
    for row, length in zip(ours.completion_ids, lengths, strict=True):
        assert (row[: length - 1] != options["eos_token_id"]).all()
        assert (row[length:] == options["pad_token_id"]).all()


def test_sampling_follows_the_model_and_belongs_to_the_row():
    task = tiny_task()
    policy = tiny_policy(task)
    with torch.no_grad():
        policy.lm_head.weight.mul_(20)
    ids, mask = pad([task.tokenizer("1+2=")["input_ids"]] * 4096, 0, left=True)
    options = {"max_new_tokens": 1, "temperature": 2.0}
    options |= {"eos_token_id": task.tokenizer.eos_token_id, "pad_token_id": 0}
    uniforms = torch.rand(4096, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch, logprobs = generate(policy, ids, mask, uniforms=uniforms, **options)
    logits = policy(input_ids=ids[:1]).logits[0, -1]
    expected = torch.softmax(logits / 2.0, -1).detach()
    found = batch.completion_ids[:, 0].bincount(minlength=len(expected)) / 4096
    assert expected.max() > 2 * expected.mean()
    torch.testing.assert_close(found, expected, atol=0.04, rtol=0)
    torch.testing.assert_close(logprobs[:, 0].exp(), expected[batch.completion_ids[:, 0]])
    part = generate(policy, ids[100:120], mask[100:120], uniforms=uniforms[100:120], **options)
    assert torch.equal(part.batch.input_ids, batch.input_ids[100:120])


def test_critic_starts_at_zero_and_holds_the_policys_weights():
    task = tiny_task()
    policy = tiny_policy(task)
    critic = models.build_critic(policy, ModelConfig())
    batch = supervised_batch(task, [Row("1+2=", "3")])
    assert torch.equal(models.values(critic, batch), torch.zeros(1, 2))
    weights = dict(critic.model.named_parameters())
    for name, weight in policy.model.named_parameters():
        assert torch.equal(weight, weights[name])
        assert weight.data_ptr() != weights[name].data_ptr()


def test_truncated_completions_are_not_finished():
    trainer = online_trainer("ppo", batch_size=64)
    seen = {}

    def spy(prompts, completions, completion_ids, answer, finished, **columns):
        seen.update(ids=completion_ids, finished=finished, answer=answer, texts=completions)
        return [0.0] * len(prompts)

    task = trainer.task
    given = {"max_new_tokens": 3, "generator": torch.Generator().manual_seed(0)}
    found = sample(
        trainer.learner, task, rewards.Rewards([spy], [1.0]), task.train[:64], **given,
        decoded_at_once=24,
    )  # fmt: skip
    eos = task.tokenizer.eos_token_id
    assert seen["finished"] == [ids[-1] == eos for ids in seen["ids"]] == found.finished.tolist()
    assert {True, False} == set(seen["finished"])
    assert all(eos not in ids[:-1] and len(ids) <= 3 for ids in seen["ids"])
    assert seen["answer"] == [r.completion for r in task.train[:64]]
    # An end token at once is an empty completion of one token.
    assert any(
        text == "" and len(ids) == 1 for text, ids in zip(seen["texts"], seen["ids"], strict=True)
    )


def test_conversations_reach_rewards_as_messages():
    trainer = online_trainer("ppo")
    seen = {}

    def spy(prompts, completions, completion_ids, **columns):
        seen.update(prompts=prompts, completions=completions)
        return [1.0] * len(prompts)

    tokenizer = bpe_tokenizer(["user: Hi assistant: Hello"] * 3, 300)
    task = trainer.task.__class__("chat", tokenizer, [Row(CHAT)], [Row(CHAT)])
    policy = models.build_policy(ModelConfig(hidden_size=32, num_heads=2), tokenizer, max_length=64)
    trainer.learner.networks.policy = policy
    sample(trainer.learner, task, rewards.Rewards([spy], [1.0]), [Row(CHAT)], max_new_tokens=3)
    assert seen["prompts"] == [CHAT]
    assert [m["role"] for m in seen["completions"][0]] == ["assistant"]


# --- report ----------------------------------------------------------------------------------


def test_replay_covers_every_kernel_and_changes_nothing():
    kernel.record_steps([0])
    trainer = online_trainer("ppo", mini_batch_size=8, epochs=2)
    trainer.step()
    calls = list(kernel.calls)
    trainer.step()
    assert len(kernel.calls) == len(calls) and kernel.steps == 1
    copies = [[t.clone() for t in c.args if isinstance(t, torch.Tensor)] for c in calls]
    timing = {t["function"]: t for t in time_kernels(calls, steps=1, device=CPU, repeats=2)}
    assert {k: t["calls_per_step"] for k, t in timing.items()} == {
        "linear_token_logprobs": 8,
        "ppo_advantages": 1,
        "linear_policy_loss": 8,
        "value_loss": 8,
    }
    for row in timing.values():
        assert row["ms_per_step"] > 0 and row["reference_ms_per_step"] > 0
    for call, copy in zip(calls, copies, strict=True):
        tensors = [t for t in call.args if isinstance(t, torch.Tensor)]
        assert all(torch.equal(a, b) for a, b in zip(tensors, copy, strict=True))
    kernel.record_steps(())


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
    log.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == log.rows
    assert [row["x"] for row in log.rows] == [1, 3]


def test_evaluate_weighs_a_short_last_batch():
    trainer = online_trainer("ppo", batch_size=8)
    task = trainer.task
    last = task.held_out[-1].prompt

    def is_last(prompts, completions, completion_ids, **columns):
        return [float(p == last) for p in prompts]

    trainer.rewards = rewards.Rewards([is_last], [1.0])
    trainer.task = task.__class__(task.name, task.tokenizer, task.train, task.held_out[-9:])
    scores, texts = _evaluate(trainer)
    assert scores == {"is_last": pytest.approx(1 / 9)}
    assert len(texts) == 9


# --- command line ----------------------------------------------------------------------------


def test_flags_win_over_yaml_and_yaml_over_the_algorithms_defaults(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(
        "learning_rate: 1e-4\nepochs: 3\nsave_model: false\nreward_funcs: [a:b, c:d]\nkl_coef: 1\n"
        "data: null\n"
    )
    classes = (RunConfig, ModelConfig, DataConfig, OptimConfig, OnlineConfig, CriticConfig)
    argv = ["--config", str(path), "--epochs", "5", "--batch-size", "256"]
    defaults = {"epochs": 2, "num_generations": 8}
    run, _, data, optim, online, _ = parse_config(classes, argv, prog="test", defaults=defaults)
    assert (optim.learning_rate, online.epochs, optim.batch_size) == (1e-4, 5, 256)
    assert online.num_generations == 8
    assert isinstance(online.kl_coef, float) and online.kl_coef == 1.0
    assert online.reward_funcs == ["a:b", "c:d"] and data.data is None
    assert run.save_model is False


@pytest.mark.parametrize("text", ["learning_rat: 1e-4", "ppo: {epochs: 3}", "- epochs"])
def test_bad_yaml_is_refused(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"learning_rat|mapping"):
        parse_config((OptimConfig,), ["--config", str(path)], prog="test")


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
    from rlhf_kernels.trainer.algorithms import ALGORITHMS
    from rlhf_kernels.trainer.run import _OFFLINE

    assert cli.TRAINERS.keys() == ALGORITHMS.keys() | _OFFLINE.keys()


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
        "total_steps: 5\nreplay_steps: 1\nthreads: 1\n"
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
    functions = {t["function"] for t in summary["kernel_timing"]}
    assert functions >= {"linear_token_logprobs", "linear_policy_loss"}
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


def test_missing_extra_is_named(monkeypatch, capsys):
    monkeypatch.setattr(cli, "MODULE", "no_such_package.run")
    assert cli.main(["train", "ppo"]) == 1
    assert "rlhf_kernels[trainer]" in capsys.readouterr().err
