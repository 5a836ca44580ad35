"""Checks that a chat template writes all of a conversation, by marks in what it may drop."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from .cells import content
from .config import UserError, require

# Renders messages and tools as text.
Write = Callable[[list[dict[str, Any]], list[Any] | None], str]


TOOL, CALL = "'tools'", "'tool_calls'"


class Piece(NamedTuple):
    """What a template may drop: the name of a tool or of a called function, or a content."""

    what: str
    value: str
    # Of the tool, or of the message.
    number: int
    # Of the call in its message.
    call: int = -1


class Conversation(NamedTuple):
    """Messages, and the tools that they may call."""

    messages: Sequence[dict[str, Any]]
    tools: Sequence[Any]

    def written(self, write: Write) -> str:
        return write(list(self.messages), list(self.tools) or None)


def require_whole(write: Write, conversation: Conversation) -> None:
    """Raises UserError if the template drops tools, tool calls or messages.

    Renders the conversation again with a unique mark in each of them, because a function's name or
    a short content may also occur elsewhere in the text. A template that interprets a value may
    reject the marked ones; then they are tried one by one.
    """
    marks = {piece: _mark(piece, i) for i, piece in enumerate(_pieces(conversation))}
    if not marks:
        return
    try:
        whole = _changed(conversation, marks).written(write)
    except Exception:
        found = [_is_written(write, conversation, piece, new) for piece, new in marks.items()]
    else:
        found = [new in whole for new in marks.values()]
    for written, piece in zip(found, marks, strict=True):
        expected = "a template that writes it: take another, or leave this out of the row"
        require(written, f"chat template: {piece.what}", expected, piece.value)


def _text(message: dict[str, Any]) -> str:
    """A message's content, or the first text of its parts."""
    parts = message.get("content")
    if not isinstance(parts, list):
        return content(message)
    return next((str(p["text"]) for p in parts if isinstance(p, dict) and p.get("text")), "")


def _mark(piece: Piece, number: int) -> str:
    # A template may look at how a name begins.
    return f"{piece.value if piece.what in (TOOL, CALL) else ''}Zebra{number}x"


def _is_written(write: Write, conversation: Conversation, piece: Piece, new: str) -> bool:
    """Whether a mark in one piece, or else its absence, changes how often it is written.

    Raises:
        UserError: the template rejects both.
    """

    def times(text: str, form: Conversation) -> int:
        return form.written(write).count(text)

    try:
        # A template may reject the call of a function that is not among the tools.
        known = _with_tool(conversation, piece, new)
        if piece.what == TOOL:
            return times(new, known) > times(new, conversation)
        return times(new, _changed(known, {piece: new})) > times(new, known)
    except Exception:
        pass
    try:
        return times(piece.value, conversation) > times(piece.value, _without(conversation, piece))
    except Exception as error:
        raise UserError(
            f"chat template: {piece.what}: expected a template that renders the conversation also "
            "without it, so that it is known to write it: take another, or leave this out of the "
            f"row, got {piece.value!r}"
        ) from error


def _pieces(conversation: Conversation) -> list[Piece]:
    """What is to be found in the text.

    Not the contents of users and assistants: every template renders them, and may rewrite an
    assistant's earlier ones.
    """
    found = []
    for index, message in enumerate(conversation.messages):
        for call, form in enumerate(message.get("tool_calls") or ()):
            if isinstance(name := _function(form).get("name"), str):
                found.append(Piece(CALL, name, index, call))
        if message["role"] not in ("user", "assistant") and (text := _text(message)).strip():
            found.append(Piece(f"a message of role {message['role']!r}", text, index))
    for index, form in enumerate(conversation.tools):
        if isinstance(name := _function(form).get("name"), str):
            found.append(Piece(TOOL, name, index))
    return found


def _function(form: Any) -> dict[str, Any]:
    """The function of a tool or of a call; some forms are the function itself."""
    if not isinstance(form, dict):
        return {}
    function = form.get("function")
    return function if isinstance(function, dict) else form


def _with_tool(conversation: Conversation, piece: Piece, name: str) -> Conversation:
    """The conversation with one more tool before that which the piece names, if it names one."""
    tools = list(conversation.tools)
    if piece.what in (TOOL, CALL):
        for index, tool in enumerate(tools):
            if _function(tool).get("name") == piece.value:
                more = copy.deepcopy(tool)
                _function(more)["name"] = name
                return conversation._replace(tools=[*tools[:index], more, *tools[index:]])
    return conversation


def _copied(conversation: Conversation) -> tuple[list[dict[str, Any]], list[Any]]:
    """Messages, their calls and tools that share nothing, though an object may stand twice."""
    messages = [copy.deepcopy(message) for message in conversation.messages]
    for message in messages:
        if message.get("tool_calls"):
            message["tool_calls"] = [copy.deepcopy(call) for call in message["tool_calls"]]
    return messages, [copy.deepcopy(tool) for tool in conversation.tools]


def _changed(conversation: Conversation, values: Mapping[Piece, str]) -> Conversation:
    """The conversation with other values of some pieces."""
    messages, tools = _copied(conversation)
    called = {piece.value: new for piece, new in values.items() if piece.what == CALL}
    for piece, new in values.items():
        if piece.what == TOOL:
            _function(tools[piece.number])["name"] = new
        elif piece.what == CALL:
            _function(messages[piece.number]["tool_calls"][piece.call])["name"] = new
        else:
            messages[piece.number]["content"] = new
    for message in messages:
        if message["role"] == "tool" and message.get("name") in called:
            message["name"] = called[message["name"]]
    return Conversation(messages, tools)


def _without(conversation: Conversation, piece: Piece) -> Conversation:
    messages, tools = _copied(conversation)
    if piece.what == TOOL:
        del tools[piece.number]
    elif piece.what == CALL:
        message = messages[piece.number]
        del message["tool_calls"][piece.call]
        if not message["tool_calls"]:
            del message["tool_calls"]
            message["content"] = content(message)
    else:
        messages[piece.number]["content"] = ""
    return Conversation(messages, tools)
