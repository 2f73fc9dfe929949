"""Contract 4 as the user meets it: `kill -9`, the same command again, and the numbers are bit-equal."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import optuna
import pytest
import torch
import yaml
from pyarrow import parquet

from command_line import CommandLine
from peft_study.engine import checkpoint
from peft_study.storage import journal
from peft_study.storage.metrics import read
from peft_study.storage.run_dir import RunFolder
from peft_study.training.interrupt import StopRequest
from peft_study.training.trial_run import TrialRun

PROGRAM = (sys.executable, "-c", "from peft_study.cli import main; main()")
TIMES = {"tokens_per_second", "peak_memory_bytes"}
PATIENCE = 300.0
"""Seconds after which a process that wrote nothing is taken to hang; a busy machine is no failure."""


def start(words: Sequence[object], cache: Path, log: Path) -> subprocess.Popen[bytes]:
    """Starts the program in a process of its own, with the cache of its own run."""
    environment = {
        **os.environ,
        "PEFT_STUDY_CACHE": str(cache),
        # an uninterrupted run in this process must add up its sums as those do
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    with log.open("ab") as file:
        return subprocess.Popen([*PROGRAM, *map(str, words)], env=environment, stdout=file, stderr=file)


def metrics(out: Path) -> list[Path]:
    return sorted([*out.glob("metrics.jsonl"), *out.glob("trials/*/metrics.jsonl")])


def steps(out: Path) -> int:
    """Returns the optimizer steps that have been written down, of all trials together."""
    return sum(record["event"] == "train" for path in metrics(out) for record in read(path))


def interrupt(process: subprocess.Popen[bytes], out: Path, target: int, delay: float, with_signal: int) -> int:
    """Sends the signal `delay` seconds after `target` steps are written down; returns the exit code."""
    begun, deadline = time.time_ns(), time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        # before it has written anything, what lies there is of the process before
        writes = any(path.stat().st_mtime_ns > begun for path in metrics(out))
        if writes and steps(out) >= target and (out / "checkpoints").is_dir():
            break
        assert process.poll() is None, f"ended with {process.returncode} before step {target}"
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(with_signal)
    return process.wait(PATIENCE)


def cache_of(out: Path) -> Path:
    """Returns the cache of a run: none finds what another has tokenised or measured."""
    return out.with_name(f"{out.name}-cache")


def here(cli: CommandLine, words: Sequence[object], out: Path) -> str:
    """Runs the program to its end, in this process to save a start; returns what it said."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PEFT_STUDY_CACHE", str(cache_of(out)))
        return cli(*words, out).ok().out


def killed_until_done(cli: CommandLine, words: Sequence[object], out: Path, targets: Sequence[int], seed: int) -> None:
    """Kills the program when it has written these numbers of steps, then lets it end.

    Args:
        cli: runs it for the last time.
        words: the command, up to the output folder.
        out: that folder.
        targets: steps, rising.
        seed: of the moments between the steps.
    """
    draw, log = random.Random(seed), out.with_name(f"{out.name}.log")
    for target in targets:
        process = start((*words, out), cache_of(out), log)
        code = interrupt(process, out, target, draw.uniform(0, 0.03), signal.SIGKILL)
        assert code == -signal.SIGKILL, f"it ended by itself before the kill at step {target}"
    assert "Traceback" not in log.read_text()
    assert "resumes at step" in here(cli, words, out)


def numbers(out: Path) -> dict[str, Any]:
    """Returns everything that must be bit-equal: measurements without times, results, adapters' bytes."""
    found: dict[str, Any] = {}
    for path in metrics(out):
        records = [{k: v for k, v in record.items() if k not in TIMES} for record in read(path)]
        found[str(path.relative_to(out))] = records
    if (out / "journal.jsonl").exists():
        found["journal"] = [timeless(event) for event in journal.read(out / "journal.jsonl")]
        rows = parquet.read_table(out / "results.parquet").to_pylist()
        found["rows"] = [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
        found["optuna"] = optuna_trials(out)
    for path in out.rglob("adapter/*.safetensors"):
        found[str(path.relative_to(out))] = path.read_bytes()
    return found


def timeless(event: dict[str, Any]) -> dict[str, Any]:
    """Returns an event without what differs from run to run."""
    return {**event, "facts": {k: v for k, v in event.get("facts", {}).items() if k != "seconds"}}


def optuna_trials(out: Path) -> list[Any]:
    """Returns what `optuna.db` says of every trial of every method."""
    url = f"sqlite:///{out / 'optuna.db'}"
    return sorted(
        (trial.user_attrs["name"], trial.state, trial.value, trial.params, trial.intermediate_values)
        for name in optuna.get_all_study_names(url)
        for trial in optuna.load_study(study_name=name, storage=url).trials
    )


def same(killed: Path, whole: Path) -> None:
    expected, found = numbers(whole), numbers(killed)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name] == value, name
    assert RunFolder(killed).status() == RunFolder(whole).status() == ("finished", None)


def drawn(total: int, count: int, seed: int) -> list[int]:
    """Returns `count` numbers of steps, all well inside the training, in rising order."""
    inside = range(2, max(int(0.8 * total), count + 2))
    return sorted(random.Random(seed).sample(inside, count))


# prompts take 17 tokens more a row than the rest: with turns forgotten, the rows after a kill would be others
@pytest.fixture
def study(tmp_path: Path, tiny_model_folder: Path, tiny_data: Path) -> Path:
    values: dict[str, Any] = {
        "model": {"name": str(tiny_model_folder), "dtype": "float32"},
        "data": {"train": str(tiny_data), "held_out": 8, "max_length": 64},
        "training": {"steps": 9, "batch_size": 5, "row_tokens": 130},
        "budget": {"trials": 4},
        "finals": {"best": 1, "seeds": 2},
        "methods": {
            "lora": {"rank": [2, 4], "dropout": 0.2},
            "prefix_tuning": {"tokens": 4, "learning_rate": [1e-3, 1e-2, 0.1, 0.3]},
            "prompt_tuning": {"tokens": 17},
        },
        "logging": {"tensorboard": False, "checkpoint_every": 1},
        "slots": 3,
        "output": str(tmp_path / "out"),
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def check_study(cli: CommandLine, study: Path, tmp_path: Path, kills: int, seed: int) -> None:
    whole, killed, words = tmp_path / "whole", tmp_path / "killed", ("run", study, "-o")
    here(cli, words, whole)
    total = steps(whole)
    found = RunFolder(whole).read("results.json")
    assert found["pruning"]["pruned"] > 0, "nothing was pruned, so nothing is shown of it"
    assert len(found["finalists"]) == 3
    killed_until_done(cli, words, killed, drawn(total, kills, seed), seed)
    same(killed, whole)
    assert len({row["name"] for row in numbers(killed)["rows"]}) == 1 + 3 * 4 + 3 * 2


def test_a_study_killed_three_times_is_bit_equal(cli: CommandLine, study: Path, tmp_path: Path) -> None:
    check_study(cli, study, tmp_path, kills=3, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "every"), [(1, 1), (2, 2)])
def test_a_study_killed_twenty_times_is_bit_equal(
    cli: CommandLine, study: Path, tmp_path: Path, seed: int, every: int
) -> None:
    values = yaml.safe_load(study.read_text())
    values["logging"]["checkpoint_every"] = every
    study.write_text(yaml.safe_dump(values))
    check_study(cli, study, tmp_path, kills=20, seed=seed)


def flags(model: Path, data: Path, flag: str, *, steps: int = 30) -> tuple[object, ...]:
    return (
        *("finetune", "--model_name_or_path", model, "--train_file", data, flag),
        *("--per_device_train_batch_size", 4, "--dtype", "float32", "--checkpointing_steps", 2, "--row_tokens", 128),
        *("--max_train_steps", steps),
        *(("--lora_dropout", "0.1") if flag == "--use_lora" else ()),
        "--output_dir",
    )


def test_a_run_killed_and_then_terminated_is_bit_equal(
    cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path
) -> None:
    words, whole, cut = flags(tiny_model_folder, tiny_data, "--use_lora"), tmp_path / "whole", tmp_path / "cut"
    here(cli, words, whole)
    log = tmp_path / "cut.log"
    assert interrupt(start((*words, cut), cache_of(cut), log), cut, 7, 0.005, signal.SIGKILL) == -signal.SIGKILL
    log.write_text("")
    assert interrupt(start((*words, cut), cache_of(cut), log), cut, 15, 0.0, signal.SIGTERM) == 130
    said = log.read_text()
    assert "resumes at step " in said
    assert "with a checkpoint; the same command resumes there" in said
    assert "Traceback" not in said
    status = RunFolder(cut).status()
    assert status is not None
    assert status[0] == "interrupted"
    stopped = checkpoint.newest(cut / "checkpoints")
    assert stopped is not None
    assert stopped.step >= 15
    assert f"resumes at step {stopped.step} of 30" in here(cli, words, cut)
    same(cut, whole)


def test_a_run_with_early_stopping_killed_three_times_keeps_the_same_step(
    cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path
) -> None:
    """Its rate is so high that the held-out loss goes up and down, and ends it."""
    words, whole, cut = flags(tiny_model_folder, tiny_data, "--use_lora"), tmp_path / "whole", tmp_path / "cut"
    high = ("--learning_rate", 0.1, "--lr_scheduler_type", "constant")
    words = (*words[:-1], *high, "--early_stopping", 5, "--eval_steps", 1, "--checkpointing_steps", 4, words[-1])
    said = here(cli, words, whole)
    assert "stopped at step " in said
    total = steps(whole)
    assert 8 < total < 30
    killed_until_done(cli, words, cut, drawn(total, 3, seed=5), seed=5)
    same(cut, whole)


def test_a_run_stopped_before_its_first_step_keeps_what_was_measured_before_it(
    cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path
) -> None:
    """Four examples do not fit into the first row, so the cut after it holds a trial at step 0, as late entries are."""
    words, whole, cut = flags(tiny_model_folder, tiny_data, "--use_lora", steps=3), tmp_path / "whole", tmp_path / "cut"
    words = (*words[:-1], "--row_tokens", 64, words[-1])
    here(cli, words, whole)
    with patch.object(StopRequest, "asked", property(lambda _s: True, lambda _s, _v: None), create=True):
        assert cli(*words, cut).code == 130
    assert [found.step for found in checkpoint.find(cut / "checkpoints")] == [0]
    here(cli, words, cut)
    same(cut, whole)


def test_a_run_that_ends_between_its_last_checkpoint_and_its_adapter_measures_nothing_twice(
    cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path
) -> None:
    """The last cut holds a finished trial whose held-out losses are already written down."""
    words, whole, cut = flags(tiny_model_folder, tiny_data, "--use_lora", steps=4), tmp_path / "whole", tmp_path / "cut"
    here(cli, words, whole)
    with patch.object(TrialRun, "save_adapter", side_effect=KeyboardInterrupt):
        assert cli(*words, cut).code == 130
    newest = checkpoint.newest(cut / "checkpoints")
    assert newest is not None
    assert newest.step == 4
    here(cli, words, cut)
    same(cut, whole)


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--use_lora", "--use_prefix_tuning", "--use_prompt_tuning"])
def test_a_run_killed_eight_times_is_bit_equal(
    cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path, flag: str
) -> None:
    words, whole, cut = flags(tiny_model_folder, tiny_data, flag), tmp_path / "whole", tmp_path / "cut"
    here(cli, words, whole)
    killed_until_done(cli, words, cut, drawn(30, 8, seed=3), seed=3)
    same(cut, whole)
