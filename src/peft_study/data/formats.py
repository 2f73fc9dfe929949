"""The forms that rows come in, and how each becomes a `Conversation`.

    {"messages": [{"role", "content"}, ...]}             Tulu
    {"conversations": [{"from", "value"}, ...]}          ShareGPT
    {"instruction", "input", "output"}                   Alpaca
    {"prompt", "completion"}   {"question", "answer"}    pairs

Text is kept exactly as it is. A conversation that ends with a user turn is kept too: that turn is not supervised.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from peft_study.data.conversation import Conversation, Message
from peft_study.data.readers import RawRow, read_file
from peft_study.data.sources import Source, open_sources
from peft_study.data.turns import check_conversation, text_of, tools_of, turns_of
from peft_study.errors import ConfigError, DataError, nearest

# Called now and then with the rows read so far and the share (0..1) of all sources that is behind.
OnProgress = Callable[[int, float], None]


class Format(enum.Enum):
    """The form of a row; the value is how error messages name it."""

    MESSAGES = "Tulu (messages)"
    SHAREGPT = "ShareGPT (conversations)"
    ALPACA = "Alpaca (instruction/input/output)"
    PROMPT = "prompt/completion"
    QUESTION = "question/answer"


MAP_KEYS = ("messages", "prompt", "response", "system", "tools", "id", "source")

_TURN_COLUMNS = {Format.MESSAGES: ("messages",), Format.SHAREGPT: ("conversations", "conversation")}
_PAIR_COLUMNS = {
    Format.ALPACA: (("instruction",), ("output", "response")),
    Format.PROMPT: (("prompt",), ("completion", "response")),
    Format.QUESTION: (("question", "query"), ("answer", "response", "solution", "output")),
}
_CONTEXT_COLUMNS = ("input", "context")
_SYSTEM_COLUMNS = ("system", "system_prompt")
_NAME_COLUMNS = "name the columns with --map messages=COL or --map prompt=COL,response=COL (in a study: data.mapping)"


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
        if key not in MAP_KEYS:
            raise ConfigError(f"unknown key {key!r}", where="--map", remedy=nearest(key, MAP_KEYS))
        if key in mapping:
            raise ConfigError(f"{key!r} is given twice", where="--map", remedy="name one column for each key")
        mapping[key] = column
    if "messages" in mapping and ("prompt" in mapping or "response" in mapping):
        raise ConfigError("messages goes without prompt and response", where="--map", remedy="give one or the other")
    if ("prompt" in mapping) != ("response" in mapping):
        raise ConfigError(
            "prompt and response go together", where="--map", remedy="give both as prompt=COL,response=COL"
        )
    return mapping


def detect_format(values: Mapping[str, Any]) -> Format | None:
    """Returns the form that the row's column names show, or None. Columns that hold null count only if all do."""
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
        row_id: the id of a row that brings none.
        default_source: the source of a row that brings none.
        where: file and row, for error messages.
        mapping: what `parse_mapping` returned.

    Raises:
        DataError: unknown or missing columns, no turns, an unknown role, no assistant turn, content that is empty,
            no text or no valid Unicode.
    """
    mapping = mapping or {}
    _check_mapped(values, mapping, where)
    form = _mapped_format(values, mapping)
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
    return Conversation(
        id=_label(values, mapping.get("id", "id"), where) or row_id,
        messages=tuple(messages),
        source=_label(values, mapping.get("source", "source"), where) or default_source,
        tools=tools_of(values.get(mapping.get("tools", "tools")), where),
    )


def _check_mapped(values: Mapping[str, Any], mapping: Mapping[str, str], where: str) -> None:
    for key, column in mapping.items():
        if column not in values:
            what = f"no column {column!r} (--map {key}={column}); found {', '.join(values) or 'none'}"
            raise DataError(what, where=where, remedy=nearest(column, values))


def _pick(values: Mapping[str, Any], columns: Sequence[str]) -> str:
    """Returns the first of the columns that holds something, else the first that is there, else the first."""
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


@dataclass(frozen=True, slots=True)
class ParsedRow:
    """A raw row with what became of it: a conversation, or the reason why not."""

    raw: RawRow
    conversation: Conversation | None
    error: DataError | None


def parsed_rows(
    sources: Sequence[Source], mapping: Mapping[str, str] | None = None, on_progress: OnProgress | None = None
) -> Iterator[ParsedRow]:
    """Yields every row of the sources in order, the unusable ones with their error.

    A row whose format differs from the first usable one of its source is unusable, since the columns of a mixture
    are mostly an accident. Raises `DataError` where a file as a whole cannot be read.
    """
    share = _Share(sources, on_progress)
    for source in sources:
        first: tuple[Format, str] | None = None
        for number, raw in enumerate(source.rows(share.tick), start=1):
            form = None if raw.broken else _mapped_format(raw.values, mapping)
            try:
                if raw.broken:
                    raise raw.broken
                if first and form and form is not first[0]:
                    raise _mixed(first, form, raw.where)
                conversation = to_conversation(
                    raw.values,
                    row_id=f"{source.name}-{number}",
                    default_source=source.name,
                    where=raw.where,
                    mapping=mapping,
                )
                assert form is not None
                first = first or (form, raw.where)
            except DataError as error:
                yield ParsedRow(raw, None, error)
            else:
                yield ParsedRow(raw, conversation, None)
            share.row()
        share.source_done(source)


def read_conversations(
    sources: Sequence[str],
    *,
    split: str | None = None,
    mapping: Mapping[str, str] | None = None,
    on_progress: OnProgress | None = None,
) -> Iterator[Conversation]:
    """Yields the conversations of files, folders or hub ids, in order; stops at the first unusable row.

    Raises:
        DataError: a source or a row cannot be used (what, file and row, remedy).
    """
    for row in parsed_rows(open_sources(sources, split), mapping, on_progress):
        if row.conversation is None:
            assert row.error is not None
            raise row.error
        yield row.conversation


def first_conversations(
    sources: Sequence[str], split: str | None = None, mapping: Mapping[str, str] | None = None
) -> Iterator[Conversation]:
    """Yields the first conversation of every file; of data on the hub none, which is only looked up.

    Raises:
        DataError: as `read_conversations`.
    """
    for source in open_sources(sources, split):
        heads = [raw for file in source.files for raw in islice(read_file(file, _unheard), 1)]
        # one shard may have no rows; where none has any, `rows` says so
        for raw in heads or (source.rows(_unheard) if source.files else ()):
            if raw.broken:
                raise raw.broken
            yield to_conversation(
                raw.values, row_id=raw.where, default_source=source.name, where=raw.where, mapping=mapping
            )


def _unheard(_share: float) -> None:
    pass


class _Share:
    """Adds up what is behind over several sources."""

    def __init__(self, sources: Sequence[Source], on_progress: OnProgress | None) -> None:
        self._total = max(sum(source.size for source in sources), 1)
        self._size = [source.size for source in sources]
        self._on_progress = on_progress
        self._done = 0
        self._rows = 0
        self._share = 0.0

    def tick(self, share: float) -> None:
        current = self._size[0] if self._size else 0
        self._share = (self._done + share * current) / self._total

    def row(self) -> None:
        self._rows += 1
        if self._rows % 256 == 0:
            self._report()

    def source_done(self, source: Source) -> None:
        self._done += source.size
        self._size.pop(0)
        self._report()

    def _report(self) -> None:
        if self._on_progress is not None:
            self._on_progress(self._rows, self._share)


def _mapped_format(values: Mapping[str, Any], mapping: Mapping[str, str] | None) -> Format | None:
    if mapping and "messages" in mapping:
        return Format.MESSAGES
    if mapping and "prompt" in mapping:
        return Format.PROMPT
    return detect_format(values)


def _mixed(first: tuple[Format, str], form: Format, where: str) -> DataError:
    what = f"this row is {form.value}, but {first[1]} is {first[0].value}: one source mixes formats"
    return DataError(what, where=where, remedy="keep one format in a file and give the files as several sources")
