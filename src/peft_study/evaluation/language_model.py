"""The model's side of lm-eval: likelihoods and greedy answers of a packed base with an adapter."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from peft_study.data.conversation import Example, Message
from peft_study.engine.engine import DEFAULT_ROW_TOKENS
from peft_study.engine.row import Item, RowRunner, fill_rows, retried, said_whose
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

    @property
    def _room(self) -> int:
        """Tokens that a text may have: one more than the model was made for, as the last is only predicted."""
        base = self._runner.base
        return min(room_after(base, self._system, 0), (base.context or sys.maxsize - 1) + 1)

    def _loglikelihood_tokens(self, requests: Any, **_more: Any) -> list[tuple[float, bool]]:
        examples = [_example(before, after, self._room) for _, before, after in requests]
        return [(-loss, greedy) for loss, greedy in likelihoods(self._runner, self._system, examples)]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Returns the log-likelihood of whole texts; a long one is cut into windows, as lm-eval's own class does it."""
        windows: list[Example] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self._room - 1, context_len=1):
                before, after = make_disjoint_window(window)
                windows.append(_example(before, after, self._room))
                owners.append(owner)
        found = [0.0] * len(requests)
        for owner, (loss, _) in zip(owners, likelihoods(self._runner, self._system, windows), strict=True):
            found[owner] -= loss
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Returns greedy answers, each up to the first of the texts that end it.

        Raises:
            ConfigError: when a task wants sampled answers.
        """
        wanted, ends = list[DecodingRequest](), list[list[str]]()
        for request in requests:
            context, given = request.args
            how = normalize_gen_kwargs(given, default_max_gen_toks=256)
            if how["do_sample"]:
                raise ConfigError("lm-eval's task samples its answers; only greedy answers are made here")
            prompt = self.tok_encode(context) or [self.prefix_token_id]
            room = self._room - 1
            most = min(how["max_gen_toks"], room - 1)
            ends.append([end for end in how["until"] if end])
            wanted.append(DecodingRequest(self._system.adapter, prompt[most - room :], most, self._stop(ends[-1])))
        found = dict(decoder(self._runner, end_tokens(self._runner.base)).answers(wanted))
        return [
            _until(self.tokenizer.decode(found[place].tokens, skip_special_tokens=True), own)
            for place, own in enumerate(ends)
        ]

    def _stop(self, ends: Sequence[str]) -> Callable[[Sequence[int]], bool]:
        return lambda tokens: any(end in self.tokenizer.decode(tokens) for end in ends)


def _until(text: str, ends: Sequence[str]) -> str:
    """Returns an answer up to the first text that ends it."""
    for end in ends:
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
    order = sorted(range(len(examples)), key=lambda place: -len(examples[place]))
    items = [Item(0, system.adapter, examples[place]) for place in order]
    row_tokens = DEFAULT_ROW_TOKENS[runner.base.device.type]
    found = retried(lambda tokens: _measured(runner, items, tokens), row_tokens)
    by_place = dict(zip(order, found, strict=True))
    return [by_place[place] for place in range(len(examples))]


def _measured(runner: RowRunner, items: Sequence[Item], row_tokens: int) -> list[tuple[float, bool]]:
    found: list[tuple[float, bool]] = []
    base = runner.base
    for row in fill_rows(items, row_tokens, packs=True):
        with said_whose(row, base.device), runner.placed(row) as (inputs, _, numbers):
            logits_SV = runner.logits(inputs, numbers.places_S).float()
            losses_S = F.cross_entropy(logits_SV, numbers.targets_S, reduction="none").cpu()  # MPS has no float64
            wrong_S = (logits_SV.argmax(-1) != numbers.targets_S).cpu()
        owners_S, none_N = numbers.owners_S.cpu(), torch.zeros(len(row), dtype=torch.float64)
        sums = none_N.index_add(0, owners_S, losses_S.double()).tolist()
        wrong = none_N.index_add(0, owners_S, wrong_S.double()).tolist()
        found += [(loss, not missed) for loss, missed in zip(sums, wrong, strict=True)]
    return found
