"""What a study measures at its end for the report: costs against PEFT and the disk, answers against PEFT's generate."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_study
from command_line import CommandLine, conversation
from peft_study import LoRA, PrefixTuning, PromptTuning, Study
from peft_study.errors import OutputError
from peft_study.report.answers import Answers, answers
from peft_study.report.costs import costs
from peft_study.storage import journal
from peft_study.study import closing
from peft_study.study.closing import wins_and_losses
from worker_cases import kill, start, until, write_study

PLAIN: dict[str, Any] = {
    "budget": {"trials": 2},
    "finals": {"best": 1, "seeds": 2, "answers": 5},
    "methods": {
        "lora": {"rank": 2, "learning_rate": [1e-3, 1e-2]},
        "lora-wide": {"method": "lora", "rank": 16, "learning_rate": [1e-3, 1e-2]},
        "prefix_tuning": {"tokens": 4},
        "prompt_tuning": {"tokens": 7},
        "full": {"learning_rate": [1e-4, 1e-3]},
    },
    "logging": {"tensorboard": False},
}


@pytest.fixture(scope="module")
def rows() -> dict[str, list[dict[str, str]]]:
    """Returns conversations of several lengths and of one or two answers, by their ids."""
    found = {}
    for i in range(60):
        question, answer = (turn["content"] for turn in conversation(i)["messages"][-2:])
        turns = [("user", "please " * (i % 6) + question), ("assistant", answer)]
        turns += [("user", "sure?"), ("assistant", f"yes, {answer}")] if i % 4 == 0 else []
        found[f"row-{i}"] = [{"role": role, "content": text} for role, text in turns]
    return found


@pytest.fixture(scope="module")
def study(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, rows: dict[str, list[dict[str, str]]]
) -> Path:
    folder = tmp_path_factory.mktemp("closing")
    lines = [json.dumps({"id": name, "messages": turns, "source": "sums"}) for name, turns in rows.items()]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return write_study(folder, tiny_model_folder, folder / "rows.jsonl", **PLAIN)


@pytest.fixture(scope="module")
def out(study: Path) -> Path:
    """Returns the folder of the study, run to its end."""
    process = start(("run", study), study.parent / "log")
    assert process.wait() == 0, (study.parent / "log").read_text()
    assert "WARNING" not in (study.parent / "log").read_text()
    return study.parent / "out"


def best_of(out: Path) -> dict[str, tuple[str, str]]:
    """Returns method -> its setting and the folder's name of its seed with the least dev loss."""
    rows = peft_study.open_study(out).trials_dataframe()
    finals = rows[rows.kind == "final"].sort_values("dev")
    found = {}
    for row in finals.itertuples():
        found.setdefault(row.method, (f"{row.method}-{row.number:03d}", row.name))
    return found


def test_costs_are_those_of_peft_and_of_the_disk(out: Path, tiny_model_folder: Path) -> None:
    found, best = costs(out), best_of(out)
    assert list(found) == list(best), "best first"
    assert set(found) == set(PLAIN["methods"])
    for method, cost in found.items():
        setting, trial = best[method]
        adapter = out / "trials" / trial / "adapter"
        model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
        if method == "full":
            trained = sum(p.numel() for p in model.parameters())
        else:
            config = peft.PeftConfig.from_pretrained(adapter)
            config.inference_mode = False
            trained = peft.get_peft_model(model, config).get_nb_trainable_parameters()[0]
        weights = "model" if method == "full" else "adapter_model"
        assert cost.setting == setting
        assert cost.trainable == trained
        assert cost.adapter_bytes == os.stat(adapter / f"{weights}.safetensors").st_size
        assert cost.peak_bytes is not None
        assert cost.peak_bytes > 16 * trained
        assert cost.tokens_per_second > 0
    assert len({cost.data_tokens for cost in found.values()}) == 1
    plain = found["lora"]
    assert plain.row_tokens == plain.data_tokens == found["prefix_tuning"].row_tokens
    virtual = found["prompt_tuning"].row_tokens - plain.data_tokens
    assert virtual > 0
    assert virtual % 7 == 0
    assert found["prompt_tuning"].row_tokens <= 130, "a row of the study"
    assert found["lora-wide"].trainable == 8 * plain.trainable
    assert found["lora-wide"].peak_bytes - plain.peak_bytes > 0  # type: ignore[operator]


def generated(model: Any, tokenizer: Any, prompt: list[dict[str, str]], tokens: int) -> str:
    """Returns what transformers' own `generate` answers to one prompt."""
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
    with torch.no_grad():
        made = model.eval().generate(
            input_ids=ids.input_ids, attention_mask=ids.attention_mask, max_new_tokens=tokens, do_sample=False
        )
    return str(tokenizer.decode(made[0, ids.input_ids.shape[1] :], skip_special_tokens=True))


def test_answers_are_those_of_peft_to_each_prompt_alone(out: Path, tiny_model_folder: Path) -> None:
    found, best = answers(out), best_of(out)
    assert found is not None
    assert found.systems == ("none", *(setting for setting, _ in best.values()))
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    lengths = {len(json.dumps(row.prompt)) for row in found.rows}
    assert len(lengths) > 1, "prompts of several lengths"
    said = set()
    for method, (setting, trial) in {"none": ("none", ""), **best}.items():
        folder = out / "trials" / trial / "adapter"
        model = AutoModelForCausalLM.from_pretrained(folder if method == "full" else tiny_model_folder)
        if method not in ("none", "full"):
            model = peft.PeftModel.from_pretrained(model, folder)
        for row in found.rows:
            assert row.answers[setting] == generated(model, tokenizer, list(row.prompt), found.max_new_tokens)
        said.add(tuple(row.answers[setting] for row in found.rows))
    assert len(said) > 3, "adapters change what is answered"


def test_rows_are_the_wins_and_losses_with_their_texts(out: Path, rows: dict[str, list[dict[str, str]]]) -> None:
    found, best = answers(out), best_of(out)
    assert found is not None
    (opened,) = [event for event in journal.read(out / "journal.jsonl") if event["event"] == "opened"]
    counts = np.array(json.loads((out / "examples.json").read_text())["test_tokens"])
    difference = (np.array(opened["sums"][next(iter(best.values()))[1]]) - opened["sums"]["none"]) / counts
    by_hand = sorted(range(len(counts)), key=lambda i: difference[i])
    assert [row.example for row in found.rows] == [*by_hand[:3], *by_hand[-1:-3:-1]]
    for row in found.rows:
        assert [*row.prompt, {"role": "assistant", "content": row.reference}] == rows[str(row.id)]
        assert row.source == "sums"
        for setting, trial in {"none": "none", **dict(best.values())}.items():
            expected = opened["sums"][trial][row.example] / counts[row.example]
            assert row.losses[setting] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("count", "expected"), [(0, []), (1, [2]), (2, [2, 1]), (3, [2, 0, 1]), (4, [2, 0, 1, 3]), (9, [2, 0, 1, 3])]
)
def test_half_are_wins_and_half_are_losses(count: int, expected: list[int]) -> None:
    assert wins_and_losses(np.array([-1.0, 0.5, -2.0, 0.1]), count) == expected


def test_a_worker_of_several_answers_the_same(
    out: Path, study: Path, cli: CommandLine, tmp_path: Path
) -> None:
    cli("run", study, "--workers", 2, "-o", tmp_path / "two").ok()
    ours, theirs = answers(tmp_path / "two"), answers(out)
    assert ours is not None
    assert theirs is not None
    assert ours.systems == theirs.systems
    assert [(row.example, row.id, row.prompt, row.answers) for row in ours.rows] == [
        (row.example, row.id, row.prompt, row.answers) for row in theirs.rows
    ]
    assert {m: (c.setting, c.trainable, c.data_tokens) for m, c in costs(tmp_path / "two").items()} == {
        m: (c.setting, c.trainable, c.data_tokens) for m, c in costs(out).items()
    }


def test_what_is_there_is_not_measured_again_and_what_is_missing_is(
    out: Path, study: Path, cli: CommandLine
) -> None:
    names = ("cost.json", "answers.json")
    before = [(out / name).read_bytes() for name in names]
    numbers = (out / "results.csv").read_bytes()
    said = cli("run", study).ok().out
    assert "measuring what each method costs" not in said
    assert [(out / name).read_bytes() for name in names] == before
    for name in names:
        (out / name).unlink()
    said = cli("run", study).ok().out
    assert "measuring what each method costs" in said
    assert "answers of the base and 5 finalists to 5 test prompts" in said
    assert (out / "answers.json").read_bytes() == before[1]
    assert (out / "results.csv").read_bytes() == numbers
