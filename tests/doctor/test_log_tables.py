"""Logs as JSON lines, JSON arrays and CSV: what is read from which column, and what is put right."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_study.doctor.observations import LossCurve
from peft_study.doctor.readers.columns import meaning
from peft_study.doctor.readers.logs import read_log
from peft_study.errors import UserError


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def curve(path: Path, **options: Any) -> LossCurve:
    found = read_log(path, **options).curve
    assert found is not None
    return found


def said(path: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        read_log(path, **options)
    text = str(caught.value)
    assert "\n" not in text
    assert path.name in text or "--map" in text
    return text


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("loss", "loss"),
        ("train/loss", "loss"),
        ("Training Loss", "loss"),
        ("loss/train", "loss"),
        ("train_loss_step", "loss"),
        ("metrics.train.loss", "loss"),
        ("run-7 - train/loss", "loss"),
        ("run-7 - train/loss__MIN", None),
        ("train/train_loss", None),  # Trainer's mean over the whole run, as its trackers name it
        ("val_loss", "held_out_loss"),
        ("Validation Loss", "held_out_loss"),
        ("eval/loss", "held_out_loss"),
        ("held_out", "held_out_loss"),
        ("held_out/loss", "held_out_loss"),
        ("eval_code_loss", "source code"),
        ("val/loss_chat", "source chat"),
        ("held_out/loss_low", None),
        ("held_out/minus_base_low", "held_out_low"),
        ("valid accuracy", "accuracy"),
        ("mean_token_accuracy", None),
        ("eval_mean_token_accuracy", None),
        ("entropy", None),
        ("eval_runtime", None),
        ("lr-AdamW/pg1", "rate"),
        ("train/learning_rate", "rate"),
        ("lr_scheduler", None),
        ("gnorm", "gradient_norm"),
        ("train/global_step", "step"),
        ("_step", "step"),
        ("loss_scale", "loss_scale"),
        ("aux_loss", None),
    ],
)
def test_names_of_columns(name: str, what: str | None) -> None:
    found = meaning(name)
    assert (found and found[0]) == what


def test_json_lines_with_other_names(tmp_path: Path) -> None:
    rows: list[Any] = [
        {"_step": n, "metrics": {"train/loss": 3 - n / 10, "lr": 1e-3, "gn": 0.5}, "epoch": n / 5} for n in range(1, 11)
    ]
    rows.insert(5, {"_step": 5, "metrics": {"val/loss": 2.8}})
    found = curve(lines(tmp_path / "log.jsonl", rows))
    assert found.steps.tolist() == list(range(1, 11))
    assert found.loss == pytest.approx(3 - np.arange(1, 11) / 10)
    assert found.window == 1
    assert found.rate is not None
    assert set(found.rate) == {1e-3}
    assert found.gradient_norm is not None
    assert found.epoch is not None
    assert found.epoch[-1] == 2
    assert found.held_out_steps is not None
    assert found.held_out_loss is not None
    assert (found.held_out_steps.tolist(), found.held_out_loss.tolist()) == ([5], [2.8])
    assert "loss read from metrics.train/loss" in found.notes[0]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_csv(tmp_path: Path, separator: str) -> None:
    rows = ["iteration,train_loss,lr,val_loss".replace(",", separator)]
    rows += [separator.join(map(str, (n, 4 - n / 100, 1e-4, 3.5 if n == 20 else ""))) for n in range(10, 60, 10)]
    (tmp_path / "log.csv").write_text("\n".join(rows) + "\n")
    found = curve(tmp_path / "log.csv")
    assert found.steps.tolist() == [10, 20, 30, 40, 50]
    assert found.window == 10
    assert found.held_out_steps is not None
    assert found.held_out_steps.tolist() == [20]


def test_decimal_commas(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("step;loss\n1;2,5\n2;2,25\n")
    assert curve(tmp_path / "log.csv").loss.tolist() == [2.5, 2.25]


@pytest.mark.parametrize("form", ["array", "gzip", "utf-16", "bom", "columns", "history"])
def test_other_forms_of_the_same(tmp_path: Path, form: str) -> None:
    rows = [{"step": n, "loss": 1 / n} for n in range(1, 4)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path = tmp_path / "log.jsonl"
    match form:
        case "array":
            path.write_text(json.dumps(rows, indent=1))
        case "gzip":
            path.write_bytes(gzip.compress(text.encode()))
        case "utf-16":
            path.write_text(text, encoding="utf-16")
        case "bom":
            path.write_text(text, encoding="utf-8-sig")
        case "columns":
            path.write_text(json.dumps({"step": [1, 2, 3], "loss": [1, 1 / 2, 1 / 3]}))
        case "history":
            path.write_text(json.dumps({"config": {"a": 1}, "history": rows}, indent=2))
    found = curve(path)
    assert found.steps.tolist() == [1, 2, 3]
    assert found.loss.tolist() == [1, 1 / 2, 1 / 3]


def test_our_own_metrics(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"event": "held_out", "step": 0, "loss": 2.5, "loss_low": 2.4, "minus_base": 0.1, "minus_base_low": 0.0,
         "minus_base_high": 0.2},
        *({"event": "train", "step": n, "loss": 2.0, "reduced_loss": 9, "loss_minus_base": -n, "gradient_norm": 1.0,
           "learning_rate": 1e-3} for n in range(1, 5)),
        {"event": "held_out", "step": 4, "loss": 2.25, "minus_base": -0.15, "minus_base_low": -0.2},
    ]  # fmt: skip
    found = curve(lines(tmp_path / "metrics.jsonl", rows))
    assert found.loss.tolist() == [2, 2, 2, 2]
    assert found.minus_base is not None
    assert found.minus_base.tolist() == [-1, -2, -3, -4]
    assert found.held_out_loss is not None
    assert found.held_out_loss.tolist() == [2.5, 2.25]
    assert found.held_out_minus_base is not None
    assert found.held_out_minus_base.tolist() == [0.1, -0.15]
    assert found.held_out_low is not None
    assert found.held_out_low.tolist() == [0, -0.2]
    assert (found.start_loss, found.base_loss) == (2.5, 2.4)


def test_columns_that_are_given(tmp_path: Path) -> None:
    path = lines(tmp_path / "log.jsonl", [{"step": n, "loss": 1.0, "objective": 2.0, "eta": 0.1} for n in range(5)])
    found = curve(path, columns={"loss": "objective", "lr": "eta"})
    assert set(found.loss) == {2.0}
    assert found.rate is not None
    assert set(found.rate) == {0.1}
    assert "has no column 'objectiv' for loss; did you mean 'objective'?" in said(path, columns={"loss": "objectiv"})
    assert "did you mean 'loss'?" in said(path, columns={"los": "objective"})


def test_which_of_several_columns(tmp_path: Path) -> None:
    rows = [{"step": n, "ce_loss": 1.0, "train_loss": 2.0, "lr": 1e-3} for n in range(5)]
    found = curve(lines(tmp_path / "log.jsonl", rows))
    assert set(found.loss) == {2.0}
    assert "loss is read from train_loss, not from ce_loss" in found.notes
    # the surer name, where it is nearly always empty, loses
    rows = [{"step": n, "ce_loss": 1.0, **({"loss": 2.0} if n == 4 else {})} for n in range(5)]
    assert set(curve(lines(tmp_path / "log.jsonl", rows)).loss) == {1.0}


def test_numbers_as_text_and_what_is_none(tmp_path: Path) -> None:
    rows = [{"step": "1", "loss": "2.5"}, {"step": 2, "loss": "oops"}, {"step": 3, "loss": None},
            {"step": 4, "loss": True}, {"step": 5, "loss": 10**400}, {"step": 6, "loss": float("nan")},
            {"step": 7, "loss": 2.0}]  # fmt: skip
    found = curve(lines(tmp_path / "log.jsonl", rows))
    assert found.steps.tolist() == [1, 5, 6, 7]
    assert np.isfinite(found.loss).tolist() == [True, False, False, True]
    assert "1 values of loss are no numbers, as 'oops': they are left out" in found.notes
    assert "the loss is not a number at 2 of 4 points, first at step 5" in found.notes


def test_nan_of_an_empty_place_is_no_loss(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("step,loss,eval_loss\n1,2.0,nan\n2,1.9,nan\n2,nan,2.1\n3,nan,nan\n4,nan,\n")
    found = curve(tmp_path / "log.csv")
    assert found.steps.tolist() == [1, 2, 4]
    assert math.isnan(found.loss[-1])
    assert found.held_out_loss is not None
    assert found.held_out_loss.tolist() == [2.1]


def test_no_column_of_steps(tmp_path: Path) -> None:
    found = curve(lines(tmp_path / "log.jsonl", [{"loss": 2.0}, {"loss": 1.5}, {"val_loss": 1.8}, {"loss": 1.0}]))
    assert found.steps.tolist() == [1, 2, 3]
    assert found.held_out_steps is not None
    assert found.held_out_steps.tolist() == [2]
    assert "no column of steps: the rows with a loss are counted" in found.notes


def test_steps_counted_anew_in_each_epoch(tmp_path: Path) -> None:
    rows = [{"epoch": e, "step": n, "loss": 3 - e - n / 10} for e in range(3) for n in range(5)]
    found = curve(lines(tmp_path / "log.jsonl", rows))
    assert found.steps.tolist() == list(range(15))
    assert found.resumed == ()
    assert any("counted anew in each epoch" in note for note in found.notes)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is empty"),
        (b" \n \n", "is empty"),
        (b"\x89PNG\r\n\x1a\n\0\0\0", "is a picture, not a log"),
        (b"abc\0\0\0\1\2", "is a binary file, not a log"),
        (b"\x80\x04\x95abc", "a pickle, which is never loaded"),
        (b"PK\x03\x04abc", "a zip archive"),
        (b"\x1f\x8b\x08broken", "cannot be read"),
        (b"Some text.\nMore of it.\n", "holds no loss that can be told by its name (columns: Some text.)"),
        (b"1,2.5\n2,2.4\n", "has no line with the names of its columns"),
        (b"step,reward\n1,2\n", "columns: step, reward); name the column, as --map loss=COLUMN"),
        (b'{"a": 1}\n{"b": 2}\n', "columns: a, b"),
        (b'{"step": 1\n' * 30, "line 1: is no log of JSON lines"),
        (b"{" + b"x" * 100, "is no JSON"),
        (b'[{"step": 1,' + b"x" * 3_000_000, "entry 1: is no JSON"),
        (b'{"step": 1, "loss": 2}\n{"loss": "' + b"x" * 3_000_000 + b'"}\n', "line 2: has more than 1,048,576 letters"),
        (b"step,loss\n" + b"1" * 3_000_000, "line 2: has more than"),
        (b"[" * 100_000, "holds no loss"),
        (b"[1, 2, 3]", "holds no loss"),
        (b"{}", "holds no loss"),
        (b"step,loss\n", "holds no loss"),
        (b"Loading\n{'loss': 2.5, 'epoch': 0.1}\n", "is what a Trainer prints, not its log; give its trainer_state"),
    ],
)  # fmt: skip
def test_what_is_no_log(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / "some.log"
    path.write_bytes(content)
    assert text in said(path)


def test_a_row_that_is_still_written(tmp_path: Path) -> None:
    path = lines(tmp_path / "log.jsonl", [{"step": n, "loss": 1.0} for n in range(5)])
    path.write_text(path.read_text() + '{"step": 5, "lo')
    assert curve(path).steps.tolist() == [0, 1, 2, 3, 4]
    assert "the last line is cut off, as in a run that still writes: it is left out" in curve(path).notes
    (tmp_path / "log.csv").write_text("step,loss,lr\n1,2.0,1e-3\n2,1.9,1e-3\n3,1")
    assert curve(tmp_path / "log.csv").steps.tolist() == [1, 2]
    assert any("last line is cut off" in note for note in curve(tmp_path / "log.csv").notes)
    path = tmp_path / "log.json"
    path.write_text(json.dumps([{"step": n, "loss": 1.0} for n in range(5)])[:-15])
    assert curve(path).steps.tolist() == [0, 1, 2, 3]
    assert any("cut off" in note for note in curve(path).notes)


def test_lines_between_that_are_no_json(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 2}\nWARNING: slow\n{"step": 2, "loss": 1}\n\n{"step": 3, "loss": 1}\n')
    assert curve(path).steps.tolist() == [1, 2, 3]
    assert "1 lines are no JSON objects, first line 2: they are left out" in curve(path).notes


def test_the_column_of_steps_can_be_named(tmp_path: Path) -> None:
    table = tmp_path / "log.csv"
    table.write_text("k,step,loss\n" + "".join(f"{50 * n},0,{2 - n / 10}\n" for n in range(8)))
    assert curve(table, columns={"step": "k"}).steps.tolist() == [50 * n for n in range(8)]
    table.write_text("step,loss\n" + "".join(f"{50 * n},{2 - n / 10}\n" for n in range(8)))
    assert curve(table, columns={"step": "step"}).steps[-1] == 350


def test_llama_factorys_steps_and_steps_with_separators(tmp_path: Path) -> None:
    rows = [{"current_steps": 50 * n, "total_steps": 400, "loss": 2 - n / 10, "lr": 1e-4} for n in range(8)]
    assert curve(lines(tmp_path / "trainer_log.jsonl", rows)).steps[-1] == 350
    table = tmp_path / "log.csv"
    table.write_text("step;loss\n" + "".join(f"{step};1,5\n" for step in ("500", "1,000", "1,500", "12,000")))
    found = curve(table)
    assert found.steps.tolist() == [500, 1000, 1500, 12000]
    assert found.loss.tolist() == [1.5] * 4  # a decimal comma there


def test_the_loss_of_a_run_that_learns_from_rewards_is_not_judged(tmp_path: Path) -> None:
    rows = [{"step": n, "loss": n / 1000, "train/reward": n / 10} for n in range(40)]
    seen = read_log(lines(tmp_path / "log.jsonl", rows))
    assert seen.curve is None
    assert "rewards" in seen.reasons["curve"][0]
