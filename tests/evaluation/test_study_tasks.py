"""A study that names tasks: base and finals are asked them at its end, and its page shows the answers."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from command_line import CommandLine, study_file
from peft_study import open_study
from peft_study.evaluation.scores import Score
from peft_study.report import page_tasks
from peft_study.report.page_words import Words
from peft_study.report.pages import page_of
from peft_study.report.view import view_of
from peft_study.statistics import Estimate

CHOICES = [
    {"id": f"c{n}", "q": f"{n}+1", "c": [str(n), str(n + 1), "a word"], "answer": "ABC"[n % 3]} for n in range(9)
]


@pytest.fixture
def file(tmp_path: Path, tiny_model_folder: Path, tiny_data: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHOICES))
    (tmp_path / "picks.yaml").write_text(
        json.dumps({"data": "rows.jsonl", "prompt": "{q}", "metric": "choice", "choices": "c"})
    )
    path = study_file(tmp_path, tiny_model_folder, tiny_data)
    return changed(path, evaluation={"tasks": str(tmp_path / "picks.yaml")})


def changed(path: Path, **sections: Any) -> Path:
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **sections}))
    return path


def test_base_and_finals_are_asked_at_the_end(file: Path, cli: CommandLine, tmp_path: Path) -> None:
    assert "of 9 answers, 95 % intervals" in cli("run", file).ok().out
    study = open_study(tmp_path / "out")
    table = pq.read_table(tmp_path / "out" / "evaluation" / "picks.parquet").to_pylist()
    assert {row["system"] for row in table} == {"base", *(final.name for final in study.finals)}
    direct = study.evaluate(str(tmp_path / "picks.yaml"), output=tmp_path / "again", verbose=False)
    again = direct.answers("picks").to_dict("records")
    losses = [{(row["system"], row["id"]): list(row["losses"]) for row in rows} for rows in (table, again)]
    assert losses[0].keys() == losses[1].keys()
    for key, own in losses[0].items():
        assert own == pytest.approx(losses[1][key], abs=1e-3), "in the study's session as from its folder"
    before = (tmp_path / "out" / "evaluation" / "picks.jsonl").read_bytes()
    cli("run", file).ok()
    assert (tmp_path / "out" / "evaluation" / "picks.jsonl").read_bytes() == before
    for lang, word in (("en", "Tasks"), ("zh", "任务")):
        page = unescape(page_of([view_of(tmp_path / "out")], lang))
        assert f'<section id="tasks"><h2>{word}</h2>' in page
        for name in ("picks", *(final.name for final in study.finals)):
            assert name in page.split('<section id="tasks">')[1].split("</section>")[0]


def test_a_study_that_is_killed_while_it_asks_goes_on_there(file: Path, cli: CommandLine, tmp_path: Path) -> None:
    dies = (
        "import os, signal\n"
        "from peft_study.evaluation import evaluate\n"
        "whole = evaluate._with_progress\n"
        "def cut(rows, *given):\n"
        "    for number, row in enumerate(whole(rows, *given)):\n"
        "        if number == 5:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "        yield row\n"
        "evaluate._with_progress = cut\n"
        "from peft_study.cli import main\n"
        "main()\n"
    )
    ran = subprocess.run([sys.executable, "-c", dies, "run", str(file)], capture_output=True, text=True, check=False)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    answers = tmp_path / "out" / "evaluation" / "picks.jsonl"
    kept = answers.read_bytes()
    assert kept.count(b"\n") == 5
    trained = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "trials").rglob("*.safetensors")}
    cli("run", file).ok()
    assert answers.read_bytes().startswith(kept), "no question is asked twice"
    again = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "trials").rglob("*.safetensors")}
    assert again == trained, "nothing is trained again"
    assert (
        len(open_study(tmp_path / "out").evaluate(str(tmp_path / "picks.yaml"), verbose=False).answers("picks")) == 27
    )


def test_the_page_shows_what_was_won_and_lost(file: Path, cli: CommandLine, tmp_path: Path) -> None:
    cli("run", file).ok()
    path = tmp_path / "out" / "evaluation" / "picks.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    best = open_study(tmp_path / "out").finals[0].name
    for row in rows:  # the best adapter knows all but the first question, the base the first alone
        right = (row["id"] == "c0") == (row["system"] == "base") if row["system"] in ("base", best) else False
        place = "ABC".index(next(c["answer"] for c in CHOICES if c["id"] == row["id"]))
        row["losses"] = [float(n != (place if right else (place + 1) % 3)) for n in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cli("evaluate", "--rescore", tmp_path / "out", "--tasks", tmp_path / "picks.yaml").ok()
    section = unescape(page_of([view_of(tmp_path / "out")])).split('<section id="tasks">')[1].split("</section>")[0]
    won, lost = f"{best} is right, the base is wrong: c1", f"the base is right, {best} is wrong: c0"
    assert won in section
    assert lost in section
    assert section.index(won) < section.index(lost)
    (score,) = [
        s
        for s in json.loads((tmp_path / "out" / "evaluation" / "scores.json").read_text())["scores"]
        if s["system"] == best
    ]
    assert score["value"][0] == pytest.approx(8 / 9)
    assert score["minus_base"][0] == pytest.approx(7 / 9)
    assert score["group"] == 1


def test_the_page_shows_what_a_metric_that_gives_shares_has_won(tmp_path: Path) -> None:
    rows = [
        {"system": system, "id": f"q{n}", "prompt": "?", "gold": "1", "output": "1", "score": score}
        for n, scores in enumerate([(0.0, 1.0, 0.25), (1.0, 0.0, None), (0.5, 0.0, 1.0)])
        for system, score in zip(("base", "lora", "prompt"), scores, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "own.parquet")
    scores = [Score("own", name, None, "accuracy", None, right=1, judged=3, unjudged=0) for name in ("lora", "prompt")]
    scores.append(Score("own", "base", None, "accuracy", None, right=1, judged=3, unjudged=0))
    shown = page_tasks._examples(tmp_path, scores, {"lora": 0, "prompt": 1}, Words("en"))
    assert [example.title for example in shown] == [
        "lora is right, the base is wrong: q0",
        "the base is right, lora is wrong: q1",
    ]
    assert [answer.loss for answer in shown[0].answers] == ["right", "25%", "wrong"]


def test_a_study_cuts_no_text_of_a_task_to_the_length_of_its_training(
    file: Path, cli: CommandLine, tmp_path: Path
) -> None:
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": "a word " * 60}) + "\n")
    task = f"text={tmp_path / 'texts.jsonl'}"
    cli("run", changed(file, evaluation={"tasks": [task]})).ok()
    study = open_study(tmp_path / "out")
    table = pq.read_table(tmp_path / "out" / "evaluation" / "text.parquet").to_pylist()
    again = study.evaluate(task, output=tmp_path / "again", verbose=False).answers("text").to_dict("records")
    assert [row["tokens"] for row in table] == [row["tokens"] for row in again]
    assert min(row["tokens"] for row in table) > 64


def test_what_is_wrong_with_a_task_is_said_before_anything_is_trained(
    file: Path, cli: CommandLine, tmp_path: Path
) -> None:
    changed(file, evaluation={"tasks": ["gsm8k=gone.jsonl"]})
    assert "gone.jsonl: no such file" in cli("run", file).error()
    assert not (tmp_path / "out").exists()
    changed(file, evaluation={"tasks": []})
    assert "evaluation.tasks" in cli("run", file).error()
    rows = [{**row, "answer": "a third"} for row in CHOICES]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changed(file, evaluation={"tasks": [str(tmp_path / "picks.yaml")]})
    assert "no row's answer is one of its choices: the first has 'a third'" in cli("run", file).error()
    changed(file, evaluation=None, finals={"task": "lm_eval:mmlu"})
    assert "a task of lm-eval may have several scores" in cli("run", file).error()


def test_tasks_that_changed_leave_a_finished_study_finished(file: Path, cli: CommandLine, tmp_path: Path) -> None:
    cli("run", file).ok()
    out = tmp_path / "out"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({**row, "q": "other"}) + "\n" for row in CHOICES))
    ran = cli("run", file).ok()
    assert "holds an evaluation of other tasks" in ran.out + ran.err
    assert json.loads((out / "status.json").read_text())["status"] == "finished"
    before = (out / "evaluation" / "picks.jsonl").read_bytes()
    values = yaml.safe_load(file.read_text())
    values["methods"]["lora"]["learning_rate"] = [1e-3, 1e-2, 2e-2]
    changed(file, methods=values["methods"])
    cli("run", file, "--continue").ok()
    assert (out / "evaluation-before-1" / "picks.jsonl").read_bytes() == before
    assert (out / "evaluation" / "picks.jsonl").read_bytes() != before


def test_a_damaged_table_costs_the_page_its_examples_alone(file: Path, cli: CommandLine, tmp_path: Path) -> None:
    cli("run", file).ok()
    (tmp_path / "out" / "evaluation" / "picks.parquet").write_bytes(b"damaged")
    assert '<section id="tasks">' in page_of([view_of(tmp_path / "out")])


def test_a_task_that_chooses_has_right_answers(file: Path, cli: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({**row, "answer": None}) + "\n" for row in CHOICES))
    changed(file, finals={"best": 1, "seeds": 2, "task": str(tmp_path / "picks.yaml")}, evaluation=None)
    assert "finals.task: no row of task picks has a right answer" in cli("run", file, "--dry-run").error()


def test_a_task_may_choose_the_winner(file: Path, cli: CommandLine, tmp_path: Path) -> None:
    """Its dev part is asked of every seed before the test part is opened; the finding and the page say so."""
    changed(file, finals={"best": 2, "seeds": 2, "task": str(tmp_path / "picks.yaml")}, evaluation=None)
    cli("run", file).ok()
    out = tmp_path / "out"
    events = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds.index("concluded") < kinds.index("chosen") < kinds.index("opened")
    table = pq.read_table(out / "evaluation-dev" / "picks.parquet").to_pylist()
    right: dict[str, list[bool]] = {}
    for row in table:
        right.setdefault(row["system"], []).append(row["score"])
    study, by_setting = open_study(out), mean_of(right)
    assert {final.name for final in study.finals} == set(by_setting)
    assert study.best is not None
    best = max(by_setting, key=lambda name: (by_setting[name], -loss_of(study, name)))
    assert study.best.name == best
    assert "winner by mean score on picks" in study.findings
    assert "on picks" in unescape(page_of([view_of(out)]))
    assert not (out / "evaluation").exists()


def mean_of(right: dict[str, list[bool]]) -> dict[str, float]:
    """Returns the mean share of right answers of each setting, from those of its seeds."""
    seeds: dict[str, list[float]] = {}
    for trial, scores in right.items():
        if trial != "base":
            seeds.setdefault(trial.split("-seed")[0], []).append(sum(scores) / len(scores))
    return {setting: sum(values) / len(values) for setting, values in seeds.items()}


def loss_of(study: Any, name: str) -> float:
    (final,) = [final for final in study.finals if final.name == name]
    return float(final.dev.value)


@pytest.mark.parametrize(("task", "unit"), [("lm_eval:wikitext", "nats a word or byte"), ("losses", "nats a token")])
def test_a_loss_is_said_over_what_it_is_counted(task: str, unit: str) -> None:
    score = Score(task, "base", None, "loss", Estimate(2.5, 2.0, 3.0), right=3, judged=3, unjudged=0)
    assert unit in page_tasks._table([score], {}, Words("en"), ()).note
