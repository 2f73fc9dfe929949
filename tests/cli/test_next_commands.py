"""The end of `finetune` says what to do next in commands that can be pasted into a shell."""

from __future__ import annotations

import shlex
import shutil
import sys
from pathlib import Path

import pytest

from command_line import CommandLine, Ran

LABELS = ("try it", "answer a file", "curves", "merge", "a study of its learning rate")


def commands(ran: Ran) -> dict[str, list[str]]:
    """Returns the words of each command by what it is for, as a shell splits them."""
    pairs = (line.partition(": ") for line in ran.out.splitlines())
    return {what: shlex.split(command) for what, _, command in pairs if what in LABELS}


@pytest.fixture
def data(tmp_path: Path, tiny_data: Path) -> Path:
    return Path(shutil.copy(tiny_data, tmp_path / "it's data.jsonl"))


def test_the_commands_after_a_lora_run(
    cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "my 'first' run"
    flags = ("finetune", "--model_name_or_path", tiny_model_folder, "--train_file", data, "--max_train_steps", 1)
    ran = cli(*flags, "--use_lora", "--output_dir", out, "--with_tracking").ok()
    (line,) = [line for line in ran.out.splitlines() if line.startswith("total time ")]
    files = f"losses by step: {out / 'metrics.jsonl'}, as a page: {out / 'report.html'}; everything else: {out}"
    assert f"s; {files}" in line
    found = commands(ran)
    assert tuple(found) == LABELS
    assert found["curves"] == ["tensorboard", "--logdir", str(out / "tensorboard")]
    assert (Path(sys.executable).parent / "tensorboard").exists(), "it comes with the program's own packages"
    assert found["a study of its learning rate"] == [
        *("peft-study", "run", "--model", str(tiny_model_folder), "--data", str(data), "--methods", "lora")
    ]
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text("1+1\n")
    for what in ("try it", "answer a file", "merge"):
        program, *words = found[what]
        assert program == "peft-study"
        cli(*words).ok()
    assert (tmp_path / "my 'first' run_merged" / "model.safetensors").exists()


def test_what_a_run_has_no_use_for_is_not_offered(
    cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, data: Path
) -> None:
    flags = ("finetune", "--model_name_or_path", tiny_model_folder, "--max_train_steps", 1)
    prefix = cli(*flags, "--use_prefix_tuning", "--train_file", data, "--output_dir", tmp_path / "prefix").ok()
    assert set(commands(prefix)) == {"try it", "answer a file", "a study of its learning rate"}
    mixture = ("--dataset_mixer_list", data, "0.5")
    full = cli(*flags, "--learning_rate", 1e-6, *mixture, "--output_dir", tmp_path / "full")
    assert set(commands(full)) == {"try it", "answer a file"}
    shares = cli(*flags, "--use_lora", *mixture, "--output_dir", tmp_path / "shares").ok()
    assert set(commands(shares)) == {"try it", "answer a file", "merge"}
