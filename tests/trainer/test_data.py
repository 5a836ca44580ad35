"""The trainer's data and rewards."""

import gzip
import json
import math
from decimal import Decimal

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from tests.trainer.trainer_tools import (
    CPU,
    DATA,
    one_thread,  # noqa: F401
    supervised_batch,
    tiny_task,
    write_jsonl,
)

from rlhf_kernels.trainer import answers, models, rewards
from rlhf_kernels.trainer.config import ModelConfig
from rlhf_kernels.trainer.data import (
    Row,
    Sampler,
    bpe_tokenizer,
    character_tokenizer,
    pad,
    parse_row,
    position_ids,
    prompt_tokens,
    read_rows,
    row_tokens,
)

GSM8K, HH = DATA / "gsm8k_train.jsonl", DATA / "hh_rlhf_harmless_test.jsonl.gz"


def test_final_number():
    assert answers.final_number("so\n#### 1,234") == 1234
    assert answers.final_number("#### -3.50\n") == answers.final_number("####-3.5")
    assert answers.final_number("#### $12") == 12
    assert answers.final_number("#### 1,234,567.5") == Decimal("1234567.5")
    # A comma that is not before thousands: 5.5 in many countries, or a list.
    for text in ("#### 5,5", "#### 1,23", "#### 1234,567", "#### 5,,,", "#### 5,", "#### ,500"):
        assert answers.final_number(text) is None, text
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
    found = both(["p", "q"], ["a", "bcd"], [[1], [2, 3]], {"bonus": [2.0, 5.0]})
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
        (_raises, ValueError, "^_raises: raised KeyError.*no such column.*at sample 0, prompt 'p'"),
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
    found = loaded(*given, {"finished": [True, False]})[:, 0].tolist()
    for text, reward in (("1+2=3<eos>", found[0]), ("10+20=30", found[1])):
        ids = torch.tensor([task.tokenizer(text.replace("<eos>", ""))["input_ids"]])
        if "<eos>" in text:
            ids = torch.cat([ids, torch.tensor([[task.tokenizer.eos_token_id]])], 1)
        theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
        with torch.no_grad():
            hidden = theirs.base_model(input_ids=ids).last_hidden_state
            assert reward == pytest.approx(theirs.score(hidden)[0, -1, 0].item(), abs=1e-5)


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
    ("prompt", "{", "a.jsonl.gz:2: Expecting"),
    ("prompt", "[]", "a.jsonl.gz:2: row: expected an object"),
    ("prompt", {"question": "q"}, "a.jsonl.gz:2: 'answer': expected.*found 'no such column'"),
    ("prompt", {"question": "q", "answer": "four"}, "a.jsonl.gz:2: 'answer': expected an end in"),
    ("prompt", {"prompt": ""}, "a.jsonl.gz:2: 'prompt': expected.*found ''"),
    ("prompt", {"prompt": 3}, "a.jsonl.gz:2: 'prompt': expected.*found 3"),
    ("prompt", {"messages": []}, "a.jsonl.gz:2: 'messages': expected"),
    ("supervised", {"prompt": "p", "completion": ""}, "a.jsonl.gz:2: 'completion': expected"),
    ("supervised", {"messages": CHAT}, "a.jsonl.gz:2: 'messages': expected an assistant's at the"),
    ("supervised", {"messages": [{"role": "user"}]}, "a.jsonl.gz:2: 'messages': expected"),
    ("supervised", {"label": 1}, "a.jsonl.gz:2: 'prompt': expected"),
    ("preference", {"chosen": "a"}, "a.jsonl.gz:2: 'rejected': expected.*'no such column'"),
    ("preference", {"chosen": "a", "rejected": "a"}, "a.jsonl.gz:2: .*two answers of one form"),
    ("preference", {"chosen": "a b", "rejected": CHAT}, "a.jsonl.gz:2: .*two answers of one form"),
    ("preference", {"chosen": CHAT, "rejected": CHAT + ANSWER}, "a.jsonl.gz:2: .*neither begins"),
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
    assert tokenizer.decode(prompt) == "\n\nuser:\nHi<eos>\n\nassistant:\n"
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
