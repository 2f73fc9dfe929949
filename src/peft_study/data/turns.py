"""The parts of a conversation as rows bring them: texts, turns, tools."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from peft_study.data.conversation import ROLES, Message, Role
from peft_study.errors import DataError, nearest

_SHAREGPT_ROLES: dict[str, Role] = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "bot": "assistant", "model": "assistant", "chatgpt": "assistant", "function_call": "assistant",
    "tool_call": "assistant", "tool": "tool", "observation": "tool", "function_response": "tool",
    "tool_response": "tool", "function": "tool", "ipython": "tool",
}  # fmt: skip
_CALLS = ("tool_calls", "function_call", "function_calls")
# What chat templates read of a turn beside role and content.
_EXTRAS = (*_CALLS, "tool_call_id", "name", "functions", "reasoning_content", "thinking")
SKIP = "correct the row, or leave such rows out with `peft-study data convert --on-error skip`"


def text_of(value: Any, what: str, where: str) -> str:
    """Returns a text as it is, or the joined texts of a list of text parts; null is the empty text.

    Raises:
        DataError: the value is neither, a part is no text (an image, say), or the text is not valid Unicode.
    """
    if value is None:
        return ""
    if isinstance(value, (list, tuple)):
        value = "".join(_part_text(part, number, what, where) for number, part in enumerate(value, start=1))
    if not isinstance(value, str):
        found = f"{type(value).__name__} {str(value)[:40]!r}"
        raise DataError(f"{what} is not a text but {found}", where=where, remedy=f"write it as a text; {SKIP}")
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            found = f"half a surrogate pair (\\u{ord(value[error.start]):04x} at character {error.start + 1})"
            raise DataError(f"{what} is not valid Unicode: {found}", where=where, remedy=SKIP) from error
    return value


def turns_of(value: Any, column: str, where: str) -> list[Message]:
    """Returns the turns of a ``messages`` or ``conversations`` column.

    Raises:
        DataError: there are none, or one has no known role, no content, or content that is no text.
    """
    if value is None or (isinstance(value, (list, tuple)) and not value):
        raise DataError(f"the row has no messages ({column} is empty)", where=where, remedy=SKIP)
    if not isinstance(value, (list, tuple)):
        remedy = (
            "a turn list looks like [{'role': 'user', 'content': '...'}, ...]; name its column with --map messages=COL"
        )
        raise DataError(f"{column} is not a list of turns but {type(value).__name__}", where=where, remedy=remedy)
    return [_turn(turn, number, where) for number, turn in enumerate(value, start=1)]


def tools_of(value: Any, where: str) -> list[dict[str, Any]] | None:
    """Returns the tools of a row from a list, a JSON text of a list, or a list of JSON texts; None where none.

    Raises:
        DataError: the value is none of these.
    """
    try:
        tools = json.loads(value) if isinstance(value, str) and value.strip() else value
        if not tools:
            return None
        if not isinstance(tools, (list, tuple)):
            raise TypeError
        parsed = [json.loads(tool) if isinstance(tool, str) else tool for tool in tools]
    except (ValueError, TypeError) as error:
        raise _bad_tools(where) from error
    if not all(isinstance(tool, Mapping) for tool in parsed):
        raise _bad_tools(where)
    return [dict(tool) for tool in parsed]


def check_conversation(messages: Sequence[Message], where: str) -> None:
    """Raises `DataError` where a user or assistant turn says nothing, or where no turn is the assistant's."""
    for number, message in enumerate(messages, start=1):
        calls = message.extra is not None and any(name in message.extra for name in _CALLS)
        if message.role in ("user", "assistant") and not message.content.strip() and not calls:
            raise DataError(f"turn {number} ({message.role}) has empty content", where=where, remedy=SKIP)
    if all(message.role != "assistant" for message in messages):
        raise DataError("the conversation has no assistant turn to learn from", where=where, remedy=SKIP)


def _turn(turn: Any, number: int, where: str) -> Message:
    if not isinstance(turn, Mapping):
        what = f"turn {number} is not an object with role and content but {type(turn).__name__}"
        raise DataError(what, where=where, remedy=SKIP)
    named = "role" in turn or "from" not in turn
    role = _role(turn.get("role"), ROLES, number, where) if named else _sharegpt_role(turn["from"], number, where)
    content = turn.get("content") if "content" in turn or "value" not in turn else turn["value"]
    extra = {name: turn[name] for name in _EXTRAS if turn.get(name) not in (None, "", [], {})}
    return Message(role, text_of(content, f"content of turn {number} ({role})", where), extra or None)


def _role(role: Any, valid: Sequence[str], number: int, where: str) -> Role:
    for state in ROLES:
        if role == state:
            return state
    what = f"turn {number} has no role" if role is None else f"turn {number} has the unknown role {role!r}"
    alias = _SHAREGPT_ROLES.get(str(role).lower())
    raise DataError(what, where=where, remedy=f"did you mean {alias!r}?" if alias else nearest(str(role), valid))


def _sharegpt_role(speaker: Any, number: int, where: str) -> Role:
    return _SHAREGPT_ROLES.get(str(speaker).lower()) or _role(speaker, tuple(_SHAREGPT_ROLES), number, where)


def _part_text(part: Any, number: int, what: str, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        remedy = f"only text can be trained on; {SKIP}"
        raise DataError(f"{what}: part {number} is not a text but {str(kind)!r}", where=where, remedy=remedy)
    return str(part["text"])


def _bad_tools(where: str) -> DataError:
    what = "tools is neither a list of objects nor the JSON text of one"
    return DataError(what, where=where, remedy=SKIP)
