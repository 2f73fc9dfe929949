"""The forms that rows come in, and how each becomes a `Conversation`.

    {"messages": [{"role", "content"}, ...]}             Tulu
    {"conversations": [{"from", "value"}, ...]}          ShareGPT
    {"instruction", "input", "output"}                   Alpaca
    {"prompt", "completion"}   {"question", "answer"}    pairs

Text is kept exactly as it is. A conversation that ends with a user turn is kept too: that turn is not supervised.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping, Sequence
from typing import Any

from peft_study.config.common import SettingError
from peft_study.config.run import check_mapping
from peft_study.data.conversation import ROLES, Conversation, Message, Role
from peft_study.data.readers import SKIP
from peft_study.errors import ConfigError, DataError, nearest


class Format(enum.Enum):
    """The form of a row; the value is how error messages name it."""

    MESSAGES = "Tulu (messages)"
    SHAREGPT = "ShareGPT (conversations)"
    ALPACA = "Alpaca (instruction/input/output)"
    PROMPT = "prompt/completion"
    QUESTION = "question/answer"


_TURN_COLUMNS = {Format.MESSAGES: ("messages",), Format.SHAREGPT: ("conversations", "conversation")}
_PAIR_COLUMNS = {
    Format.ALPACA: (("instruction",), ("output", "response")),
    Format.PROMPT: (("prompt",), ("completion", "response")),
    Format.QUESTION: (("question", "query"), ("answer", "response", "solution", "output")),
}
_CONTEXT_COLUMNS = ("input", "context")
_SYSTEM_COLUMNS = ("system", "system_prompt")
_NAME_COLUMNS = "name the columns with --map messages=COL or --map prompt=COL,response=COL (in a study: data.mapping)"
_SHAREGPT_ROLES: dict[str, Role] = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "bot": "assistant", "model": "assistant", "chatgpt": "assistant", "function_call": "assistant",
    "tool_call": "assistant", "tool": "tool", "observation": "tool", "function_response": "tool",
    "tool_response": "tool", "function": "tool", "ipython": "tool",
}  # fmt: skip
_CALLS = ("tool_calls", "function_call", "function_calls")
# What chat templates read of a turn beside role and content.
_EXTRAS = (*_CALLS, "tool_call_id", "name", "functions", "reasoning_content", "thinking")


def parse_mapping(text: str | None) -> dict[str, str] | None:
    """Parses ``--map``: ``messages=COL`` or ``prompt=COL,response=COL``, also system, tools, id and source.

    Raises:
        ConfigError: a part is not KEY=COL, the key is unknown or given twice, or the keys do not go together.
    """
    if text is None:
        return None
    mapping: dict[str, str] = {}
    for part in text.split(","):
        key, equals, column = (piece.strip() for piece in part.partition("="))
        if not equals or not column:
            raise ConfigError(f"{part!r} is not KEY=COLUMN", where="--map", remedy="for example --map messages=turns")
        if key in mapping:
            raise ConfigError(f"{key!r} is given twice", where="--map", remedy="name one column for each key")
        mapping[key] = column
    try:
        check_mapping(mapping)
    except SettingError as error:
        raise ConfigError(error.what, where="--map", remedy=error.remedy) from None
    return mapping


def detect_format(values: Mapping[str, Any], mapping: Mapping[str, str] | None = None) -> Format | None:
    """Returns the form that the mapping or the row's column names show, or None.

    Columns that hold null count only if all do.
    """
    if mapping and "messages" in mapping:
        return Format.MESSAGES
    if mapping and "prompt" in mapping:
        return Format.PROMPT
    filled = {name for name, value in values.items() if value is not None}
    for names in (filled, set(values)):
        for form, columns in _TURN_COLUMNS.items():
            if names.intersection(columns):
                return form
        for form, (asks, answers) in _PAIR_COLUMNS.items():
            if names.intersection(asks) and names.intersection(answers):
                return form
    return None


def to_conversation(
    values: Mapping[str, Any],
    *,
    row_id: str,
    default_source: str,
    where: str,
    mapping: Mapping[str, str] | None = None,
) -> Conversation:
    """Turns one row into a conversation.

    Args:
        values: the row's columns.
        row_id: the id of a row that has none.
        default_source: the source of a row that has none.
        where: file and row, for error messages.
        mapping: what `parse_mapping` returned.

    Raises:
        DataError: unknown or missing columns, no turns, an unknown role, no assistant turn, content that is empty,
            no text or no valid Unicode.
    """
    mapping = mapping or {}
    _check_mapped(values, mapping, where)
    form = detect_format(values, mapping)
    if form is None:
        raise DataError(f"no known columns: found {', '.join(values) or 'none'}", where=where, remedy=_NAME_COLUMNS)
    if form in _TURN_COLUMNS:
        column = mapping.get("messages") or _pick(values, _TURN_COLUMNS[form])
        messages = turns_of(values[column], column, where)
    else:
        messages = _pair(values, form, mapping, where)
    system = mapping.get("system") or _pick(values, _SYSTEM_COLUMNS)
    instruction = text_of(values.get(system), system, where)
    if instruction and messages[0].role != "system":
        messages.insert(0, Message("system", instruction))
    check_conversation(messages, where)
    tools = tools_of(values.get(mapping.get("tools", "tools")), where)
    _refuse_half_characters([tools, [message.extra for message in messages]], where)
    return Conversation(
        id=_label(values, mapping.get("id", "id"), where) or row_id,
        messages=tuple(messages),
        source=_label(values, mapping.get("source", "source"), where) or default_source,
        tools=tools,
    )


def _refuse_half_characters(values: Any, where: str) -> None:
    """Refuses half a surrogate pair in what stands beside the turns' texts: a tokenizer takes none."""
    try:
        json.dumps(values, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise DataError("tools or a turn's further fields are not valid Unicode", where=where, remedy=SKIP) from error


def _check_mapped(values: Mapping[str, Any], mapping: Mapping[str, str], where: str) -> None:
    for key, column in mapping.items():
        if column not in values:
            what = f"no column {column!r} (--map {key}={column}); found {', '.join(values) or 'none'}"
            raise DataError(what, where=where, remedy=nearest(column, values))


def _pick(values: Mapping[str, Any], columns: Sequence[str]) -> str:
    """Returns the first of the columns that is not null, else the first that exists, else the first."""
    filled = [column for column in columns if values.get(column) is not None]
    return (filled or [column for column in columns if column in values] or list(columns))[0]


def _pair(values: Mapping[str, Any], form: Format, mapping: Mapping[str, str], where: str) -> list[Message]:
    asks, answers = _PAIR_COLUMNS[form]
    ask = mapping.get("prompt") or _pick(values, asks)
    answer = mapping.get("response") or _pick(values, answers)
    if _is_turns(values[ask]) and _is_turns(values[answer]):  # the conversational form of prompt/completion
        return [*turns_of(values[ask], ask, where), *turns_of(values[answer], answer, where)]
    question = text_of(values[ask], ask, where)
    if form is Format.ALPACA:
        column = _pick(values, _CONTEXT_COLUMNS)
        context = text_of(values.get(column), column, where)
        question = f"{question}\n\n{context}" if question and context else question or context
    return [Message("user", question), Message("assistant", text_of(values[answer], answer, where))]


def _is_turns(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and isinstance(value[0], Mapping) and "role" in value[0]


def _label(values: Mapping[str, Any], column: str, where: str) -> str:
    """Returns the row's id or source as a text; empty where the row has none."""
    value = values.get(column)
    if isinstance(value, (int, float)):
        return str(value)
    if value is None or isinstance(value, str):
        return text_of(value, column, where)
    remedy = f"correct the row, or name another column with --map {'id' if column == 'id' else 'source'}=COL"
    raise DataError(f"{column} is neither a text nor a number", where=where, remedy=remedy)


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
    """Returns the tools of a row from a list, a JSON text of a list, or a list of JSON texts; None if there are none.

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
        if not all(isinstance(tool, Mapping) for tool in parsed):
            raise TypeError
    except (ValueError, TypeError) as error:
        what = "tools is neither a list of objects nor the JSON text of one"
        raise DataError(what, where=where, remedy=SKIP) from error
    return [dict(tool) for tool in parsed]


def check_conversation(messages: Sequence[Message], where: str) -> None:
    """Raises `DataError` if a user or assistant turn is empty, or if there is no assistant turn."""
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
