"""Answers side by side against `generate` of PEFT and of transformers, one prompt at a time, in float32."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

import peft_reference as pr
import tiny_world as tw
from peft_study.engine.row import RowRunner
from peft_study.evaluation.decoding import Continuation, Decoder, DecodingRequest
from peft_study.methods.base import Adapter
from peft_study.methods.reference import NoAdapter
from peft_study.model.cache import KeyValueCache

ENDS = frozenset(range(0, tw.VOCABULARY, 13))
"""Many, so that random models end some of their answers."""
PROMPTS = [5, 31, 12, 3, 20, 8]
MOST = 24


def prompts(seed: int = 0) -> list[list[int]]:
    draw = np.random.default_rng(seed)
    return [draw.integers(3, tw.VOCABULARY, length).tolist() for length in PROMPTS]


def theirs(model: Any, prompt: list[int], most: int = MOST) -> list[int]:
    """Returns the tokens of `generate`, without the one that ends."""
    ids = torch.tensor([prompt])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False, pad_token_id=0,
        eos_token_id=sorted(ENDS),
    )  # fmt: skip
    found: list[int] = out[0, len(prompt) :].tolist()
    return found[:-1] if found[-1] in ENDS else found


def ours(family: str, adapters: list[Adapter], base: Any, **how: Any) -> list[Continuation]:
    """Returns the answers of each adapter to each prompt, adapter by adapter."""
    decoder = Decoder(RowRunner(base), ends=ENDS, row_tokens=how.pop("row_tokens", 64), **how)
    requests = [DecodingRequest(adapter, prompt, MOST) for adapter in adapters for prompt in prompts()]
    found = dict(decoder.answers(requests))
    assert sorted(found) == list(range(len(requests)))
    return [found[place] for place in range(len(requests))]


@pytest.mark.parametrize("family", tw.FAMILIES)
def test_three_methods_and_the_base_side_by_side_have_pefts_tokens(family: str) -> None:
    base = tw.base(family)
    adapters = {name: pr.adapter_of(config, base) for name, config in pr.METHODS.items()}
    found = ours(family, [*adapters.values(), NoAdapter()], base)
    expected = [
        theirs(pr.Reference(tw.model(family), pr.METHODS[name], adapter).model, prompt)
        for name, adapter in adapters.items()
        for prompt in prompts()
    ]
    expected += [theirs(tw.model(family), prompt) for prompt in prompts()]
    assert [list(answer.tokens) for answer in found] == expected
    assert len({answer.tokens for answer in found}) > len(PROMPTS), "the adapters change the answers"


@pytest.mark.parametrize("how", [{"batch": 1}, {"batch": 5}, {"row_tokens": 1}, {"row_tokens": 4096}])
def test_company_and_the_cut_into_rows_change_nothing(how: dict[str, int]) -> None:
    base = tw.base("llama")
    adapters = [pr.adapter_of(pr.METHODS[name], base) for name in ("lora", "prefix, text", "prompt, text")]
    usual = ours("llama", adapters, base)
    assert [answer.tokens for answer in ours("llama", adapters, base, **how)] == [answer.tokens for answer in usual]
    assert any(answer.ended for answer in usual), "some end by themselves"
    assert any(not answer.ended and len(answer.tokens) == MOST for answer in usual), "some by their limit"


def test_a_batch_that_does_not_fit_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tw.base("llama")
    usual = ours("llama", [NoAdapter()], base)
    tried, make = [], KeyValueCache.empty

    def empty(shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device) -> KeyValueCache:
        tried.append(shape[1])
        if shape[1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return make(shape, dtype, device)

    monkeypatch.setattr(KeyValueCache, "empty", empty)
    found = ours("llama", [NoAdapter()], base)
    assert [answer.tokens for answer in found] == [answer.tokens for answer in usual]
    assert tried == [6, 3, 1, 2, 3, 1, 2]


def test_a_batch_that_does_not_fit_is_let_go_before_its_halves_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    begin, held = Decoder._begin, list[weakref.ref[Held]]()

    def limited(decoder: Decoder, requests: Sequence[DecodingRequest]) -> Any:
        assert not any(other() for other in held)
        own = Held()
        held.append(weakref.ref(own))
        if len(requests) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return begin(decoder, requests)

    monkeypatch.setattr(Decoder, "_begin", limited)
    assert len(ours("llama", [NoAdapter()], tw.base("llama"))) == 6
    assert len(held) > 6


def test_a_batch_that_no_longer_fits_after_its_first_answers_goes_on_in_halves(monkeypatch: pytest.MonkeyPatch) -> None:
    base, keep = tw.base("llama"), KeyValueCache.keep
    usual = ours("llama", [NoAdapter()], base)

    def limited(cache: KeyValueCache, rows_B: torch.Tensor) -> None:
        if len(rows_B) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        keep(cache, rows_B)

    monkeypatch.setattr(KeyValueCache, "keep", limited)
    assert [answer.tokens for answer in ours("llama", [NoAdapter()], base)] == [answer.tokens for answer in usual]


class Held:
    """Stands for the tensors of a batch."""


def test_each_answer_has_its_own_limit() -> None:
    base = tw.base("llama")
    whole = ours("llama", [NoAdapter()], base)
    decoder = Decoder(RowRunner(base), ends=ENDS, row_tokens=64)
    requests = [
        DecodingRequest(NoAdapter(), prompt, most) for prompt, most in zip(prompts(), (1, 2, 3, 4, 5, 6), strict=True)
    ]
    for place, answer in decoder.answers(requests):
        assert answer.tokens == whole[place].tokens[: place + 1]


def test_a_long_prompt_with_a_short_answer_has_room_beside_others() -> None:
    """It has written all it may while seven of sixteen still write: its cache ends there, and it leaves at once."""
    base = tw.base("llama")
    whole = ours("llama", [NoAdapter()], base)
    requests = [DecodingRequest(NoAdapter(), prompts()[1], 1)]  # 31 tokens and one more
    requests += [DecodingRequest(NoAdapter(), prompts()[3], MOST)] * 15  # 3 tokens and 24 more
    found = dict(Decoder(RowRunner(base), ends=frozenset(), row_tokens=64).answers(requests))
    assert len(found[0].tokens) == 1
    assert found[0].tokens == whole[1].tokens[:1]
    assert {found[place].tokens for place in range(1, 16)} == {found[1].tokens}
    assert len(found[1].tokens) == MOST


def test_a_failure_in_the_middle_leaves_the_base_as_it_was() -> None:
    base = tw.base("llama")
    adapter = pr.adapter_of(pr.METHODS["lora"], base)
    before = ours("llama", [NoAdapter()], base)
    found = Decoder(RowRunner(base), ends=ENDS, row_tokens=64).answers([DecodingRequest(adapter, prompts()[1], MOST)])
    next(found)
    found.close()  # type: ignore[attr-defined]
    assert [answer.tokens for answer in ours("llama", [NoAdapter()], base)] == [answer.tokens for answer in before]
