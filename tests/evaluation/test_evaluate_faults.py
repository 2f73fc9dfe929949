"""`peft-study evaluate` where something is wrong: input, files, a kill, a full disk, a model that has no room."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from command_line import CommandLine, largest_file
from evaluated import SUMS, rows_of, words
from peft_study import PromptTuning, finetune
from peft_study.evaluation.systems import short_names
from peft_study.storage.run_dir import RunFolder
from tiny_world import VOCABULARY


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


def test_answers_of_another_adapter_of_the_same_name_are_not_mixed_in(
    adapters: list[Path], tasks: list[Path], cli: CommandLine, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    cli("evaluate", adapters[0], *words(tasks[:1], out)).ok()
    other = tmp_path / "elsewhere" / "lora"
    shutil.copytree(adapters[1] / "adapter", other)
    assert "holds answers of another lora" in cli("evaluate", other, *words(tasks[:1], out)).error()


def test_a_metric_of_the_users_that_fails_is_one_line(
    adapters: list[Path], tasks: list[Path], cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_metric.py").write_text("def half(output, gold):\n    return 1 / (len(gold) - 1) > 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    task = json.loads(tasks[0].read_text()) | {"metric": "own_metric:half"}
    tasks[0].write_text(json.dumps(task))
    error = cli("evaluate", adapters[0], *words(tasks[:1], tmp_path / "out")).error()
    assert "metric own_metric:half failed on row s0" in error
    assert "division by zero" in error
    assert len((tmp_path / "out" / "sums.jsonl").read_text().splitlines()) == 2 * len(SUMS), "no answer is lost"


def test_a_line_separator_in_an_answer_is_no_end_of_a_row(
    adapters: list[Path], tasks: list[Path], cli: CommandLine, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    cli("evaluate", adapters[0], *words(tasks[:1], out)).ok()
    lines = [json.loads(line) for line in (out / "sums.jsonl").read_text().splitlines()]
    lines[0]["output"] = "first\u2028second\u0085" + "x" * 10_000
    (out / "sums.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    ran = cli("evaluate", adapters[0], *words(tasks[:1], out)).ok()
    assert "answers of" not in ran.out + ran.err
    assert len(rows_of(out, "sums")) == len(lines)


def test_bad_input_is_one_line(
    adapters: list[Path], tasks: list[Path], wide_model_folder: Path, cli: CommandLine, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert "no adapter is given" in cli("evaluate", *words(tasks, out)).error()
    assert "is given twice" in cli("evaluate", adapters[0], *words([tasks[0], tasks[0]], out)).error()
    assert "holds no" in cli("evaluate", tmp_path, *words(tasks, out)).error()
    shutil.copytree(adapters[0], half := tmp_path / "half")
    shutil.rmtree(half / "adapter")
    assert "holds no adapter" in cli("evaluate", half, *words(tasks, out)).error()
    shutil.copytree(adapters[0], cut := tmp_path / "cut")
    weights = cut / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    assert str(cut / "adapter") in cli("evaluate", cut, *words(tasks, out)).error()
    unfit = cli("evaluate", adapters[0], *words(tasks, out), "--base", wide_model_folder)
    assert unfit.code == 2
    assert "does not fit this base" in unfit.err.splitlines()[-1], "a line before it may say that the weights differ"
    assert not out.exists()
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


def test_adapters_of_one_base_in_two_precisions_are_not_mixed(
    adapters: list[Path], tasks: list[Path], cli: CommandLine, tmp_path: Path
) -> None:
    shutil.copytree(adapters[0] / "adapter", other := tmp_path / "other" / "adapter")
    note = json.loads((other / "peft_study.json").read_text())
    (other / "peft_study.json").write_text(json.dumps({**note, "base_quantization": "nf4"}))
    error = cli("evaluate", adapters[0], other, *words(tasks, tmp_path / "out")).error()
    assert "its quantization is nf4" in error
    cli("evaluate", adapters[0], *words(tasks[:1], tmp_path / "out")).ok()
    again = cli("evaluate", adapters[0], *words(tasks[:1], tmp_path / "out")[:-1], "bfloat16").error()
    assert "holds answers of base in float32, not bfloat16" in again


def test_files_that_are_damaged_are_one_line(
    adapters: list[Path], tasks: list[Path], cli: CommandLine, tmp_path: Path
) -> None:
    given = [adapters[0], *words(tasks[:1], out := tmp_path / "out")]
    assert "holds no answers" in cli("evaluate", "--rescore", *words(tasks[:1], out)).error()
    assert not out.exists()
    cli("evaluate", *given).ok()
    whole = rows_of(out, "sums")
    answers = out / "sums.jsonl"
    answers.write_bytes(answers.read_bytes().rstrip(b"\n"))  # a whole line without its end
    cli("evaluate", *given).ok()
    assert [row["output"] for row in rows_of(out, "sums")] == [row["output"] for row in whole]
    with answers.open("ab") as file:
        file.write(b'5\n{"system": "base", "id": "unknown"}\n\xff\xfe\n[]\n')
    (out / "scores.json").write_text("{")
    cli("evaluate", "--rescore", *words(tasks[:1], out)).ok()
    assert len(rows_of(out, "sums")) == len(whole)
    for text in ("", "5", "[]", '{"systems": 3}'):
        (out / "evaluation.json").write_text(text)
        assert "evaluation.json: is damaged" in cli("evaluate", *given).error()


def test_one_process_at_a_time_writes_to_a_folder(
    adapters: list[Path], tasks: list[Path], cli: CommandLine, tmp_path: Path
) -> None:
    with RunFolder(tmp_path / "out").locked():
        assert "is writing to it" in cli("evaluate", adapters[0], *words(tasks, tmp_path / "out")).error()


def test_texts_that_hold_nothing_are_counted_apart(adapters: list[Path], cli: CommandLine, tmp_path: Path) -> None:
    rows = [{"text": "a text of some words"}, {"text": "x"}, {"text": " another text of words"}, {"text": ""}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:3]))
    given = ["--tasks", f"text={tmp_path / 'rows.jsonl'}", "-o", tmp_path / "out"]
    out = cli("evaluate", adapters[0], *given).ok().out
    measured = [row["tokens"] for row in rows_of(tmp_path / "out", "text") if row["system"] == "base"]
    assert measured[1] == 0
    assert "on 2 rows, 95 % intervals; 1 have nothing to measure" in out
    (tmp_path / "rows.jsonl").write_text('{"q": "half a pair: \\ud83d", "id": "\\ud83d", "answer": "1"}\n')
    (tmp_path / "sums.yaml").write_text(json.dumps({"data": "rows.jsonl", "prompt": "{q}", "metric": "number"}))
    cli("evaluate", adapters[0], "--tasks", tmp_path / "sums.yaml", "-o", tmp_path / "half").ok()
    assert rows_of(tmp_path / "half", "sums")[0]["prompt"] == "half a pair: ?"


def test_where_a_models_positions_end_nothing_is_asked_of_it(
    tiny_model_folder: Path, tiny_data: Path, tasks: list[Path], cli: CommandLine, tmp_path: Path
) -> None:
    """GPT-2 has a table of positions: answers are shorter there, and what is too long cannot be judged."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=96)
    GPT2LMHeadModel(config).save_pretrained(base := tmp_path / "gpt2")
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(base)
    data = {"train": str(tiny_data), "max_length": 40}
    setting = PromptTuning(tokens=2, learning_rate=0.1)
    finetune(str(base), data, setting, steps=1, output=tmp_path / "run", verbose=False)
    long = {"id": "long", "q": "1+1 " * 40, "c": ["1", "2"], "answer": "B", "text": "a word " * 20}
    for name in ("sums", "choices"):
        with (tmp_path / f"{name}.jsonl").open("a") as file:
            file.write(json.dumps(long) + "\n")
    out = tmp_path / "out"
    cli("evaluate", tmp_path / "run", *words(tasks, out), "--tasks", f"text={tmp_path / 'choices.jsonl'}").error()
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "a word " * 60}) + "\n")
    cli("evaluate", tmp_path / "run", *words(tasks, out), "--tasks", f"text={tmp_path / 'texts.jsonl'}").ok()
    for name in ("sums", "choices"):
        assert [row["score"] for row in rows_of(out, name) if row["id"] == "long"] == [None, None]
        assert all(row["score"] is not None for row in rows_of(out, name) if row["id"] in ("s1", "c1"))
    assert {row["system"]: row["tokens"] for row in rows_of(out, "text")} == {"base": 95, "run": 93}


def test_studies_of_one_name_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft_study.cli import evaluate as command
    from peft_study.report import study_reader, study_result

    class Found:
        def __init__(self, path: Path) -> None:
            self.folder = path

        def adapters(self) -> dict[str, Path]:
            return {"lora-000": self.folder / "adapter"}

    monkeypatch.setattr(study_reader, "is_study", lambda _path: True)
    monkeypatch.setattr(study_result, "open_study", Found)
    found, _ = command._folders([tmp_path / "st", tmp_path / "a" / "st", tmp_path / "b" / "st"])
    assert len(found) == 3
    assert all(name.endswith("st/lora-000") for name in found)


def test_a_full_disk_loses_no_answer(adapters: list[Path], tasks: list[Path], cli: CommandLine, tmp_path: Path) -> None:
    whole, full = tmp_path / "whole", tmp_path / "full"
    cli("evaluate", adapters[0], *words(tasks[:1], whole)).ok()
    with largest_file(900):
        error = cli("evaluate", adapters[0], *words(tasks[:1], full)).error()
    assert "writing failed" in error
    assert "goes on from the answers that are there" in error
    kept = (full / "sums.jsonl").read_text().count("\n")
    assert 0 < kept < 2 * len(SUMS)
    ran = cli("evaluate", adapters[0], *words(tasks[:1], full)).ok()
    assert f"sums: {2 * len(SUMS) - kept} answers" in ran.out + ran.err
    same = "system", "id", "output", "score"
    found = [[tuple(row[name] for name in same) for row in rows_of(out, "sums")] for out in (whole, full)]
    assert sorted(map(repr, found[0])) == sorted(map(repr, found[1]))
