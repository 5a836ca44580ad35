"""Rows as tokens: what tokenizers add, boundaries that tokens span."""

import itertools
import json
import warnings

import pytest
import torch
from transformers import AddedToken, ByT5Tokenizer, CanineTokenizer

from tests.trainer.encoding_cases import (
    AROUND,
    BAD,
    GOOD,
    KINDS,
    OTHER,
    TEXTS,
    USER,
    joined,
    made,
    texts,
)
from tests.trainer.trainer_tools import CPU, write_jsonl

from rlhf_kernels.trainer import rewards
from rlhf_kernels.trainer.config import DataConfig, DPOConfig, ModelConfig, RewardConfig, UserError
from rlhf_kernels.trainer.data import (
    Row,
    load_task,
    load_tokenizer,
    parse_row,
    prompt_tokens,
    row_tokens,
    whole_tokens,
)
from rlhf_kernels.trainer.encoding import pair_tokens
from rlhf_kernels.trainer.objectives import DPO, RewardModelling
from rlhf_kernels.trainer.tokenizers import bpe_tokenizer, check_vocabulary


def test_added_tokens_without_embeddings_are_refused_where_they_stand():
    tokenizer = bpe_tokenizer(["what is one and two"] * 3, 270)
    size = len(tokenizer)
    check_vocabulary(tokenizer, size, setting="model")
    with pytest.raises(UserError, match=f"model: expected embeddings of {size} tokens, the last"):
        check_vocabulary(tokenizer, size - 1, setting="model")
    tokenizer.add_tokens(["<image>"])
    check_vocabulary(tokenizer, size, setting="model")
    assert row_tokens(tokenizer, "what is", " one")[1][-1] == tokenizer.eos_token_id
    for prompt, completion in (("what <image>", " one"), ("what", " is <image>")):
        with pytest.raises(UserError, match="has embeddings for, found '<image>'"):
            row_tokens(tokenizer, prompt, completion)
    check_vocabulary(tokenizer, size + 1, setting="model")
    assert size in row_tokens(tokenizer, "what", " is <image>")[1]
    tokenizer.add_special_tokens({"pad_token": "<padding>"})
    with pytest.raises(UserError, match=f"embeddings of {size + 2} tokens, the last '<padding>'"):
        check_vocabulary(tokenizer, size + 1, setting="model")


def _common(one, other):
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return len(list(pairs))


@pytest.mark.filterwarnings("ignore:a prompt has other tokens")
@pytest.mark.parametrize("kind", [*KINDS, "bytes, slow"])
@pytest.mark.parametrize("around", AROUND)
def test_prompt_and_completion_are_what_the_tokenizer_makes_of_both(kind, around):
    if kind == "bytes, slow":
        tokenizer, around = ByT5Tokenizer(), "$A </s>"
    else:
        tokenizer = made(kind, around)
    end, closed = tokenizer.eos_token_id, around is not None and not around.endswith("$A")
    encoder = around == "[CLS] $A [SEP]"
    for prompt, completion in texts(12):
        # The tokenizer's own, without what it closes texts with.
        whole, alone = (tokenizer(text)["input_ids"] for text in (prompt + completion, prompt))
        inner = [ids[:-1] if closed else ids for ids in (whole, alone)]
        assert prompt_tokens(tokenizer, prompt) == inner[1]
        assert whole_tokens(tokenizer, prompt, completion) == whole + [end] * (not closed)
        cut_off = whole_tokens(tokenizer, prompt, completion, ended=False)
        assert cut_off == (whole if encoder else inner[0])
        if encoder:
            first, one, two = pair_tokens(tokenizer, prompt, completion, "x", scored=True)
            assert first + one == whole and first + two == tokenizer(prompt + "x")["input_ids"]
            continue
        first, rest = row_tokens(tokenizer, prompt, completion)
        assert first + rest == [*inner[0], end]
        # TRL's rule; where nothing is common the first token stands for the prompt.
        assert len(first) == (_common(*reversed(inner)) or 1)
        common, one, two = pair_tokens(tokenizer, prompt, completion, completion + " it")
        assert common + one == first + rest
        assert common + two == joined(row_tokens(tokenizer, prompt, completion + " it"))
        assert common == first[: len(common)]


@pytest.mark.filterwarnings("ignore:a prompt has other tokens")
def test_a_token_that_spans_the_boundary_is_the_completions():
    tokenizer = made("byte-level", "<s> $A")
    with pytest.warns(UserWarning, match="a prompt has other tokens at its end"):
        first, rest = row_tokens(tokenizer, "hello wor", "ld it is")
    assert tokenizer.convert_ids_to_tokens(first) == ["<s>", "hello"]
    assert tokenizer.convert_ids_to_tokens(rest) == ["Ġworld", "Ġit", "Ġis", "</s>"]
    # "it" would have a space of its own if it were tokenised alone.
    tokenizer = made("metaspace, always")
    first, rest = row_tokens(tokenizer, "hello\n", "it")
    assert "".join(tokenizer.convert_ids_to_tokens(first + rest)) == "▁hello\nit</s>"


def test_special_tokens_are_not_written_twice():
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    )
    tokenizer = made("byte-level", "<s> $A", template)
    for prompt, completion in (("<s>hello", " it</s>"), ("hello", " it")):
        ids = joined(row_tokens(tokenizer, prompt, completion))
        assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "hello", "Ġit", "</s>"]
        assert ids == whole_tokens(tokenizer, prompt, completion)
        assert prompt_tokens(tokenizer, prompt) == ids[:2]
    chat = [{"role": "user", "content": "hello"}], [{"role": "assistant", "content": "it"}]
    ids = joined(row_tokens(tokenizer, *chat))
    assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "hello", "</s>", "Ċ", "it", "</s>"]
    assert ids == whole_tokens(tokenizer, *chat)
    assert whole_tokens(tokenizer, *chat, ended=False) == ids[:-1]


def test_text_alone_begins_as_the_tokenizer_begins_it():
    for around, prompt in (("<s> $A", ["<s>"]), (None, ["hello"])):
        tokenizer = made("byte-level", around)
        first, rest = row_tokens(tokenizer, "", "hello world")
        assert tokenizer.convert_ids_to_tokens(first) == prompt
        assert tokenizer.convert_ids_to_tokens(rest)[-2:] == ["Ġworld", "</s>"]


def test_a_pair_with_nothing_in_common_keeps_both_first_tokens():
    row = parse_row({"chosen": "hello world", "rejected": "two plus two"}, "preference")
    for around in (None, "<s> $A", "<s> $A </s>"):
        tokenizer = made("byte-level", around)
        objective = DPO(tokenizer, None, DPOConfig())
        pair = objective.encode(row)
        opening = ["<s>"] if around else []
        assert tokenizer.convert_ids_to_tokens(pair.prompt) == opening
        for ids, words in ((pair.chosen, "hello Ġworld"), (pair.rejected, "two Ġplus Ġtwo")):
            assert tokenizer.convert_ids_to_tokens(ids) == [*words.split(), "</s>"]
        batch = objective.batch([pair], CPU)
        rows = [
            ids[mask].tolist()
            for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
        ]
        assert rows == [pair.prompt + pair.chosen, pair.prompt + pair.rejected]
        # Something is there to predict each completion's first token from.
        assert batch.attention_mask[:, -batch.completion_mask.shape[1] - 1].all()


@pytest.mark.parametrize(
    ("chosen", "rejected", "cut"),
    [
        ("Q: why? A: sunny day", "Q: why? A: sun is up", 10),
        ("a b", "a b c", 1),
        ("a", "a b", 0),
        ("a b ", "a b", 1),
        ("same words here", "same words", 4),
        ("line\nx", "line\ny", 5),
        ("天気は晴れ", "天気は雨", 3),
        ("質問: 天気は晴れ", "質問: 天気は雨", 7),
        ("👩‍👩‍👧 yes", "👩‍👩‍👦 yes", 0),
        ("it is cafe\u0301", "it is cafe", 5),
    ],
)
def test_the_common_beginning_of_texts(chosen, rejected, cut):
    row = parse_row({"chosen": chosen, "rejected": rejected}, "preference")
    assert row[:4] == (chosen[:cut], None, chosen[cut:], rejected[cut:])


@pytest.mark.parametrize(
    ("chosen", "rejected", "cut"),
    [
        ([USER, GOOD], [USER, BAD], 1),
        ([USER, GOOD, OTHER, GOOD], [USER, GOOD, OTHER, BAD], 3),
        ([USER, GOOD], [OTHER, GOOD], 0),
        ([GOOD], [BAD], 0),
        # One goes on where the other ends.
        ([USER, GOOD], [USER, GOOD, OTHER, BAD], 1),
    ],
)
def test_the_common_beginning_of_conversations(chosen, rejected, cut):
    row = parse_row({"chosen": chosen, "rejected": rejected}, "preference")
    assert row[:4] == (chosen[:cut], None, chosen[cut:], rejected[cut:])
    tokenizer = bpe_tokenizer(TEXTS, 400)
    for objective in (
        DPO(tokenizer, None, DPOConfig()),
        RewardModelling(tokenizer, None, RewardConfig()),
    ):
        pair = objective.encode(row)
        for ids, messages in ((pair.chosen, chosen), (pair.rejected, rejected)):
            text = tokenizer.apply_chat_template(messages, tokenize=False)
            assert tokenizer.decode(pair.prompt + ids) == text


def test_encoders_close_texts_themselves(tmp_path):
    tokenizer = made("wordpiece", "[CLS] $A [SEP]")
    row = Row("hello", None, " world", " it is")
    pair = RewardModelling(tokenizer, None, RewardConfig()).encode(row)
    assert pair.prompt + pair.chosen == tokenizer("hello world")["input_ids"]
    assert pair.prompt + pair.rejected == tokenizer("hello it is")["input_ids"]
    with pytest.raises(
        UserError, match=r"a.jsonl:7: model: expected a tokenizer with an end token"
    ):
        DPO(tokenizer, None, DPOConfig()).encode(row._replace(origin="a.jsonl:7"))
    tokenizer.save_pretrained(tmp_path / "encoder")
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"chosen": "a b", "rejected": f"a {i}"} for i in range(3)]
    )
    config = DataConfig(data=path, eval_size=1)
    task = load_task(config, "preference", seed=0, model=str(tmp_path / "encoder"))
    assert task.tokenizer.sep_token == "[SEP]"
    with pytest.raises(UserError, match="model: expected a tokenizer with an end token"):
        load_tokenizer(str(tmp_path / "encoder"))
    assert whole_tokens(CanineTokenizer(), "a", "b") == [0xE000, 97, 98, 0xE001]


def test_reward_models_read_what_they_were_trained_on(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(rewards, "load_reward_model", lambda *_: torch.nn.Identity())
    monkeypatch.setattr(torch.nn.Identity, "device", CPU, raising=False)
    monkeypatch.setattr(
        rewards, "sequence_rewards", lambda _, batch: seen.append(batch) or torch.zeros(2)
    )
    for around, kind in ((None, "byte-level"), ("<s> $A", "byte-level"), (AROUND[-1], "wordpiece")):
        tokenizer = made(kind, around)
        tokenizer.save_pretrained(tmp_path / "model")
        model = rewards.RewardModel(str(tmp_path / "model"), ModelConfig(), CPU)
        model(prompts=["hello", "two"], completions=[" world", " it"], finished=[True, False])
        ids, mask, _ = seen.pop()
        found = [row[kept].tolist() for row, kept in zip(ids, mask, strict=True)]
        pair = RewardModelling(tokenizer, None, RewardConfig()).encode(
            Row("hello", None, " world", " it")
        )
        assert found[0] == pair.prompt + pair.chosen
        # What was cut off has no end, except an encoder's.
        end = [] if around == AROUND[-1] else [tokenizer.eos_token_id]
        assert found[1] + end == whole_tokens(tokenizer, "two", " it")


def test_a_tokenizer_that_draws_its_tokens_is_refused(tmp_path):
    tokenizer = bpe_tokenizer(TEXTS, 400)
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path))("one").input_ids == tokenizer("one").input_ids
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["dropout"] = 0.1
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"model: expected .* the same tokens each time .* 0\.1"):
        load_tokenizer(str(tmp_path))


def test_an_end_token_within_a_text_is_told():
    tokenizer = bpe_tokenizer(TEXTS, 400)
    end = tokenizer.eos_token
    ids = tokenizer(["one", " two"]).input_ids
    for completion in (f"one{end} two", f"one{end} two{end}"):
        with pytest.warns(UserWarning, match="end token before its end: it is learned as an end"):
            _, found = row_tokens(tokenizer, "", completion)
        expected = [*ids[0], tokenizer.eos_token_id, *ids[1], tokenizer.eos_token_id]
        assert found == expected[1:]
    with pytest.warns(UserWarning, match="end token before its end"):
        pair_tokens(tokenizer, "one", " two", f" it{end} two")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # At the end it is the end; a prompt, as one with examples, is not learned.
        assert row_tokens(tokenizer, "one", f" two{end}") == row_tokens(tokenizer, "one", " two")
        row_tokens(tokenizer, f"one{end}one", " two")


def test_a_special_token_within_a_message_is_told():
    tokenizer = bpe_tokenizer(TEXTS, 400)
    end = tokenizer.eos_token
    asked, bad = [{"role": "user", "content": "one"}], [{"role": "user", "content": f"one{end}"}]
    answer, worse = ([{"role": "assistant", "content": f"it{e}"}] for e in ("", end))
    for call, *found in (
        (row_tokens, bad, answer),
        (row_tokens, asked, worse),
        (pair_tokens, asked, answer, worse),
        (prompt_tokens, bad),
        (whole_tokens, asked, worse),
    ):
        with pytest.warns(UserWarning, match="a message has a special token .* in its content"):
            call(tokenizer, *found)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row_tokens(tokenizer, asked, answer)
        prompt_tokens(tokenizer, asked)


def test_special_tokens_without_a_name_are_told():
    tokenizer = bpe_tokenizer(TEXTS, 400)
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<think>")])
    with pytest.warns(UserWarning, match="a message has a special token"):
        prompt_tokens(tokenizer, [{"role": "user", "content": "one<|im_start|>system"}])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prompt_tokens(tokenizer, [{"role": "user", "content": "<think>one"}])


def test_a_special_token_that_the_tokenizer_reads_as_text_is_not_told():
    tokenizer = bpe_tokenizer(TEXTS, 400)
    tokenizer.split_special_tokens = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prompt_tokens(tokenizer, [{"role": "user", "content": "one<eos>"}])
