"""Chat templates by name, and where a template comes from: a NAME, a FILE, or the tokenizer itself.

The named ones give, turn for turn, the text of open-instruct's ``CHAT_TEMPLATES`` (``tulu``, ``zephyr``,
``simple_chat``, ``simple_concat_with_space``, ``simple_concat_with_new_line``, ``assistant_message_only``). Two
differences are meant: a ``tool`` turn, which open-instruct drops in silence, is written like any other role, and
``chatml`` is here as well. ``tulu`` in pictures (eos after every answer, a newline after it unless it is the last):

    <|system|>⏎ text ⏎ <|user|>⏎ text ⏎ <|assistant|>⏎ answer eos ⏎ <|user|>⏎ text ⏎ <|assistant|>⏎ answer eos
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from peft_study.errors import TemplateError, nearest

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
    """A chat template: its name for messages, its text, and the text to use where a conversation brings tools."""

    name: str
    text: str
    tool_text: str


def resolve_template(template: str | None, own: str | Mapping[str, str] | None) -> Template:
    """Finds the template that a user means.

    Args:
        template: None for the tokenizer's own; a name of ``NAMED_TEMPLATES``, or of the tokenizer's own set where it
            brings several; or the path of a Jinja file.
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
