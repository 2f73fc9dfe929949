"""`merge`: the merged folder is the model that was trained, and says by how much it is not."""

from __future__ import annotations

import gc
import json
import re
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny_world
from command_line import CommandLine
from peft_study.methods.peft_files import encoding
from tiny_tokenizer import tiny_tokenizer

Trained = Callable[..., Path]
LOSSES = re.compile(
    r"held-out loss: base (\d\.\d+), adapter (\d\.\d+), merged (\d\.\d+); merged minus adapter (\S+) \[(\S+), (\S+)\]"
)


@pytest.fixture(scope="module")
def rounded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a base in bfloat16, as most bases are: what rounds away is the update alone."""
    folder = tmp_path_factory.mktemp("rounded")
    tiny_world.model("llama", dtype=torch.bfloat16).save_pretrained(folder)
    tiny_tokenizer(tiny_world.VOCABULARY).save_pretrained(folder)
    return folder


@pytest.fixture
def trained(cli: CommandLine, rounded: Path, tiny_data: Path, tmp_path: Path) -> Trained:
    """Returns a function that trains a LoRA adapter with small steps, and returns the run's folder."""

    def train(*more: object) -> Path:
        cli(
            *("finetune", "--model_name_or_path", rounded, "--train_file", tiny_data, "--use_lora", "--held_out", 20),
            *("--max_train_steps", 40, "--learning_rate", 2e-5, "--dtype", "float32", "--output_dir", tmp_path / "out"),
            *more,
        ).ok()
        return tmp_path / "out"

    return train


def when_loaded(monkeypatch: pytest.MonkeyPatch, told: Callable[[Any], None]) -> None:
    """Calls `told` with every model that is loaded from now on."""
    original = AutoModelForCausalLM.from_pretrained

    def noting(*words: object, **named: object) -> object:
        loaded = original(*words, **named)
        told(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", noting)


def losses(text: str) -> tuple[float, ...]:
    """Returns the losses of base, adapter and merged model, their difference, and its interval."""
    found = LOSSES.search(text)
    assert found, text
    return tuple(float(number) for number in found.groups())


def test_what_was_learned_is_in_the_merged_model(trained: Trained, cli: CommandLine, tmp_path: Path) -> None:
    ran = cli("merge", trained() / "adapter", "-o", tmp_path / "merged").ok()
    base, adapter, merged, above, low, high = losses(ran.out)
    assert base - adapter > 0.02
    assert abs(merged - adapter) < 1e-3
    assert abs(above) < 1e-3
    assert low <= above <= high
    assert ran.err == ""
    assert {t.dtype for t in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.float32}
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "float32"


def test_what_is_rounded_away_is_said(trained: Trained, cli: CommandLine, tmp_path: Path) -> None:
    ran = cli("merge", trained() / "adapter", "-o", tmp_path / "merged", "--dtype", "bfloat16").ok()
    base, adapter, merged, above, low, _ = losses(ran.out)
    assert adapter < merged <= base + 0.05
    assert 0 < low < above
    (line,) = ran.err.splitlines()
    assert line.startswith("WARNING: ")
    assert "--dtype float32" in line
    assert {t.dtype for t in load_file(tmp_path / "merged" / "model.safetensors").values()} == {torch.bfloat16}


def test_the_losses_are_those_of_the_run(trained: Trained, cli: CommandLine, tmp_path: Path) -> None:
    run = trained()
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if record["event"] == "held_out"][-1]
    base, adapter, *_ = losses(cli("merge", run / "adapter", "-o", tmp_path / "merged").ok().out)
    assert adapter == pytest.approx(last["loss"], abs=1e-3)
    assert base == pytest.approx(last["loss"] - last["minus_base"], abs=1e-3)


def test_the_arguments_of_open_instruct(trained: Trained, cli: CommandLine, tmp_path: Path, rounded: Path) -> None:
    run = trained()
    words = (
        "--base_model_name_or_path",
        rounded,
        "--lora_model_name_or_path",
        f"{run}/",
        "--qlora",
        "--save_tokenizer",
    )
    cli("merge", *words, "--output_dir", f"{tmp_path}/theirs/", "--no-measure").ok()
    cli("merge", run, "-o", tmp_path / "ours", "--no-measure").ok()
    theirs, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())
    line = cli("merge", run, "--lora_model_name_or_path", run, "--output_dir", tmp_path / "no").error()
    assert "the adapter is given twice" in line
    assert "no adapter is given; write `peft-study merge ADAPTER" in cli("merge", "-o", tmp_path / "no").error()


def test_an_unknown_dtype(trained: Trained, cli: CommandLine, tmp_path: Path) -> None:
    line = cli("merge", trained() / "adapter", "-o", tmp_path / "merged", "--dtype", "float31").error()
    assert "float31" in line
    assert "float32" in line
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("template", ["zephyr", "own"])
def test_the_trained_template_is_the_merged_models(
    template: str, trained: Trained, cli: CommandLine, tmp_path: Path, rounded: Path
) -> None:
    run = trained(*("--chat_template", template), *(("--add_bos", True) if template == "zephyr" else ()))
    cli("merge", run / "adapter", "-o", tmp_path / "merged", "--no-measure").ok()
    kept = (run / "adapter" / "chat_template.jinja").read_text()
    assert (kept == AutoTokenizer.from_pretrained(rounded).chat_template) == (template == "own")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == kept
    of_merged, of_adapter = encoding(tmp_path / "merged"), encoding(run / "adapter")
    assert of_merged["add_bos"] is of_adapter["add_bos"] is (template == "zephyr")
    assert Path(of_merged["template"]).read_text() == kept


def test_the_merged_model_answers_as_the_adapter_does(trained: Trained, cli: CommandLine, tmp_path: Path) -> None:
    """Also where it was trained with another template than the base's own."""
    run = trained("--chat_template_name", "zephyr", "--learning_rate", 1e-2)
    cli("merge", run / "adapter", "-o", tmp_path / "merged", "--no-measure").ok()
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("1+2\n")
    words = ("--prompts", prompts, "--max-new-tokens", 6)
    answers = [cli("generate", folder, *words).ok().out for folder in (run / "adapter", tmp_path / "merged")]
    assert answers[0] == answers[1]


def test_without_a_run_nothing_is_measured(trained: Trained, cli: CommandLine, tmp_path: Path) -> None:
    shutil.copytree(trained() / "adapter", tmp_path / "alone")
    ran = cli("merge", tmp_path / "alone", "-o", tmp_path / "merged").ok()
    assert "not measured: " in ran.out
    assert "config.resolved.json" in ran.out
    assert "held-out loss: base" not in ran.out
    assert (tmp_path / "merged" / "model.safetensors").exists()


@pytest.mark.parametrize("change", ["gone", "other"])
def test_without_the_runs_rows_nothing_is_measured(
    change: str, trained: Trained, cli: CommandLine, tmp_path: Path, tiny_data: Path
) -> None:
    mine = tmp_path / "mine.jsonl"
    shutil.copy(tiny_data, mine)
    run = trained("--train_file", mine)
    if change == "gone":
        mine.unlink()
    else:
        mine.write_text("".join(mine.read_text().splitlines(keepends=True)[10:]))
    ran = cli("merge", run / "adapter", "-o", tmp_path / "merged").ok()
    (line,) = [line for line in ran.out.splitlines() if line.startswith("not measured: ")]
    assert ("mine.jsonl" if change == "gone" else "held-out rows") in line
    assert (tmp_path / "merged" / "model.safetensors").exists()


def test_a_trial_of_a_study_is_measured_on_its_dev_rows(
    cli: CommandLine, tmp_path: Path, rounded: Path, tiny_data: Path
) -> None:
    """Where the held-out rows are a file, a study divides it: the dev rows are one half."""
    held_out = tmp_path / "held-out.jsonl"
    rows = tiny_data.read_text().splitlines(keepends=True)
    held_out.write_text("".join(rows[:20]))
    study = {
        "model": {"name": str(rounded), "device": "cpu", "dtype": "float32"},
        "data": {"train": str(tiny_data), "held_out": str(held_out)},
        "methods": {"lora": {"learning_rate": [1e-3], "rank": 4}},
        "budget": {"steps": 3, "trials": 1},
        "output": str(tmp_path / "study"),
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study))
    cli("run", tmp_path / "study.yaml").ok()
    trial = tmp_path / "study" / "trials" / "lora-000"
    records = [json.loads(line) for line in (trial / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in records if record["event"] == "held_out"][-1]
    ran = cli("merge", trial, "-o", tmp_path / "merged").ok()
    _, adapter, merged, *_ = losses(ran.out)
    assert adapter == pytest.approx(last["loss"], abs=1e-3)
    assert merged == pytest.approx(adapter, abs=1e-3)


def test_a_model_trained_as_a_whole_is_no_adapter(
    cli: CommandLine, tmp_path: Path, rounded: Path, tiny_data: Path
) -> None:
    cli(
        *("finetune", "--model_name_or_path", rounded, "--train_file", tiny_data, "--max_train_steps", 1),
        *("--dtype", "float32", "--output_dir", tmp_path / "out"),
    ).ok()
    line = cli("merge", tmp_path / "out" / "adapter", "-o", tmp_path / "merged").error()
    assert "whole model" in line


def test_the_dtype_of_a_merged_model_is_kept_where_it_is_used(
    trained: Trained, cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read in bfloat16, a float32 model would lose what the merge kept."""
    cli("merge", trained() / "adapter", "-o", tmp_path / "merged", "--no-measure").ok()
    used: list[torch.dtype] = []
    when_loaded(monkeypatch, lambda model: used.append(model.dtype))
    cli("chat", tmp_path / "merged", stdin="").ok()
    assert used == [torch.float32]


def test_one_model_is_in_memory_at_a_time(
    trained: Trained, cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained()
    gc.collect()
    loaded: list[weakref.ref[Any]] = []
    beside: list[int] = []

    def note(model: Any) -> None:
        beside.append(sum(earlier() is not None for earlier in loaded))
        loaded.append(weakref.ref(model))

    when_loaded(monkeypatch, note)
    cli("merge", run / "adapter", "-o", tmp_path / "merged").ok()
    assert beside == [0, 0, 0]
