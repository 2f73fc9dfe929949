"""`finetune --early_stopping`: the best held-out step's adapter is what a run leaves, however often it was stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest

from command_line import CommandLine
from peft_study.compat.command_line import parse
from peft_study.compat.finetune import to_run
from peft_study.engine import checkpoint
from peft_study.errors import ConfigError
from peft_study.statistics import Losses
from peft_study.storage.metrics import read
from peft_study.storage.run_dir import RunFolder
from peft_study.training.best_step import BestStep
from peft_study.training.trial_run import TrialRun

EARLY = ("--early_stopping", 2, "--eval_steps", 2)


@pytest.fixture
def words(tiny_model_folder: Path, tiny_data: Path) -> tuple[Any, ...]:
    """Returns a run whose rate is so high that its held-out loss goes up and down."""
    return (
        *("finetune", "--model_name_or_path", tiny_model_folder, "--train_file", tiny_data, "--dtype", "float32"),
        *("--per_device_train_batch_size", 4, "--lr_scheduler_type", "constant", "--warmup_ratio", 0),
        *("--max_train_steps", 40, "--use_lora", "--learning_rate", 0.1),
    )


def held_out(run: Path) -> list[dict[str, Any]]:
    return [record for record in read(run / "metrics.jsonl") if record["event"] == "held_out"]


def adapter(run: Path) -> bytes:
    return next((run / "adapter").glob("*.safetensors")).read_bytes()


def best_step(run: Path) -> int:
    """Returns the step of the lowest held-out loss, which the run must have kept and named."""
    records = held_out(run)[1:]
    lowest = min(records, key=lambda record: record["loss"])
    marked = [record["step"] for record in records if record["best"]]
    assert marked[-1] == lowest["step"]
    assert "best" not in held_out(run)[0], "before step 1 nothing is trained"
    return int(lowest["step"])


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_adapter_is_that_of_the_best_step(
    cli: CommandLine, words: tuple[Any, ...], tmp_path: Path, method: str
) -> None:
    if method == "full":
        words = tuple(word for word in words if word != "--use_lora")
    ran = cli(*words, *EARLY, "--output_dir", tmp_path / "early")
    best = best_step(tmp_path / "early")
    last = held_out(tmp_path / "early")[-1]["step"]
    assert last == best + 4, "two measurements in vain, two steps apart"
    assert last < 40
    said = f"stopped at step {last} of 40: the held-out loss was lowest after step {best}, whose adapter is kept"
    assert said in ran.out
    (lowest,) = [record["loss"] for record in held_out(tmp_path / "early") if record["step"] == best]
    assert f" before, {lowest:.3f} [" in ran.out
    assert not (tmp_path / "early" / "best").exists()
    cli(*words, "--max_train_steps", best, "--output_dir", tmp_path / "whole")
    assert adapter(tmp_path / "early") == adapter(tmp_path / "whole")


def test_without_it_nothing_is_marked_and_the_last_step_is_kept(
    cli: CommandLine, words: tuple[Any, ...], tmp_path: Path
) -> None:
    ran = cli(*words, "--max_train_steps", 6, "--output_dir", tmp_path / "out").ok()
    assert "lowest" not in ran.out
    assert not any("best" in record for record in held_out(tmp_path / "out"))
    resolved = RunFolder(tmp_path / "out").read("config.resolved.json")
    assert resolved["early_stopping"] is None


def test_a_best_step_after_the_last_checkpoint_is_found_again(
    cli: CommandLine, words: tuple[Any, ...], tmp_path: Path
) -> None:
    """The process ends when RUN/best is newer than its checkpoint, whose own best must come back."""
    words = (*words, *EARLY, "--checkpointing_steps", 5)
    cli(*words, "--output_dir", tmp_path / "whole").ok()
    best, cut = best_step(tmp_path / "whole"), tmp_path / "cut"
    original = TrialRun._save

    def dies(self: TrialRun, folder: Path) -> None:
        original(self, folder)
        if self.trial.step == best:
            raise KeyboardInterrupt

    with patch.object(TrialRun, "_save", dies):
        assert cli(*words, "--output_dir", cut).code == 130
    newest = checkpoint.newest(cut / "checkpoints")
    assert newest is not None
    assert newest.decided["slots"]["best"]["step"] <= newest.step < best
    kept = (newest.folder / "best" / "adapter_model.safetensors").read_bytes()
    assert kept != (cut / "best" / "adapter_model.safetensors").read_bytes() == adapter(tmp_path / "whole")

    def seen(self: BestStep, step: int, sums_N: Losses) -> bool:  # what lies in RUN/best is the checkpoint's again
        files.append((cut / "best" / "adapter_model.safetensors").read_bytes())
        return counted(self, step, sums_N)

    files: list[bytes] = []
    counted = BestStep.seen
    with patch.object(BestStep, "seen", seen):
        assert f"resumes at step {newest.step} of 40" in cli(*words, "--output_dir", cut).ok().out
    assert files[0] == kept
    assert adapter(cut) == adapter(tmp_path / "whole")
    assert [r["loss"] for r in held_out(cut)] == [r["loss"] for r in held_out(tmp_path / "whole")]


def test_a_run_that_had_stopped_early_does_not_train_on(
    cli: CommandLine, words: tuple[Any, ...], tmp_path: Path
) -> None:
    """The process ends between the checkpoint of the last measurement and the adapter."""
    words = (*words, *EARLY, "--checkpointing_steps", 2)
    cli(*words, "--output_dir", tmp_path / "whole").ok()
    with patch.object(TrialRun, "save_adapter", side_effect=KeyboardInterrupt):
        assert cli(*words, "--output_dir", tmp_path / "cut").code == 130
    ran = cli(*words, "--output_dir", tmp_path / "cut").ok()
    assert adapter(tmp_path / "cut") == adapter(tmp_path / "whole")
    assert held_out(tmp_path / "cut") == held_out(tmp_path / "whole")
    assert f"(resumed at step {held_out(tmp_path / 'cut')[-1]['step']})" in ran.out


def test_a_checkpoint_brings_its_best_step_to_another_folder(
    cli: CommandLine, words: tuple[Any, ...], tmp_path: Path
) -> None:
    words = (*words, *EARLY, "--checkpointing_steps", 2, "--keep_last_n_checkpoints", 1)
    cli(*words, "--output_dir", tmp_path / "first").ok()
    (newest,) = checkpoint.find(tmp_path / "first" / "checkpoints")
    assert newest.step > best_step(tmp_path / "first"), "the best step lies before the checkpoint"
    resumed = ("--resume_from_checkpoint", newest.folder, "--output_dir", tmp_path / "second")
    cli(*words, *resumed).ok()
    assert adapter(tmp_path / "second") == adapter(tmp_path / "first")
    file = newest.folder / "best" / "adapter_model.safetensors"
    file.unlink()
    file.write_bytes(adapter(tmp_path / "first")[:-1] + b"x")
    assert "the checkpoint is damaged" in cli(*words, *resumed[:-1], tmp_path / "third").error()


def test_where_it_is_measured_is_part_of_the_run(cli: CommandLine, words: tuple[Any, ...], tmp_path: Path) -> None:
    def stopped(name: str, *more: object) -> None:
        with patch.object(TrialRun, "save_adapter", side_effect=KeyboardInterrupt):
            assert cli(*words, "--max_train_steps", 4, *more, "--output_dir", tmp_path / name).code == 130

    stopped("early", "--early_stopping", "--eval_steps", 2)
    again = (*words, "--max_train_steps", 4, "--eval_steps", 1)
    line = cli(*again, "--early_stopping", "--output_dir", tmp_path / "early").error()
    assert "holds another run, with other settings" in line
    stopped("plain", "--eval_steps", 2)
    cli(*again, "--output_dir", tmp_path / "plain").ok()


def test_a_run_that_diverges_leaves_its_best_step(cli: CommandLine, words: tuple[Any, ...], tmp_path: Path) -> None:
    from peft_study.engine.engine import Engine

    original, calls = Engine.losses, [0]

    def losses(self: Engine, adapters: Any, examples: Any, indices: Any) -> list[Losses]:
        found = original(self, adapters, examples, indices)
        calls[0] += "NoAdapter" not in type(adapters[0]).__name__ and len(examples) == 6
        return [np.full_like(found[0], np.nan)] if calls[0] == 3 else found

    with patch.object(Engine, "losses", losses):
        ran = cli(*words, *EARLY, "--output_dir", tmp_path / "out")
    assert ran.code == 1
    assert (RunFolder(tmp_path / "out").status() or ("",))[0] == "diverged"
    best = [record["step"] for record in held_out(tmp_path / "out") if record.get("best")][-1]
    assert f"the adapter of step {best}, whose held-out loss was the lowest: {tmp_path / 'out' / 'best'}" in ran.out
    assert not (tmp_path / "out" / "adapter").exists()
    cli("merge", tmp_path / "out" / "best", "-o", tmp_path / "merged", "--no-measure").ok()


def patience(*words: str) -> int | None:
    return to_run(parse(["--model_name_or_path", "m", "--train_file", "t", "--use_lora", *words])).config.early_stopping


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", None),
        ("--early_stopping", 3),
        ("--early_stopping --seed 1", 3),
        ("--early_stopping 5", 5),
        ("--early-stopping 5", 5),
        ("--early_stopping=1", 1),
        ("--early_stopping True", 3),
        ("--early_stopping False", None),
    ],
)
def test_how_it_is_written(words: str, expected: int | None) -> None:
    assert patience(*words.split()) == expected


def test_how_it_is_written_in_yaml(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    for value, expected in ((True, 3), (5, 5), (False, None)):
        path.write_text(json.dumps({"early_stopping": value, "model_name_or_path": "m", "train_file": "t"}))
        assert to_run(parse([str(path), "--use_lora"])).config.early_stopping == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--early_stopping 0", "--early_stopping: 0 is not at least 1; give a value that is at least 1"),
        ("--early_stopping -1", "--early_stopping: -1 is not at least 1"),
        ("--early_stopping 1.5", "--early_stopping: '1.5' is not a whole number; fix the value"),
        ("--early_stopping=x", "--early_stopping: 'x' is not a whole number"),
        ("--early_stopping x", "unexpected value 'x'"),
    ],
)
def test_what_it_cannot_be(words: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        patience(*words.split())
    assert message in str(error.value)
