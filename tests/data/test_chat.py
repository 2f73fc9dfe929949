"""Chat templates by name, the frozen clock, the fingerprint, lengths and prompts."""

from __future__ import annotations

import pickle
from datetime import datetime
from pathlib import Path

import pytest

from chat_cases import GEMMA, LLAMA3, TOKENIZER, encoder, turns
from peft_study.data.chat import ChatEncoder
from peft_study.data.conversation import Message
from peft_study.data.templates import FROZEN_CLOCK, NAMED_TEMPLATES
from peft_study.errors import ConfigError, ModelError, TemplateError
from tiny_tokenizer import tiny_tokenizer


def test_named_templates_as_in_open_instruct() -> None:
    messages = turns(("s", "S"), ("u", "U"), ("a", "A"), ("u", "V"), ("a", "B")).messages
    rendered = {name: encoder(name).render(messages) for name in NAMED_TEMPLATES}
    assert rendered == {
        "tulu": "<|system|>\nS\n<|user|>\nU\n<|assistant|>\nA</s>\n<|user|>\nV\n<|assistant|>\nB</s>",
        "zephyr": "<|system|>\nS</s>\n<|user|>\nU</s>\n<|assistant|>\nA</s>\n<|user|>\nV</s>\n<|assistant|>\nB</s>\n",
        "simple_chat": "System: S\n\nUser: U\n\nAssistant: A\n\nUser: V\n\nAssistant: B</s>",
        "simple_concat_with_space": "S U A V B</s>",
        "simple_concat_with_new_line": "S\nU\nA\nV\nB</s>",
        "assistant_message_only": "AB",
        "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n",
    }
    assert encoder("tulu").render(messages[:2], add_generation_prompt=True).endswith("<|user|>\nU\n<|assistant|>\n")


def test_unknown_template_names_the_nearest() -> None:
    with pytest.raises(TemplateError, match=r"'tulo'.*did you mean 'tulu'"):
        encoder("tulo")
    with pytest.raises(TemplateError, match=r"missing\.jinja: there is no such"):
        encoder("missing.jinja")


def test_tokenizer_without_template() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(TemplateError, match=r"no chat template.*give tulu"):
        ChatEncoder(tokenizer)


def test_template_that_is_no_jinja(tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match=r"line 2.*not valid Jinja"):
        encoder("{# ok #}\n{% for %}", tmp_path)


def test_tokenizer_with_several_templates() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": "D{{ messages[0].content }}", "tool_use": "T{{ messages[0].content }}"}
    encode = ChatEncoder(tokenizer)
    message = [Message("user", "x")]
    assert (encode.render(message), encode.render(message, [{"name": "f"}])) == ("Dx", "Tx")
    assert ChatEncoder(tokenizer, template="tool_use").render(message) == "Tx"


def test_slow_tokenizer_is_refused() -> None:
    class Slow:
        bos_token = chat_template = None

    with pytest.raises(ModelError, match="fast tokenizer"):
        ChatEncoder(Slow(), template="tulu")


def test_clock_stands_still_and_counts(tmp_path: Path) -> None:
    frozen, other = encoder(LLAMA3, tmp_path), encoder(LLAMA3, tmp_path, clock=datetime(2030, 1, 2))
    messages = [Message("user", "x")]
    assert frozen.clock == FROZEN_CLOCK
    assert "26 Jul 2024" in frozen.render(messages)
    assert "02 Jan 2030" in other.render(messages)
    assert frozen.fingerprint != other.fingerprint


def test_fingerprint_follows_everything_that_decides_the_tokens() -> None:
    larger = ChatEncoder(tiny_tokenizer(401), template="tulu")
    renamed = tiny_tokenizer()
    renamed.eos_token = "<|im_end|>"
    different = [
        encoder("tulu"), encoder("zephyr"), encoder("tulu", max_length=5), encoder("tulu", add_bos=True), larger,
        ChatEncoder(renamed, template="tulu"),
    ]  # fmt: skip
    assert len({one.fingerprint for one in different}) == len(different)
    assert encoder("tulu").fingerprint == ChatEncoder(tiny_tokenizer(), template="tulu").fingerprint


def test_fingerprint_ignores_how_the_tokenizer_was_used() -> None:
    tokenizer = tiny_tokenizer()
    before = ChatEncoder(tokenizer, template="tulu").fingerprint
    tokenizer("some text", truncation=True, max_length=3)
    used = ChatEncoder(tokenizer, template="tulu")
    assert used.fingerprint == before
    assert len(used.encode(turns(("u", "a long question"), ("a", "a long answer")))) > 10


def test_cut_on_the_right() -> None:
    conversation = turns(("u", "question"), ("a", "a long answer"))
    whole, cut = encoder("tulu").encode(conversation), encoder("tulu", max_length=20).encode(conversation)
    assert len(whole) > 20
    assert cut.tokens_L.tolist() == whole.tokens_L[:20].tolist()
    assert cut.supervised_L.tolist() == whole.supervised_L[:20].tolist()
    with pytest.raises(ConfigError, match="max_length is 0"):
        encoder("tulu", max_length=0)


def test_bos_is_added_once(tmp_path: Path) -> None:
    conversation = turns(("u", "q"), ("a", "a"))
    bos = TOKENIZER.bos_token_id
    plain, added = encoder("tulu").encode(conversation), encoder("tulu", add_bos=True).encode(conversation)
    assert added.tokens_L.tolist() == [bos, *plain.tokens_L.tolist()]
    assert added.supervised_L.tolist() == [False, *plain.supervised_L.tolist()]
    own = encoder(GEMMA, tmp_path, add_bos=True)
    assert own.encode(conversation).tokens_L.tolist().count(bos) == 1
    assert own.prompt_tokens(conversation.messages[:1]).count(bos) == 1
    assert encoder("tulu", add_bos=True).prompt_tokens(conversation.messages[:1])[0] == bos


@pytest.mark.parametrize("name", ["tulu", "chatml", "zephyr", None])
def test_prompt_is_what_training_saw_before_the_answer(name: str | None) -> None:
    conversation = turns(("s", "s"), ("u", "first?"), ("a", "one"), ("u", "second?"), ("a", "two"))
    encode = encoder(name)
    example = encode.encode(conversation)
    for count in (2, 4):
        prompt = encode.prompt_tokens(conversation.messages[:count])
        assert example.tokens_L[: len(prompt)].tolist() == prompt
        assert not example.supervised_L[len(prompt) - 1]
        assert example.supervised_L[len(prompt)]


def test_encoder_survives_pickling() -> None:
    encode = encoder("tulu", max_length=30)
    copy = pickle.loads(pickle.dumps(encode))
    conversation = turns(("u", "q"), ("a", "a"))
    assert copy.fingerprint == encode.fingerprint
    assert copy.encode(conversation).tokens_L.tolist() == encode.encode(conversation).tokens_L.tolist()
