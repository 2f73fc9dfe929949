"""Memory that runs out ends the trial that needed it, with the numbers, and never the study."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pyarrow import parquet

from command_line import CommandLine
from peft_study.engine.row import Item, RowPlan, RowResult, RowRunner
from peft_study.engine.trial import Trial
from peft_study.workers.worker import Worker

HUGE = 10**8


@pytest.fixture
def flags(tmp_path: Path, tiny_model_folder: Path, tiny_data: Path) -> tuple[object, ...]:
    return (
        *("finetune", "--model_name_or_path", tiny_model_folder, "--train_file", tiny_data, "--max_train_steps", 1),
        *("--output_dir", tmp_path / "out"),
    )


@pytest.fixture
def study(tmp_path: Path, tiny_model_folder: Path, tiny_data: Path) -> Path:
    values: dict[str, Any] = {
        "model": {"name": str(tiny_model_folder), "dtype": "float32"},
        "data": {"train": str(tiny_data), "held_out": 8},
        "training": {"steps": 2, "batch_size": 4},
        "search": {"pruner": "none"},
        "methods": {
            "prompt_tuning": {"tokens": [3, 17], "init": "random", "learning_rate": 0.1},
            "lora": {"rank": 2, "learning_rate": [1e-3, 1e-2]},
        },
        "finals": {"best": 1, "seeds": 1},
        "logging": {"tensorboard": False},
        "output": str(tmp_path / "out"),
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def rows(study: Path) -> list[dict[str, Any]]:
    """Returns the trials of a finished study."""
    found: list[dict[str, Any]] = parquet.read_table(study.parent / "out" / "results.parquet").to_pylist()
    return found


def failed(study: Path) -> dict[tuple[str, int], str]:
    """Returns the reasons of failed trials by method and size; checks that all others finished."""
    found = rows(study)
    assert {row["status"] for row in found} == {"finished", "failed"}
    return {(r["method"], r["tokens"] or r["rank"]): r["reason"] for r in found if r["status"] == "failed"}


@pytest.mark.parametrize("slots", [1, 5])
@pytest.mark.parametrize("after", [0, 1], ids=["before step 1", "at the end"])
def test_a_held_out_example_that_does_not_fit_beside_a_prompt_ends_that_trial(
    cli: CommandLine, study: Path, monkeypatch: pytest.MonkeyPatch, slots: int, after: int
) -> None:
    """Evaluated rows have no dropout key; the first evaluation of a trial is before step 1."""
    whole_row = RowRunner.row
    trained = False

    def limited(runner: RowRunner, items: Sequence[Item], *plan: RowPlan) -> AbstractContextManager[RowResult]:
        nonlocal trained
        own = [item for item in items if item.adapter.row_tokens == 17]
        trained = trained or any(item.dropout is not None for item in own)
        if own and own[0].dropout is None and trained >= after:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return whole_row(runner, items, *plan)

    monkeypatch.setattr(RowRunner, "row", limited)
    said = cli("run", study, "--slots", slots).ok()
    reasons = failed(study)
    assert list(reasons) == [("prompt_tuning", 17)]
    assert reasons["prompt_tuning", 17].startswith("held-out rows: one example of ")
    assert "does not fit into the memory of cpu" in said.out


def test_a_test_example_that_does_not_fit_leaves_a_finalist_without_a_test_loss(
    cli: CommandLine, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_row, whole_test, opened = RowRunner.row, Worker.test, []

    def limited(runner: RowRunner, items: Sequence[Item], *plan: RowPlan) -> AbstractContextManager[RowResult]:
        if opened and any(item.adapter.row_tokens for item in items):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return whole_row(runner, items, *plan)

    def test(worker: Worker, trained: Any) -> Any:
        opened.append(True)
        return whole_test(worker, trained)

    monkeypatch.setattr(RowRunner, "row", limited)
    monkeypatch.setattr(Worker, "test", test)
    cli("run", study).ok()
    finals = {row["method"]: row for row in rows(study) if row["kind"] == "final"}
    assert finals["prompt_tuning"]["test"] is None
    assert finals["lora"]["test"] > 0


def test_a_finetune_whose_held_out_example_does_not_fit_is_one_line(
    cli: CommandLine, flags: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_row = RowRunner.row

    def limited(runner: RowRunner, items: Sequence[Item], *plan: RowPlan) -> AbstractContextManager[RowResult]:
        if any(item.adapter.row_tokens > 1 for item in items):  # a row of one is tried for the estimate
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you")
        return whole_row(runner, items, *plan)

    monkeypatch.setattr(RowRunner, "row", limited)
    ran = cli(*flags, "--use_prompt_tuning")
    assert ran.code == 2
    assert ran.err.splitlines()[-1].startswith("error: one example of ")
    assert "Traceback" not in ran.err


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (("--use_lora", "--lora_rank", HUGE), f"lora of rank {HUGE:,}"),
        (("--use_prefix_tuning", "--num_virtual_tokens", HUGE), f"prefix_tuning of {HUGE:,} tokens"),
        (("--use_prompt_tuning", "--num_virtual_tokens", HUGE), f"prompt_tuning of {HUGE:,} tokens"),
    ],
    ids=["lora", "prefix", "prompt"],
)
def test_a_run_that_does_not_fit_is_refused_with_the_numbers(
    cli: CommandLine, flags: tuple[object, ...], tmp_path: Path, words: tuple[object, ...], name: str
) -> None:
    line = cli(*flags, *words).error()
    assert name in line
    assert " GB of memory beside the base" in line
    assert " GB are free; " in line
    assert "; use " in line
    assert not (tmp_path / "out").exists()


def test_a_row_that_does_not_fit_is_refused_with_the_numbers(cli: CommandLine, study: Path) -> None:
    fixed = ("--set", "training.gradient_checkpointing=false")
    line = cli("run", study, "--set", f"methods.prompt_tuning.tokens={HUGE // 10}", *fixed).error()
    assert "GB of it for a row of" in line


def test_a_longer_row_than_the_memory_holds_is_cut(cli: CommandLine, flags: tuple[object, ...]) -> None:
    ran = cli(*flags, "--use_lora", "--row_tokens", 10**10).ok()
    assert "rows of 10,000,000,000 tokens do not fit into the " in ran.out + ran.err


def test_a_setting_that_does_not_fit_is_a_row_that_failed(cli: CommandLine, study: Path) -> None:
    words = ("run", study, "--set", f"methods.lora.rank=[2, {HUGE}]")
    why = f"it does not fit into memory: lora of rank {HUGE:,} needs "
    note = f"methods.lora: some settings of its space cannot be made ({why}"
    dry = cli(*words, "--dry-run").ok().out
    assert note in dry
    assert "timing 2 steps of lora" in dry
    assert note in cli(*words).ok().out
    reasons = failed(study)
    assert set(reasons) == {("lora", HUGE)}
    assert " GB are free" in reasons["lora", HUGE]


def test_a_method_of_which_nothing_fits_is_refused(cli: CommandLine, study: Path, tmp_path: Path) -> None:
    ran = cli("run", study, "--set", f"methods.lora.rank=[{HUGE}, {2 * HUGE}]")
    assert ran.code == 2
    assert ", methods.lora: it does not fit into memory: lora of rank " in ran.err
    assert " GB of memory beside the base, " in ran.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("moment", ["made", "stepped"])
def test_memory_that_runs_out_in_a_trials_own_tensors_ends_that_trial(
    cli: CommandLine, study: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Of the adapter and of AdamW's moments, which are made in the first step."""
    real = Trial.__init__

    def no_memory() -> None:
        torch.empty(1 << 60)

    def made(trial: Trial, *words: Any, **named: Any) -> None:
        real(trial, *words, **named)
        if trial.adapter.row_tokens != 17:
            return
        if moment == "made":
            no_memory()
        assert trial.optimizer is not None
        trial.optimizer.step = no_memory  # type: ignore[method-assign,assignment]

    monkeypatch.setattr(Trial, "__init__", made)
    cli("run", study).ok()
    (reason,) = failed(study).values()
    said = {"made": "prompt_tuning of 17 tokens does not fit", "stepped": "the optimizer's state of 544 parameters"}
    assert said[moment] in reason
