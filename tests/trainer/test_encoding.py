"""Rows as tokens: what tokenizers add, boundaries that tokens span, chat templates."""

import itertools
import random
import warnings

import pytest
import torch
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import models as vocabularies
from transformers import ByT5Tokenizer, CanineTokenizer, PreTrainedTokenizerFast

from tests.trainer.trainer_tools import CPU, write_jsonl

from rlhf_kernels.trainer import rewards
from rlhf_kernels.trainer.config import DataConfig, DPOConfig, ModelConfig, RewardConfig, UserError
from rlhf_kernels.trainer.data import (
    Row,
    character_tokenizer,
    load_task,
    load_tokenizer,
    parse_row,
    prompt_tokens,
    read_rows,
    row_tokens,
    whole_tokens,
)
from rlhf_kernels.trainer.encoding import encode_pair, encode_prompt, encode_row, pair_tokens
from rlhf_kernels.trainer.offline import DPO, SFT, RewardModelling
from rlhf_kernels.trainer.tokenizers import bpe_tokenizer

SPECIAL = ["<pad>", "<unk>", "<s>", "</s>", "[CLS]", "[SEP]", "<|User|>", "<|Assistant|>"]
TEXTS = [
    "hello world what is two plus two it is four 0 1 2 3\nQ: why? A: because it is so.",
    "the answer is 42, ok then.\n\nyes",
    "two\nit\nhello\nit\ntwo",
    "héllo wörld ﬁne 天気は晴れ",
] * 6
# Kind: vocabulary, its trainer, normalizer, pre-tokenizer.
KINDS = {
    "byte-level": (
        vocabularies.BPE(),
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
        None,
        pre_tokenizers.ByteLevel(add_prefix_space=False),
    ),
    "byte-level, prefix space": (
        vocabularies.BPE(),
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
        None,
        pre_tokenizers.ByteLevel(add_prefix_space=True),
    ),
    **{
        f"metaspace, {scheme}": (
            vocabularies.BPE(unk_token="<unk>"),
            trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False),
            None,
            pre_tokenizers.Metaspace(prepend_scheme=scheme),
        )
        for scheme in ("always", "first", "never")
    },
    "legacy metaspace": (
        vocabularies.BPE(unk_token="<unk>", fuse_unk=True),
        trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, show_progress=False),
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        None,
    ),
    "unigram": (
        vocabularies.Unigram(),
        trainers.UnigramTrainer(
            vocab_size=200, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
        ),
        normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()]),
        pre_tokenizers.Metaspace(),
    ),
    "wordpiece": (
        vocabularies.WordPiece(unk_token="<unk>"),
        trainers.WordPieceTrainer(vocab_size=300, special_tokens=SPECIAL, show_progress=False),
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
    ),
}
# What the tokenizer puts around a text.
AROUND = (None, "<s> $A", "<s> $A </s>", "$A </s>", "[CLS] $A [SEP]")


def made(kind, around=None, template=None):
    vocabulary, trainer, normalizer, words = KINDS[kind]
    tokenizer = Tokenizer(vocabulary)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if words is not None:
        tokenizer.pre_tokenizer = words
    if kind.startswith("byte"):
        tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(TEXTS, trainer)
    if around:
        marks = [(s, tokenizer.token_to_id(s)) for s in SPECIAL if s in around]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=around, special_tokens=marks
        )
    marks = {"bos_token": "<s>", "eos_token": "</s>"}
    if around == "[CLS] $A [SEP]":
        marks = {"cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=template,
        clean_up_tokenization_spaces=False,
        **marks,
    )


PIECES = (
    "hello", " world", "wor", "ld", " it", "it", "\n", "\n\n", " ", " is", "two", "plus ", "é",
    "A: ", "?", " héllo", "天気", "は晴れ", "ﬁne", "e\u0301",
)  # fmt: skip


def _texts(count):
    generator = random.Random(0)
    while count:
        prompt = "".join(generator.choices(PIECES, k=generator.randint(0, 4)))
        completion = "".join(generator.choices(PIECES, k=generator.randint(1, 4)))
        if (prompt + completion).strip():
            count -= 1
            yield prompt, completion


def _joined(parts):
    first, rest = parts
    return first + rest


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
    for prompt, completion in _texts(12):
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
        assert common + two == _joined(row_tokens(tokenizer, prompt, completion + " it"))
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
        ids = _joined(row_tokens(tokenizer, prompt, completion))
        assert tokenizer.convert_ids_to_tokens(ids) == ["<s>", "hello", "Ġit", "</s>"]
        assert ids == whole_tokens(tokenizer, prompt, completion)
        assert prompt_tokens(tokenizer, prompt) == ids[:2]
    chat = [{"role": "user", "content": "hello"}], [{"role": "assistant", "content": "it"}]
    ids = _joined(row_tokens(tokenizer, *chat))
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


USER, OTHER = {"role": "user", "content": "hello"}, {"role": "user", "content": "two"}
GOOD, BAD = {"role": "assistant", "content": "it is"}, {"role": "assistant", "content": "four"}


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


# --- chat templates --------------------------------------------------------------------------

CHATML = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
# The way of DeepSeek-R1: the generation prompt opens a thought, answers lose theirs.
THINKING = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '<|User|>' + m['content'] }}{% else %}"
    "{{ '<|Assistant|>' + m['content'].split('</think>')[-1] + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
# The way of Qwen: only the last answer keeps its thought.
LAST_THOUGHT = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' }}{% if loop.last %}{{ m['content'] }}"
    "{% else %}{{ m['content'].split('</think>')[-1] }}{% endif %}{{ '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
TOOLS = (
    "{% for t in tools or [] %}{{ t['function']['name'] + '\n' }}{% endfor %}"
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' }}"
    "{% if m['tool_calls'] is defined %}{% for c in m['tool_calls'] %}"
    "{{ c['function']['name'] + (c['function']['arguments'] | tojson) }}{% endfor %}{% else %}"
    "{{ m['content'] }}{% endif %}{{ '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
    "{% if quiet is defined %}{{ quiet }}{% endif %}"
)
PARTS = (
    "{% for m in messages %}{{ m['role'] + ':' }}{% for p in m['content'] %}"
    "{% if p['type'] == 'text' %}{{ p['text'] }}{% endif %}{% endfor %}{{ eos_token }}{% endfor %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ m['content'] + eos_token }}{% endfor %}"
)


def _chat(template):
    return made("byte-level", "<s> $A", template)


def _decoded(tokenizer, row):
    return tuple(map(tokenizer.decode, encode_row(tokenizer, parse_row(row, "supervised"))))


@pytest.mark.filterwarnings("ignore:the chat template leaves out")
def test_answers_of_templates_that_rewrite_history():
    thought = {"role": "assistant", "content": "<think>x</think>it is"}
    tokenizer = _chat(THINKING)
    with pytest.warns(UserWarning, match="a prompt has other tokens at its end"):
        found = _decoded(tokenizer, {"messages": [USER, thought]})
    assert found == ("<s><|User|>hello<|Assistant|>", "it is</s>")
    assert tokenizer.decode(prompt_tokens(tokenizer, [USER])).endswith("<|Assistant|><think>\n")
    found = _decoded(_chat(LAST_THOUGHT), {"messages": [USER, thought, OTHER, thought]})
    earlier = "<s>user\nhello</s>\n<s>assistant\nit is</s>\n<s>user\ntwo</s>\n<s>assistant\n"
    assert found == (earlier, "<think>x</think>it is</s>")


def test_conversations_that_begin_with_the_assistant():
    first, rest = _decoded(_chat(CHATML), {"messages": [GOOD]})
    assert first + rest == "<s>assistant\nit is</s>" and first == "<s>"


@pytest.mark.filterwarnings("ignore:a prompt has other tokens")
def test_tools_and_their_calls():
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    messages = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "name": "add", "content": "3"},
        {"role": "assistant", "content": "four"},
    ]
    schema = [{"type": "function", "function": {"name": "multiply"}}]
    for tools in (schema, '[{"type": "function", "function": {"name": "multiply"}}]'):
        row = {"messages": messages, "tools": tools, "chat_template_kwargs": {"quiet": "!"}}
        first, rest = _decoded(_chat(TOOLS), row)
        assert first.startswith('multiply\n<s>user\nhello</s>\n<s>assistant\nadd{"a": 1}</s>')
        assert first.endswith("<s>tool\n3</s>\n<s>assistant\n") and rest == "four</s>\n!</s>"
        parsed = parse_row({"prompt": [USER], "tools": tools}, "prompt")
        assert encode_prompt(_chat(TOOLS), parsed) == prompt_tokens(
            _chat(TOOLS), [USER], {"tools": schema}
        )
    # A template that reads the content beside calls, which is not there.
    reads = TOOLS.replace("{% for c in m", "{{ m['content'] + '' }}{% for c in m")
    assert reads != TOOLS
    assert _decoded(_chat(reads), {"messages": messages})[1] == "four</s>"
    for row, column in (
        ({"messages": messages}, "'tool_calls'"),
        ({"messages": [USER, GOOD], "tools": schema}, "'tools'"),
    ):
        silent = _chat("{% for m in messages %}{{ m['content'] }}{% endfor %}")
        with pytest.raises(UserError, match=f"chat template: {column}: expected a template that"):
            _decoded(silent, row)


SCHEMA = [{"type": "function", "function": {"name": "add"}}]


def _calling(arguments):
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def test_what_a_template_leaves_out_is_told_whatever_else_stands_there():
    asks = {"role": "user", "content": "use add, be brief"}
    first, second = ({"role": "system", "content": text} for text in ("be brief", "be good"))
    calls = [asks, _calling({"a": 1}), {"role": "tool", "name": "add", "content": "use"}, GOOD]
    words = _chat("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    no_calls = _chat(TOOLS.replace("['tool_calls'] is defined", "['x'] is defined"))
    users = _chat(
        "{% for m in messages %}{% if m['role'] in ('user', 'assistant') %}{{ m['content'] }}"
        "{% endif %}{% endfor %}"
    )
    one_system = _chat(
        "{{ messages[0]['content'] }}{{ messages[2:] | map(attribute='content') | join }}"
    )
    for tokenizer, row, what in (
        (words, {"messages": [asks, GOOD], "tools": SCHEMA}, "'tools'"),
        (words, {"messages": calls}, "'tool_calls'"),
        # The name stands in the tools and in what the user says.
        (no_calls, {"messages": calls, "tools": SCHEMA}, "'tool_calls'"),
        (users, {"messages": [asks, GOOD, {"role": "tool", "content": "add"}, GOOD]},
         "role 'tool'"),
        (users, {"messages": [first, asks, GOOD]}, "role 'system'"),
        (users, {"messages": [asks, {"role": "function_call", "content": "add"}, GOOD]},
         "role 'function_call'"),
        (one_system, {"messages": [first, second, asks, GOOD]}, "role 'system'.*"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"^a:1: chat template: .*{what}.*expected a templ"):
            encode_row(tokenizer, parse_row(row, "supervised")._replace(origin="a:1"))
    for tokenizer, row in ((words, [first, second, asks, GOOD]), (users, [asks, GOOD])):
        assert encode_row(tokenizer, parse_row({"messages": row}, "supervised"))


def test_arguments_of_calls_as_json_texts_are_written_once():
    items = TOOLS.replace(
        "(c['function']['arguments'] | tojson)", "c['function']['arguments'].items() | string"
    )
    text = TOOLS.replace("(c['function']['arguments'] | tojson)", "c['function']['arguments']")
    assert len({TOOLS, items, text}) == 3
    for template in (TOOLS, items, text):
        tokenizer = _chat(template)
        given = {"messages": [USER, _calling('{"a": "é"}')]}
        wanted = given if template == text else {"messages": [USER, _calling({"a": "é"})]}
        expected = {TOOLS: 'add{"a": "é"}', text: 'add{"a": "é"}'}.get(template, "add")
        found = _decoded(tokenizer, given)
        assert found == _decoded(tokenizer, wanted) and found[1].startswith(expected)
    # What is no object stays as it is.
    assert _decoded(_chat(TOOLS), {"messages": [USER, _calling("1 2")]})[1] == 'add"1 2"</s>'


@pytest.mark.filterwarnings("ignore:a prompt has other tokens")
def test_reasoning_that_a_template_leaves_out_is_warned_of():
    thought = {"role": "assistant", "content": "it is", "reasoning_content": "two plus two"}
    for message in (GOOD | {"content": "<think>x</think>it is"}, thought):
        with pytest.warns(UserWarning, match="leaves out a part of an answer"):
            encode_row(_chat(THINKING), parse_row({"messages": [USER, message]}, "supervised"))
    whole = _chat(
        CHATML.replace("m['content']", "m['content'] + m['reasoning_content'] | default('')")
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode_row(whole, parse_row({"messages": [USER, thought]}, "supervised"))


@pytest.mark.filterwarnings("ignore:(a prompt has other|the chat template leaves out)")
def test_pairs_that_are_equal_as_tokens_are_refused():
    one, two = (GOOD | {"content": f"<think>{t}</think>it is"} for t in "xy")
    conversations = Row([USER], None, [one], [two], origin="a:3")
    texts = Row("hello", None, " World", " world", origin="a:3")
    for tokenizer, row in (
        (_chat(THINKING), conversations),
        (made("wordpiece", AROUND[-1]), texts),
    ):
        with pytest.raises(UserError, match=r"^a:3: 'chosen' and 'rejected': .*differ as tokens"):
            encode_pair(tokenizer, row, scored=True)


def test_content_in_parts_is_text():
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    row = {"messages": [{"role": "user", "content": parts}, GOOD]}
    assert _decoded(_chat(CHATML), row)[0] == "<s>user\nhello</s>\n<s>assistant\n"
    # A template that reads nothing but parts.
    assert _decoded(_chat(PARTS), row) == ("user:hello</s>", "assistant:it is</s>")


@pytest.mark.parametrize(
    ("template", "row", "match"),
    [
        (None, {"messages": [USER, GOOD]}, "chat template: the tokenizer has none"),
        (ALTERNATING, {"messages": [USER, OTHER, GOOD]}, "roles must alternate .roles: user, user"),
        (ALTERNATING, {"messages": [GOOD]}, "roles must alternate .roles: assistant"),
        ("{{ messages[0].x.y }}", {"messages": [USER, GOOD]}, "UndefinedError"),
        ("{% if %}", {"messages": [USER, GOOD]}, "TemplateSyntaxError"),
        ("{{ 1 + messages }}", {"messages": [USER, GOOD]}, "TypeError"),
        (
            CHATML,
            {"messages": [USER, GOOD], "chat_template_kwargs": {"tokenize": True}},
            "chat_template_kwargs: expected arguments of the template alone",
        ),
    ],
)
def test_errors_of_templates_name_the_row(tmp_path, template, row, match):
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": [USER, GOOD]}, row])
    second = read_rows(path, "supervised")[1]
    tokenizer = made("byte-level", None, template)
    with pytest.raises(UserError, match=rf"a.jsonl:2: .*{match}") as error:
        SFT(tokenizer, None).encode(second)
    assert "\n" not in str(error.value)
    pair = Row(second.prompt, None, second.completion, [BAD], second.columns, second.origin)
    with pytest.raises(UserError, match=rf"a.jsonl:2: .*{match}"):
        DPO(tokenizer, None, DPOConfig()).encode(pair)
    with pytest.raises(UserError, match=r"a.jsonl:2: "):
        encode_prompt(tokenizer, second) if second.prompt else encode_row(tokenizer, second)


def test_texts_that_the_tokenizer_refuses_name_their_characters():
    row = Row("1*2=", "2", origin="a.jsonl:3")
    with pytest.raises(
        UserError, match=r"a.jsonl:3: tokenizer: cannot encode '1\*2=2': no tokens for \['\*'\]"
    ):
        encode_row(character_tokenizer("0123456789+-="), row)
    with pytest.raises(UserError, match="cannot encode"):
        prompt_tokens(bpe_tokenizer(TEXTS, 400), "a\ud800")
    for make in (character_tokenizer, lambda text: bpe_tokenizer([text], 300)):
        with pytest.raises(UserError, match="half of a surrogate pair"):
            make("a\udc00")


def test_rollouts_and_training_see_the_same_prompt():
    for around in (None, "<s> $A", "<s> $A </s>"):
        tokenizer = made("byte-level", around)
        first, _ = row_tokens(tokenizer, "Q: why?\n", "because")
        assert prompt_tokens(tokenizer, "Q: why?\n") == first
        assert first[-1] != tokenizer.eos_token_id
    tokenizer = _chat(CHATML)
    assert prompt_tokens(tokenizer, [USER]) == row_tokens(tokenizer, [USER], [GOOD])[0]


def test_a_row_without_completion_cannot_be_learned():
    with pytest.raises(UserError, match=r"a.jsonl:1: row: expected a completion"):
        SFT(bpe_tokenizer(TEXTS, 400), None).encode(Row("q", origin="a.jsonl:1"))
