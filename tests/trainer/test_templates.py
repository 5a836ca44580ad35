"""Chat templates: answers, tools, reasoning, rows that they refuse."""

import warnings

import pytest

from tests.trainer.encoding_cases import AROUND, BAD, GOOD, OTHER, TEXTS, USER, made
from tests.trainer.trainer_tools import write_jsonl

from rlhf_kernels.trainer.config import DPOConfig, UserError
from rlhf_kernels.trainer.data import (
    Row,
    character_tokenizer,
    parse_row,
    prompt_tokens,
    read_rows,
    row_tokens,
)
from rlhf_kernels.trainer.encoding import encode_pair, encode_prompt, encode_row
from rlhf_kernels.trainer.objectives import DPO, SFT
from rlhf_kernels.trainer.tokenizers import bpe_tokenizer

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


def test_what_a_template_leaves_out_is_told_if_it_rejects_a_marked_name():
    known = (
        "{% for m in messages %}{% for c in m['tool_calls'] or [] %}"
        "{% if c['function']['name'] not in ['add', 'sub'] %}{{ raise_exception('unknown tool') }}"
        "{% endif %}{% endfor %}{% endfor %}"
    )
    system = {"role": "system", "content": "hello"}
    calls = [system, USER, _calling({"a": 1}), {"role": "tool", "content": "hello"}, GOOD]
    encode_row(_chat(known + TOOLS), parse_row({"messages": calls, "tools": SCHEMA}, "supervised"))
    users = "{% if m['role'] in ('user', 'assistant') %}{{ m['content'] }}{% endif %}"
    no_system = TOOLS.replace("{{ m['content'] }}", users)
    no_tools = TOOLS.replace("{{ t['function']['name'] + '\n' }}", "")
    no_calls = TOOLS.replace("c['function']['name']", "'' ")
    assert len({TOOLS, no_system, no_tools, no_calls}) == 4
    for template, tools, what in (
        # The user says it as well.
        (no_system, SCHEMA, "role 'system'"),
        # The call has the same name.
        (no_tools, SCHEMA, "'tools'"),
        (no_calls, None, "'tool_calls'"),
    ):
        row = {"messages": calls, "tools": tools}
        with pytest.raises(UserError, match=f"chat template: .*{what}.*expected a template that"):
            encode_row(_chat(known + template), parse_row(row, "supervised"))


KNOWN = (
    "{% for t in tools or [] %}{% if t['function']['name'] not in ['add', 'sub'] %}"
    "{{ raise_exception('unknown tool') }}{% endif %}{% endfor %}"
    "{% for m in messages %}{% for c in m['tool_calls'] or [] %}"
    "{% if c['function']['name'] not in ['add', 'sub'] %}{{ raise_exception('unknown call') }}"
    "{% endif %}{% endfor %}{% if m['role'] == 'system' and m['content'] not in ['', 'hello'] %}"
    "{{ raise_exception('unknown words') }}{% endif %}{% endfor %}"
)
# Called is what is among the tools.
AMONG_TOOLS = (
    "{% for m in messages %}{% for c in m['tool_calls'] or [] %}"
    "{% if c['function']['name'] not in (tools | map(attribute='function.name') | list) %}"
    "{{ raise_exception('unknown call') }}{% endif %}{% endfor %}{% endfor %}"
)
SYSTEM = {"role": "system", "content": "hello"}


@pytest.mark.parametrize("checks", (KNOWN, AMONG_TOOLS))
def test_what_a_template_leaves_out_is_told_if_it_rejects_every_mark(checks):
    """All of the values stand elsewhere in the text too."""
    asks = {"role": "user", "content": "hello, use add and sub"}
    calls = [SYSTEM, asks, _calling({"a": 1}), {"role": "tool", "content": "3"}, GOOD]
    tools = [*SCHEMA, {"type": "function", "function": {"name": "sub"}}]
    row = {"messages": calls, "tools": tools}
    whole = encode_row(_chat(checks + TOOLS), parse_row(row, "supervised"))
    assert whole == encode_row(_chat(TOOLS), parse_row(row, "supervised"))
    users = "{% if m['role'] in ('user', 'assistant', 'tool') %}{{ m['content'] }}{% endif %}"
    for old, new, what in (
        ("{{ m['content'] }}", users, "role 'system'"),
        ("{{ t['function']['name'] + '\n' }}", "", "'tools'.*'add'"),
        ("for t in tools or []", "for t in (tools or [])[:1]", "'tools'.*'sub'"),
        ("c['function']['name']", "'' ", "'tool_calls'"),
    ):
        assert old in TOOLS
        template = _chat(checks + TOOLS.replace(old, new))
        with pytest.raises(UserError, match=f"chat template: .*{what}"):
            encode_row(template, parse_row(row, "supervised"))


def test_a_template_that_no_other_conversation_passes_is_refused():
    only = "{% if messages[0]['content'] != 'hello' %}{{ raise_exception('no') }}{% endif %}"
    row = {"messages": [SYSTEM, USER, GOOD]}
    with pytest.raises(UserError, match=r"role 'system'.*renders the conversation also without it"):
        encode_row(_chat(only + CHATML), parse_row(row, "supervised"))


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
    # One that takes a string's letters for other parts.
    images = PARTS.replace("{% endif %}", "{% else %}<image>{% endif %}")
    assert _decoded(_chat(images), row) == ("user:hello</s>", "assistant:it is</s>")


@pytest.mark.parametrize(
    "read",
    ("content[:3]", "content | first", "content | join('-')", "content | list", "content | string",
     "content | upper", "content | tojson", "content[:3] | tojson", "content | reverse | string"),
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:the chat template leaves out")
def test_templates_that_change_strings_are_given_strings(read):
    """A string, not the parts whose Python form holds the same words."""
    template = f"{{% for m in messages %}}{{{{ m['role'] + ':' + (m.{read}) | string }}}}</s>"
    tokenizer = _chat(template + "{% endfor %}")
    user = {"role": "user", "content": "hello you"}
    found = "".join(_decoded(tokenizer, {"messages": [user, GOOD]}))
    assert found == tokenizer.apply_chat_template([user, GOOD], tokenize=False)
    assert "type" not in found and found.startswith("user:") and "hello" not in read
    if read == "content[:3]":
        assert found == "user:hel</s>assistant:it </s>"


def test_content_as_python_writes_it_is_never_a_part():
    """Of templates that reject strings or write nothing of them, as of those that show parts."""
    for read in ("m.content[0] | string", "m.content[0].values() | list", "m.content[0].items()"):
        leaks = "{% for m in messages %}{% if m.content is string %}{{ raise_exception('no') }}"
        tokenizer = _chat(leaks + "{% endif %}{{ " + read + " }}{% endfor %}")
        with pytest.raises(UserError, match=r"chat template: .*no"):
            _decoded(tokenizer, {"messages": [USER, GOOD]})
    # A template's own braces are none of these.
    only = "{% if messages[0].content is string %}{{ raise_exception('no') }}{% endif %}"
    tokenizer = _chat(only + "{'type': 1} " + PARTS)
    assert "".join(_decoded(tokenizer, {"messages": [USER, GOOD]})).startswith("{'type': 1} user:h")


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
