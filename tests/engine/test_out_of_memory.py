"""Out of memory halves the row, says so once, and begins the batches anew: no example is lost or counted twice."""

from __future__ import annotations

import pickle
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny_world as tw
from command_line import CommandLine
from company import apart, trial, values
from peft_study.config import LoraConfig, TrainingConfig
from peft_study.engine.engine import Engine
from peft_study.engine.row import DoesNotFit, Item, RowPlan, RowResult, RowRunner
from peft_study.engine.trial import StepReport, Trial
from peft_study.errors import ModelError
from peft_study.methods import create
from peft_study.model.load import Base
from peft_study.storage.metrics import read

ROW_TOKENS = 160
NAMES = ("lora", "prefix", "prompt", "prefix, projected")


@dataclass
class Memory:
    """Stands between the engine and its rows and refuses some.

    Attributes:
        limit: tokens above which a row is refused; None: no limit.
        refused: numbers of rows (from 1) that are refused whatever their length.
        after_backward: True: only when all of the row's gradients are added, as late as it can happen.
        rows: items of each row that was asked for.
    """

    runner: RowRunner
    limit: int | None = None
    refused: frozenset[int] = frozenset()
    after_backward: bool = False
    rows: list[list[Item]] = field(default_factory=list)

    @contextmanager
    def row(self, items: Sequence[Item], *plan: RowPlan) -> Iterator[RowResult]:
        self.rows.append(list(items))
        tokens = sum(item.row_length for item in items)
        full = len(self.rows) in self.refused or (self.limit is not None and tokens > self.limit)
        if full and not self.after_backward:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        with self.runner.row(items, *plan) as result:
            yield result
        if full:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    @property
    def base(self) -> Base:
        return self.runner.base


def engine_of(base: Base, **refusing: object) -> tuple[Engine, Memory]:
    engine = Engine(base, row_tokens=ROW_TOKENS)
    memory = Memory(engine.runner, **refusing)  # type: ignore[arg-type]
    engine.runner = memory  # type: ignore[assignment]
    return engine, memory


def finish(engine: Engine) -> dict[str, list[StepReport]]:
    reports: dict[str, list[StepReport]] = {own.name: [] for own in engine.trials}
    for _ in range(2000):  # an example that was lost would be waited for without end
        if not engine.trials:
            return reports
        for event in engine.step():
            assert event.report is not None, event.diverged
            reports[event.trial.name].append(event.report)
            if event.trial.finished:
                engine.evict(event.trial)
    pytest.fail(f"{engine.trials[0].name} never came to its end")


def undisturbed() -> tuple[dict[str, Trial], dict[str, list[StepReport]]]:
    base = tw.base("llama")
    trials = {name: trial(base, name, dropout=0.1) for name in NAMES}
    engine = Engine(base, row_tokens=ROW_TOKENS)
    for own in trials.values():
        engine.admit(own)
    return trials, finish(engine)


@pytest.mark.parametrize("after_backward", [False, True], ids=["in forward", "after backward"])
@pytest.mark.parametrize("refused", [{1}, {4}, {3, 9}, {2, 3, 4}], ids=str)
def test_refused_rows_change_nothing_but_the_rows(refused: set[int], after_backward: bool) -> None:
    expected, curves = undisturbed()
    base = tw.base("llama")
    engine, _ = engine_of(base, refused=frozenset(refused), after_backward=after_backward)
    trials = {name: trial(base, name, dropout=0.1) for name in NAMES}
    for own in trials.values():
        engine.admit(own)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        reports = finish(engine)
    told = [str(w.message) for w in caught if "out of memory" in str(w.message)]
    assert len(told) == len(refused), "once for each time"
    # a row below the budget is halved itself: half of the budget might hold the same examples again
    assert engine.row_tokens <= ROW_TOKENS // 2 ** len(refused)
    assert f"from {ROW_TOKENS} to " in told[0]
    assert told[-1].endswith(f"to {engine.row_tokens} tokens; nothing is lost")
    for name, own in trials.items():
        assert [r.examples for r in reports[name]] == [r.examples for r in curves[name]]
        assert [r.loss for r in reports[name]] == pytest.approx([r.loss for r in curves[name]], rel=1e-5)
        assert own.tokens == expected[name].tokens
        for parameter, tensor in values(own).items():
            assert apart(tensor, expected[name].parameters[parameter].detach()) < 1e-5, (name, parameter)


def test_a_limit_is_found_by_halving_and_every_example_goes_through_once_after_it() -> None:
    base = tw.base("llama")
    engine, memory = engine_of(base, limit=45)
    for name in NAMES:
        engine.admit(trial(base, name))
    with pytest.warns(UserWarning, match="out of memory on cpu"):
        engine.step()
    assert engine.row_tokens <= ROW_TOKENS // 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while engine.row_tokens > 45:
            engine.step()
    assert 45 // 2 <= engine.row_tokens <= 45
    assert all(own.step == 0 for own in engine.trials), "a step was taken from a row that was refused"
    assert all(not own.progress().sums for own in engine.trials), "a part of a refused row was kept"
    memory.rows.clear()
    reports = finish(engine)
    went = Counter(item.dropout for items in memory.rows for item in items)
    counted = sum(len(report.examples) for own in reports.values() for report in own)
    assert went.total() == counted
    assert max(len(items) for items in memory.rows) <= 6


def test_batches_that_were_not_in_the_row_are_kept() -> None:
    """Row 1 holds an example of 60 tokens, row 2 three of 20: when row 2 is refused, the first's half batch stays."""
    base = tw.base("llama")
    engine, _ = engine_of(base, refused=frozenset({2}))
    engine.row_tokens = 60
    training = TrainingConfig(learning_rate=1e-3, steps=2, batch_size=3)
    one, two = (
        Trial(str(n), create(LoraConfig(rank=2), base, None, n), training, tw.examples([length] * 6))
        for n, length in enumerate((60, 20))
    )
    engine.admit(one)
    engine.admit(two)
    engine.step()
    before = one.progress()
    gradients = {name: p.grad.clone() for name, p in one.parameters.items() if p.grad is not None}
    assert (len(before.sums), len(before.waiting), two.progress().sums) == (1, 2, {})
    with pytest.warns(UserWarning, match="out of memory"):
        engine.step()
    assert one.progress() == before
    assert gradients
    for name, gradient in gradients.items():
        assert torch.equal(one.parameters[name].grad, gradient), name
    assert two.progress().sums == {}
    assert all(parameter.grad is None for parameter in two.parameters.values())
    finish(engine)
    assert (one.tokens, two.tokens) == (2 * 3 * 60, 2 * 3 * 20)


def test_one_example_that_does_not_fit_is_an_error_that_names_the_remedy() -> None:
    base = tw.base("llama")
    engine, _ = engine_of(base, limit=20)
    engine.admit(trial(base, "lora"))
    refusal = r"one example of \d+ tokens does not fit.*gradient_checkpointing.*max_length"
    with pytest.warns(UserWarning, match="out of memory"), pytest.raises(ModelError, match=refusal):
        finish(engine)


def test_another_error_is_not_taken_for_it() -> None:
    base = tw.base("llama")
    engine, memory = engine_of(base)
    engine.admit(trial(base, "lora"))

    @contextmanager
    def broken(_items: Sequence[Item], *_plan: RowPlan) -> Iterator[RowResult]:
        raise RuntimeError("shapes do not fit")
        yield

    memory.row = broken  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        engine.step()
    assert engine.row_tokens == ROW_TOKENS


def test_an_evaluation_goes_on_with_smaller_rows_and_the_same_losses() -> None:
    base = tw.base("llama")
    trials = [trial(base, name) for name in NAMES]
    examples = tw.examples([25, 9, 30, 14, 22, 8, 17])
    expected = Engine(base, row_tokens=ROW_TOKENS).losses([trial.adapter for trial in trials], examples, range(7))
    engine, memory = engine_of(base, limit=50)
    with pytest.warns(UserWarning, match="nothing is lost") as caught:
        found = engine.losses([trial.adapter for trial in trials], examples, range(7))
    assert len(caught) == 2  # 160, 80, 40
    assert engine.row_tokens == 40
    assert [list(losses) for losses in found] == [pytest.approx(list(losses), rel=1e-5) for losses in expected]
    last = memory.rows[-1]
    assert sum(item.row_length for item in last) <= 40 or len(last) == 1


def test_an_evaluation_of_one_example_that_does_not_fit_ends_and_says_whose_it_was() -> None:
    base = tw.base("llama")
    engine, memory = engine_of(base, limit=31)
    lora, prompt = trial(base, "lora"), trial(base, "prompt")
    assert prompt.adapter.row_tokens > 1
    with (
        pytest.warns(UserWarning, match="out of memory"),
        pytest.raises(DoesNotFit, match=r"one example of 3\d tokens does not fit.*gradient_checkpointing") as raised,
    ):
        engine.losses([lora.adapter, prompt.adapter], tw.examples([30, 9]), range(2))
    assert raised.value.adapter is prompt.adapter
    assert len(memory.rows) < 12


def no_memory(_self: object) -> None:
    torch.empty(1 << 60)


def test_what_the_cpu_says_is_understood() -> None:
    """A row is halved as on an accelerator; numpy and Python have their own error."""
    engine = Engine(tw.base("llama"), row_tokens=ROW_TOKENS)
    whole, errors = engine.runner.row, [lambda: torch.empty(1 << 60), lambda: np.empty(1 << 58, np.uint8)]

    def row(items: Sequence[Item], *plan: RowPlan) -> AbstractContextManager[RowResult]:
        if errors:
            errors.pop()()
        return whole(items, *plan)

    engine.runner.row = row  # type: ignore[method-assign]
    engine.admit(trial(engine.base, "lora"))
    with pytest.warns(UserWarning, match="out of memory on cpu: rows are cut") as caught:
        reports = finish(engine)
    assert len(caught) == 2
    assert reports["lora"]


def test_an_optimizer_without_room_for_its_moments_takes_only_its_own_trial_out() -> None:
    base = tw.base("llama")
    engine = Engine(base, row_tokens=ROW_TOKENS)
    large, other = trial(base, "lora"), trial(base, "prompt")
    large.optimizer.step = lambda: no_memory(large)  # type: ignore[union-attr,method-assign]
    for own in (large, other):
        engine.admit(own)
    failed = []
    while large in engine.trials:
        failed += [event for event in engine.step() if event.failed]
    (event,) = failed
    assert event.trial is large
    assert event.report is None
    assert re.search(r"the optimizer's state of [\d,]+ parameters \(0\.0 GB\) does not fit", str(event.failed))
    assert set(finish(engine)) == {"prompt"}
    assert other.finished


def test_a_whole_run_goes_on_where_no_row_of_the_wanted_length_fits(
    cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base's own losses, the held-out losses and the steps: each of them meets the limit."""
    words = (
        *("finetune", "--model_name_or_path", tiny_model_folder, "--train_file", tiny_data, "--use_lora"),
        *("--max_train_steps", 4, "--per_device_train_batch_size", 6, "--dtype", "float32", "--row_tokens", 400),
        "--output_dir",
    )
    cli(*words, tmp_path / "whole").ok()
    monkeypatch.setenv("PEFT_STUDY_CACHE", str(tmp_path / "cache"))  # else the base's losses are known already
    whole_row, refused = RowRunner.row, []

    def limited(runner: RowRunner, items: Sequence[Item], *plan: RowPlan) -> AbstractContextManager[RowResult]:
        if len(items) > 1 and sum(item.row_length for item in items) > 150:
            refused.append(len(items))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return whole_row(runner, items, *plan)

    monkeypatch.setattr(RowRunner, "row", limited)
    cli(*words, tmp_path / "cut").ok()
    assert refused
    one, two = (read(tmp_path / run / "metrics.jsonl") for run in ("whole", "cut"))
    assert len(one) == len(two) > 4
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in one], rel=1e-5)


def test_another_process_gets_what_did_not_fit_without_the_trials_tensors() -> None:
    adapter = create(LoraConfig(rank=2), tw.base(), None, 0)
    error = DoesNotFit(Item(0, adapter, tw.examples([5])[0]), torch.device("cpu"))
    got = pickle.loads(pickle.dumps(error))
    assert (type(got), str(got)) == (ModelError, str(error))
    assert "5 tokens" in str(got)
    assert "gradient_checkpointing" in str(got)
