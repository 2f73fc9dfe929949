"""From a conversation to tokens and a loss mask.

Conversation --template--> text + character ranges of the answers --tokenizer--> tokens + supervised mask

<|user|>⏎ Hi ⏎ <|assistant|>⏎ Hello . </s> ⏎ <|user|>⏎ ...
                              ^^^^^^^^^^^^                      supervised
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from peft_study.data.conversation import Conversation, Example, Message
from peft_study.data.spans import Span, SpanFinder
from peft_study.data.templates import FROZEN_CLOCK, Renderer, Template, resolve_template
from peft_study.doctor.batches import Ends, LabelledRow, count_batches
from peft_study.doctor.observations import DataCounts
from peft_study.errors import ConfigError, ModelError, TemplateError

#: Raised whenever the same conversation may give other tokens or another mask than before.
ENCODING_VERSION = 1

_PROBE = "Hi, world!\n\n 3 naïve  cafés \U0001f642\n"


class ChatEncoder:
    """Turns conversations into tokens and a mask of the tokens to learn.

    The whole rendered conversation is tokenised at once, without the tokenizer's automatic special tokens (the
    template writes its own, so none is doubled). Every assistant turn including its end token is supervised, nothing
    else: see ``peft_study.data.spans``. A token is supervised when any of its characters belongs to an answer, so every
    character of an answer is learned even if the tokenizer merges its start with the end of a header. Special tokens
    spelled out in a message are tokenised as such, as in transformers.

    Args:
        tokenizer: a fast tokenizer of transformers. It is read here and not kept.
        template: None for the tokenizer's own, a name of ``NAMED_TEMPLATES``, or the path of a Jinja file.
        max_length: longest example in tokens; longer ones lose their end. None: no limit.
        add_bos: begin with the bos token where the template does not.
        clock: what the template's ``strftime_now`` shows; by default FROZEN_CLOCK, 26 July 2024.

    Attributes:
        template_name: what messages call the template.
        template_text: its source.
        clock: the frozen clock.
        missing_bos: the BOS token, as text, where the tokenizer puts it before a text by itself and examples do not
            begin with it, so that the model reads texts unlike those of its training; else None.
        ends: the tokenizer's special tokens, and
        probe: what the doctor sees in a smallest conversation; None where the template refuses it.
        tuned_template: name of the template that the model was tuned with; None where its tokenizer has none.
        fingerprint: sha256 over everything that decides the tokens: tokenizer, template, clock, length, bos.

    Raises:
        TemplateError: no such template, or it is not valid Jinja.
        ModelError: the tokenizer is not a fast one.
        ConfigError: ``max_length`` below 1, or ``add_bos`` without a bos token.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        template: str | None = None,
        max_length: int | None = None,
        add_bos: bool = False,
        clock: datetime | None = None,
    ) -> None:
        if max_length is not None and max_length < 1:
            raise ConfigError(f"max_length is {max_length}", remedy="give at least 1 token")
        if add_bos and tokenizer.bos_token is None:
            raise ConfigError("add_bos is set, but the tokenizer has no bos token", remedy="leave add_bos out")
        chosen = resolve_template(template, tokenizer.chat_template)
        self.template_name = chosen.name
        self.template_text = chosen.text
        self.clock = clock or FROZEN_CLOCK
        self.max_length = max_length
        self._tool_text = chosen.tool_text
        self._backend_json = _bare_backend(tokenizer).to_str()
        self._variables = _template_variables(tokenizer)
        self._eos: str = tokenizer.eos_token or ""
        self._bos_id: int | None = tokenizer.bos_token_id if add_bos else None
        self._special = sorted({t.content for t in tokenizer.added_tokens_decoder.values() if t.special})
        self._build()
        if self._encode_text(_PROBE).ids != tokenizer(_PROBE, add_special_tokens=False)["input_ids"]:
            raise ModelError(
                f"{type(tokenizer).__name__} changes the tokens of its own fast tokenizer",
                remedy="use a tokenizer that transformers loads as PreTrainedTokenizerFast",
            )
        self.fingerprint = self._fingerprint()
        self.ends = Ends.of(tokenizer)
        self.tuned_template = _tuned_template(tokenizer, chosen)
        self.probe = self._probed()
        self.missing_bos = None if self.probe is None else self.probe.missing_bos

    def _build(self) -> None:
        self._backend: Tokenizer = Tokenizer.from_str(self._backend_json)
        self._finder = self._compile(self.template_text)
        same = self._tool_text == self.template_text
        self._tool_finder = self._finder if same else self._compile(self._tool_text)

    def _compile(self, text: str) -> SpanFinder:
        return SpanFinder(Renderer(self.template_name, text, self._variables, self.clock), self._eos, self._special)

    def __getstate__(self) -> dict[str, Any]:
        built = ("_backend", "_finder", "_tool_finder")
        return {key: value for key, value in self.__dict__.items() if key not in built}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._build()

    def _probed(self) -> DataCounts | None:
        """Returns what the doctor sees in a smallest conversation; None where the template refuses it."""
        try:
            text = self._finder.renderer.render(
                [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            )
        except TemplateError:
            return None  # a template that refuses even this fails at the first row
        ids = np.array(self._encode_text(text).ids, dtype=np.int32)
        if self._bos_id is not None:
            ids = behind_bos(Example(ids, np.ones(len(ids), dtype=np.bool_)), self._bos_id).tokens_L
        return count_batches([LabelledRow(ids.astype(np.int64), ids.astype(np.int64))], ends=self.ends, max_length=None)

    def _fingerprint(self) -> str:
        parts = {
            "encoding": ENCODING_VERSION,
            "tokenizer": hashlib.sha256(self._backend_json.encode()).hexdigest(),
            "special": self._special,
            "variables": self._variables,
            "template": [self.template_text, self._tool_text],
            "clock": self.clock.isoformat(),
            "max_length": self.max_length,
            "bos_id": self._bos_id,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        """Returns the text of a conversation, with the header of the next assistant turn if asked for.

        Raises:
            TemplateError: the template refuses the conversation.
        """
        finder = self._tool_finder if tools is not None else self._finder
        turns = [message.to_dict() for message in messages]
        return finder.renderer.render(turns, tools, add_generation_prompt=add_generation_prompt)

    def encode(self, conversation: Conversation) -> Example:
        """Returns the tokens and the mask, cut on the right to ``max_length`` tokens.

        Raises:
            TemplateError: the template refuses the conversation, or an answer cannot be located.
        """
        whole = self.encode_whole(conversation)
        return Example(whole.tokens_L[: self.max_length], whole.supervised_L[: self.max_length])

    def encode_whole(self, conversation: Conversation) -> Example:
        """Returns the tokens and the mask at full length.

        Raises:
            TemplateError: as ``encode``.
        """
        finder = self._tool_finder if conversation.tools is not None else self._finder
        try:
            text, spans = finder.locate([m.to_dict() for m in conversation.messages], conversation.tools)
        except TemplateError as error:
            where = f"conversation {conversation.id!r}"
            raise TemplateError(error.what, where=where, remedy=error.remedy) from error
        encoding = self._encode_text(text)
        tokens_L = np.array(encoding.ids, dtype=np.int32)
        supervised_L = _covered(np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2), spans)
        example = Example(tokens_L, supervised_L)
        if self._bos_id is not None:
            example = behind_bos(example, self._bos_id)
        example.supervised_L[:1] = False
        return example

    def prompt_tokens(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> list[int]:
        """Returns the tokens that a model continues with its answer: rendered and tokenised as in training.

        Raises:
            TemplateError: the template refuses the conversation.
        """
        tokens: list[int] = self._encode_text(self.render(messages, tools, add_generation_prompt=True)).ids
        if self._bos_id is not None and tokens[:1] != [self._bos_id]:
            tokens = [self._bos_id, *tokens]
        return tokens

    def answered(self, messages: Sequence[Message], answer: str) -> Example:
        """Returns a prompt with the beginning of an answer, whose tokens are supervised: all that was said of it.

        The whole text is tokenised at once and cut where the prompt's tokens end, as lm-eval does; where the two run
        together the answer is tokenised alone.

        Raises:
            TemplateError: the template refuses the conversation.
        """
        prompt = self.prompt_tokens(messages)
        text = self.render(messages, add_generation_prompt=True)
        whole: list[int] = self._encode_text(text + answer).ids
        if self._bos_id is not None and whole[:1] != [self._bos_id]:
            whole = [self._bos_id, *whole]
        if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
            whole = [*prompt, *self._encode_text(answer).ids]
        supervised_L = np.arange(len(whole)) >= len(prompt)
        return Example(np.array(whole, dtype=np.int32), supervised_L)

    def plain(self, text: str) -> Example:
        """Returns a whole text without a template, behind BOS where the tokenizer puts it.

        All but the first token is supervised.
        """
        bos = [self.ends.bos] if self.ends.adds_bos else []
        tokens_L = np.array([*bos, *self._encode_text(text).ids], dtype=np.int32)
        return Example(tokens_L, np.arange(len(tokens_L)) > 0)

    def _encode_text(self, text: str) -> Any:
        return self._backend.encode(text, add_special_tokens=False)


def behind_bos(example: Example, bos: int) -> Example:
    """Returns the example with that token first; the example itself where it begins with it."""
    if example.tokens_L[:1].tolist() == [bos]:
        return example
    tokens_L = np.concatenate([np.array([bos], dtype=np.int32), example.tokens_L])
    return Example(tokens_L, np.concatenate([np.zeros(1, dtype=np.bool_), example.supervised_L]))


def _bare_backend(tokenizer: Any) -> Tokenizer:
    """A copy of the Rust tokenizer without truncation, padding and post-processing.

    The post-processor adds special tokens, which are not wanted here, and trims white space off the offsets, so that
    a token's offsets would no longer say which characters it holds.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ModelError(
            f"{type(tokenizer).__name__} is not a fast tokenizer, so its tokens cannot be traced to characters",
            remedy="use a model folder with a tokenizer.json",
        )
    state = json.loads(backend.to_str())
    state.update(post_processor=None, truncation=None, padding=None)
    return Tokenizer.from_str(json.dumps(state, ensure_ascii=False))


def _tuned_template(tokenizer: Any, chosen: Template) -> str | None:
    """Returns the name of the tokenizer's own template: that of the chosen one where both say the same."""
    if not tokenizer.chat_template:
        return None
    try:
        own = resolve_template(None, tokenizer.chat_template)
    except TemplateError:  # several, and no default
        return None
    return chosen.name if own.text == chosen.text else own.name


def _template_variables(tokenizer: Any) -> dict[str, Any]:
    """The special tokens by name, as text: what transformers shows to a template beside the messages."""
    named = tokenizer.special_tokens_map.items()
    return {key: [str(v) for v in value] if isinstance(value, list) else str(value) for key, value in named}


def _covered(offsets_L2: npt.NDArray[np.int64], spans: Sequence[Span]) -> npt.NDArray[np.bool_]:
    """Which tokens hold a character of a span. A token of no characters counts where it stands inside one."""
    starts_L, ends_L = offsets_L2[:, 0], offsets_L2[:, 1]
    covered_L = np.zeros(len(offsets_L2), dtype=np.bool_)
    for start, end in spans:
        if start < end:
            covered_L |= (starts_L < end) & (np.maximum(ends_L, starts_L + 1) > start)
    return covered_L
