"""The model's side of lm-eval: likelihoods and greedy answers of a packed base with an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lm_eval.api.model import TemplateLM

from peft_study.data.conversation import Example, Message
from peft_study.engine.engine import DEFAULT_ROW_TOKENS
from peft_study.engine.row import Item, RowRunner, fill_rows, said_whose
from peft_study.errors import ConfigError
from peft_study.evaluation.answering import decoder, end_tokens, room_after
from peft_study.evaluation.decoding import DecodingRequest
from peft_study.evaluation.systems import System


class PackedLanguageModel(TemplateLM):
    """A base with an adapter as lm-eval calls it; it answers three kinds of request.

    Args:
        runner: of the base, which packs rows.
        system: the adapter, and how it writes conversations.
    """

    def __init__(self, runner: RowRunner, system: System) -> None:
        super().__init__()
        self.tokenizer = runner.base.tokenizer
        self._runner, self._system = runner, system

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context: BOS, where there is one."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """Whose tokenizer it is."""
        return self._runner.base.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_more: Any) -> list[int]:
        """Returns the tokens of a text; BOS is not doubled."""
        begins = self.tokenizer.bos_token is not None and string.startswith(self.tokenizer.bos_token)
        special = not begins if add_special_tokens is None else add_special_tokens
        ids: list[int] = self.tokenizer(string, add_special_tokens=special).input_ids
        return ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns a conversation as text, as in the adapter's training."""
        turns = [Message(turn["role"], turn["content"]) for turn in chat_history]  # type: ignore[arg-type]
        return self._system.encoder.render(turns, add_generation_prompt=add_generation_prompt)

    def _loglikelihood_tokens(self, requests: Any, **_more: Any) -> list[tuple[float, bool]]:
        room = room_after(self._runner.base, self._system, 0)
        examples = [_example(before, after, room) for _, before, after in requests]
        return [(-loss, greedy) for loss, greedy in likelihoods(self._runner, self._system, examples)]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of whole texts."""
        texts = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
        room = room_after(self._runner.base, self._system, 0)
        examples = [_example([self.prefix_token_id], text, room) for text in texts]
        return [-loss for loss, _ in likelihoods(self._runner, self._system, examples)]

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Returns greedy answers, each up to the first of the texts that end it.

        Raises:
            ConfigError: when a task wants sampled answers.
        """
        wanted = []
        for request in requests:
            context, how = request.args
            if how.get("do_sample"):
                raise ConfigError("lm-eval's task samples its answers; only greedy answers are made here")
            prompt, most = self.tok_encode(context), how.get("max_gen_toks", 256)
            prompt = prompt[-max(1, room_after(self._runner.base, self._system, most)) :]
            wanted.append(DecodingRequest(self._system.adapter, prompt, most, self._stop(how)))
        found = dict(decoder(self._runner, end_tokens(self._runner.base)).answers(wanted))
        return [
            _until(self.tokenizer.decode(found[place].tokens, skip_special_tokens=True), request.args[1])
            for place, request in enumerate(requests)
        ]

    def _stop(self, how: dict[str, Any]) -> Any:
        until = how.get("until") or []
        return lambda tokens: any(text in self.tokenizer.decode(tokens) for text in until)


def _until(text: str, how: dict[str, Any]) -> str:
    """Returns an answer up to the first text that ends it."""
    for end in how.get("until") or []:
        text = text.split(end)[0]
    return text


def _example(before: Sequence[int], after: Sequence[int], room: int) -> Example:
    """Returns a context and what is scored after it; cut on the left to the tokens that the model has room for."""
    tokens_L = np.array([*before, *after], dtype=np.int32)
    supervised_L = np.arange(len(tokens_L)) >= len(before)
    first = max(0, len(tokens_L) - room)
    supervised_L[first] = False
    return Example(tokens_L[first:], supervised_L[first:])


@torch.no_grad()
def likelihoods(runner: RowRunner, system: System, examples: Sequence[Example]) -> list[tuple[float, bool]]:
    """Returns for each example the summed loss of its supervised tokens, in nats, and whether greedy answers give them.

    Raises:
        DoesNotFit: where an example does not fit into the memory.
    """
    base = runner.base
    order = sorted(range(len(examples)), key=lambda place: -len(examples[place]))
    items = [Item(0, system.adapter, examples[place]) for place in order]
    found: list[tuple[float, bool]] = []
    for row in fill_rows(items, DEFAULT_ROW_TOKENS[base.device.type], packs=True):
        with said_whose(row, base.device), runner.placed(row) as (inputs, _, numbers):
            logits_SV = runner.logits(inputs, numbers.places_S).float()
            losses_S = F.cross_entropy(logits_SV, numbers.targets_S, reduction="none").double()
            greedy_S = logits_SV.argmax(-1) == numbers.targets_S
        for number in range(len(row)):
            own_S = numbers.owners_S == number
            found.append((float(losses_S[own_S].sum()), bool(greedy_S[own_S].all())))
    by_place = dict(zip(order, found, strict=True))
    return [by_place[place] for place in range(len(examples))]
