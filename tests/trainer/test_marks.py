"""Marks in a conversation, by which the trainer sees what a chat template writes."""

import json

import pytest

from rlhf_kernels.trainer.errors import UserError
from rlhf_kernels.trainer.marks import Conversation, require_whole

CALL = {"function": {"name": "look_up", "arguments": {}}}
ASK = {"role": "assistant", "tool_calls": [CALL, CALL]}
FOUND = {"role": "tool", "content": "nothing"}
TOOL = {"type": "function", "function": {"name": "look_up"}}
MESSAGES = [{"role": "user", "content": "Where?"}, ASK, FOUND, ASK, FOUND]


def written(messages, tools):
    names = [tool["function"]["name"] for tool in tools or ()]
    calls = [[c["function"]["name"] for c in m.get("tool_calls") or ()] for m in messages]
    return f"{names} {calls} {[m.get('content', '') for m in messages]}"


def without_later_results(messages, tools):
    first = next((i for i, m in enumerate(messages) if m["role"] == "tool"), len(messages))
    kept = [m for i, m in enumerate(messages) if m["role"] != "tool" or i <= first]
    return written(kept, tools)


@pytest.mark.parametrize("tools", [[], [TOOL], [TOOL, TOOL]])
def test_an_object_that_stands_twice_is_two_pieces(tools):
    """As rows made in Python may have it; those of a file share nothing."""
    conversation = Conversation(MESSAGES, tools)
    before = json.dumps(conversation)
    for form in (conversation, Conversation(*json.loads(before))):
        require_whole(written, form)
        with pytest.raises(UserError, match="role 'tool'"):
            require_whole(without_later_results, form)
    assert json.dumps(conversation) == before
