"""Templates, conversations and independent renderings that the tests of chat encoding share."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_study.data.chat import ChatEncoder
from peft_study.data.conversation import Conversation, Message
from tiny_tokenizer import tiny_tokenizer

SHARED = Path(__file__).resolve().parents[1].parent / "shared" / "data"
TOKENIZER = tiny_tokenizer()

LLAMA3 = (
    "{{ bos_token }}{{ '<|start|>system<|end|>\\n\\nToday: ' + strftime_now('%d %b %Y') + '<|eot|>' }}"
    "{% for m in messages %}{{ '<|start|>' + m.role + '<|end|>\\n\\n' + m.content | trim + '<|eot|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant<|end|>\\n\\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{{ '<start>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim + '<end>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start>model\\n' }}{% endif %}"
)
# Drops the thoughts of earlier answers, keeps those of the last, and writes empty ones where it has none.
QWEN3 = (
    "{% for m in messages %}{% set content = m.content %}{% set thoughts = '' %}"
    "{% if m.role == 'assistant' %}"
    "{% if '</think>' in content %}"
    "{% set thoughts = content.split('</think>')[0].split('<think>')[-1].strip() %}"
    "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\\n' }}"
    "{% if loop.last %}{{ '<think>\\n' + thoughts + '\\n</think>\\n\\n' }}{% endif %}{{ content }}"
    "{% if m.tool_calls %}{% for call in m.tool_calls %}"
    "{{ '\\n' if content or not loop.first }}{{ '<tool_call>\\n' + call.function | tojson + '\\n</tool_call>' }}"
    "{% endfor %}{% endif %}{{ '<|im_end|>\\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# What depends on how the environment is set up: block trimming, undefined keys, loop controls, JSON without escapes.
LAYOUT = """{% for m in messages %}
    {% if m.role == 'system' %}
        {% continue %}
    {% endif %}
{{ m.role }}: {{ m | tojson }} {{ 'thinks' if m.reasoning_content is defined }}
    {%- if m.thinking is defined %}

    {{ m.thinking }}
    {% endif %}
{% endfor %}
{{ eos_token }}"""
TAGGED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
)


def encoder(template: str | None = None, tmp_path: Path | None = None, **options: Any) -> ChatEncoder:
    """An encoder of the tiny tokenizer; a Jinja text goes through a file."""
    if template is not None and "{" in template:
        assert tmp_path is not None
        path = tmp_path / "template.jinja"
        path.write_text(template, encoding="utf-8")
        template = str(path)
    return ChatEncoder(TOKENIZER, template=template, **options)


def turns(*pairs: tuple[str, str]) -> Conversation:
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return Conversation("c1", tuple(Message(roles[role], text) for role, text in pairs), "here")  # type: ignore[arg-type]


def learned(encode: ChatEncoder, conversation: Conversation) -> list[str]:
    """The supervised stretches as text."""
    example = encode.encode(conversation)
    edges = np.flatnonzero(np.diff(np.r_[0, example.supervised_L.astype(np.int8), 0]))
    return [TOKENIZER.decode(example.tokens_L[a:b]) for a, b in edges.reshape(-1, 2)]


def by_hand(conversation: Conversation, name: str, eos: str, end: str) -> tuple[str, list[tuple[int, int]]]:
    """An independent rendering of tulu (``eos``) and ChatML (``end``): text and answer ranges."""
    text, spans = "", []
    for number, message in enumerate(conversation.messages):
        last = number == len(conversation.messages) - 1
        text += f"<|{message.role}|>\n" if name == "tulu" else f"<|im_start|>{message.role}\n"
        closing = end if name == "chatml" else eos if message.role == "assistant" else ""
        if message.role == "assistant":
            spans.append((len(text), len(text) + len(message.content) + len(closing)))
        text += message.content + closing
        if name == "chatml" or message.role != "assistant" or not last:
            text += "\n"
    return text, spans


def expected(tokenizer: Any, text: str, spans: list[tuple[int, int]]) -> tuple[list[int], list[bool]]:
    """Tokens of the text, and which hold a byte of a span: told from the tokens' own bytes, without offsets."""
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    alphabet = byte_of_letter()
    byte_spans = [(len(text[:a].encode()), len(text[:b].encode())) for a, b in spans]
    mask, position = [], 0
    for token in tokens:
        letters = tokenizer.convert_ids_to_tokens(token)
        special = token in tokenizer.all_special_ids
        raw = letters.encode() if special else bytes(alphabet[letter] for letter in letters)
        mask.append(any(position < b and position + len(raw) > a for a, b in byte_spans))
        position += len(raw)
    assert position == len(text.encode())
    return tokens, [False, *mask[1:]]


def byte_of_letter() -> dict[str, int]:
    """GPT-2's printable letters and the bytes they stand for (as in its encoder.py)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + n): b for n, b in enumerate(rest)}


def real_conversations(folder: str, limit: int) -> list[Conversation]:
    path = SHARED / folder / "train.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"no shared data at {path}")
    chosen: list[Conversation] = []
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            # Every row with several answers or a system turn, up to the limit.
            if len(row["messages"]) > 2 and len(chosen) < limit:
                messages = tuple(Message(m["role"], m["content"]) for m in row["messages"])
                chosen.append(Conversation(row["id"], messages, row["source"]))
    assert any(c.messages[0].role == "system" for c in chosen)
    assert any(sum(m.role == "assistant" for m in c.messages) > 2 for c in chosen)
    return chosen
