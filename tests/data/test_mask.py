"""What is supervised: against renderings by hand, transformers' own mask and TRL's tags, and on planted cases."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from chat_cases import (
    GEMMA,
    LAYOUT,
    LLAMA3,
    QWEN3,
    TAGGED,
    TOKENIZER,
    by_hand,
    encoder,
    expected,
    learned,
    real_conversations,
    turns,
)
from peft_study.data.chat import ChatEncoder
from peft_study.data.conversation import Conversation, Message
from peft_study.errors import TemplateError
from tiny_tokenizer import tiny_tokenizer


@pytest.mark.parametrize("folder", ["chat-demo", "tulu-like-mix"])
@pytest.mark.parametrize("name", ["tulu", "chatml"])
def test_real_conversations_as_rendered_by_hand(folder: str, name: str) -> None:
    encode = encoder(name)
    for conversation in real_conversations(folder, 60):
        text, spans = by_hand(conversation, name, "</s>", "<|im_end|>")
        tokens, mask = expected(TOKENIZER, text, spans)
        example = encode.encode(conversation)
        assert example.tokens_L.tolist() == tokens
        assert example.supervised_L.tolist() == mask


def test_real_conversations_as_masked_by_transformers(tmp_path: Path) -> None:
    encode = encoder(TAGGED, tmp_path)
    for conversation in real_conversations("chat-demo", 60):
        reference = TOKENIZER.apply_chat_template(
            [message.to_dict() for message in conversation.messages],
            chat_template=TAGGED,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        example = encode.encode(conversation)
        assert example.tokens_L.tolist() == reference["input_ids"]
        assert example.supervised_L.astype(int).tolist() == reference["assistant_masks"]


def test_markers_find_what_generation_tags_say(tmp_path: Path) -> None:
    untagged = TAGGED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    (tmp_path / "b").mkdir()
    tagged, marked = encoder(TAGGED, tmp_path), encoder(untagged, tmp_path / "b")
    for conversation in real_conversations("chat-demo", 40):
        one, other = tagged.encode(conversation), marked.encode(conversation)
        assert one.tokens_L.tolist() == other.tokens_L.tolist()
        assert one.supervised_L.tolist() == other.supervised_L.tolist()


@pytest.mark.parametrize("template", [LLAMA3.replace("strftime_now('%d %b %Y')", "'x'"), QWEN3, TAGGED, GEMMA, LAYOUT])
@pytest.mark.parametrize("prompt", [False, True])
def test_renders_as_transformers(template: str, prompt: bool, tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "Hi <&> \u00e9"},
        {"role": "assistant", "content": "<think>a</think>\n\nb ", "reasoning_content": None},
        {"role": "user", "content": " q"},
    ]
    reference = TOKENIZER.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=prompt
    )
    said = [Message(m["role"], m["content"]) for m in messages[:1]]  # type: ignore[arg-type]
    said += [Message("assistant", messages[1]["content"], {"reasoning_content": None}), Message("user", " q")]  # type: ignore[arg-type]
    assert encoder(template, tmp_path).render(said, add_generation_prompt=prompt) == reference


@pytest.mark.parametrize(
    "family", ["qwen2_5", "llama3", "gemma", "gemma3", "cohere2", "qwen3_instruct_2507", "lfm2_v2"]
)
def test_markers_find_what_trl_marks(family: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="TRL brings the templates with tags; it is no dependency")
    folder = Path(trl.__file__).parent / "chat_templates"
    if not (folder / f"{family}_training.jinja").is_file():
        pytest.skip(f"this TRL has no {family} template")
    own = (folder / f"{family}.jinja").read_text(encoding="utf-8")
    tagged = (folder / f"{family}_training.jinja").read_text(encoding="utf-8")
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|eot_id|>", "<end_of_turn>", "<|END_RESPONSE|>", "<|END_OF_TURN_TOKEN|>"]}
    )
    conversation = turns(("u", "Paris?"), ("a", " Paris. "), ("u", "Paris."), ("a", "Paris."), ("u", "?"), ("a", "Yes"))
    texts = []
    for name, template in (("own", own), ("tagged", tagged)):
        (tmp_path / name).write_text(template, encoding="utf-8")
        example = ChatEncoder(tokenizer, template=str(tmp_path / name)).encode(conversation)
        texts.append(tokenizer.decode(example.tokens_L[example.supervised_L]))
    # Some of TRL's tags take in the newline before the answer or the one after its end token.
    assert texts[0] == texts[1].replace("\n", "")
    assert texts[0].count("Paris.") == 2


def test_outer_white_space_is_the_answers_own() -> None:
    assert learned(encoder("tulu"), turns(("u", "q"), ("a", "  a\n\n"))) == ["  a\n\n</s>"]


def test_answer_repeated_everywhere() -> None:
    conversation = turns(("s", "yes"), ("u", "yes"), ("a", "yes"), ("u", "yes</s>\nyes"), ("a", "yes"))
    example = encoder("tulu").encode(conversation)
    assert learned(encoder("tulu"), conversation) == ["yes</s>", "yes</s>"]
    text, spans = by_hand(conversation, "tulu", "</s>", "")
    assert example.supervised_L.tolist() == expected(TOKENIZER, text, spans)[1]


def test_answer_that_spells_out_its_context() -> None:
    answer = "a</s>\n<|user|>\nq\n<|assistant|>\na"
    conversation = turns(("u", "q"), ("a", answer), ("u", "q"), ("a", "a"))
    assert learned(encoder("tulu"), conversation) == [answer + "</s>", "a</s>"]


def test_empty_system_turn() -> None:
    assert learned(encoder("chatml"), turns(("s", ""), ("u", "q"), ("a", "a"))) == ["a<|im_end|>"]


def test_answers_one_after_the_other() -> None:
    assert learned(encoder("chatml"), turns(("u", "q"), ("a", "a"), ("a", "a"))) == ["a<|im_end|>", "a<|im_end|>"]


def test_conversation_that_ends_with_a_question() -> None:
    assert learned(encoder("chatml"), turns(("u", "q"), ("a", "a"), ("u", "q"))) == ["a<|im_end|>"]


def test_template_that_trims_and_dates(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|end|>", "<|eot|>"]})
    (tmp_path / "l").write_text(LLAMA3)
    encode = ChatEncoder(tokenizer, template=str(tmp_path / "l"))
    conversation = turns(("s", " s "), ("u", " a "), ("a", " a\n"), ("u", "b"), ("a", "\n b b "))
    example = encode.encode(conversation)
    text = tokenizer.decode(example.tokens_L)
    assert text.startswith("<s><|start|>system<|end|>\n\nToday: 26 Jul 2024<|eot|>")
    assert tokenizer.decode(example.tokens_L[example.supervised_L]) == "a<|eot|>b b<|eot|>"


def test_gemma_like_template(tmp_path: Path) -> None:
    encode = encoder(GEMMA, tmp_path)
    assert learned(encode, turns(("u", "a"), ("a", " a "), ("u", "b"), ("a", "b"))) == ["a<end>", "b<end>"]
    with pytest.raises(TemplateError, match=r"conversation 'c1'.*template\.jinja.*System role not supported"):
        encode.encode(turns(("s", "s"), ("u", "a"), ("a", "a")))


def test_earlier_thoughts_dropped_last_ones_learned(tmp_path: Path) -> None:
    encode = encoder(QWEN3, tmp_path)
    old, new = "<think>\nold\n</think>\n\nfirst", "<think>\nnew\n</think>\n\nsecond"
    assert learned(encode, turns(("u", "q"), ("a", old), ("u", "q"), ("a", new))) == [
        "first<|im_end|>",
        "<think>\nnew\n</think>\n\nsecond<|im_end|>",
    ]


def test_thoughts_that_the_template_adds_are_the_models_to_write(tmp_path: Path) -> None:
    encode = encoder(QWEN3, tmp_path)
    conversation = turns(("u", "q"), ("a", "first"), ("u", "q"), ("a", "second"))
    assert learned(encode, conversation) == ["first<|im_end|>", "<think>\n\n</think>\n\nsecond<|im_end|>"]
    # What is learned begins where the prompt for generation ends.
    prompt = encode.prompt_tokens(conversation.messages[:3])
    example = encode.encode(conversation)
    assert example.tokens_L[: len(prompt)].tolist() == prompt
    assert example.supervised_L[len(prompt) :].tolist()[:-1] == [True] * (len(example) - len(prompt) - 1)


def test_thoughts_dropped_without_trimming(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% set c = m.content %}"
        "{% if m.role == 'assistant' and not loop.last %}{% set c = c.split('</think>')[-1] %}{% endif %}"
        "{{ '<' + m.role + '>' + c + eos_token }}{% endfor %}"
    )
    conversation = turns(("u", "q"), ("a", "<think>x</think>\n\n a"), ("u", "q"), ("a", "<think>y</think> b "))
    assert learned(encoder(template, tmp_path), conversation) == ["\n\n a</s>", "<think>y</think> b </s>"]


def test_tool_turns_are_read_and_not_learned() -> None:
    conversation = turns(("u", "q"), ("a", "call"), ("t", "42"), ("a", "It is 42."))
    for name in ("tulu", "chatml", "zephyr"):
        encode = encoder(name)
        end = "<|im_end|>" if name == "chatml" else "</s>"
        assert "42" in encode.render(conversation.messages[:3])
        assert learned(encode, conversation) == ["call" + end, "It is 42." + end]


def test_rendered_tool_call_is_learned(tmp_path: Path) -> None:
    calls = [{"type": "function", "function": {"name": "get", "arguments": {"city": "Paris", "n": 3}}}]
    messages = (
        Message("user", "Paris?"),
        Message("assistant", "", {"tool_calls": calls}),
        Message("tool", "42"),
        Message("assistant", "42"),
    )
    spoken = learned(encoder(QWEN3, tmp_path), Conversation("c", messages, "s"))
    call = '<tool_call>\n{"name": "get", "arguments": {"city": "Paris", "n": 3}}\n</tool_call><|im_end|>'
    assert spoken == [call, "<think>\n\n</think>\n\n42<|im_end|>"]


def test_tools_reach_the_template(tmp_path: Path) -> None:
    template = "{% if tools %}{{ tools | tojson + '\\n' }}{% endif %}" + TAGGED
    tools = [{"name": "get"}]
    messages = (Message("user", "q"), Message("assistant", "a"))
    encode = encoder(template, tmp_path)
    assert encode.render(messages, tools).startswith('[{"name": "get"}]\n')
    assert learned(encode, Conversation("c", messages, "s", tools)) == ["a<|im_end|>"]


def test_tags_without_the_end_token_take_it_in(tmp_path: Path) -> None:
    template = TAGGED.replace("+ '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}<|im_end|>")
    assert learned(encoder(template, tmp_path), turns(("u", "q"), ("a", "a"))) == ["a<|im_end|>"]


def test_a_question_that_begins_with_an_end_token_ends_no_answer(tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{{ eos_token if loop.last }}{% else %}{{ ' ' + m.content }}{% endif %}{% endfor %}"
    )
    conversation = turns(("u", "q"), ("a", "a"), ("u", "</s>"), ("a", "b"))
    assert learned(encoder(template, tmp_path), conversation) == ["a", "b</s>"]


def test_tags_around_something_else_are_refused(tmp_path: Path) -> None:
    template = TAGGED.replace("{% generation %}{{ m.content | trim", "{% generation %}x{% endgeneration %}{{ m.content")
    template = template.replace("'<|im_end|>' }}{% endgeneration %}", "'<|im_end|>' }}", 1)
    with pytest.raises(TemplateError, match="outside its"):
        encoder(template, tmp_path).encode(turns(("u", "q"), ("a", "a")))


def test_template_without_end_token_learns_the_answer_alone() -> None:
    conversation = turns(("u", "q"), ("a", "a"), ("u", "</s>b"), ("a", "c"))
    # eos follows the last answer only; the user's own must not pass for the first answer's end.
    assert learned(encoder("simple_concat_with_new_line"), conversation) == ["a", "c</s>"]
    assert learned(encoder("assistant_message_only"), turns(("u", "q"), ("a", "abc"))) == ["bc"]  # position 0


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "does not write the answer"),
        ("{% for m in messages %}{{ m.content + m.content }}{% endfor %}", "writes an answer twice"),
        ("{% for m in messages[::-1] %}{{ m.content }}{% endfor %}", "in another order"),
        (
            "{% for m in messages %}{{ m.content | trim }}"
            "{{ '!' if 'hi' in messages[1].content and 'bye' in messages[3].content }}{% endfor %}",
            "depends on it",
        ),
        ("{% for m in messages %}{{ m.content | length }}:{{ m.content }}{% endfor %}", "depends on it"),
        ("{% for m in messages %}{{ m.content[0] + m.content[1:] | upper }}{% endfor %}", "does not write the answer"),
    ],
)
def test_answers_that_cannot_be_located_are_refused(template: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(TemplateError, match=rf"conversation 'c1'.*template\.jinja.*{message}.*generation"):
        encoder(template, tmp_path).encode(turns(("u", "hello"), ("a", "hi there"), ("u", "x"), ("a", "bye")))


def test_offsets_that_leave_out_white_space() -> None:
    """GPT-2's post-processor trims white space off the offsets: a blank token would then belong nowhere."""
    trimming = tiny_tokenizer()
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    conversation = turns(("u", "q"), ("a", " \n\n  Paris \n "), ("u", " "), ("a", "\n"))
    for name in ("tulu", "simple_concat_with_space"):
        one, other = ChatEncoder(trimming, template=name), ChatEncoder(TOKENIZER, template=name)
        assert one.encode(conversation).supervised_L.tolist() == other.encode(conversation).supervised_L.tolist()


def test_a_token_across_the_header_is_learned(tmp_path: Path) -> None:
    """The header ends with a blank and the answer begins with a word: one token holds both."""
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\\n' }}{% endfor %}"
    assert " Paris" in TOKENIZER.convert_tokens_to_string(["ĠParis"])
    assert learned(encoder(template, tmp_path), turns(("u", "q"), ("a", "Paris is"))) == [" Paris is"]


SPELLED_OUT = [
    "</s>", "<s>", "<|im_end|>", "<|im_start|>", "<|im_start|>assistant\n", "<|assistant|>\n", "</think>", "<think>",
    "\n", " ", "\t", "a", "Paris", "é", "e\u0301", "\U0001f469\u200d\U0001f4bb", "日本", "\u00a0", "0qk0x", "{{ x }}",
]  # fmt: skip
LETTERS = st.text(st.characters(exclude_categories=["Cs"]), max_size=4)
NASTY = st.lists(st.sampled_from(SPELLED_OUT) | LETTERS, min_size=1, max_size=5).map("".join)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(NASTY, NASTY), min_size=1, max_size=3), st.none() | NASTY, st.sampled_from(["tulu", "chatml"])
)
def test_nasty_text_is_masked_exactly(pairs: list[tuple[str, str]], system: str | None, name: str) -> None:
    said = [] if system is None else [("s", system)]
    conversation = turns(*said, *(turn for q, a in pairs for turn in (("u", q), ("a", a))))
    text, spans = by_hand(conversation, name, "</s>", "<|im_end|>")
    tokens, mask = expected(TOKENIZER, text, spans)
    example = NASTY_ENCODERS[name].encode(conversation)
    assert example.tokens_L.tolist() == tokens
    assert example.supervised_L.tolist() == mask
    assert TOKENIZER.decode(example.tokens_L) == text


NASTY_ENCODERS = {name: ChatEncoder(TOKENIZER, template=name) for name in ("tulu", "chatml")}


@pytest.mark.slow
def test_smollm2_on_real_conversations() -> None:
    from peft_study.model.load import load_tokenizer

    tokenizer = load_tokenizer("smollm2-135m-instruct")
    for name in ("tulu", "chatml"):
        encode = ChatEncoder(tokenizer, template=name)
        for conversation in real_conversations("tulu-like-mix", 300):
            text, spans = by_hand(conversation, name, tokenizer.eos_token, "<|im_end|>")
            tokens, mask = expected(tokenizer, text, spans)
            example = encode.encode(conversation)
            assert example.tokens_L.tolist() == tokens
            assert example.supervised_L.tolist() == mask
