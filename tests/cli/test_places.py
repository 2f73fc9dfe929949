"""Files and folders that commands are given: what cannot be written, read or meant is one line, before any work."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from command_line import CommandLine, listing


@pytest.fixture
def study(tmp_path: Path, tiny_model_folder: Path, tiny_data: Path) -> Path:
    values: dict[str, Any] = {
        "model": {"name": str(tiny_model_folder)},
        "data": {"train": str(tiny_data), "held_out": 8},
        "training": {"steps": 1},
        "methods": {"lora": {"learning_rate": [1e-3]}},
        "output": str(tmp_path / "out"),
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Returns a LoRA adapter whose base is nowhere: whoever loads it, fails."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": str(tmp_path / "no-base"), "r": 4}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("1+1\n")
    return path


def bad_places(tmp_path: Path) -> dict[str, tuple[Path, str]]:
    """Returns places that nothing can be written to, each with what is said of it."""
    file = tmp_path / "file"
    file.write_text("in the way")
    return {
        "below a file": (file / "new", f"{file}: is a file, not a folder; name another folder"),
        "below a file, deeper": (file / "new" / "newer", f"{file}: is a file, not a folder; name another folder"),
        "no file system": (Path("/proc/peft-study/new"), "/proc/peft-study"),
        "too long a name": (tmp_path / ("a" * 300), "File name too long; "),
    }


BAD = ("below a file", "below a file, deeper", "no file system", "too long a name")


def refused(cli: CommandLine, tmp_path: Path, place: str, *words: object, ending: str = "") -> None:
    """Checks that a place is refused with one line before anything is loaded, and that nothing is left behind."""
    path, said = bad_places(tmp_path)[place]
    before = listing(tmp_path)
    ran = cli(*(path.with_name(path.name + ending) if word is ... else word for word in words))
    line = ran.error()
    assert said in line.replace(ending, "") if ending else said in line, line
    assert "loading" not in ran.out
    assert listing(tmp_path) == before


@pytest.mark.parametrize("place", BAD)
def test_run(cli: CommandLine, study: Path, tmp_path: Path, place: str) -> None:
    refused(cli, tmp_path, place, "run", study, "-o", ...)


@pytest.mark.parametrize("place", BAD)
def test_finetune(cli: CommandLine, tiny_model_folder: Path, tiny_data: Path, tmp_path: Path, place: str) -> None:
    words = ("--model_name_or_path", tiny_model_folder, "--train_file", tiny_data, "--use_lora")
    refused(cli, tmp_path, place, "finetune", *words, "--output_dir", ...)


@pytest.mark.parametrize("place", BAD)
def test_init(cli: CommandLine, tiny_data: Path, tmp_path: Path, place: str) -> None:
    words = ("init", "--data", tiny_data, "--model", tmp_path / "no-model", "-o", ...)
    refused(cli, tmp_path, place, *words, ending=".yaml")


@pytest.mark.parametrize("place", BAD)
def test_data(cli: CommandLine, tiny_data: Path, tmp_path: Path, place: str) -> None:
    refused(cli, tmp_path, place, "data", "convert", tiny_data, "-o", ..., ending=".jsonl")
    refused(cli, tmp_path, place, "data", "sample", tiny_data, "--sizes", 5, "-o", ...)
    refused(cli, tmp_path, place, "data", "skills", "--count", 3, "-o", ..., ending=".jsonl")
    model = ("--model", tmp_path / "no-model")
    refused(cli, tmp_path, place, "data", "stats", tiny_data, *model, "--plot", ..., ending=".png")


@pytest.mark.parametrize("place", BAD)
def test_schema_generate_and_merge(cli: CommandLine, adapter: Path, prompts: Path, tmp_path: Path, place: str) -> None:
    refused(cli, tmp_path, place, "schema", "-o", ..., ending=".json")
    refused(cli, tmp_path, place, "generate", adapter, "--prompts", prompts, "-o", ..., ending=".jsonl")
    refused(cli, tmp_path, place, "merge", adapter, "-o", ...)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_must_not_be_written(cli: CommandLine, study: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir(mode=0o500)
    ran = cli("run", study)
    assert "this place cannot be written; name another folder or change its permissions" in ran.error()
    assert "loading" not in ran.out


def test_missing_folders_are_made(cli: CommandLine, tmp_path: Path) -> None:
    target = tmp_path / "new" / "newer" / "schema.json"
    cli("schema", "-o", target).ok()
    assert json.loads(target.read_text())["title"]


def test_folders_in_the_way_of_samples(cli: CommandLine, tiny_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "sample-5.jsonl").mkdir(parents=True)
    words = ("data", "sample", tiny_data, "--overwrite", "-o", out, "--sizes")
    assert "sample-5.jsonl: is a folder, not a file" in cli(*words, 5).error()
    cli(*words, 6).ok()
    (out / "manifest.json").unlink()
    (out / "manifest.json").mkdir()
    assert "manifest.json: is a folder, not a file" in cli(*words, 6).error()


@pytest.mark.parametrize(
    "words",
    [
        ("data", "convert", "{data}", "-o", ""),
        ("data", "convert", "", "-o", "a.jsonl"),
        ("data", "sample", "{data}", "--sizes", "5", "-o", ""),
        ("data", "sample", "{data}", "--sizes", "5", "--output="),
        ("data", "stats", "{data}", "--model", "", "--plot", "a.png"),
        ("data", "stats", "{data}", "--model", "x", "--plot", ""),
        ("data", "skills", "-o", ""),
        ("init", "--data", "{data}", "-o", ""),
        ("init", "--data", ""),
        ("schema", "-o", ""),
        ("run", ""),
        ("run", "{study}", "-o", ""),
        ("run", "{study}", "--output", " "),
        ("run", "{study}", "--set", "output=''"),
        ("run", "{study}", "--set", "data.held_out=''"),
        ("run", "{study}", "--set", "data.train=''"),
        ("run", "{study}", "--set", "data.train=['']"),
        ("run", "{study}", "--set", "data.chat_template=''"),
        ("run", "{study}", "--set", "ray=''"),
        ("run", "{study}", "--set", "model.name=''"),
        ("status", ""),
        ("list", ""),
        ("show", "lora-000", "-s", ""),
        ("clean", ""),
        ("merge", "", "-o", "merged"),
        ("merge", "a", "-o", ""),
        ("generate", "a", "--prompts", ""),
        ("chat", ""),
        *(
            ("finetune", "--model_name_or_path", "x", "--use_lora", "--train_file", "{data}", f"--{name}", "")
            for name in ("output_dir", "resume_from_checkpoint", "held_out", "chat_template", "chat_template_name")
        ),
    ],
    ids=" ".join,
)
def test_an_empty_path_is_not_the_current_folder(
    cli: CommandLine,
    study: Path,
    tiny_data: Path,
    tmp_path: Path,
    words: tuple[str, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    before = listing(tmp_path)
    line = cli(*(word.format(data=tiny_data, study=study) for word in words)).error()
    assert "is empty" in line, line
    assert listing(tmp_path) == before


def test_the_option_that_is_empty_is_named(cli: CommandLine, tiny_data: Path) -> None:
    assert cli("data", "convert", tiny_data, "-o", "").error() == "error: -o: is empty; give a value"
    assert cli("data", "convert", tiny_data, "--output=").error() == "error: --output: is empty; give a value"
    assert cli("status", "").error() == "error: what follows status: is empty; give a value"
