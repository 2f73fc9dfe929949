"""What a study measures at its end for the report: costs against PEFT and the disk, answers against PEFT's generate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import peft_study
from command_line import CommandLine, conversation
from peft_study import LoRA, PrefixTuning, PromptTuning, Study
from peft_study.errors import OutputError
from peft_study.evaluation.generation import put_on
from peft_study.report.answers import answers
from peft_study.report.costs import costs
from peft_study.storage import journal
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
        assert cost.adapter_bytes == (adapter / f"{weights}.safetensors").stat().st_size
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


def test_a_worker_of_several_answers_the_same(out: Path, study: Path, cli: CommandLine, tmp_path: Path) -> None:
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


def test_what_is_there_is_not_measured_again_and_what_is_missing_is(out: Path, study: Path, cli: CommandLine) -> None:
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


def test_a_kill_in_between_measures_what_is_missing(study: Path, out: Path, cli: CommandLine, tmp_path: Path) -> None:
    log, killed = tmp_path / "log", tmp_path / "killed"
    process = start(("run", study, "-o", killed), log)
    until((killed / "cost.json").exists, process)
    kill(process.pid)
    process.wait()
    assert not (killed / "answers.json").exists()
    cost = (killed / "cost.json").read_bytes()
    cli("run", study, "-o", killed).ok()
    assert (killed / "cost.json").read_bytes() == cost
    assert (killed / "answers.json").read_bytes() == (out / "answers.json").read_bytes()
    assert (killed / "results.json").read_bytes() == (out / "results.json").read_bytes()


def test_a_model_in_memory_answers_and_comes_back_bit_by_bit(
    tiny_model_folder: Path, rows: dict[str, list[dict[str, str]]], tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = [(name, id(module), dict(vars(module))) for name, module in model.named_modules()]
    data = {"train": [{"messages": turns} for turns in rows.values()], "held_out": 10, "test": 10}
    methods = ["full", LoRA(rank=2), PrefixTuning(tokens=3), PromptTuning(tokens=3)]
    settings: dict[str, Any] = {"trials": 1, "steps": 2, "finals": {"best": 1, "seeds": 1, "answers": 2}}
    Study(model, data, methods, output=tmp_path, **settings).run(verbose=False)
    found = answers(tmp_path)
    assert found is not None
    assert len(found.rows) == 2
    assert all(len(row.answers) == 5 for row in found.rows)
    assert set(costs(tmp_path)) == {"full", "lora", "prefix_tuning", "prompt_tuning"}
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert [(name, id(module), dict(vars(module))) for name, module in model.named_modules()] == modules


SMALL: dict[str, Any] = {
    "budget": {"trials": 1},
    "finals": {"best": 1, "seeds": 1, "answers": 1},
    "training": {"steps": 2, "batch_size": 2},
    "methods": {"lora": {"rank": 2, "learning_rate": 1e-2}, "prompt_tuning": {"tokens": 3, "learning_rate": 0.1}},
}


def test_a_changed_study_is_measured_anew_and_another_number_of_answers_is_no_change(
    cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path
) -> None:
    study, out = write_study(tmp_path, tiny_model_folder, tiny_data, **SMALL), tmp_path / "out"
    cli("run", study, "--set", "finals.answers=0").ok()
    assert not (out / "answers.json").exists()
    before = costs(out)
    cli("run", study).ok()
    assert (out / "answers.json").exists()
    assert costs(out) == before
    cli("run", study, "--continue", "--set", "methods.lora.rank=4").ok()
    wider, found = costs(out), answers(out)
    assert wider["lora"].setting == "lora-001" or wider["lora"] != before["lora"]
    assert wider["prompt_tuning"] != before["prompt_tuning"], "measured anew"
    assert found is not None
    assert set(found.systems) == {"none", *(cost.setting for cost in wider.values())}


def test_without_finals_the_best_of_the_search_is_measured(
    cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path
) -> None:
    changed = {**SMALL, "finals": {"best": 0}}
    cli("run", write_study(tmp_path, tiny_model_folder, tiny_data, **changed)).ok()
    found = costs(tmp_path / "out")
    assert {cost.setting for cost in found.values()} == {"lora-000", "prompt_tuning-000"}
    assert answers(tmp_path / "out") is None


def test_what_fails_is_a_warning_and_the_rest_is_there(
    cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, out = write_study(tmp_path, tiny_model_folder, tiny_data, **SMALL), tmp_path / "out"

    def refuse(adapter: Path, base: Any) -> Any:
        if "lora" in str(adapter):
            raise AttributeError("no such layer")
        return put_on(adapter, base)

    monkeypatch.setattr("peft_study.evaluation.generation.put_on", refuse)
    ran = cli("run", study).ok()
    found = answers(out)
    assert found is not None
    assert "lora-000 does not answer the test prompts: no such layer" in ran.out + ran.err
    assert [set(row.answers) for row in found.rows] == [{"none", "prompt_tuning-000"}]
    assert set(found.rows[0].losses) == {"none", "lora-000", "prompt_tuning-000"}
    (out / "answers.json").unlink()
    (out / "cost.json").unlink()

    def fail(*_: Any) -> Any:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr("peft_study.workers.worker.measure_costs", fail)
    monkeypatch.setattr("peft_study.workers.worker.answer_rows", fail)
    ran = cli("run", study).ok()
    assert (ran.out + ran.err).count("the device is gone") == 2
    assert costs(out) == {}
    assert (out / "results.csv").exists()


def test_damaged_files_are_an_error_and_missing_ones_are_not(tmp_path: Path) -> None:
    assert costs(tmp_path) == {}
    assert answers(tmp_path) is None
    for name, text in (("cost.json", '{"lora": {"setting": 1}}'), ("answers.json", '{"rows": [3]}')):
        for damage in (text, "{", "[1]"):
            (tmp_path / name).write_text(damage)
            with pytest.raises(OutputError, match=f"{name} is damaged"):
                costs(tmp_path) if name == "cost.json" else answers(tmp_path)
