"""Held-out losses by example, and the base's own, computed once and kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

import peft_reference as pr
import tiny_world as tw
from peft_study.config import LoraConfig
from peft_study.engine.heldout import BaseLosses, example_losses
from peft_study.engine.row import Item, RowRunner
from peft_study.methods.reference import NoAdapter

LENGTHS = [12, 20, 9, 33, 7]


@pytest.mark.parametrize("method", pr.METHODS)
@pytest.mark.parametrize("row_tokens", [1, 50, 4096])
def test_losses_are_pefts_in_the_order_asked_for(method: str, row_tokens: int) -> None:
    base, examples, config = tw.base("llama"), tw.examples(LENGTHS), pr.METHODS[method]
    adapter = pr.adapter_of(config, base)
    expected = [loss.item() for loss in pr.Reference(tw.model("llama"), config, adapter).losses(examples)]
    (found,) = example_losses(RowRunner(base), [adapter], examples, [3, 0, 4, 1], row_tokens)
    assert found == pytest.approx([expected[i] for i in (3, 0, 4, 1)], rel=1e-5)


def test_nothing_is_dropped_and_no_gradient_is_kept() -> None:
    base, examples = tw.base("llama"), tw.examples(LENGTHS)
    adapter = pr.adapter_of(LoraConfig(rank=4, dropout=0.5), base)
    losses = [example_losses(RowRunner(base), [adapter], examples, range(5), 64)[0] for _ in range(2)]
    assert (losses[0] == losses[1]).all()
    with RowRunner(base).row([Item(0, adapter, example) for example in examples]) as result:
        assert result.item_losses == pytest.approx(losses[0], rel=1e-5)
    assert all(parameter.grad is None for parameter in adapter.parameters().values())


def test_the_bases_losses_are_computed_once_kept_and_read_again(tmp_path: Path) -> None:
    base, examples = tw.base("llama"), tw.examples(LENGTHS)
    runner, path = RowRunner(base), tmp_path / "deep" / "losses.npy"
    (expected,) = example_losses(runner, [NoAdapter()], examples, range(5), 64)
    asked: list[list[int]] = []

    def measure(indices: Sequence[int]) -> npt.NDArray[np.float64]:
        asked.append(list(indices))
        return example_losses(runner, [NoAdapter()], examples, indices, 64)[0]

    losses = BaseLosses(measure, 5, path)
    assert losses.of([4, 1, 4]) == pytest.approx(expected[[4, 1, 4]], rel=1e-6)
    losses.save()
    assert np.isnan(np.load(path)).tolist() == [True, False, True, True, False]
    again = BaseLosses(measure, 5, path)
    again.of([1, 4])
    assert asked == [[1, 4]]
    assert again.of([1, 0]) == pytest.approx(expected[[1, 0]], rel=1e-6)
    assert asked == [[1, 4], [0]]


def test_kept_losses_of_another_data_set_are_not_believed(tmp_path: Path) -> None:
    np.save(tmp_path / "losses.npy", np.zeros(4))
    losses = BaseLosses(lambda indices: np.ones(len(indices)), 5, tmp_path / "losses.npy")
    assert losses.of(range(5)).tolist() == [1.0] * 5
