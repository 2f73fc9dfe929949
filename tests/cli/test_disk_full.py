"""A disk that takes no more, met at every place that writes: one line, exit code 2, and nothing half-written."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from command_line import CommandLine, largest_file, listing
from peft_study.errors import OutputError
from peft_study.storage.cache_dir import cache_root
from peft_study.storage.files import output_error
from peft_study.storage.metrics import MetricsWriter
from peft_study.storage.run_dir import RunFolder


@pytest.fixture
def flags(tiny_model_folder: Path, tiny_data: Path, tmp_path: Path) -> tuple[Any, ...]:
    """Returns a LoRA run whose adapter takes some 200 kB and whose checkpoint three times that."""
    return (
        *("finetune", "--model_name_or_path", tiny_model_folder, "--train_file", tiny_data, "--use_lora"),
        *("--max_train_steps", 4, "--per_device_train_batch_size", 2, "--output_dir", tmp_path / "out"),
    )


def temporary(folder: Path) -> list[str]:
    """Returns what looks like a leftover below a folder."""
    return [name for name in listing(folder) if any(part.startswith(".") for part in Path(name).parts)]


def test_convert(cli: CommandLine, tiny_data: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "out.jsonl"
    with largest_file(1000):
        line = cli("data", "convert", tiny_data, "-o", target).error()
    assert str(target) in line
    assert "; " in line
    assert list(tmp_path.iterdir()) == []


def test_convert_at_the_last_sync(
    cli: CommandLine, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    line = cli("data", "convert", tiny_data, "-o", tmp_path / "out.jsonl").error()
    assert "the disk is full; free some space" in line
    assert "out.jsonl" in line
    assert list(tmp_path.iterdir()) == []


def test_token_cache(cli: CommandLine, flags: tuple[Any, ...], tmp_path: Path) -> None:
    before = listing(cache_root() / "tokens") if (cache_root() / "tokens").exists() else {}
    with largest_file(1000):
        # the sequence length makes tokens that no other test has cached
        line = cli(*flags, "--max_seq_length", 93, "--preprocessing_num_workers", 1).error()
    assert "tokens" in line
    assert listing(cache_root() / "tokens") == before
    assert list(tmp_path.iterdir()) == []


def test_adapter(cli: CommandLine, flags: tuple[Any, ...], tmp_path: Path) -> None:
    cli(*flags, "--max_train_steps", 1, "--overwrite_output_dir").ok()  # tokens and digests are cached now
    with largest_file(100_000):
        line = cli(*flags, "--overwrite_output_dir").error()
    assert f"{tmp_path / 'out' / 'adapter'}: " in line
    assert not (tmp_path / "out" / "adapter").exists()
    assert temporary(tmp_path) == []
    status = RunFolder(tmp_path / "out").status()
    assert status is not None
    assert status[0] == "failed"
    cli(*flags).ok()  # the same command once there is space
    assert RunFolder(tmp_path / "out").status() == ("finished", None)


def test_checkpoint(cli: CommandLine, flags: tuple[Any, ...], tmp_path: Path) -> None:
    words = (*flags, "--checkpointing_steps", 2)
    cli(*words).ok()
    with largest_file(300_000):
        line = cli(*words, "--overwrite_output_dir").error()
    assert "the checkpoint could not be written" in line
    assert "free some space" in line
    assert listing(tmp_path / "out" / "checkpoints") == {}
    assert temporary(tmp_path) == []


def test_metrics(cli: CommandLine, tiny_model_folder: Path, tiny_data: Path, tmp_path: Path) -> None:
    words = (
        *("finetune", "--model_name_or_path", tiny_model_folder, "--train_file", tiny_data, "--use_prompt_tuning"),
        *("--max_train_steps", 90, "--output_dir", tmp_path / "out"),
    )
    cli(*words).ok()  # tokens and digests are cached now
    assert (tmp_path / "out" / "metrics.jsonl").stat().st_size > 18_000
    assert (tmp_path / "out" / "doctor.json").stat().st_size < 15_000  # it is written before
    with largest_file(15_000):
        line = cli(*words, "--overwrite_output_dir").error()
    assert f"{tmp_path / 'out' / 'metrics.jsonl'}: writing failed: File too large; " in line
    assert not (tmp_path / "out" / "adapter").exists()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's own writer
def test_event_files(tmp_path: Path) -> None:
    def write() -> None:
        with contextlib.closing(MetricsWriter(tmp_path / "metrics.jsonl", tmp_path / "events")) as metrics:
            for step in range(2000):
                metrics.write("train", step, loss=1.0)

    with largest_file(5000), pytest.raises(OutputError, match=r"metrics\.jsonl: writing failed"):
        write()


def test_folder_of_the_run(
    cli: CommandLine, flags: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli(*flags).ok()
    words = [word if word != tmp_path / "out" else tmp_path / "runs" / "new" for word in flags]

    def full(self: RunFolder, name: str, values: Any) -> None:
        if name == "status.json":
            raise output_error(OSError(errno.ENOSPC, "full"), self.path / name)
        (self.path / name).write_text("{}")

    monkeypatch.setattr(RunFolder, "write", full)
    assert "the disk is full" in cli(*words).error()
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", ["finetune", "run"])
def test_output_below_a_file(
    cli: CommandLine, flags: tuple[Any, ...], tmp_path: Path, tiny_model_folder: Path, tiny_data: Path, command: str
) -> None:
    (tmp_path / "file").write_text("mine")
    for place, said in ((tmp_path / "file", "is a file"), (tmp_path / "file" / "out", "file")):
        study = {
            "model": {"name": str(tiny_model_folder)},
            "data": {"train": str(tiny_data)},
            "methods": {"lora": {}},
            "output": str(place),
        }
        (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
        before = listing(tmp_path)
        words = ("run", tmp_path / "study.yaml") if command == "run" else (*flags[:-1], place)
        assert said in cli(*words).error()
        assert listing(tmp_path) == before


def test_answers(cli: CommandLine, flags: tuple[Any, ...], tmp_path: Path) -> None:
    cli(*flags).ok()
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("1+1\n2+2\n")
    before = listing(tmp_path)
    with largest_file(10):
        line = cli(
            *("generate", tmp_path / "out" / "adapter", "--prompts", prompts, "--max-new-tokens", 4),
            *("-o", tmp_path / "answers.jsonl"),
        ).error()
    assert "answers.jsonl" in line
    assert listing(tmp_path) == before


def test_merged_model(cli: CommandLine, flags: tuple[Any, ...], tmp_path: Path) -> None:
    cli(*flags).ok()
    before = listing(tmp_path)
    with largest_file(20_000):
        line = cli("merge", tmp_path / "out" / "adapter", "-o", tmp_path / "new" / "merged").error()
    assert str(tmp_path / "new" / "merged") in line
    assert listing(tmp_path) == before
    assert not (tmp_path / "new").exists()
