"""The forms of rows that map by themselves, and what a bad row says."""

import json
from decimal import Decimal

import pytest

from tests.trainer.trainer_tools import write_jsonl

from rlhf_kernels.trainer.config import DataConfig, UserError
from rlhf_kernels.trainer.data import Row, Sampler, load_task, parse_row, read_rows
from rlhf_kernels.trainer.rows import parse_rows, template_arguments

USER, MORE = {"role": "user", "content": "Hi"}, {"role": "user", "content": "And?"}
YES, NO = {"role": "assistant", "content": "Hello"}, {"role": "assistant", "content": "Go"}
SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = [USER, YES]
PRINTED = "[{'content': 'Hi', 'role': 'user'}\n {'content': 'Hello', 'role': 'assistant'}]"


def said(*pairs):
    return [{"from": who, "value": what} for who, what in pairs]


SUPERVISED = [
    # TRL's mixed forms: a text beside a conversation is the user's or the assistant's.
    ({"prompt": "Hi", "completion": [YES]}, [USER], [YES]),
    ({"prompt": [USER], "completion": "Hello"}, [USER], [YES]),
    ({"prompt": "Hi", "completion": [USER, YES]}, [USER], [YES]),
    ({"prompt": "Hi", "completion": [SYSTEM, YES]}, [SYSTEM, USER], [YES]),
    ({"prompt": [SYSTEM, USER], "completion": [USER, YES]}, [SYSTEM, USER], [YES]),
    ({"messages": [SYSTEM, USER, YES, MORE, NO]}, [SYSTEM, USER, YES, MORE], [NO]),
    ({"messages": [YES]}, [], [YES]),
    # UltraChat.
    ({"prompt": "Hi", "prompt_id": "7", "messages": [USER, YES]}, [USER], [YES]),
    # ShareGPT.
    ({"conversations": said(("human", "Hi"), ("gpt", "Hello"))}, [USER], [YES]),
    (
        {"conversations": said(("human", "Hi"), ("gpt", "Hello")), "system": "Be brief."},
        [SYSTEM, USER],
        [YES],
    ),
    ({"conversations": said(("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"))},
     [SYSTEM, USER], [YES]),
    ({"conversations": [USER, YES], "id": 3}, [USER], [YES]),
    ({"messages": said(("human", "Hi"), ("chatgpt", "Hello"))}, [USER], [YES]),
    # Alpaca, Dolly.
    ({"instruction": "Add.", "input": "1 2", "output": "3"}, "Add.\n1 2\n", "3"),
    ({"instruction": "Add.", "input": "", "output": "3", "text": "x"}, "Add.\n", "3"),
    ({"instruction": "Add.", "input": None, "output": "3"}, "Add.\n", "3"),
    ({"instruction": "Add.", "output": "3"}, "Add.\n", "3"),
    ({"instruction": "Add.", "context": "1 2", "response": "3"}, "Add.\n1 2\n", "3"),
    ({"query": "Add.", "response": "3"}, "Add.\n", "3"),
    ({"question": "Add.", "answer": "3"}, "Add.\n", "3"),
    ({"question": "Add.", "context": "1 2", "answer": "3"}, "Add.\n1 2\n", "3"),
    ({"query": "Add.", "input": "1 2", "context": "", "response": "3"}, "Add.\n1 2\n", "3"),
    # Whole conversations beside the prompt, with and without the system message.
    ({"prompt": [USER], "completion": [SYSTEM, USER, YES]}, [SYSTEM, USER], [YES]),
    ({"prompt": [SYSTEM, USER], "completion": [SYSTEM, USER, YES]}, [SYSTEM, USER], [YES]),
    # Several turns that begin with the assistant's.
    ({"prompt": [USER], "completion": [YES, MORE, NO]}, [USER], [YES, MORE, NO]),
]  # fmt: skip
PREFERENCES = [
    # Ultrafeedback.
    ({"prompt": "Hi", "chosen": [USER, YES], "rejected": [USER, NO], "score_chosen": 8.5,
      "messages": [USER, YES]}, [USER], [YES], [NO]),
    ({"prompt": "Hi", "chosen": [SYSTEM, USER, YES], "rejected": [SYSTEM, USER, NO]},
     [SYSTEM, USER], [YES], [NO]),
    ({"prompt": "Hi", "chosen": [YES], "rejected": [NO]}, [USER], [YES], [NO]),
    ({"prompt": [USER], "chosen": "Hello", "rejected": "Go"}, [USER], [YES], [NO]),
    ({"prompt": [USER], "chosen": [USER, YES], "rejected": [USER, NO]}, [USER], [YES], [NO]),
    ({"prompt": [USER], "chosen": [YES], "rejected": [NO]}, [USER], [YES], [NO]),
    ({"prompt": [USER], "chosen": YES, "rejected": NO}, [USER], [YES], [NO]),
    ({"conversations": said(("human", "Hi")), "chosen": said(("gpt", "Hello"))[0],
      "rejected": said(("gpt", "Go"))[0]}, [USER], [YES], [NO]),
    # Without a prompt column; what has a user of its own has its prompt too.
    ({"messages": [SYSTEM, USER], "chosen": "Hello", "rejected": "Go"},
     [SYSTEM, USER], [YES], [NO]),
    ({"messages": [USER], "chosen": YES, "rejected": [NO]}, [USER], [YES], [NO]),
    ({"messages": [USER, YES], "chosen": [USER, YES], "rejected": [USER, NO]},
     [USER], [YES], [NO]),
    ({"prompt": [USER], "chosen": [SYSTEM, USER, YES], "rejected": [SYSTEM, USER, NO]},
     [SYSTEM, USER], [YES], [NO]),
    ({"prompt": [USER], "chosen": [YES, MORE, YES], "rejected": [NO]},
     [USER], [YES, MORE, YES], [NO]),
    ({"messages": [SYSTEM, USER], "chosen": [USER, YES], "rejected": [USER, NO]},
     [SYSTEM, USER], [YES], [NO]),
    ({"messages": [USER], "chosen": [YES, MORE, YES], "rejected": [NO]},
     [USER], [YES, MORE, YES], [NO]),
    ({"question": "Why?", "context": "x", "chosen": "A", "rejected": "B"}, "Why?\nx\n", "A", "B"),
    ({"chosen": "A", "rejected": "B", "input": ""}, "", "A", "B"),
    ({"question": "Why?", "chosen": "A", "rejected": "B", "system": "s"}, "s\nWhy?\n", "A", "B"),
    ({"question": "Why?", "chosen": "A", "rejected": "B", "system": ""}, "Why?\n", "A", "B"),
    ({"instruction": "Do.", "input": "x", "chosen": "A", "rejected": "B"}, "Do.\nx\n", "A", "B"),
    ({"chosen": said(("human", "Hi"), ("gpt", "Hello")),
      "rejected": said(("human", "Hi"), ("gpt", "Go"))}, [USER], [YES], [NO]),
]  # fmt: skip


@pytest.mark.parametrize(("row", "prompt", "completion"), SUPERVISED)
def test_supervised_forms(row, prompt, completion):
    before = json.dumps(row)
    assert parse_row(row, "supervised")[:4] == (prompt, completion, None, None)
    assert json.dumps(row) == before
    if prompt:
        asked = parse_row(row | {"answer": "3 #### 3"} if "answer" in row else row, "prompt")
        # UltraChat's first message is a column of its own, as a text.
        assert asked.prompt == (row["prompt"] if "prompt_id" in row else prompt)


@pytest.mark.parametrize(("row", "prompt", "chosen", "rejected"), PREFERENCES)
def test_preference_forms(row, prompt, chosen, rejected):
    assert parse_row(row, "preference")[:4] == (prompt, None, chosen, rejected)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        # TRL's unpaired preferences; a table may hold the labels as numbers or texts.
        ({"prompt": "Hi", "completion": "A", "label": True}, [("Hi", "A", True)]),
        ({"prompt": [USER], "completion": [NO], "label": False}, [([USER], [NO], False)]),
        ({"prompt": "Hi", "completion": "A", "label": 0}, [("Hi", "A", False)]),
        ({"prompt": "Hi", "completion": "A", "label": "True"}, [("Hi", "A", True)]),
        ({"messages": [USER, YES], "label": 1.0}, [([USER], [YES], True)]),
        # A preference is two completions.
        ({"prompt": "Hi", "chosen": "A", "rejected": "B"}, [("Hi", "A", True), ("Hi", "B", False)]),
        (
            {"chosen": [USER, YES], "rejected": [USER, NO]},
            [([USER], [YES], True), ([USER], [NO], False)],
        ),
    ],
)
def test_unpaired_forms(row, expected):
    found = parse_rows(row, "unpaired")
    assert [(r.prompt, r.completion, r.columns["label"]) for r in found] == expected


ONE, TWO = {"chosen": [YES], "rejected": [NO]}, {"completion": [YES]}
SYSTEMS = [
    ("preference", {"conversations": said(("human", "Hi")), **ONE}, [USER]),
    ("preference", {"conversations": [USER], "chosen": "Hello", "rejected": "Go"}, [USER]),
    ("preference", {"messages": [USER], **ONE}, [USER]),
    ("preference", {"prompt": [USER], **ONE}, [USER]),
    ("preference", {"prompt": "Hi", **ONE}, [USER]),
    ("preference", {"prompt": "Hi", "chosen": [USER, YES], "rejected": [USER, NO]}, [USER]),
    ("preference", {"chosen": [USER, YES], "rejected": [USER, NO]}, [USER]),
    ("preference", {"question": "Why?", **ONE}, [USER | {"content": "Why?\n"}]),
    ("unpaired", {"prompt": [USER], **ONE}, [USER]),
    ("unpaired", {"prompt": [USER], **TWO, "label": True}, [USER]),
    ("supervised", {"prompt": [USER], **TWO}, [USER]),
    ("supervised", {"prompt": "Hi", **TWO}, [USER]),
    ("supervised", {"prompt": [USER], "completion": "Hello"}, [USER]),
    ("supervised", {"messages": [USER, YES]}, [USER]),
    ("supervised", {"messages": [YES]}, []),
    ("supervised", {"conversations": [USER, YES, MORE, NO]}, [USER, YES, MORE]),
    ("prompt", {"prompt": [USER]}, [USER]),
    ("prompt", {"messages": [USER]}, [USER]),
]


@pytest.mark.parametrize("column", ["system", "system_prompt"])
@pytest.mark.parametrize(("kind", "row", "prompt"), SYSTEMS)
def test_a_system_column_is_the_first_message_of_a_conversation(kind, row, prompt, column):
    for empty in ({}, {column: None}, {column: ""}):
        assert parse_rows(row | empty, kind)[0].prompt == prompt
    for more in ({}, {"system": "Be brief.", "system_prompt": "Be brief."}):
        for found in parse_rows(row | {column: "Be brief."} | more, kind):
            assert found.prompt == [SYSTEM, *prompt]
            assert found[1:4] == parse_rows(row, kind)[0][1:4] or kind == "unpaired"
    with pytest.raises(UserError, match=f"{column!r}: expected a text, found 3"):
        parse_rows(row | {column: 3}, kind)
    for name in ("prompt", "messages", "conversations"):
        if isinstance(row.get(name), list) and prompt:
            own = row | {name: [SYSTEM, *row[name]]}
            assert parse_rows(own | {column: "Be brief."}, kind)[0].prompt == [SYSTEM, *prompt]
            with pytest.raises(UserError, match=f"{column!r}: expected what the conversation's sy"):
                parse_rows(own | {column: "Be long."}, kind)
    with pytest.raises(UserError, match="'system' and 'system_prompt': expected one text"):
        parse_rows(row | {"system": "a", "system_prompt": "b"}, kind)


@pytest.mark.parametrize(
    ("kind", "row", "prompt"),
    [
        ("preference", {"prompt": "p", "chosen": "A", "rejected": "B"}, "s\np"),
        ("preference", {"question": "Why?", "chosen": "A", "rejected": "B"}, "s\nWhy?\n"),
        ("unpaired", {"prompt": "p", "completion": "A", "label": True}, "s\np"),
        ("supervised", {"prompt": "p", "completion": "A"}, "s\np"),
        ("supervised", {"instruction": "Do.", "output": "A"}, "s\nDo.\n"),
        ("prompt", {"prompt": "p"}, "s\np"),
        # Whole texts that hold it.
        ("supervised", {"text": "system: s, user: q"}, ""),
        ("preference", {"chosen": "s q A", "rejected": "s q B"}, "s q"),
    ],
)
def test_a_system_column_precedes_texts(kind, row, prompt):
    for column in ("system", "system_prompt"):
        assert parse_rows(row | {column: "s"}, kind)[0].prompt == prompt


@pytest.mark.parametrize("label", [None, 2, "good", [True], float("nan")])
def test_unpaired_labels_that_are_neither_true_nor_false(label):
    with pytest.raises(UserError, match="'label': expected true or false"):
        parse_rows({"prompt": "Hi", "completion": "A", "label": label}, "unpaired")


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"query": "Add."}, "Add.\n"),
        ({"instruction": "Add.", "input": "1 2"}, "Add.\n1 2\n"),
        ({"conversations": said(("human", "Hi"))}, [USER]),
        ({"prompt": [USER], "completion": None}, [USER]),
        ({"messages": [USER, YES]}, [USER]),
    ],
)
def test_prompt_forms(row, prompt):
    assert parse_row(row, "prompt").prompt == prompt


def test_margins_are_finite_numbers():
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    for margin in (1, 0.5, Decimal("0.5"), -2):
        assert parse_row(pair | {"margin": margin}, "preference").columns["margin"] == float(margin)
    bad = (None, "big", "1", True, float("nan"), float("inf"), 10**400, 1e39, [1.0], {})
    for margin in bad:
        with pytest.raises(UserError, match="'margin': expected a finite number"):
            parse_row(pair | {"margin": margin}, "preference")


def test_a_margin_that_no_loss_uses_does_not_matter():
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    for margin in (None, "big", 2.0):
        row = pair | {"margin": margin}
        assert parse_row(row, "pair") == parse_row(pair | {"margin": 1.0}, "pair")
        assert "margin" not in parse_row(row, "pair").columns
        assert [r.completion for r in parse_rows(row, "unpaired")] == ["a", "b"]


def test_texts_that_are_json_stay_texts():
    """But for conversations: they are what a model is to answer with."""
    texts = (
        '[{"name": "add", "role": "tool call"}]', '{"role": "user", "content": "a"}', "[{}]",
        'A list: [{"role": "user"}]', '[{"from": "Paris", "value": 3}]', '[1, {"role": "chef"}]',
    )  # fmt: skip
    for text in texts:
        assert parse_row({"prompt": "p", "completion": text}, "supervised").completion == text


def test_arguments_of_the_chat_template_are_columns():
    tools = [{"type": "function", "function": {"name": "add", "x": None}}]
    row = {"prompt": [USER], "tools": tools, "chat_template_kwargs": '{"thinking": false}'}
    found = parse_row(row, "prompt").template
    assert found == {
        "tools": [{"type": "function", "function": {"name": "add"}}],
        "thinking": False,
    }
    assert template_arguments({"tools": [], "chat_template_kwargs": None}) == {}
    # They mean nothing beside texts.
    row = {"prompt": "p", "tools": "hammer", "chat_template_kwargs": 3}
    assert parse_row(row, "prompt").columns == {"tools": "hammer", "chat_template_kwargs": 3}


def test_columns_of_any_type_reach_reward_functions():
    extra = {
        "a": None,
        "b": [1, {"c": float("nan")}],
        "d": 10**30,
        "e": b"\0",
        "f": {"g": "\ud800"},
    }
    assert parse_row({"prompt": "p"} | extra, "prompt").columns == extra


TEAM = json.dumps([{"name": "Ann", "role": "developer"}, {"name": "Bob", "role": "user"}])
REQUEST = json.dumps([{"role": "system", "content": "Brief."}, {"role": "user", "content": "Hi"}])


@pytest.mark.parametrize("answer", [TEAM, REQUEST, json.dumps([{"from": "tool", "to": "user"}])])
def test_answers_of_json_are_texts(answer):
    """They answer a text, and are no conversation that ends with an answer."""
    for row in (
        {"prompt": "List our team, or a request.", "completion": answer},
        {"question": "Which?", "answer": answer},
        {"instruction": "List our team.", "output": answer},
    ):
        parsed = parse_row(row, "supervised")
        assert parsed.completion == answer and isinstance(parsed.prompt, str)


BAD = [
    ("supervised", {"prompt": "a\ud800", "completion": "b"}, "'prompt': .*half a surrogate pair"),
    # A conversation as its text: JSON, and as Python and NumPy print it.
    ("supervised", {"prompt": json.dumps(ASKED), "completion": "b"}, "'prompt': .*not the text"),
    ("supervised", {"prompt": "a", "completion": str(ASKED)}, "'completion': .*not the text"),
    ("supervised", {"text": json.dumps(ASKED, indent=1)}, "'text': .*not the text"),
    ("pair", {"chosen": PRINTED, "rejected": PRINTED}, "'chosen': .*not the text"),
    ("prompt", {"prompt": '[{"from": "human", "value": "a"}]'}, "'prompt': .*not the text"),
    ("supervised", {"text": "a\udfffb"}, "'text': .*half a surrogate pair.*at character 1"),
    ("supervised", {"messages": [USER, YES | {"content": "\ud800"}]}, "'messages' in message 2: "),
    ("supervised", {"prompt": None, "completion": "b"}, "'prompt': expected a text .*found None"),
    ("supervised", {"prompt": "a", "completion": None}, "'completion': expected.*found None"),
    ("supervised", {"prompt": "a", "completion": ["b"]}, "'completion': expected a text or a list"),
    ("supervised", {"messages": "Hi"}, "'messages': expected a list of messages, found 'Hi'"),
    ("supervised", {"messages": [USER, "Hello"]}, "'messages': expected a text or a list"),
    ("supervised", {"messages": [USER, {"content": "x"}]}, "'messages': expected a 'role' in mess"),
    ("supervised", {"messages": [USER, {"role": "assistant"}]}, "expected 'content' or 'tool_c"),
    ("supervised", {"messages": [USER, YES | {"content": 3}]}, "expected a text as 'content'"),
    (
        "supervised",
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, YES]},
        "'messages': expected parts of type 'text' in message 1, found .'type': 'image_url'",
    ),
    ("supervised", {"conversations": said(("human", "Hi"))}, "'conversations': expected an assis"),
    ("supervised", {"instruction": "", "output": "x"}, "'instruction': expected a text, found ''"),
    ("supervised", {"instruction": "x", "output": ""}, "'output': expected a text, found ''"),
    ("supervised", {"instruction": "x", "output": "y", "history": [["a", "b"]]}, "'history': "),
    ("supervised", {"instruction": "x"}, "'output': expected a text, found 'no such column'"),
    ("supervised", {"prompt": "Bye", "completion": [USER, YES]}, "'prompt': .*conversation rep"),
    ("supervised", {"prompt": [USER], "completion": [USER]}, "answer: expected a message after"),
    # What a user or a system says is no answer.
    ("supervised", {"prompt": [USER], "completion": [MORE]}, "'completion': expected an assistant"),
    ("supervised", {"prompt": "Hi", "completion": [USER, MORE]}, "'completion': expected an assis"),
    ("supervised", {"prompt": [USER], "completion": [MORE, YES]}, "'completion': expected an answ"),
    ("supervised", {"prompt": "Hi", "completion": [USER, MORE, YES]}, "'completion': .*own messag"),
    ("supervised", {"prompt": [USER], "completion": [USER, MORE, YES]}, "'completion': expected a"),
    ("supervised", {"prompt": [SYSTEM, USER], "completion": [SYSTEM | {"content": "x"}, USER, YES]},
     "'completion': expected an answer alone, or a conversation that begins with the prompt's own"),
    ("prompt", {"prompt": [USER], "completion": [MORE]}, "'completion': expected an assistant's"),
    ("preference", {"prompt": [USER], "chosen": [MORE, YES], "rejected": [MORE, NO]}, "'chosen': "),
    ("preference", {"prompt": [USER], "chosen": [YES], "rejected": [MORE, NO]}, "'rejected': expe"),
    ("preference", {"prompt": [USER], "chosen": [YES], "rejected": [MORE]}, "'rejected': .*assist"),
    ("preference", {"prompt": [USER], "chosen": [SYSTEM, USER, YES], "rejected": [USER, NO]},
     "different answers to one prompt"),
    ("preference", {"messages": [USER], "chosen": [MORE, YES], "rejected": [MORE, NO]}, "'chosen'"),
    ("preference", {"conversations": [USER], "chosen": MORE, "rejected": NO}, "'chosen': expected"),
    ("preference", {"chosen": [USER, YES], "rejected": [USER, MORE]}, "'rejected': expected an as"),
    ("preference", {"prompt": "Hi", "chosen": [USER, MORE, YES], "rejected": [USER, USER, NO]},
     "'chosen': expected an answer alone"),
    # Whole texts have no place for a system column.
    ("supervised", {"text": "q a", "system": "s"}, "'system': expected a text that the row's text"),
    ("preference", {"chosen": "A", "rejected": "B", "system_prompt": "s"}, "'system_prompt': expe"),
    ("supervised", {"chosen": "a", "rejected": "b"}, "found .'chosen', 'rejected'."),
    ("supervised", {"messages": [USER, YES], "tools": "{"}, "'tools': expected JSON"),
    ("supervised", {"messages": [USER, YES], "tools": [1]}, "'tools': expected a list of JSON sch"),
    ("supervised", {"messages": [USER, YES], "chat_template_kwargs": []}, "expected an object"),
    ("preference", {"prompt": "Bye", "chosen": [USER, YES], "rejected": [USER, NO]}, "both conver"),
    ("preference", {"prompt": [USER], "chosen": "x", "rejected": [NO]}, "two answers of one form"),
    ("preference", {"prompt": "p", "chosen": "x", "rejected": "x"}, "one form that differ"),
    ("preference", {"prompt": [USER], "chosen": [USER, YES], "rejected": [YES]}, "different ans"),
    ("preference", {"prompt": "p", "chosen": "", "rejected": "x"}, "'chosen': expected.*found ''"),
    ("preference", {"prompt": "p", "chosen": "a", "rejected": None}, "'rejected': .*found None"),
    ("preference", {"prompt": "p", "chosen": "a", "rejected": 3}, "'rejected': .*found 3"),
    ("preference", {"chosen": [USER], "rejected": [USER, YES]}, "neither begins the other"),
    ("preference", {"messages": [USER, YES], "chosen": "a", "rejected": "b"}, "answer, found"),
    *(
        ("preference", {name: "Why?", "chosen": "a", "rejected": "b"}, f"{name!r}: expected the pr")
        for name in ("input", "problem", "context", "history", "conversation")
    ),
    ("prompt", {"messages": [YES]}, "'messages': expected something to answer"),
    ("prompt", {"query": 3}, "'query': expected a text, found 3"),
    *(
        ("prompt", {"prompt": "p", name: 1}, f"{name!r}: expected a column of another name")
        for name in ("prompts", "completions", "completion_ids", "finished", "trainer_state")
    ),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "row", "match"), BAD)
def test_bad_rows_say_what_is_wrong(tmp_path, kind, row, match):
    good = {"prompt": "p", "completion": "c", "chosen": "a", "rejected": "b"}
    path = write_jsonl(tmp_path / "a.jsonl", [good, row])
    with pytest.raises(UserError, match=rf"a.jsonl:2: .*{match}") as error:
        read_rows(path, kind)
    assert "\n" not in str(error.value)


def test_rows_are_equal_wherever_they_come_from():
    assert Row("a", origin="x:1") == Row("a", origin="y:2") != Row("b", origin="x:1")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"eval_size": 9}, "eval_size: expected less than the 8 rows of .*a.jsonl.* found 9"),
        ({"eval_size": 8}, "eval_size: expected less than the 8 rows"),
        ({"eval_size": 2, "max_prompt_tokens": 1},
         "max_prompt_tokens: .*found 1; the prompts of all 6 are longer, 9 to 9 tokens"),
    ],
)  # fmt: skip
def test_too_few_rows_are_counted(tmp_path, options, match):
    path = write_jsonl(
        tmp_path / "a.jsonl", [{"prompt": f"12345678{i}", "completion": "1"} for i in range(8)]
    )
    with pytest.raises(UserError, match=match):
        load_task(DataConfig(data=path, vocab_size=300, **options), "supervised", seed=0)


def test_the_stage_that_uses_a_margin_names_the_row_without_one(tmp_path):
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    path = write_jsonl(tmp_path / "a.jsonl", [pair | {"margin": 1}, pair | {"margin": None}] * 2)
    config = DataConfig(data=path, eval_size=1, vocab_size=300)
    assert len(load_task(config, "pair", seed=0).train) == 3
    with pytest.raises(UserError, match=r"a.jsonl:2: 'margin': expected a finite number .* None"):
        load_task(config, "preference", seed=0)
    with pytest.raises(UserError, match="data: expected a file of preferences"):
        load_task(DataConfig(), "pair", seed=0)


def test_dropped_rows_are_counted(tmp_path):
    rows = [{"prompt": "1" * (3 + i % 2), "completion": "1"} for i in range(8)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    held_out = write_jsonl(tmp_path / "b.jsonl", rows)
    config = DataConfig(data=path, eval_data=held_out, vocab_size=258, max_prompt_tokens=3)
    task = load_task(config, "supervised", seed=0)
    assert (len(task.train), len(task.held_out), task.dropped) == (4, 4, 8)
    with pytest.raises(
        UserError, match=r"batch_size: expected at most the 4 training rows .* found 5"
    ):
        Sampler(len(task.train), 5, seed=0)
