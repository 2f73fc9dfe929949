"""`peft-study evaluate`: scores that can be traced, and the losses of choices against a plain loop over PEFT."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from command_line import CommandLine, study_file
from evaluated import CHOICES, METHODS, SUMS, rows_of, words
from peft_study import finetune, open_study
from peft_study.methods.peft_files import encoding
from peft_study.model.load import load_base


def plain_loss(folder: Path | None, base: Path, ids: list[int]) -> float:
    """Returns the summed loss of all tokens of a text but the first, with PEFT."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = model if folder is None else peft.PeftModel.from_pretrained(model, folder)
    tokens = torch.tensor([ids])
    with torch.no_grad():
        logits = model.eval()(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[0, -len(ids) :]
    return -float(logits[:-1].log_softmax(-1).gather(1, tokens[0, 1:, None]).sum())


def plain_losses(
    folder: Path | None, base: Path, template: Path, question: str | list[dict[str, str]], choices: list[str]
) -> list[float]:
    """Returns the summed loss of each choice after the prompt: one at a time, with PEFT."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = template.read_text()
    turns = [{"role": "user", "content": question}] if isinstance(question, str) else question
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
    assert "of 5 answers, 95 % intervals; 1 could not be judged" in ran.out
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


def test_losses_of_answers_and_of_texts_are_pefts(
    adapters: list[Path], tiny_model_folder: Path, cli: CommandLine, tmp_path: Path
) -> None:
    rows = [
        {"id": f"r{n}", "instruction": f"{n}+{n}?", "output": f"It is {2 * n}.", "text": f"Text {n} " * 4, "source": s}
        for n, s in enumerate("aabbb")
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    words = ["-o", out, "--dtype", "float32", "--tasks", f"loss={tmp_path / 'rows.jsonl'}"]
    ran = cli("evaluate", *adapters, *words, "--tasks", f"text={tmp_path / 'rows.jsonl'}").ok()
    assert [line.strip() for line in ran.out.splitlines() if "source" in line] == ["loss, source a", "loss, source b"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    end = tokenizer.apply_chat_template([{"role": "assistant", "content": "x"}], tokenize=False).partition("x")[2]
    template = Path(str(encoding(adapters[0] / "adapter")["template"]))
    for name, folder in (("base", None), *((path.name, path / "adapter") for path in adapters)):
        losses = {row["id"]: row for row in rows_of(out, "loss") if row["system"] == name}
        texts = {row["id"]: row for row in rows_of(out, "text") if row["system"] == name}
        for row in rows[:2]:
            answer = row["output"] + end.rstrip("\n")
            expected = plain_losses(folder, tiny_model_folder, template, row["instruction"], [answer])
            assert losses[row["id"]]["loss"] == pytest.approx(expected[0], rel=1e-4)
            ids = tokenizer(row["text"]).input_ids
            assert texts[row["id"]]["tokens"] == len(ids) - 1
            assert texts[row["id"]]["loss"] == pytest.approx(plain_loss(folder, tiny_model_folder, ids), rel=1e-4)
    scores = {s["system"]: s for s in json.loads((out / "scores.json").read_text())["scores"] if s["task"] == "text"}
    of = {name: [row for row in rows_of(out, "text") if row["system"] == name] for name in ("base", "lora")}
    forgotten = sum(own["loss"] - base["loss"] for own, base in zip(of["lora"], of["base"], strict=True))
    value, low, high = scores["lora"]["minus_base"]
    assert value == pytest.approx(forgotten / sum(row["tokens"] for row in of["base"]), rel=1e-4)
    assert low <= value <= high
    assert high - low < scores["lora"]["value"][2] - scores["lora"]["value"][1], "what is hard for both is taken away"


def test_the_base_has_worked_examples_and_a_system_prompt_as_baselines(
    adapters: list[Path], tasks: list[Path], tiny_model_folder: Path, cli: CommandLine, tmp_path: Path
) -> None:
    worked = [{"q": "5+1", "c": ["5", "6"], "answer": "B"}, {"q": "6+1", "c": ["7", "6"], "answer": "A"}]
    (tmp_path / "worked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in worked))
    baselines = ["--examples", f"choices={tmp_path / 'worked.jsonl'}", "--shots", "2", "--system-prompt", "Be right."]
    cli("evaluate", adapters[0], *words(tasks, tmp_path / "out"), *baselines).ok()
    assert {row["system"] for row in rows_of(tmp_path / "out", "sums")} == {"base", "base, system prompt", "lora"}
    rows = {row["system"]: row["losses"] for row in rows_of(tmp_path / "out", "choices") if row["id"] == "c1"}
    template = Path(str(encoding(adapters[0] / "adapter")["template"]))
    asked = [{"role": "user", "content": CHOICES[1]["q"]}]
    shown = [
        turn
        for example in worked
        for turn in (
            {"role": "user", "content": example["q"]},
            {"role": "assistant", "content": example["c"]["AB".index(str(example["answer"]))]},
        )
    ]
    (tmp_path / "worked.jsonl").write_text("".join(json.dumps({**row, "answer": "A"}) + "\n" for row in worked))
    error = cli("evaluate", adapters[0], *words(tasks, tmp_path / "out"), *baselines).error()
    assert "holds an evaluation of other worked examples" in error
    for system, turns in (
        ("base, 2 examples", [*shown, *asked]),
        ("base, system prompt", [{"role": "system", "content": "Be right."}, *asked]),
    ):
        expected = plain_losses(None, tiny_model_folder, template, turns, CHOICES[1]["c"])
        assert rows[system] == pytest.approx(expected, rel=1e-4)


def test_a_study_is_evaluated_by_its_finals(
    adapters: list[Path], tasks: list[Path], tiny_model_folder: Path, tiny_data: Path, cli: CommandLine, tmp_path: Path
) -> None:
    cli("run", study_file(tmp_path, tiny_model_folder, tiny_data)).ok()
    cli("evaluate", tmp_path / "out", *(word for task in tasks for word in ("--tasks", task))).ok()
    study = open_study(tmp_path / "out")
    names = {final.name for final in study.finals}
    assert {row["system"] for row in rows_of(tmp_path / "out" / "evaluation", "sums")} == {"base", *names}
    found = study.evaluate([str(task) for task in tasks], verbose=False)
    frame = found.dataframe()
    assert set(frame["system"]) == {"base", *names}
    assert len(found.answers("choices")) == len(CHOICES) * 3
    sums = frame[(frame["task"] == "sums") & (frame["system"] == "base")].iloc[0]
    assert (sums["judged"], sums["unjudged"]) == (5, 1)
    with_others = cli("evaluate", tmp_path / "out", adapters[0], *words(tasks, tmp_path / "mixed"), "--limit", "2")
    assert "lora" in with_others.ok().out
    shutil.rmtree(study.finals[0].adapter_path)
    with pytest.warns(UserWarning, match=f"{study.finals[0].name} is left out"):
        assert set(study.adapters()) == names - {study.finals[0].name}


def test_a_study_without_finals_is_evaluated_by_the_best_trial_of_each_method(
    tasks: list[Path], tiny_model_folder: Path, tiny_data: Path, cli: CommandLine, tmp_path: Path
) -> None:
    file = study_file(tmp_path, tiny_model_folder, tiny_data)
    cli("run", file, "--set", "finals.best=0").ok()
    cli("evaluate", tmp_path / "out", *words(tasks[:1], tmp_path / "asked")).ok()
    trials = open_study(tmp_path / "out").trials_dataframe()
    best = trials.loc[trials.groupby("method")["dev"].idxmin()]
    best = best[best["method"] != "none"]
    expected = {f"{method}-{number:03}" for method, number in zip(best["method"], best["number"], strict=True)}
    assert {row["system"] for row in rows_of(tmp_path / "asked", "sums")} == {"base", *expected}


def test_a_model_trained_as_a_whole_stands_beside_adapters(
    adapters: list[Path], tasks: list[Path], tiny_model_folder: Path, tiny_data: Path, cli: CommandLine, tmp_path: Path
) -> None:
    trained = finetune({"name": str(tiny_model_folder), "dtype": "float32"}, str(tiny_data), "full", steps=3,
                       training={"learning_rate": 0.01}, output=tmp_path / "full", verbose=False)  # fmt: skip
    out = tmp_path / "out"
    cli("evaluate", adapters[0], tmp_path / "full", *words(tasks, out)).ok()
    template = Path(str(encoding(trained.adapter_path)["template"]))
    (row,) = [row for row in rows_of(out, "choices") if row["system"] == "full" and row["id"] == "c0"]
    expected = plain_losses(None, trained.adapter_path, template, CHOICES[0]["q"], CHOICES[0]["c"])
    assert row["losses"] == pytest.approx(expected, rel=1e-4)
    assert {row["system"] for row in rows_of(out, "sums")} == {"base", "lora", "full"}


def test_a_model_whose_rows_hold_one_sequence_answers_one_prompt_at_a_time(
    adapters: list[Path], tasks: list[Path], cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, alone = tmp_path / "packed", tmp_path / "alone"
    cli("evaluate", *adapters, *words(tasks, packed)).ok()

    def load(*given: Any, **how: Any) -> Any:
        base = load_base(*given, **how)
        base.proof = replace(base.proof, packs=False)
        return base

    monkeypatch.setattr("peft_study.evaluation.systems.load_base", load)
    monkeypatch.setattr("peft_study.evaluation.answering.decoder", None)
    cli("evaluate", *adapters, *words(tasks, alone)).ok()
    same = "system", "id", "output", "score", "tokens", "ended"
    found = [[{name: row[name] for name in same} for row in rows_of(out, "sums")] for out in (packed, alone)]
    assert sorted(map(repr, found[0])) == sorted(map(repr, found[1]))
    assert [row["score"] for row in rows_of(packed, "choices")] == [row["score"] for row in rows_of(alone, "choices")]


def test_shares_of_an_answer_have_a_mean(
    adapters: list[Path], tasks: list[Path], cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_shares.py").write_text("def share(output, gold, row):\n    return int(row['id'][1:]) / 4\n")
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SUMS[:5]))
    task = json.loads(tasks[0].read_text()) | {"metric": "own_shares:share"}
    tasks[0].write_text(json.dumps(task))
    ran = cli("evaluate", adapters[0], *words(tasks[:1], tmp_path / "out")).ok()
    assert "mean score, %" in ran.out
    assert "50.0 [" in ran.out
    assert sorted({row["score"] for row in rows_of(tmp_path / "out", "sums")}) == [0, 0.25, 0.5, 0.75, 1]


def test_what_answers_cost_is_kept(adapters: list[Path], tasks: list[Path], cli: CommandLine, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cli("evaluate", *adapters, *words(tasks, out)).ok()
    costs = json.loads((out / "scores.json").read_text())["costs"]
    assert list(costs) == ["base", *METHODS]
    config = json.loads((Path(json.loads((adapters[0] / "adapter" / "adapter_config.json").read_text())
                              ["base_model_name_or_path"]) / "config.json").read_text())  # fmt: skip
    of_a_token = (
        2
        * 4
        * config["num_hidden_layers"]
        * config["num_key_value_heads"]
        * (config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    )  # keys and values of float32
    tokens = json.loads((adapters[1] / "adapter" / "adapter_config.json").read_text())["num_virtual_tokens"]
    assert costs["base"]["cache_bytes"] == of_a_token * costs["base"]["prompt_tokens"] == costs["lora"]["cache_bytes"]
    assert costs["prefix_tuning"]["cache_bytes"] - costs["base"]["cache_bytes"] == of_a_token * tokens
    assert all(cost["first_token_seconds"] > 0 and cost["tokens_per_second"] > 0 for cost in costs.values())
    before = (out / "scores.json").read_bytes()
    cli("evaluate", *adapters, *words(tasks, out)).ok()
    assert (out / "scores.json").read_bytes() == before, "measured once"


def test_outputs_are_judged_again_without_a_model(
    adapters: list[Path], tasks: list[Path], cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    cli("evaluate", adapters[0], *words(tasks, out)).ok()
    before = rows_of(out, "sums")
    (tmp_path / "sums.jsonl").write_text(
        "".join(json.dumps({**row, "answer": str(len(row["id"]) * 0 + 7)}) + "\n" for row in SUMS)
    )
    monkeypatch.setattr("peft_study.evaluation.systems.load_base", None)
    cli("evaluate", "--rescore", *words(tasks, out)).ok()
    after = rows_of(out, "sums")
    assert [row["output"] for row in after] == [row["output"] for row in before]
    assert all(row["score"] is not None for row in after), "all rows have an answer now"


def test_an_adapter_of_plain_peft_needs_no_study(
    tasks: list[Path], tiny_model_folder: Path, cli: CommandLine, tmp_path: Path
) -> None:
    """Layers by a pattern, as Unsloth names them; the folder has nothing of this program."""
    torch.manual_seed(0)
    pattern = r"(?:.*?(?:layers).*?(?:self_attn|mlp).*?(?:q_proj|v_proj|down_proj).*?)"
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=pattern, init_lora_weights=False, task_type="CAUSAL_LM")
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_folder), config).save_pretrained(tmp_path / "x")
    cli("evaluate", tmp_path / "x", *words(tasks[1:], tmp_path / "out")).ok()
    template = tmp_path / "template.jinja"
    template.write_text(AutoTokenizer.from_pretrained(tiny_model_folder).chat_template)
    (row,) = [r for r in rows_of(tmp_path / "out", "choices") if r["system"] == "x" and r["id"] == "c0"]
    expected = plain_losses(tmp_path / "x", tiny_model_folder, template, CHOICES[0]["q"], CHOICES[0]["c"])
    assert row["losses"] == pytest.approx(expected, rel=1e-4)
