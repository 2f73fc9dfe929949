"""Tasks of lm-eval: our packed model against lm-eval's own for PEFT, and our own tasks against lm-eval's."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from command_line import CommandLine

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.tasks import TaskManager  # noqa: E402

METHODS = ("lora", "prefix_tuning", "prompt_tuning")
ROWS = [
    {
        "id": str(n),
        "q": f"{n}+1=",
        "c": [str(n), str(n + 1), " a word"],
        "answer": "B",
        "gold": 1,
        "text": f"Text {n}. " * (3 if n else 400),  # the first is longer than the model's 256 positions
    }
    for n in range(5)
]
TASKS: dict[str, dict[str, Any]] = {
    "picks": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{c}}",
        "doc_to_target": "{{gold}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "writes": {
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["e", "\n\n"], "max_gen_toks": 12},
        "metric_list": [{"metric": "exact_match"}],
    },
    "stops": {
        "output_type": "generate_until",
        "doc_to_text": "{{q}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": "ab", "max_new_tokens": 200},
        "metric_list": [{"metric": "exact_match"}],
    },
    "reads": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    },
}


@pytest.fixture
def harness(tmp_path: Path) -> Path:
    """Returns a folder with lm-eval's task files over rows of a local file."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, task in TASKS.items():
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}}}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **data, "test_split": "test", **task}))
    return tmp_path


def evaluated(cli: CommandLine, harness: Path, adapters: list[Path], name: str, *more: str) -> list[dict[str, Any]]:
    out = harness / f"out-{name}"
    named = f"lm_eval:{harness / f'{name}.yaml'}"
    cli("evaluate", *adapters, "--tasks", named, "-o", out, "--dtype", "float32", *more).ok()
    return [row for path in sorted(out.glob("lm_eval-*.parquet")) for row in pq.read_table(path).to_pylist()]


def theirs(harness: Path, base: Path, adapter: Path | None, name: str) -> list[dict[str, Any]]:
    """Returns the samples that lm-eval gets of its own model class, one sequence at a time."""
    from lm_eval.models.huggingface import HFLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = peft.PeftModel.from_pretrained(model, adapter)
    found = lm_eval.simple_evaluate(
        HFLM(pretrained=model.eval(), tokenizer=AutoTokenizer.from_pretrained(base), batch_size=1),
        tasks=[name],
        bootstrap_iters=0,
        task_manager=TaskManager(include_path=str(harness), include_defaults=False),
    )
    samples: list[dict[str, Any]] = found["samples"][name]
    return sorted(samples, key=lambda sample: sample["doc_id"])


@pytest.mark.parametrize("name", TASKS)
def test_answers_are_those_of_lm_evals_own_model(
    name: str, adapters: list[Path], harness: Path, tiny_model_folder: Path, cli: CommandLine
) -> None:
    rows = evaluated(cli, harness, adapters, name)
    for system, adapter in (
        ("base", None),
        ("lora", adapters[0] / "adapter"),
    ):  # HFLM cannot continue with virtual tokens
        own = [row for row in rows if row["system"] == system]
        expected = theirs(harness, tiny_model_folder, adapter, name)
        assert [row["id"] for row in own] == [str(sample["doc_id"]) for sample in expected]
        for row, sample in zip(own, expected, strict=True):
            if name in ("writes", "stops"):
                assert row["output"] == str(sample["filtered_resps"])
            else:
                assert numbers(row["output"]) == pytest.approx(numbers(str(sample["filtered_resps"])), rel=1e-4)
            if name == "reads":
                assert (-row["loss"], row["tokens"]) == pytest.approx(sample["word_perplexity"], rel=1e-4)
            else:
                assert row["score"] == sample[row["metric"]]
    assert len({row["output"] for row in rows if row["id"] == "0"}) > 1, "the adapters change the answers"


def numbers(text: str) -> list[float]:
    import ast

    found = ast.literal_eval(text)
    flat = [part for each in found for part in (each if isinstance(each, tuple) else (each,))]
    return [float(part) for part in flat]


def test_a_group_gives_every_system_what_its_tasks_give_alone(
    adapters: list[Path], harness: Path, cli: CommandLine
) -> None:
    (harness / "both.yaml").write_text(yaml.safe_dump({"group": "both", "task": ["picks", "writes"]}))
    together = evaluated(cli, harness, adapters, "both")
    alone = [row for name in ("picks", "writes") for row in evaluated(cli, harness, adapters, name)]
    outputs = [sorted((row["system"], row["prompt"], row["output"]) for row in rows) for rows in (together, alone)]
    assert len({system for system, _, _ in outputs[0]}) > 2
    assert outputs[0] == outputs[1]


def test_choices_of_our_tasks_are_those_of_lm_eval(adapters: list[Path], harness: Path, cli: CommandLine) -> None:
    """In the chat template, both.

    lm-eval counts the line break that ends the header of the answer as part of each choice: all its losses of a
    question are larger by the same.
    """
    (harness / "own.yaml").write_text(
        json.dumps({"data": "rows.jsonl", "prompt": "{q}", "metric": "choice", "choices": "c"})
    )
    out = harness / "own"
    cli("evaluate", *adapters, "--tasks", harness / "own.yaml", "-o", out, "--dtype", "float32").ok()
    ours = {(row["system"], row["id"]): row for row in pq.read_table(out / "own.parquet").to_pylist()}
    rows = evaluated(cli, harness, adapters, "picks", "--lm-eval-chat")
    assert {row["system"] for row in rows} == {"base", *METHODS}
    for row in rows:
        losses = np.array([-value for value in numbers(row["output"])[::2]])
        own = np.array(ours[row["system"], row["id"]]["losses"])
        assert own - own[0] == pytest.approx(losses - losses[0], rel=1e-4, abs=1e-4)
        assert ours[row["system"], row["id"]]["score"] == row["score"]
    task = TaskManager(include_path=str(harness), include_defaults=False).load(["picks"])["tasks"]["picks"]
    raw, by_length = set(), set()
    for (system, name), row in ours.items():  # by their length, as lm-eval judges the same losses
        judged = task.process_results(ROWS[int(name)], [(-loss, False) for loss in row["losses"]])
        assert (row["score"], row["normalised"]) == (judged["acc"], judged["acc_norm"])
        raw.add((system, name, row["score"]))
        by_length.add((system, name, row["normalised"]))
    assert raw != by_length, "length makes a difference"


def test_a_stopped_evaluation_asks_no_system_twice(adapters: list[Path], harness: Path, cli: CommandLine) -> None:
    rows = evaluated(cli, harness, adapters[:1], "picks")
    path = harness / "out-picks" / "lm_eval-picks.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[: len(ROWS) + 2]))  # the second system was cut off: it is asked again
    again = evaluated(cli, harness, adapters[:1], "picks")
    assert [{**row, "seconds": 0} for row in again] == [{**row, "seconds": 0} for row in rows]
    assert path.read_text().splitlines(keepends=True)[: len(ROWS)] == lines[: len(ROWS)]


def test_data_that_the_hub_would_have_is_named(
    adapters: list[Path], cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval's own task, on a machine without a network and with an empty cache."""
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    asked = cli("evaluate", adapters[0], "--tasks", "lm_eval:hellaswag", "-o", tmp_path / "out").error()
    assert "the data of lm-eval's task hellaswag could not be loaded" in asked
    assert "Rowan/hellaswag" in asked
    assert "take the folder HF_HOME with you" in asked
    assert not (tmp_path / "out" / "evaluation.json").exists()


def test_what_is_missing_is_one_line(adapters: list[Path], harness: Path, cli: CommandLine) -> None:
    out = harness / "out"

    def error(task: str) -> str:
        return cli("evaluate", adapters[0], "--tasks", f"lm_eval:{task}", "-o", out).error()

    assert "no such task file" in error(str(harness / "other.yaml"))
    (harness / "no.yaml").write_text("a: 1\n")
    assert "no task file of lm-eval" in error(str(harness / "no.yaml"))
    (harness / "both.yaml").write_text(yaml.safe_dump({"group": "both", "task": ["picks", "writes"]}))
    group, task = (f"lm_eval:{harness / name}.yaml" for name in ("both", "picks"))
    again = cli("evaluate", adapters[0], "--tasks", group, "--tasks", task, "-o", out).error()
    assert "picks is asked twice" in again
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(harness / "gone.jsonl")}}}
    (harness / "gone.yaml").write_text(yaml.safe_dump({"task": "gone", **data, "test_split": "test", **TASKS["picks"]}))
    assert "the data of lm-eval's task gone could not be loaded" in error(str(harness / "gone.yaml"))
