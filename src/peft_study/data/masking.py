"""Assistant turns with markers in place of their text.

    {"role": "assistant", "content": "Paris."}   ->   {"role": "assistant", "content": "0qk7x000e0000z"}

Rendering the masked conversation shows what the template writes around each answer. A marker is lower-case letters and
digits, so that no filter a template applies to text (trim, tojson, escape) changes it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from peft_study.data.templates import REASONING_FIELDS

#: The tags around thoughts that templates split an answer at.
THOUGHT_TAGS = re.compile(r"(</?think>|</?thinking>|\[/?THINK\]|<\|(?:START|END)_THINKING\|>)")


class Style(Enum):
    """How the content of an answer is masked."""

    WHOLE = "one marker for everything"
    ENCLOSED = "a marker before the thoughts, their tags kept, a marker for each text"
    TAGGED = "the thoughts' tags kept, a marker for each text"


@dataclass(slots=True)
class MaskedTurn:
    """An assistant turn with markers.

    Attributes:
        message: the turn to render.
        markers: every marker in it, in the order in which templates write them.
        opening: markers that begin the answer if no other is written before them.
        closing: the marker that ends the answer's content, if it has content.
        calls_tools: the answer has tool calls after its content.
    """

    message: dict[str, Any]
    markers: list[str] = field(default_factory=list)
    opening: set[str] = field(default_factory=set)
    closing: str | None = None
    calls_tools: bool = False


def has_thoughts(message: Mapping[str, Any]) -> bool:
    """Whether the content holds the tags of thoughts."""
    return THOUGHT_TAGS.search(str(message.get("content") or "")) is not None


def marker_stem(texts: Sequence[str]) -> str:
    """Returns the beginning of markers that occurs in none of ``texts``."""
    number = 0
    while any((stem := f"0qk{number}x") in text for text in texts):
        number += 1
    return stem


class Masker:
    """Puts numbered markers that begin with ``stem`` into assistant turns."""

    def __init__(self, stem: str) -> None:
        self.pattern = re.compile(re.escape(stem) + r"\d{6}z")
        self._stem = stem
        self._count = 0

    def _next(self) -> str:
        self._count += 1
        return f"{self._stem}{self._count:06d}z"

    def mask(self, message: Mapping[str, Any], style: Style) -> MaskedTurn:
        """Returns the turn with its content, reasoning and tool calls masked."""
        turn = MaskedTurn(message=dict(message))
        for key in REASONING_FIELDS:
            if isinstance(message.get(key), str) and message[key].strip():
                turn.message[key] = self._append(turn)
        content, calls = message.get("content"), message.get("tool_calls")
        # An empty text beside tool calls stays empty: templates write calls with and without a text differently.
        if isinstance(content, str) and (content or not calls):
            turn.message["content"] = self._content(turn, content, style)
            turn.closing = turn.markers[-1]
        if isinstance(calls, list) and calls:
            turn.calls_tools = True
            turn.message["tool_calls"] = [self._call(turn, call) for call in calls]
        return turn

    def _append(self, turn: MaskedTurn) -> str:
        turn.markers.append(self._next())
        return turn.markers[-1]

    def _content(self, turn: MaskedTurn, content: str, style: Style) -> str:
        if style is Style.WHOLE or not THOUGHT_TAGS.search(content):
            turn.opening.add(self._append(turn))
            return turn.markers[-1]
        pieces: list[str] = []
        if style is Style.ENCLOSED:
            pieces.append(self._append(turn))
            turn.opening.add(pieces[0])
        parts = THOUGHT_TAGS.split(content.strip())
        for number, part in enumerate(parts):
            is_tag, is_last = number % 2 == 1, number == len(parts) - 1
            text = part.strip()
            if is_tag or not (text or is_last):
                pieces.append(part)
                continue
            # White space before the last text may be the answer's own (thoughts dropped, nothing trimmed).
            before = "" if is_last else part[: len(part) - len(part.lstrip())]
            after = "" if is_last else part[len(part.rstrip()) :]
            pieces.append(before + self._append(turn) + after)
        # Where a template drops the thoughts, the answer begins with the text after them.
        turn.opening.add(turn.markers[-1])
        return "".join(pieces)

    def _call(self, turn: MaskedTurn, call: Any) -> Any:
        if not isinstance(call, Mapping):
            return call
        if isinstance(call.get("function"), Mapping):
            return {**call, "function": self._call(turn, call["function"])}
        masked, before = dict(call), len(turn.markers)
        if "arguments" in call:
            masked["arguments"] = self._leaves(turn, call["arguments"])
        # Some templates repeat the name over the tool's reply, so it is masked only where nothing else can be.
        if len(turn.markers) == before and isinstance(call.get("name"), str):
            masked["name"] = self._append(turn)
        return masked

    def _leaves(self, turn: MaskedTurn, value: Any) -> Any:
        if isinstance(value, str):
            return self._append(turn)
        if isinstance(value, Mapping):
            return {key: self._leaves(turn, item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._leaves(turn, item) for item in value]
        return value
