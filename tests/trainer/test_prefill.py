"""Prompts that end with an assistant's message, which the completion continues."""

import warnings

import pytest

from tests.trainer.encoding_cases import BAD, GOOD, OTHER, USER, made
from tests.trainer.test_templates import ALTERNATING, CHATML, PARTS, THINKING, TOOLS

from rlhf_kernels.trainer.config import UserError
from rlhf_kernels.trainer.data import Row, parse_row, whole_tokens
from rlhf_kernels.trainer.encoding import encode_pair, encode_prompt, encode_row

SURE = {"role": "assistant", "content": "Sure,"}
OPEN = "<s>user\nhello</s>\n<s>assistant\nSure,"


def chat(template):
    return made("byte-level", "<s> $A", template)


def _pieces(tokenizer, row, kind):
    found = parse_row(row, kind)
    if kind == "prompt":
        return (tokenizer.decode(encode_prompt(tokenizer, found)),)
    encode = encode_pair if kind == "preference" else encode_row
    return tuple(map(tokenizer.decode, encode(tokenizer, found)))


@pytest.mark.parametrize(
    ("kind", "row", "expected"),
    [
        ("prompt", {"prompt": [USER, SURE]}, (OPEN,)),
        ("prompt", {"messages": [USER, SURE, GOOD]}, (OPEN,)),
        ("supervised", {"prompt": [USER, SURE], "completion": [GOOD]}, (OPEN, "it is</s>")),
        ("supervised", {"prompt": [USER, SURE], "completion": "it is"}, (OPEN, "it is</s>")),
        ("supervised", {"prompt": [USER, SURE], "completion": [GOOD, OTHER, BAD]},
         (OPEN, "it is</s>\n<s>user\ntwo</s>\n<s>assistant\nfour</s>")),
        ("preference", {"prompt": [USER, SURE], "chosen": [GOOD], "rejected": [BAD]},
         (OPEN, "it is</s>", "four</s>")),
        ("preference", {"prompt": [USER, SURE], "chosen": "it is", "rejected": "four"},
         (OPEN, "it is</s>", "four</s>")),
        # Whole conversations stay as they are.
        ("supervised", {"messages": [USER, SURE, GOOD]},
         (OPEN + "</s>\n<s>assistant\n", "it is</s>")),
        ("preference", {"chosen": [USER, SURE, GOOD], "rejected": [USER, SURE, BAD]},
         (OPEN + "</s>\n<s>assistant\n", "it is</s>", "four</s>")),
    ],
)  # fmt: skip
def test_a_prompt_that_ends_with_the_assistant_is_continued(kind, row, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer = chat(CHATML)
        assert _pieces(tokenizer, row, kind) == expected
    parsed = parse_row(row, kind)
    if not parsed.apart:
        assert tokenizer.decode(encode_prompt(tokenizer, parsed)) == OPEN
        # Reward models read what the policy wrote.
        whole = whole_tokens(tokenizer, parsed.prompt, [GOOD])
        assert tokenizer.decode(whole) == OPEN + "it is</s>"
    # As transformers continues a message, TRL's way.
    theirs = tokenizer.apply_chat_template(
        [USER, SURE], tokenize=False, continue_final_message=True
    )
    assert theirs == OPEN
    parts = chat(PARTS)
    assert _pieces(parts, row, kind)[0].startswith("user:hello</s>assistant:Sure,")


@pytest.mark.filterwarnings("ignore:a prompt has other tokens")
def test_a_prompt_that_no_completion_can_continue_is_refused():
    called = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    call = SURE | {"tool_calls": [called]}
    row = Row([USER, SURE], origin="a:3")
    for template in (
        CHATML.replace("m['content']", "m['content'][:4]"),
        CHATML.replace("m['content']", "m['content'] | upper"),
        THINKING.replace("[-1]", "[1:] | join"),
    ):
        with pytest.raises(UserError, match=r"^a:3: chat template: expected .* found 'Sure,'$"):
            encode_prompt(chat(template), row)
    with pytest.raises(UserError, match=r"^a:3: prompt: expected text alone .* without tool calls"):
        encode_prompt(chat(TOOLS), row._replace(prompt=[USER, call]))
    # The template's own complaint comes first.
    with pytest.raises(UserError, match=r"^a:3: chat template: .*roles must alternate"):
        encode_prompt(chat(ALTERNATING), row._replace(prompt=[SURE]))
    one, two = (m | {"name": n} for m, n in ((SURE, "x"), (GOOD, "y")))
    with pytest.raises(UserError, match=r"^a:3: 'name': expected one value in the prompt's last"):
        encode_row(chat(CHATML), Row([USER, one], [two], origin="a:3"))
    # What a tool returned does not continue the call.
    result = {"role": "tool", "content": "four"}
    parsed = parse_row({"prompt": [USER, call], "completion": [result, GOOD]}, "supervised")
    assert encode_prompt(chat(TOOLS), parsed)[-1:] and encode_row(chat(TOOLS), parsed)
