"""Batches by hand: padding, packing, BOS, end tokens, shifted labels, the unigram loss."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import peft
import pytest
import torch
from torch import nn

from peft_study.doctor.batches import Ends, LabelledRow, as_rows, count_batches, losses_before, unigram_loss
from tiny_tokenizer import tiny_tokenizer, with_bos
from tiny_world import model

N = -100
ENDS = Ends(bos=1, bos_text="<s>", adds_bos=True, ends=frozenset({2}))


def rows(*lines: tuple[list[int], list[int]]) -> list[LabelledRow]:
    return [LabelledRow(np.array(ids), np.array(labels)) for ids, labels in lines]


def count(lines: list[LabelledRow], **values: Any) -> Any:
    return count_batches(lines, **({"ends": ENDS, "max_length": 100} | values))


def test_padding_on_either_side_is_left_out() -> None:
    ids = torch.tensor([[0, 0, 5, 6], [7, 8, 9, 0]])
    labels = torch.tensor([[N, N, N, 6], [7, 8, 9, N]])
    for batch in (
        {"input_ids": ids, "labels": labels, "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])},
        {"input_ids": ids, "labels": labels},
    ):
        first, second = as_rows([batch], pad=0)
        assert (first.ids.tolist(), first.labels.tolist()) == ([5, 6], [N, 6])
        assert second.ids.tolist() == [7, 8, 9]


def test_a_packed_row_is_taken_apart_at_its_examples() -> None:
    batch = {
        "input_ids": torch.tensor([[4, 5, 6, 7, 8, 9]]),
        "labels": torch.tensor([[N, 5, 6, N, 8, N]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 0]]),
    }
    assert [row.ids.tolist() for row in as_rows([batch])] == [[4, 5, 6], [7, 8], [9]]


def test_batches_of_something_else_are_no_rows() -> None:
    assert as_rows([{"pixel_values": torch.ones(2, 3)}, {"input_ids": torch.ones(2, 3)}, [1, 2]]) == []


def test_tokens_and_rows_are_counted() -> None:
    found = count(rows(([1, 5, 6, 2], [N, N, 6, 2]), ([1, 5, 6], [N, N, N])), positions=64, context=256)
    assert (found.rows, found.tokens, found.supervised, found.unsupervised, found.longest) == (2, 7, 2, 1, 4)
    assert (found.positions, found.context, found.max_length) == (64, 256, 100)
    assert (found.shifted, found.no_end, found.missing_bos, found.double_bos) == (False, 0, None, 0)


def test_rows_are_wholly_supervised_also_where_a_collator_takes_the_first_label() -> None:
    whole, packed = rows(([1, 5, 6], [1, 5, 6]), ([1, 5, 6], [N, 5, 6]))
    for row in (whole, packed):
        found = count([row])
        assert found.supervised == found.tokens == 3


def test_bos_is_missed_or_found_twice() -> None:
    assert count(rows(([5, 6, 2], [5, 6, 2]))).missing_bos == "<s>"
    assert count(rows(([1, 1, 6, 2], [1, 1, 6, 2]))).double_bos == 1
    # a tokenizer that puts none by itself wants none
    found = count(rows(([5, 6, 2], [5, 6, 2])), ends=ENDS._replace(adds_bos=False))
    assert (found.missing_bos, found.bos_checked) == (None, True)
    assert count(rows(([5, 6, 2], [5, 6, 2])), ends=Ends(None, None, None, frozenset({2}))).bos_checked is None


def test_an_answer_without_an_end_is_counted_where_it_is_whole() -> None:
    assert count(rows(([1, 5, 6], [N, N, 6]), ([1, 5, 2], [N, N, 2]))).no_end == 1
    # a line break after the end token
    assert count(rows(([1, 5, 2, 9], [N, 5, 2, 9]))).no_end == 0
    # the tokens are there, but the collator took the end for padding
    assert count(rows(([1, 5, 2], [N, 5, N]))).no_end == 1
    # cut: of no use
    assert count(rows(([1, 5, 6], [N, 5, 6])), max_length=3).no_end is None
    many = rows(*[([1, 5, 6, 7], [N, 5, 6, 7])] * 2, ([1, 5, 2], [N, 5, 2]))
    assert count(many, max_length=None).no_end == 0


def test_pieces_of_a_stream_are_not_asked_how_they_begin_and_end() -> None:
    pieces = rows(*[([7, 5, 6, 7], [7, 5, 6, 7])] * 4)
    found = count(pieces, max_length=None)
    assert (found.missing_bos, found.bos_checked, found.no_end, found.double_bos) == (None, False, None, None)


@pytest.mark.parametrize("places", [1, -1])
def test_shifted_labels_are_found_in_either_direction(places: int) -> None:
    ids = np.arange(10, 30)
    assert count([LabelledRow(ids, ids.copy())]).shifted is False
    assert count([LabelledRow(ids, np.roll(ids, places))]).shifted is True
    assert count([LabelledRow(ids, ids[::-1].copy())]).shifted is None
    assert count([LabelledRow(ids, np.roll(ids, places))], decoder_only=False).shifted is None


def test_a_tokenizer_tells_its_special_tokens() -> None:
    plain, bos = tiny_tokenizer(320), with_bos(tiny_tokenizer(320))
    assert (Ends.of(plain).adds_bos, Ends.of(bos).adds_bos) == (False, True)
    found = Ends.of(plain, model())
    assert (found.bos, found.bos_text) == (1, "<s>")
    assert found.ends == {2, plain.convert_tokens_to_ids("<|im_end|>")}
    assert Ends.of(None) == (None, None, None, frozenset())


def test_the_unigram_loss_of_known_shares() -> None:
    labels = np.repeat([5, 6, 7, 8], 500)
    ids = np.zeros(2001, int)
    exact = unigram_loss([LabelledRow(ids, np.concatenate([[N], labels]))])
    assert exact == pytest.approx(math.log(4) + 3 / 4000)
    assert unigram_loss([LabelledRow(ids[:400], labels[:400])]) is None
    # a sample says less than the whole, and the correction makes up for most of it
    draw = np.random.default_rng(0).integers(0, 100, 1000)
    assert unigram_loss([LabelledRow(np.zeros(1001, int), np.concatenate([[N], draw]))]) == pytest.approx(
        math.log(100), abs=0.02
    )


def batch(width: int = 12) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 320, (4, width), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "labels": torch.where(torch.arange(width) < 4, N, ids)}


def test_losses_before_the_first_step_are_those_of_model_and_base() -> None:
    plain = model()
    exact = float(plain(**batch()).loss)
    assert losses_before(plain, [batch()], has_adapter=False) == (pytest.approx(exact), pytest.approx(exact), None)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    attached = peft.get_peft_model(model(), config)
    attached.train()
    expected = float(attached(**batch()).loss)
    start, base, why = losses_before(attached, [batch()], has_adapter=True)
    assert why is None
    assert (start, base) == (pytest.approx(expected), pytest.approx(exact))
    assert abs(expected - exact) > 0.01
    assert attached.training
    zero = peft.get_peft_model(model(), peft.LoraConfig(task_type="CAUSAL_LM"))
    assert losses_before(zero, [batch()], has_adapter=True)[:2] == (pytest.approx(exact), pytest.approx(exact))


def test_losses_that_cannot_be_measured_say_why() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, **batch: Any) -> None:
            raise ValueError("no such input")

    start, base, why = losses_before(Broken(), [batch()], has_adapter=False)
    assert (start, base) == (None, None)
    assert why is not None
    assert "no such input" in why[0]
    unsupervised = batch() | {"labels": torch.full((4, 12), N)}
    assert losses_before(model(), [unsupervised], has_adapter=False)[0] is None


def test_rows_without_any_label_are_not_taken_for_cut_ones() -> None:
    masked = rows(*[([1, 5, 6, 7], [N] * 4)] * 4)
    assert count(masked).truncated is None
    assert count(masked).unsupervised == 4
    some = rows(*[([1, 5, 6, 7], [N] * 4)] * 5, ([1, 5, 2], [N, 5, 2]))
    assert count(some).truncated == 5
