"""Finds the answers in a rendered conversation.

Each assistant turn is supervised from the end of its header through its end token. The template is a program: it may
trim, drop earlier thoughts, write a date. So nothing is searched for by its text. ``{% generation %}`` tags mark the
answers if the template has them. Otherwise the answers are replaced by markers, which shows the text around them:

    masked     c0 [m1] c1 [m2] c2          c0 = "<|user|>⏎hi⏎<|assistant|>⏎"    c1 = "</s>⏎<|user|>⏎..."
    one real   c0 [r1] c1 [m2] c2          the length of r1, what the template made of answer 1, follows
    real       c0 [r1] c1 [r2] c2          must hold, character by character; then every offset is known

(The renderings with one real answer are skipped if the third line already holds with the answers as they are.)
An answer may contain its own context, or occur in the user's turn too: offsets come from lengths, never from a search.

The header ends where the rendering of the turns before it ends, generation prompt included: the model also writes the
thoughts that a template puts around an answer. The end token is the text that the template writes right after the last
answer of a conversation (or eos). White space between answer and end token is supervised, since the model has to write
it; text after the end token is not. If a template writes no end token, none is supervised.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from peft_study.data.masking import THOUGHT_TAGS, MaskedTurn, Masker, Style, has_thoughts, marker_stem
from peft_study.data.templates import GENERATION_END, GENERATION_START, Renderer
from peft_study.errors import TemplateError

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]] | None

#: Half-open range of characters.
Span = tuple[int, int]

# End tokens of a turn that calls a tool, for models that end it with another token than an answer.
_TOOL_CALL_ENDS = ("<|eom_id|>", "<|call|>")
_REMEDY = "use a template with {% generation %} tags around its answers, or one that writes every answer as it is"


class _ContextDiffersError(Exception):
    """The text around an answer depends on the answer, so this style of masking cannot locate it."""


@dataclass(frozen=True, slots=True)
class _Masked:
    """A masked conversation: its turns, its text, and the range of each answer's markers in that text."""

    messages: list[dict[str, Any]]
    turns: list[MaskedTurn]
    text: str
    ranges: list[Span]


class SpanFinder:
    """Locates the answers that one template writes.

    Args:
        renderer: the compiled template.
        eos: the tokenizer's end-of-text token, or "".
        special: the tokenizer's special tokens, as text.
    """

    def __init__(self, renderer: Renderer, eos: str, special: Sequence[str]) -> None:
        self.renderer = renderer
        self._eos = eos
        self._special = tuple(sorted(special, key=len, reverse=True))

    def locate(self, messages: Messages, tools: Tools = None) -> tuple[str, list[Span]]:
        """Returns the rendered conversation and the supervised range of each of its answers, in order.

        Raises:
            TemplateError: the template refuses the conversation, or an answer cannot be located in it.
        """
        text = self.renderer.render(messages, tools)
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if self.renderer.has_generation_tags:
            return text, self._tagged_spans(messages, tools, text, turns)
        if not turns:
            return text, []
        return text, self._marked_spans(messages, tools, text, turns)

    # --- templates with {% generation %} ---------------------------------------------------------------------------

    def _tagged_spans(self, messages: Messages, tools: Tools, text: str, turns: list[int]) -> list[Span]:
        written, spans = self._tagged(messages, tools)
        if written != text:
            raise self._error("changes the text inside its {% generation %} tags after writing it")
        self._check_tags(messages, tools, turns)
        neutral, neutral_spans = text, spans
        if self._spells_end(messages):
            neutral, neutral_spans = self._tagged(_neutral(messages), tools)
            if len(neutral_spans) != len(spans):
                raise self._error("places its {% generation %} tags by what the user says")
        widened: list[Span] = []
        for (start, end), (_, neutral_end) in zip(spans, neutral_spans, strict=True):
            closed = any(text[start:end].rstrip().endswith(mark) for mark in self._end_marks)
            widened.append((start, end if closed else end + self._end_length(neutral[neutral_end:])))
        return widened

    def _check_tags(self, messages: Messages, tools: Tools, turns: list[int]) -> None:
        """Every answer must lie inside the tags."""
        stem = marker_stem([self.renderer.text, json.dumps(messages, default=str)])
        masked = self._mask(messages, tools, turns, Masker(stem), Style.WHOLE)
        text, spans = self._tagged(masked.messages, tools)
        for number, turn in zip(turns, masked.turns, strict=True):
            position = text.find(turn.markers[-1])
            if not any(start <= position < end for start, end in spans):
                raise self._error(f"leaves the answer of turn {number + 1} outside its {{% generation %}} tags")

    def _tagged(self, messages: Messages, tools: Tools) -> tuple[str, list[Span]]:
        """The rendered text and the ranges of the tags in it, empty ones left out."""
        first, *rest = self.renderer.render(messages, tools, mark_generation=True).split(GENERATION_START)
        pieces, spans, length = [first], [], len(first)
        for piece in rest:
            inside, closed, outside = piece.partition(GENERATION_END)
            if not closed:
                raise self._error("nests its {% generation %} tags")
            if inside:
                spans.append((length, length + len(inside)))
            pieces += [inside, outside]
            length += len(inside) + len(outside)
        return "".join(pieces), spans

    # --- templates without ------------------------------------------------------------------------------------------

    def _marked_spans(self, messages: Messages, tools: Tools, text: str, turns: list[int]) -> list[Span]:
        masker = Masker(marker_stem([text, self.renderer.text, json.dumps(messages, default=str)]))
        masked = self._mask(messages, tools, turns, masker, Style.WHOLE)
        plain = [messages[number].get("content") or "" for number in turns]
        if _assemble(masked, plain) == text and not any(turn.calls_tools for turn in masked.turns):
            return self._extend(masked, tools, plain, turns)
        thoughtful = any(has_thoughts(messages[number]) for number in turns)
        styles = (Style.ENCLOSED, Style.TAGGED, Style.WHOLE) if thoughtful else (Style.WHOLE,)
        failure: TemplateError | None = None
        for style in styles:
            try:
                masked = self._mask(messages, tools, turns, masker, style)
                real = [self._one_real(messages, tools, masked, turns, k) for k in range(len(turns))]
                if _assemble(masked, real) != text:
                    raise _ContextDiffersError
                return self._extend(masked, tools, real, turns)
            except _ContextDiffersError:
                failure = failure or self._error("surrounds an answer with text that depends on it")
            except TemplateError as error:
                failure = error
        assert failure is not None
        raise failure

    def _mask(self, messages: Messages, tools: Tools, turns: list[int], masker: Masker, style: Style) -> _Masked:
        masked_messages = [dict(message) for message in messages]
        masked_turns = [masker.mask(messages[number], style) for number in turns]
        for number, turn in zip(turns, masked_turns, strict=True):
            masked_messages[number] = turn.message
        text = self.renderer.render(masked_messages, tools)
        found: dict[str, int] = {}
        for match in masker.pattern.finditer(text):
            if match.group() in found:
                raise self._error("writes an answer twice")
            found[match.group()] = match.start()
        ranges: list[Span] = []
        for number, turn in zip(turns, masked_turns, strict=True):
            turn.markers = sorted((m for m in turn.markers if m in found), key=found.__getitem__)
            if not turn.markers:
                what = "tool calls" if turn.calls_tools else "answer"
                raise self._error(f"does not write the {what} of turn {number + 1}")
            start, end = found[turn.markers[0]], found[turn.markers[-1]] + len(turn.markers[-1])
            if ranges and start < ranges[-1][1]:
                raise self._error("writes the answers in another order")
            ranges.append((start, end))
        return _Masked(masked_messages, masked_turns, text, ranges)

    def _one_real(self, messages: Messages, tools: Tools, masked: _Masked, turns: list[int], k: int) -> str:
        """The text that the template writes for answer ``k``: all between the context pieces."""
        variant: list[Mapping[str, Any]] = list(masked.messages)
        variant[turns[k]] = messages[turns[k]]
        text = self.renderer.render(variant, tools)
        start, end = masked.ranges[k]
        before, after = masked.text[:start], masked.text[end:]
        if len(text) < len(before) + len(after) or not (text.startswith(before) and text.endswith(after)):
            raise _ContextDiffersError
        return text[len(before) : len(text) - len(after)]

    def _extend(self, masked: _Masked, tools: Tools, real: Sequence[str], turns: list[int]) -> list[Span]:
        """Widens each answer by what the template writes between header and answer, and by its end token."""
        tails = self._tails(masked, tools)
        spans: list[Span] = []
        shift = 0
        for k, (start, end) in enumerate(masked.ranges):
            opening = self._header_end(masked, tools, k, turns[k]) + shift
            shift += len(real[k]) - (end - start)
            spans.append((opening, end + shift + self._closing_length(masked.turns[k], tails[k], turns[k])))
        return spans

    def _header_end(self, masked: _Masked, tools: Tools, k: int, number: int) -> int:
        start = masked.ranges[k][0]
        prompt = self._generation_prompt
        if prompt and masked.text[:start].endswith(prompt):
            return start
        if prompt and (header := self._proven_header(masked, tools, number)) is not None and header <= start:
            return header
        if masked.turns[k].markers[0] not in masked.turns[k].opening:
            raise self._error(f"hides where the answer of turn {number + 1} begins")
        return start

    def _proven_header(self, masked: _Masked, tools: Tools, number: int) -> int | None:
        """End of the header of turn ``number``: of the turns before it, rendered with the generation prompt."""
        try:
            before = self.renderer.render(masked.messages[:number], tools, add_generation_prompt=True)
        except TemplateError:
            return None  # some templates refuse a conversation that begins with the answer
        if masked.text.startswith(before):
            return len(before)
        thoughts = THOUGHT_TAGS.search(self._generation_prompt)
        if thoughts and before.endswith(self._generation_prompt):
            # The prompt opens the thoughts; this turn has others or none. Its header ends where thoughts would begin.
            before = before[: len(before) - len(self._generation_prompt) + thoughts.start()]
            if masked.text.startswith(before):
                return len(before)
        return None

    def _tails(self, masked: _Masked, tools: Tools) -> list[str]:
        """What the template itself writes after each answer, up to the next answer."""
        text, ranges = masked.text, masked.ranges
        if self._spells_end(masked.messages):
            text = self.renderer.render(_neutral(masked.messages), tools)
            markers = [(turn.markers[0], turn.markers[-1]) for turn in masked.turns]
            if any(text.count(marker) != 1 for pair in markers for marker in pair):
                raise self._error("writes the answers by what the user says")
            ranges = [(text.index(first), text.index(last) + len(last)) for first, last in markers]
        limits = [start for start, _ in ranges[1:]] + [len(text)]
        return [text[end:limit] for (_, end), limit in zip(ranges, limits, strict=True)]

    def _closing_length(self, turn: MaskedTurn, tail: str, number: int) -> int:
        if not turn.calls_tools or turn.markers[-1] == turn.closing:
            return self._end_length(tail)
        ends = [(tail.find(mark), len(mark)) for mark in (*self._end_marks, *_TOOL_CALL_ENDS) if mark in tail]
        if not ends:
            raise self._error(f"writes no end token after the tool call of turn {number + 1}")
        position, length = min(ends)
        return position + length

    def _spells_end(self, messages: Messages) -> bool:
        """Whether a turn that is no answer contains an end token.

        If the template writes nothing between an answer and such a turn, that token is not the answer's end.
        """
        others = [str(message.get("content")) for message in messages if message["role"] != "assistant"]
        return any(mark in content for content in others for mark in self._end_marks)

    def _end_length(self, tail: str) -> int:
        """Characters of ``tail`` that belong to the answer before it: white space and an end token, or none."""
        bare = tail.lstrip()
        for mark in self._end_marks:
            if bare.startswith(mark):
                return len(tail) - len(bare) + len(mark)
        return 0

    # --- what the template writes around any answer -------------------------------------------------------------------

    @functools.cached_property
    def _generation_prompt(self) -> str:
        """What ``add_generation_prompt`` adds to a conversation, or "" if unknown."""
        try:
            probe = [{"role": "user", "content": "x"}]
            with_prompt = self.renderer.render(probe, add_generation_prompt=True)
            without = self.renderer.render(probe)
        except TemplateError:
            return ""
        return with_prompt[len(without) :] if with_prompt.startswith(without) else ""

    @functools.cached_property
    def _end_marks(self) -> tuple[str, ...]:
        """Texts that end an answer, longest first: eos, and what the template writes after a last answer.

        Where the template ends its last answer, a special token right after a user's text ends turns too (gpt-oss
        writes one token after a last answer and another after an earlier one).
        """
        marks = {self._eos} - {""}
        asked, answered = "0qkuserz", "0qkanswerz"
        try:
            probe = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
            text = self.renderer.render(probe)
        except TemplateError:
            return tuple(marks)
        tail = text.partition(answered)[2]
        token, run = self._leading_special(tail.lstrip()), self._leading_run(tail.lstrip())
        if not token and tail and not tail[0].isspace():
            token = run = tail.split()[0]  # an end token that this tokenizer spells with several
        if token:
            marks |= {token, run, self._leading_special(text.partition(asked)[2])} - {""}
        return tuple(sorted(marks, key=lambda mark: (-len(mark), mark)))

    def _leading_run(self, text: str) -> str:
        """The special tokens that ``text`` begins with (Cohere ends a turn with two)."""
        length = 0
        while token := self._leading_special(text[length:]):
            length += len(token)
        return text[:length]

    def _leading_special(self, text: str) -> str:
        return next((token for token in self._special if token and text.startswith(token)), "")

    def _error(self, what: str) -> TemplateError:
        return TemplateError(f"chat template {self.renderer.name!r} {what}", remedy=_REMEDY)


def _assemble(masked: _Masked, answers: Sequence[str]) -> str:
    """The masked text with ``answers`` in place of the markers."""
    pieces: list[str] = []
    position = 0
    for (start, end), answer in zip(masked.ranges, answers, strict=True):
        pieces += [masked.text[position:start], answer]
        position = end
    return "".join([*pieces, masked.text[position:]])


def _neutral(messages: Messages) -> list[Mapping[str, Any]]:
    """The turns, with another text in every turn that is no answer."""
    return [message if message["role"] == "assistant" else {**message, "content": "x"} for message in messages]
