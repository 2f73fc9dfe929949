"""Chat templates: a NAME, a FILE or the tokenizer's own, and their rendering as transformers does it.

The named ones write the same text as open-instruct's ``CHAT_TEMPLATES`` (``tulu``, ``zephyr``, ``simple_chat``,
``simple_concat_with_space``, ``simple_concat_with_new_line``, ``assistant_message_only``), with two intended
differences: a ``tool`` turn, which open-instruct drops silently, is written like any other role, and ``chatml`` is
added. ``tulu`` in pictures (eos after every answer, then a newline unless it is the last answer):

    <|system|>⏎ text ⏎ <|user|>⏎ text ⏎ <|assistant|>⏎ answer eos ⏎ <|user|>⏎ text ⏎ <|assistant|>⏎ answer eos

The Jinja environment is the one documented for chat templates: sandboxed, with ``trim_blocks``, ``lstrip_blocks``, loop
controls, ``raise_exception``, ``strftime_now``, a plain ``tojson`` and the ``{% generation %}`` tag. It is built here
because transformers' own reads the wall clock and cannot be given another one (its template arguments are reduced to
plain data), so tokens would change from day to day. A test compares the two.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

from peft_study.errors import TemplateError, nearest

#: What ``strftime_now`` shows by default: the date that Llama 3's template falls back to.
FROZEN_CLOCK = datetime(2024, 7, 26)

#: Enclose what ``{% generation %}`` encloses, in the marked rendering. Unicode noncharacters: no text has them.
GENERATION_START, GENERATION_END = "\ufdd0\ufdd1", "\ufdd1\ufdd0"

_GENERATION_TAG = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")
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

_EACH = "{%- for message in messages -%}"
_END = "{%- endfor -%}"


def _joined(separator: str, turn: str) -> str:
    """Turns with ``separator`` between them and eos after the last."""
    return (
        f"{_EACH}{{%- if not loop.first -%}}{{{{ '{separator}' }}}}{{%- endif -%}}{{{{ {turn} }}}}"
        f"{{%- if loop.last and not add_generation_prompt -%}}{{{{ eos_token }}}}{{%- endif -%}}{_END}"
    )


def _headed(ending_of_answer: str, ending_of_others: str) -> str:
    """Turns under ``<|role|>`` lines."""
    return (
        f"{_EACH}{{{{ '<|' + message['role'] + '|>\\n' + message['content'] }}}}"
        f"{{%- if message['role'] == 'assistant' -%}}{ending_of_answer}{{%- else -%}}{ending_of_others}{{%- endif -%}}"
        f"{_END}{{%- if add_generation_prompt -%}}{{{{ '<|assistant|>\\n' }}}}{{%- endif -%}}"
    )


NAMED_TEMPLATES: dict[str, str] = {
    "tulu": _headed("{{ eos_token }}{%- if not loop.last -%}{{ '\\n' }}{%- endif -%}", "{{ '\\n' }}"),
    "zephyr": _headed("{{ eos_token + '\\n' }}", "{{ eos_token + '\\n' }}"),
    "simple_chat": _joined("\\n\\n", "message['role'].capitalize() + ': ' + message['content']"),
    "simple_concat_with_space": _joined(" ", "message['content']"),
    "simple_concat_with_new_line": _joined("\\n", "message['content']"),
    "assistant_message_only": (
        f"{_EACH}{{%- if message['role'] == 'assistant' -%}}{{{{ message['content'] }}}}{{%- endif -%}}{_END}"
    ),
    "chatml": (
        f"{_EACH}{{{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}}}{_END}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
    ),
}


class Template(NamedTuple):
    """A chat template: its name for messages, its text, and the text for conversations with tools."""

    name: str
    text: str
    tool_text: str


def resolve_template(template: str | None, own: str | Mapping[str, str] | None) -> Template:
    """Returns the template that a user names.

    Args:
        template: None for the tokenizer's own; a name of ``NAMED_TEMPLATES``, or of the tokenizer's own set where it
            has several; or the path of a Jinja file.
        own: the tokenizer's ``chat_template``: one text, several by name, or none.

    Raises:
        TemplateError: no such name or file, or the tokenizer has none and none was given.
    """
    variants = dict(own) if isinstance(own, Mapping) else {}
    if template is None:
        text = own if isinstance(own, str) else variants.get("default")
        if not text:
            several = f"; it has {', '.join(sorted(variants))}" if variants else ""
            raise TemplateError(
                f"the tokenizer has no chat template of its own{several}",
                remedy="give tulu, another built-in name, or a Jinja file",
            )
        return Template("the tokenizer's own", text, variants.get("tool_use", text))
    if template in NAMED_TEMPLATES:
        return Template(template, NAMED_TEMPLATES[template], NAMED_TEMPLATES[template])
    if template in variants:
        return Template(template, variants[template], variants[template])
    path = Path(template)
    if path.is_file():
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TemplateError(f"cannot read the chat template: {error}", where=template) from error
        if not text.strip():
            raise TemplateError("the chat template is empty", where=template)
        return Template(template, text, text)
    if "/" in template or path.suffix in {".jinja", ".jinja2", ".j2", ".txt"}:
        raise TemplateError("there is no such chat template file", where=template, remedy="check the path")
    raise TemplateError(f"unknown chat template {template!r}", remedy=nearest(template, [*NAMED_TEMPLATES, *variants]))


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}...{% endgeneration %}``: marked if the environment says ``mark_generation``."""

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
    reasoning = next((turn[field] for field in REASONING_FIELDS if field in turn), None)
    return turn if reasoning is None else {"thinking": reasoning, **turn, "reasoning_content": reasoning}
