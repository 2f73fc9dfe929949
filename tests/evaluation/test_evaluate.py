"""`peft-study evaluate`: scores that can be traced, and the losses of choices against a plain loop over PEFT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from command_line import CommandLine
from peft_study import LoRA, PrefixTuning, PromptTuning, finetune
from peft_study.evaluation.evaluate import short_names
from peft_study.methods.peft_files import encoding

METHODS = ("lora", "prefix_tuning", "prompt_tuning")
SUMS = [{"id": f"s{n}", "q": f"{n}+{n}", "answer": str(2 * n)} for n in range(5)] + [{"id": "none", "q": "1+2"}]
CHOICES = [{"id": f"c{n}", "q": f"{n}+1", "c": [str(n), str(n + 1), "a word"], "answer": "B"} for n in range(4)]


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, tiny_data: Path) -> list[Path]:
    """Trains one adapter a method for a few steps at a high rate, so that each answers otherwise than the base."""
    folder = tmp_path_factory.mktemp("adapters")
    settings = LoRA(rank=4, learning_rate=0.05), PrefixTuning(learning_rate=0.5), PromptTuning(learning_rate=0.5)
    for name, setting in zip(METHODS, settings, strict=True):
        finetune(str(tiny_model_folder), str(tiny_data), setting, steps=3, output=folder / name, verbose=False)
    return [folder / method for method in METHODS]


@pytest.fixture
def tasks(tmp_path: Path) -> list[Path]:
    files = {
        "sums": (SUMS, {"metric": "number", "max_new_tokens": 6}),
        "choices": (CHOICES, {"metric": "choice", "choices": "c"}),
    }
    for name, (rows, task) in files.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"data": f"{name}.jsonl", "prompt": "{q}", **task}))
    return [tmp_path / f"{name}.yaml" for name in files]


def words(tasks: list[Path], out: Path) -> list[Any]:
    return [*(word for task in tasks for word in ("--tasks", task)), "-o", out, "--dtype", "float32"]


def rows_of(out: Path, task: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(out / f"{task}.parquet").to_pylist()
    return found


def plain_losses(folder: Path | None, base: Path, template: Path, question: str, choices: list[str]) -> list[float]:
    """Returns the summed loss of each choice after the prompt: one at a time, with PEFT."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = template.read_text()
    turns = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = model if folder is None else peft.PeftModel.from_pretrained(model, folder)
    found = []
    for choice in choices:
        start = len(tokenizer(prompt, add_special_tokens=False).input_ids)
        ids = tokenizer(prompt + choice, add_special_tokens=False, return_tensors="pt").input_ids
        with torch.no_grad():
            logits = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -ids.shape[1] :]
        scores = logits[start - 1 : -1].log_softmax(-1)
        found.append(-float(scores.gather(1, ids[0, start:, None]).sum()))
    return found


def test_scores_can_be_traced_and_the_losses_are_pefts(
    adapters: list[Path], tasks: list[Path], tiny_model_folder: Path, cli: CommandLine, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ran = cli("evaluate", *adapters, *words(tasks, out)).ok()
    sums, choices = rows_of(out, "sums"), rows_of(out, "choices")
    systems = ["base", *METHODS]
    assert sorted({row["system"] for row in sums}) == sorted(systems)
    assert len(sums) == len(systems) * len(SUMS)
    assert [row["score"] for row in sums if row["id"] == "none"] == [None] * len(systems), "counted apart"
    assert all("(1 without an answer)" in line for line in ran.out.splitlines() if " sums " in f" {line} ")
    template = Path(str(encoding(adapters[0] / "adapter")["template"]))
    for name, folder in zip(systems, [None, *(path / "adapter" for path in adapters)], strict=True):
        for row in (row for row in choices if row["system"] == name):
            asked = next(one for one in CHOICES if one["id"] == row["id"])
            expected = plain_losses(folder, tiny_model_folder, template, asked["q"], asked["c"])
            assert row["losses"] == pytest.approx(expected, rel=1e-4, abs=1e-4)
            assert row["output"] == asked["c"][expected.index(min(expected))]
            assert row["score"] == (expected.index(min(expected)) == 1)
    assert len({tuple(row["losses"]) for row in choices if row["id"] == "c0"}) == len(systems)


def test_the_outputs_are_those_of_generate(
    adapters: list[Path], tasks: list[Path], cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft_study.evaluation import generation
    from peft_study.model.precision import Placement

    out = tmp_path / "out"
    cli("evaluate", *adapters, *words(tasks[:1], out)).ok()
    monkeypatch.setattr(generation, "choose", lambda _d: Placement(torch.device("cpu"), torch.float32))
    for folder in adapters:
        answerer = generation.Answerer.load(folder / "adapter")
        found = {row["id"]: row["output"] for row in rows_of(out, "sums") if row["system"] == folder.name}
        for asked in SUMS:
            assert found[asked["id"]] == answerer.answer([{"role": "user", "content": asked["q"]}], 6)


def test_a_killed_evaluation_goes_on_where_it_was(
    adapters: list[Path], tasks: list[Path], cli: CommandLine, tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    for out in (whole, cut):
        cli("evaluate", adapters[0], *words(tasks, out)).ok()
    lines = (cut / "sums.jsonl").read_text().splitlines(keepends=True)
    (cut / "sums.jsonl").write_text("".join(lines[:5]) + lines[5][:20])
    (cut / "sums.parquet").unlink()
    ran = cli("evaluate", adapters[0], *words(tasks, cut)).ok()
    assert f"sums: {len(lines) - 5} answers" in ran.out + ran.err
    assert "choices:" not in ran.out + ran.err, "nothing of it was due"

    def outputs(out: Path) -> list[tuple[str, ...]]:
        return [(row["system"], row["id"], row["output"]) for row in rows_of(out, "sums")]

    assert sorted(outputs(cut)) == sorted(outputs(whole))
    assert (cut / "sums.jsonl").read_text().count("\n") == len(lines)


def test_outputs_are_judged_again_without_a_model(
    adapters: list[Path], tasks: list[Path], cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    cli("evaluate", adapters[0], *words(tasks, out)).ok()
    before = rows_of(out, "sums")
    (tmp_path / "sums.jsonl").write_text(
        "".join(json.dumps({**row, "answer": str(len(row["id"]) * 0 + 7)}) + "\n" for row in SUMS)
    )
    monkeypatch.setattr("peft_study.evaluation.evaluate.load_base", None)
    cli("evaluate", "--rescore", *words(tasks, out)).ok()
    after = rows_of(out, "sums")
    assert [row["output"] for row in after] == [row["output"] for row in before]
    assert all(row["score"] is not None for row in after), "all rows have an answer now"


def test_bad_input_is_one_line(
    adapters: list[Path], tasks: list[Path], wide_model_folder: Path, cli: CommandLine, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert "no adapter is given" in cli("evaluate", *words(tasks, out)).error()
    assert "is given twice" in cli("evaluate", adapters[0], *words([tasks[0], tasks[0]], out)).error()
    assert "holds no" in cli("evaluate", tmp_path, *words(tasks, out)).error()
    other = tmp_path / "other" / "adapter"
    other.mkdir(parents=True)
    config = json.loads((adapters[0] / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(wide_model_folder)
    (other / "adapter_config.json").write_text(json.dumps(config))
    save_file(load_file(adapters[0] / "adapter" / "adapter_model.safetensors"), other / "adapter_model.safetensors")
    assert "adapters of one base" in cli("evaluate", adapters[0], other, *words(tasks, out)).error()
    cli("evaluate", adapters[0], *words(tasks[:1], out)).ok()
    assert "an evaluation of other tasks" in cli("evaluate", adapters[0], *words(tasks, out)).error()


def test_adapters_are_named_by_what_tells_them_apart() -> None:
    assert short_names([Path("/a/runs/one/adapter"), Path("/a/runs/two")]) == ["one", "two"]
    assert short_names([Path("/a/one/adapter"), Path("/b/one/adapter")]) == ["a/one", "b/one"]
    assert short_names([Path("/a/base/adapter")]) == ["a/base"]
