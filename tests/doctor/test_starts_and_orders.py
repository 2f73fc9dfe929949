"""Runs that blow up at once, rows in a fixed order, resumes, starts that are made good, what batches hide."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from run_curves import falling, noise, one, seen, wrong

from peft_study.doctor.batches import IGNORED, Ends, LabelledRow, count_batches, supervised_padding
from peft_study.doctor.observations import DataCounts, Observations, UsedSettings
from peft_study.doctor.rule import examine

ENDS = Ends(1, "<s>", True, frozenset({2}))


def test_a_run_that_blows_up_at_once_and_never_returns_is_too_hot() -> None:
    loss = np.concatenate([[2.43], falling(199, start=6.5, end=3.3, speed=12)]) + noise(200, 0.1)
    problem = one("too_hot", seen(loss))
    assert problem is not None
    assert (problem.level, problem.step) == ("error", 2)
    back = np.concatenate([[2.43], falling(199, start=6.5, end=1.5, speed=12)]) + noise(200, 0.1)
    problem = one("too_hot", seen(back))
    assert problem is None or problem.values["before"] > 3  # it is not told as lost


@pytest.mark.parametrize("amount", [0.3, 0.0])
def test_rows_in_a_fixed_order_show_without_epochs(amount: float) -> None:
    saw = amount * (1 - (np.arange(120) % 20) / 10)
    loss = falling(120, start=2.2, end=1.8) + saw + noise(120, 0.03)
    assert wrong(seen(loss)) == (["epoch_jumps"] if amount else [])


@pytest.mark.parametrize(("rise", "told"), [(0.5, True), (0.1, False)])
def test_a_resume_that_loses_what_was_learned(rise: float, told: bool) -> None:
    loss = np.concatenate([falling(40, start=4.5, end=4.0), 4.0 + rise * np.ones(20)]) + noise(60, 0.1)
    assert (one("resume_jump", seen(loss, resumed=(40,))) is not None) == told


def test_a_start_above_the_base_is_a_note_where_it_is_made_good_at_once() -> None:
    soon, late = falling(60, start=3.5, end=1.4, speed=40), falling(60, start=3.5, end=1.4, speed=2)
    for loss, level in ((soon, "note"), (late, "warning")):
        problem = one("init_wrecks", seen(loss, start_loss=3.5, base_loss=1.6))
        assert problem is not None
        assert problem.level == level


def test_a_rate_far_above_is_a_note_only_where_the_run_ends_below_its_base() -> None:
    settings = UsedSettings(method="lora", learning_rate=0.05)
    for base, level in ((3.0, "note"), (0.9, "warning")):
        problem = one("rate_too_high", seen(falling(60), settings=settings, base_loss=base))
        assert problem is not None
        assert problem.level == level


@pytest.mark.parametrize(("epochs", "level"), [(4.0, None), (6.0, "note"), (21.0, "warning")])
def test_a_loss_near_zero_without_held_out_rows(epochs: float, level: str | None) -> None:
    loss = falling(60, start=3.8, end=0.004, speed=20)
    problem = one("memorising", seen(loss, epoch=np.linspace(0, epochs, 60)))
    assert (problem.level if problem else None) == level


def test_a_smoke_test_is_not_said_to_have_learned_nothing() -> None:
    flat = 6.3 + noise(30, 0.1)
    assert one("never_learned", seen(flat[:12])) is None
    assert one("never_learned", seen(flat)) is not None
    assert one("never_learned", seen(flat, start_loss=8.0)) is None  # it fell before its first logged step


def rows_of(length: int, count: int, *, answered: bool) -> list[LabelledRow]:
    ids = np.arange(3, 3 + length)
    labels = np.where(np.arange(length) >= length // 2, ids, IGNORED) if answered else np.full(length, IGNORED)
    return [LabelledRow(ids, labels) for _ in range(count)]


def test_rows_of_one_length_without_an_end_are_cut() -> None:
    whole = [LabelledRow(np.array([1, 3, 4, 2]), np.array([IGNORED, IGNORED, 4, 2]))] * 4
    found = count_batches([*whole, *rows_of(10, 4, answered=True)], ends=ENDS, max_length=None)
    assert found.truncated == 4
    assert count_batches([*whole, *rows_of(10, 3, answered=True)], ends=ENDS, max_length=None).truncated is None
    # pieces of a stream end anywhere, and lose nothing
    assert count_batches(rows_of(10, 8, answered=True), ends=ENDS, max_length=None).truncated is None
    silent = count_batches(
        [*rows_of(10, 4, answered=True), *rows_of(10, 4, answered=False)], ends=ENDS, max_length=None
    )
    checks = [problem.check for problem in examine(Observations(data=silent), kinds=("data",)).problems]
    assert checks[0] == "truncated"
    assert "nothing_supervised" not in checks


def test_padding_that_is_learned_is_found() -> None:
    ids = torch.tensor([[5, 6, 2, 0, 0], [5, 6, 7, 8, 2]])
    mask = (ids != 0).long()
    assert supervised_padding([{"input_ids": ids, "labels": ids, "attention_mask": mask}]) == 2
    masked = ids.masked_fill(mask == 0, IGNORED)
    assert supervised_padding([{"input_ids": ids, "labels": masked, "attention_mask": mask}]) == 0
    assert supervised_padding([{"input_ids": ids, "labels": ids}]) is None
    for padding, level in ((2, "warning"), (0, "note")):
        counts = DataCounts(rows=2, tokens=8, supervised=8, padding=padding)
        (problem,) = examine(Observations(data=counts), checks=["nothing_masked"]).problems
        assert problem.level == level
    half = dataclasses.replace(counts, supervised=4)
    assert not examine(Observations(data=half), checks=["nothing_masked"]).problems
