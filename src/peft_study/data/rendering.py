"""Rendering a chat template as transformers does, with a clock that stands still.

The environment is the one documented for chat templates: sandboxed Jinja with ``trim_blocks`` and ``lstrip_blocks``,
loop controls, ``raise_exception``, ``strftime_now``, a plain ``tojson`` and the ``{% generation %}`` tag. It is built
here because transformers' own reads the wall clock and offers no way to pass another (its template arguments are
reduced to plain data), so that tokens made today would differ from tokens made tomorrow. A test holds the two equal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from peft_study.errors import TemplateError

#: What ``strftime_now`` shows unless told otherwise: the date that Llama 3's template falls back to.
FROZEN_CLOCK = datetime(2024, 7, 26)

#: Enclose what ``{% generation %}`` encloses, in the marked rendering. Unicode noncharacters: no text has them.
GENERATION_START, GENERATION_END = "\ufdd0\ufdd1", "\ufdd1\ufdd0"

_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
# What a template's own code can raise, beyond Jinja's errors, on data it did not expect.
_TEMPLATE_FAULTS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    LookupError,
    ArithmeticError,
    AttributeError,
    RecursionError,
)


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}...{% endgeneration %}``: transparent, or marked where the environment says so."""

    tags = {"generation"}  # noqa: RUF012 - Jinja reads this class attribute

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_enclose"), [], [], body).set_lineno(line)

    def _enclose(self, caller: Callable[[], str]) -> str:
        text = caller()
        return f"{GENERATION_START}{text}{GENERATION_END}" if self.environment.globals["mark_generation"] else text


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of Jinja's own filter, as chat templates expect."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


class Renderer:
    """One compiled chat template. Holds no state between calls: threads may share it.

    Args:
        name: what messages call the template.
        text: its Jinja source.
        variables: what the template sees besides the messages (``bos_token``, ``eos_token``, ...).
        clock: what ``strftime_now`` shows.

    Raises:
        TemplateError: the source is not valid Jinja.
    """

    def __init__(self, name: str, text: str, variables: Mapping[str, Any], clock: datetime = FROZEN_CLOCK) -> None:
        self.name = name
        self.text = text
        self.clock = clock
        self.has_generation_tags = _GENERATION_TAG.search(text) is not None
        self._variables = dict(variables)
        self._plain = self._compile(mark_generation=False)
        self._marked = self._compile(mark_generation=True) if self.has_generation_tags else self._plain

    def _compile(self, *, mark_generation: bool) -> jinja2.Template:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = self.clock.strftime
        environment.globals["mark_generation"] = mark_generation
        try:
            return environment.from_string(self.text)
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(
                f"chat template {self.name!r} is not valid Jinja: {error.message}", where=f"line {error.lineno}"
            ) from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
        mark_generation: bool = False,
    ) -> str:
        """Returns the text of a conversation.

        Args:
            messages: turns as mappings with ``role`` and ``content``; keys whose value is None are left out.
            tools: JSON schemas, as in the ``tools`` column.
            add_generation_prompt: end with the header of the next assistant turn.
            mark_generation: enclose what ``{% generation %}`` encloses in GENERATION_START and GENERATION_END.

        Raises:
            TemplateError: the template refuses the conversation (its own words are in the message).
        """
        template = self._marked if mark_generation else self._plain
        try:
            return template.render(
                {
                    **self._variables,
                    "messages": [_as_templates_read(message) for message in messages],
                    "tools": None if tools is None else list(tools),
                    "documents": None,
                    "add_generation_prompt": add_generation_prompt,
                }
            )
        except _TEMPLATE_FAULTS as error:
            raise TemplateError(
                f"chat template {self.name!r} refuses the conversation: {error}",
                remedy="change the row, or choose another chat template",
            ) from error


def _as_templates_read(message: Mapping[str, Any]) -> dict[str, Any]:
    """One turn without None values, its reasoning under the two names that templates look for."""
    turn = {key: value for key, value in message.items() if value is not None}
    reasoning = next((turn[field] for field in _REASONING_FIELDS if field in turn), None)
    return turn if reasoning is None else {"thinking": reasoning, **turn, "reasoning_content": reasoning}
