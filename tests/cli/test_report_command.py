"""`peft-study report` on trained, hand-made, half-written and broken studies and runs."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from command_line import CommandLine, listing, study_file
from hand_made import NAN, RATE, HandMade
from peft_study.report import writing


def page_in(folder: Path) -> str:
    """Returns the page in a folder, without its data and scripts."""
    return (folder / "report.html").read_text(encoding="utf-8").split('<script type="application/json"')[0]


def test_run_writes_the_page_and_says_where(trained: Path, cli: CommandLine, copy: Path) -> None:
    assert "was killed" not in page_in(trained)
    assert "finished" in page_in(trained)
    assert '<span class="tag winner">winner</span>' in page_in(trained)
    (copy / "report.html").unlink()
    assert cli("report", copy).ok().out == f"report: {copy / 'report.html'}\n"
    assert "learning_curves" in page_in(copy)


def test_a_page_that_cannot_be_written_does_not_lose_the_study(
    cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path
) -> None:
    path = study_file(tmp_path, tiny_model_folder, tiny_data)
    with patch.object(writing, "write_page", side_effect=RuntimeError("a defect")):
        said = cli("run", path).ok()
    assert "WARNING: the report was not written (a defect)" in said.out + said.err
    assert not (tmp_path / "out/report.html").exists()
    assert "finished" in cli("status", tmp_path / "out").ok().out
    assert (tmp_path / "out/results.json").exists()


def test_every_format_has_every_trial(trained: Path, cli: CommandLine, tmp_path: Path) -> None:
    before = listing(trained)
    rows = list(csv.DictReader(io.StringIO(cli("report", trained, "--format", "csv").ok().out)))
    assert rows == list(csv.DictReader((trained / "results.csv").open()))
    values = json.loads(cli("report", trained, "--format", "json").ok().out)
    assert [row["name"] for row in values["trials"]] == [row["name"] for row in rows]
    assert (values["state"], values["study"]) == ("finished", str(trained))
    assert {finding["topic"] for finding in values["findings"]} >= {"base", "winner"}
    text = cli("report", trained, "--format", "md", "--lang", "zh").ok().out
    assert "## 结论" in text
    cells = [line.split("|")[1].strip().replace("\\", "") for line in text.splitlines() if line.startswith("|")]
    assert {row["name"] for row in rows} <= set(cells)
    assert cli("report", trained, "--format", "md", "-o", tmp_path / "new/r.md").ok().out.startswith("report: ")
    assert (tmp_path / "new/r.md").read_text(encoding="utf-8").startswith("# Study out")
    assert listing(trained) == before, "nothing was written into the study"


@pytest.mark.parametrize("form", ["svg", "png"])
def test_pictures_of_every_chart(trained: Path, cli: CommandLine, tmp_path: Path, form: str) -> None:
    cli("report", trained, "--format", form, "-o", tmp_path / "charts").ok()
    names = sorted(path.name for path in (tmp_path / "charts").iterdir())
    assert f"learning_curves.{form}" in names
    begins = {"svg": b"<svg", "png": b"\x89PNG"}[form]
    assert all(path.read_bytes().startswith(begins) for path in (tmp_path / "charts").iterdir())


def test_the_browser_is_opened_at_the_page(trained: Path, cli: CommandLine, tmp_path: Path) -> None:
    with patch("webbrowser.open") as opened:
        cli("report", trained, "--open", "-o", tmp_path / "a b.html").ok()
    opened.assert_called_once_with((tmp_path / "a b.html").as_uri())


@pytest.mark.parametrize(
    ("words", "missing"),
    [
        (["status"], ["torch", "altair", "jinja2", "pyarrow"]),
        (["show", "lora-000", "-s"], ["torch", "altair", "jinja2", "pyarrow"]),
        (["report"], ["torch", "transformers", "optuna"]),
    ],
)
def test_looking_at_a_study_loads_little(copy: Path, words: list[str], missing: list[str]) -> None:
    program = (
        f"import sys\nsys.argv = ['peft-study', *{words}, {str(copy)!r}]\nfrom peft_study.cli import main\n"
        f"try: main()\nexcept SystemExit as end: assert not end.code\n"
        f"print('LOADED', [name for name in {missing} if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ran.stdout.splitlines()[-1:] == ["LOADED []"], ran.stdout + ran.stderr


# -- mistakes are one line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--format", "pdf"], "--format: unknown 'pdf'"),
        (["--lang", "fr"], "--lang: unknown 'fr'; one of: en, zh"),
        (["--open", "--format", "md"], "--open: opens the page"),
    ],
)
def test_an_unknown_word_is_refused(trained: Path, cli: CommandLine, words: list[str], said: str) -> None:
    assert said in cli("report", trained, *words).error()


def test_a_folder_that_is_no_study_is_refused(cli: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no study" in cli("report", tmp_path / "empty").error()
    assert "there is no such folder" in cli("report", tmp_path / "nowhere").error()
    assert listing(tmp_path) == {}


def test_a_place_that_cannot_be_written_is_refused(trained: Path, cli: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cli("report", trained, "-o", tmp_path / "file/report.html").error()
    assert "has no chart" in cli("report", unstarted(tmp_path), "--format", "svg").error()


def test_a_damaged_journal_is_refused(made: HandMade, cli: CommandLine) -> None:
    folder = made.written()
    made.folder.journal.write_text('{"event": "ended"}\n')
    assert "line 1 is damaged" in cli("report", folder).error()


# -- studies of which little is there


def unstarted(tmp_path: Path) -> Path:
    """Returns a study whose process was killed before its first trial."""
    made = HandMade(tmp_path / "unstarted", {"lora": RATE})
    made.events.clear()
    folder = made.written(status="running")
    (folder / "examples.json").unlink()
    return folder


def test_a_study_without_trials_says_so(cli: CommandLine, tmp_path: Path) -> None:
    folder = unstarted(tmp_path)
    cli("report", folder).ok()
    text = page_in(folder)
    assert "Its process was killed" in text
    assert "No trial has ended yet." in text
    assert "peft-study run " in text, "how to resume it"
    assert "No trial has ended yet." in cli("report", folder, "--format", "md").ok().out
    assert json.loads(cli("report", folder, "--format", "json").ok().out)["trials"] == []


def test_a_study_in_its_middle_ranks_nothing(made: HandMade, cli: CommandLine) -> None:
    folder = made.written(status="interrupted", reason="stopped by hand")
    cli("report", folder).ok()
    text = page_in(folder)
    assert "It was interrupted" in text
    assert "(stopped by hand)" in text
    assert "not ranked: one seed, chosen among 2 settings" in text
    assert "dev loss, nats a token" in text
    assert "winner</span>" not in text


def test_a_study_of_failures_says_that_nothing_finished(cli: CommandLine, tmp_path: Path) -> None:
    made = HandMade(tmp_path / "s", {"lora": RATE, "prompt_tuning": RATE})
    for method in ("lora", "prompt_tuning"):
        made.trial(method, 1e-3, None)
        made.trial(method, 1e-2, 0.1, status="failed", reason="out of memory " * 1000)
    folder = made.written()
    cli("report", folder).ok()
    text = page_in(folder)
    assert text.count("no setting finished") == 2
    assert NAN in text
    assert len(text) < 200_000, "the reasons are shortened"
    assert cli("report", folder, "--lang", "zh").ok().out.endswith("report.zh.html\n")


def test_one_trial_is_a_study(cli: CommandLine, tmp_path: Path) -> None:
    made = HandMade(tmp_path / "s", {"lora": RATE})
    made.trial("lora", 1e-3, 0.5)
    cli("report", made.written()).ok()
    assert "chosen among 1 settings" not in page_in(tmp_path / "s")
    assert "one seed, the only setting" in page_in(tmp_path / "s")


def test_losses_that_are_no_numbers_do_not_reach_the_charts(cli: CommandLine, tmp_path: Path) -> None:
    made = HandMade(tmp_path / "s", {"lora": RATE}, finals={"best": 1, "seeds": 2})
    made.trial("lora", 1e-3, 0.5)
    name = made.trial("lora", 1e-2, 0.4)
    for event in made.events:
        if event["event"] == "measured" and event["name"] == name and event["step"] == 100:
            event["sums"] = [float("nan")] * len(event["sums"])
    folder = made.written()
    cli("report", folder).ok()
    data = (folder / "report.html").read_text(encoding="utf-8").split('id="data">')[1].split("</script>")[0]
    json.loads(data, parse_constant=lambda word: pytest.fail(word))
    json.loads(cli("report", folder, "--format", "json").ok().out, parse_constant=lambda word: pytest.fail(word))


# -- several studies


def with_record(made: HandMade, **digests: str) -> Path:
    folder = made.written()
    (folder / "record.json").write_text(json.dumps({"data": digests}))
    return folder


def two(tmp_path: Path) -> tuple[HandMade, HandMade]:
    """Returns two studies, the second of which is 0.2 nats a token better in lora, and 0.1 in prompt tuning."""
    found = []
    for name, more in (("one", 0.0), ("two", 0.1)):
        made = HandMade(tmp_path / name, {"lora": RATE, "prompt_tuning": RATE}, finals={"best": 1, "seeds": 2})
        made.trial("lora", 1e-3, 0.5)
        made.trial("prompt_tuning", 1e-3, 0.2)
        made.chosen(lora=[0], prompt_tuning=[0])
        made.finals("lora", 0, [0.5 + 2 * more] * 2)
        made.finals("prompt_tuning", 0, [0.2 + more] * 2)
        made.concluded("lora")
        found.append(made)
    return found[0], found[1]


def test_two_studies_on_the_same_rows_have_paired_differences(cli: CommandLine, tmp_path: Path) -> None:
    folders = [with_record(made, held_out_digest="same", test_digest=made.folder.path.name) for made in two(tmp_path)]
    cli("report", *folders, "-o", tmp_path / "both.html").ok()
    text = (tmp_path / "both.html").read_text(encoding="utf-8")
    assert "one minus two, on the same 64 dev rows" in text
    rows = re.findall(r'<tr><th scope="row">(\w+)</th><td>(\S+) .*?</td><td>(.*?)</td><td>(.*?)</td>', text)
    assert [row[0] for row in rows] == ["lora", "prompt_tuning"]
    assert [float(row[1]) for row in rows] == pytest.approx([0.2, 0.1])
    assert {row[2:] for row in rows} == {("told apart", "two")}
    values = json.loads(cli("report", *folders, "--format", "json").ok().out)
    assert [round(each["value"], 6) for each in values["pairs"][0]["differences"]] == [0.2, 0.1]
    lines = cli("report", *folders, "--format", "csv").ok().out.splitlines()
    assert lines[0].startswith("study,name,")
    assert {line.split(",")[0] for line in lines[1:]} == {"one", "two"}


@pytest.mark.parametrize(
    ("digests", "why"),
    [
        (("a", "b"), "their records do not name the same held-out rows"),
        ((None, "b"), "does not name its held-out rows"),
    ],
)
def test_studies_on_other_rows_are_not_subtracted(
    cli: CommandLine, tmp_path: Path, digests: tuple[str | None, str], why: str
) -> None:
    folders = []
    for made, digest in zip(two(tmp_path), digests, strict=True):
        folders.append(with_record(made, **({} if digest is None else {"held_out_digest": digest})))
    text = cli("report", *folders, "--format", "md").ok().out
    assert why in text
    assert "| lora |" not in text.split("# Study")[0]


# -- a single run


def test_a_run_has_a_page(cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        json.dumps(
            {
                "model": {"name": str(tiny_model_folder)},
                "data": {"train": str(tiny_data), "held_out": 8},
                "method": {"method": "lora"},
                "training": {"steps": 4, "batch_size": 2},
                "output": str(tmp_path / "run"),
            }
        )
    )
    said = cli("finetune", file).ok()
    assert f"as a page: {tmp_path / 'run/report.html'}" in said.out + said.err
    text = page_in(tmp_path / "run")
    assert "Fine-tuning run" in text
    assert "held-out loss, nats a token" in text
    assert "data-chart=" in text
    assert f"peft-study chat {tmp_path / 'run/adapter'}" in text
    rows = cli("report", tmp_path / "run", "--format", "csv").ok().out.splitlines()
    assert rows[0].startswith("step,loss,")
    assert rows[-1].startswith("4,")
    assert "is a single run" in cli("report", tmp_path / "run", tmp_path / "run").error()
    shutil.rmtree(tmp_path / "run/adapter")
    (tmp_path / "run/metrics.jsonl").unlink()
    cli("report", tmp_path / "run", "--lang", "zh").ok()
    assert "尚无测量结果" in (tmp_path / "run/report.zh.html").read_text(encoding="utf-8")
