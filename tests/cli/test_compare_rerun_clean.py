"""compare, rerun and clean on a small trained study, and on hand-made ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest

from command_line import CommandLine, listing, study_file
from hand_made import RATE, HandMade
from peft_study.training.interrupt import StopRequest
from peft_study.training.loop import Slots


def test_two_settings_of_the_search(cli: CommandLine, made: HandMade) -> None:
    made.trial("lora", 0.5, 0.45)
    folder = made.written()
    said = cli("compare", "lora-000", "lora-002", "-s", folder).ok().out
    assert "- on the dev part lora-000 is better than lora-002 by 0.050 [0.0" in said
    assert "one seed each (seed 0)" in said
    assert [line.split() for line in said.splitlines() if "learning_rate" in line] == [
        ["learning_rate", "0.001", "0.5"]
    ]
    turned = cli("compare", "lora-002", "lora-000", "-s", folder).ok().out
    assert "- on the dev part lora-000 is better than lora-002 by 0.050 [0.0" in turned
    assert "better than the untouched base by 0.500" in cli("compare", "lora-000", "none", "-s", folder).ok().out


def test_differences_within_noise_are_none(cli: CommandLine, tmp_path: Path) -> None:
    study = HandMade(tmp_path / "s", {"lora": RATE})
    study.trial("lora", 1e-3, 0.5, noise=0.3)
    study.trial("lora", 1e-2, 0.49, noise=0.3)
    said = cli("compare", "lora-000", "lora-001", "-s", study.written()).ok().out
    assert "- on the dev part lora-000 and lora-001 cannot be told apart (-0.010 [-" in said


def test_finalists_are_compared_over_their_seeds(cli: CommandLine, made: HandMade) -> None:
    made.chosen(lora=[0], prompt_tuning=[0])
    names = made.finals("lora", 0, [0.5, 0.6]) + made.finals("prompt_tuning", 0, [0.2, 0.3])
    made.concluded("lora")
    made.opened(**dict(zip(names, (0.4, 0.5, 0.1, 0.1), strict=True)))
    folder = made.written()
    said = cli("compare", "lora-000", "prompt_tuning-000", "-s", folder).ok().out
    (dev,) = (line for line in said.splitlines() if line.strip().startswith("dev loss"))
    assert "1.450" in dev
    assert "-0.300 [" in said
    assert "-0.350 [" in said, "test"
    assert "one seed" not in said
    (line,) = (line for line in said.splitlines() if line.strip().startswith("seeds"))
    assert line.split() == ["seeds", "2", "2"]
    single = cli("compare", "lora-000-seed-1", folder / "trials/prompt_tuning-000-seed-2").ok().out
    assert "one seed each, and not the same (seeds 1 and 2)" in single
    assert "-0.200 [" in single


def test_finals_beside_a_setting_that_has_none(cli: CommandLine, made: HandMade) -> None:
    made.trial("lora", 0.5, 0.45)
    made.chosen(lora=[0])
    made.finals("lora", 0, [0.5, 0.6])
    said = cli("compare", "lora-000", "lora-002", "-s", made.written()).ok().out
    assert "lora-000 was retrained with new seeds, lora-002 was not: the trials of the search are compared" in said
    assert "0.050 [" in said


def test_what_has_no_value_is_not_compared(cli: CommandLine, made: HandMade) -> None:
    made.chosen(lora=[0])
    made.finals("lora", 0, [0.5, None])
    made.asked("lora-002", "lora", "search", 2, None, {"learning_rate": 1.0})
    folder = made.written()

    def error(first: str, second: str) -> str:
        return cli("compare", first, second, "-s", folder).error()

    assert "lora-001 was pruned (at step 11 worse), so it has no final loss" in error("lora-001", "prompt_tuning-000")
    assert "prompt_tuning-001 diverged (the loss became nan at step 3), so" in error("none", "prompt_tuning-001")
    assert "lora-002 was interrupted, so it has no final loss" in error("lora-002", "none")
    assert "lora-000: 1 of its 2 seeds did not finish (lora-000-seed-2: the loss" in error("lora-000", "none")
    assert "both arguments name lora-000-seed-1" in error("lora-000-seed-1", "lora-000-seed-1")
    assert "has no trial 'lora-0'" in error("none", "lora-0")


# -- rerun


def test_a_trial_trained_again_comes_out_the_same(cli: CommandLine, copy: Path) -> None:
    before = listing(copy)
    ran = cli("rerun", "lora-001-seed-1", "-s", copy).ok()
    assert "lora-001-seed-1: the same: apart by " in ran.out
    found = json.loads((copy / "reruns/lora-001-seed-1/rerun.json").read_text())
    assert found["same"]
    _, then, now = found["curve"][-1]
    assert [step for step, _, _ in found["curve"]] == [9], "a final has no loss at step 0"
    assert now == pytest.approx(then, rel=1e-5)
    assert found["tolerance"] == pytest.approx(1e-5 * then)
    assert (copy / "reruns/lora-001-seed-1/adapter/adapter_model.safetensors").exists()
    assert not (copy / "reruns/lora-001-seed-1/checkpoints").exists()
    after = {name: size for name, size in listing(copy).items() if not name.startswith("reruns/")}
    assert after == before, "the study itself is left alone"
    cli("rerun", copy / "trials/lora-001-seed-1").ok()
    assert (copy / "reruns/lora-001-seed-1-2/rerun.json").exists()


def test_a_trial_that_comes_out_otherwise_is_said_to(cli: CommandLine, copy: Path) -> None:
    journal = copy / "journal.jsonl"
    events = [json.loads(line) for line in journal.read_text().splitlines()]
    for event in events:
        if event["event"] == "measured" and event["name"] == "prefix_tuning-000" and event["step"] == 9:
            event["sums"][0] += 0.01
        if event["event"] == "ended" and event["name"] == "prefix_tuning-001":
            event.update(status="diverged", reason="the loss became nan at step 3")
    journal.write_text("".join(json.dumps(event) + "\n" for event in events))
    ran = cli("rerun", "prefix_tuning-000", "-s", copy)
    assert ran.code == 1
    assert "prefix_tuning-000: NOT the same: apart by " in ran.out
    ran = cli("rerun", "prefix_tuning-001", "-s", copy)
    assert ran.code == 1
    assert "NOT the same: then diverged (the loss became nan at step 3), now finished" in ran.out


def test_a_pruned_trial_is_trained_up_to_where_it_was_stopped(cli: CommandLine, copy: Path) -> None:
    journal = copy / "journal.jsonl"
    events = [json.loads(line) for line in journal.read_text().splitlines()]
    kept = [e for e in events if not (e["event"] == "measured" and e["name"] == "lora-000" and e["step"] > 0)]
    metrics = (copy / "trials/lora-000/metrics.jsonl").read_text().splitlines()
    assert any('"step": 9' in line for line in metrics)
    for event in kept:
        if event["event"] == "ended" and event["name"] == "lora-000":
            event.update(status="pruned", reason="at step 3 worse")
    # what it had at step 3 is not written down, so it is found out first
    at = next(i for i, e in enumerate(kept) if e["event"] == "ended" and e["name"] == "lora-000")
    kept.insert(at, {"event": "measured", "name": "lora-000", "step": 3, "sums": [1.0] * 8})
    journal.write_text("".join(json.dumps(event) + "\n" for event in kept))
    ran = cli("rerun", "lora-000", "-s", copy)
    assert ran.code == 1
    found = json.loads((copy / "reruns/lora-000/rerun.json").read_text())
    assert found["now"] == ["pruned", "as in the study, at step 3 worse"]
    assert [step for step, _, _ in found["curve"]] == [0, 3]


def test_what_cannot_be_trained_again(
    cli: CommandLine, copy: Path, tiny_data: Path, tmp_path: Path, made: HandMade
) -> None:
    assert "nothing was trained" in cli("rerun", "none", "-s", copy).error()
    made.asked("lora-002", "lora", "search", 2, None, {"learning_rate": 1.0})
    folder = made.written("interrupted")
    assert "lora-002 has not ended" in cli("rerun", "lora-002", "-s", folder).error()
    data = tmp_path / "other.jsonl"
    data.write_text("".join(tiny_data.read_text().splitlines(keepends=True)[:-5]))
    config = copy / "config.resolved.json"
    values = json.loads(config.read_text())
    values["data"]["train"][0]["path"] = str(data)
    config.write_text(json.dumps(values))
    assert "since this run began, the training rows" in cli("rerun", "lora-000", "-s", copy).error()
    assert not (copy / "reruns").exists()


def test_a_rerun_that_is_stopped_says_so(cli: CommandLine, copy: Path) -> None:
    with patch.object(StopRequest, "asked", property(lambda _s: True, lambda _s, _v: None), create=True):
        ran = cli("rerun", "lora-000", "-s", copy)
    assert ran.code == 130
    assert "nothing is kept of a rerun that was stopped" in ran.err
    assert json.loads((copy / "reruns/lora-000/status.json").read_text())["status"] == "interrupted"


def test_other_versions_and_code_are_notes(cli: CommandLine, copy: Path) -> None:
    record = json.loads((copy / "record.json").read_text())
    record["packages"]["torch"] = "1.0"
    record["code"] = {"commit": "0123456789abcdef", "changed": False}
    (copy / "record.json").write_text(json.dumps(record))
    said = cli("rerun", "lora-000", "-s", copy).ok().out
    assert "torch was 1.0, is " in said
    assert "the code was at 0123456789ab, is at " in said


# -- clean


def test_clean_frees_what_is_spare_and_nothing_else(cli: CommandLine, copy: Path) -> None:
    before = listing(copy)
    dry = cli("clean", copy, "--dry-run").ok().out
    assert "nothing was deleted" in dry
    assert listing(copy) == before
    said = cli("clean", copy).ok().out
    assert said.splitlines()[:-1] == dry.splitlines()[:-1]
    gone = set(before) - set(listing(copy))
    assert gone
    assert all(name.startswith("checkpoints/") or "/tensorboard/" in name or "/adapter/" in name for name in gone), gone
    finals = json.loads((copy / "results.json").read_text())["finalists"]
    chosen = {f"{f['method']}-{f['number']:03d}" for f in finals}
    left = {path.parent.name for path in copy.glob("trials/*/adapter")}
    assert left == chosen | {f"{name}-seed-{seed}" for name in chosen for seed in (1, 2)}
    assert not list(copy.rglob("tensorboard"))
    assert cli("clean", copy).ok().out == "0 B freed\n"


def test_a_cleaned_study_is_still_finished(
    cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path, trained: Path
) -> None:
    """Without any checkpoint the same command would begin it again, and forget its journal."""
    copy = shutil.copytree(trained, tmp_path / "out")
    cli("clean", copy).ok()
    journal = (copy / "journal.jsonl").read_text()
    path = study_file(tmp_path, tiny_model_folder, tiny_data)
    with patch.object(Slots, "_enter", side_effect=AssertionError("something is trained")) as enter:
        enter.side_effect = lambda plans: [] if not plans else pytest.fail("something is trained")
        cli("run", path).ok()
    assert (copy / "journal.jsonl").read_text() == journal


def test_a_study_without_finals_keeps_each_methods_best(cli: CommandLine, made: HandMade) -> None:
    made.trial("lora", 0.5, 0.45)
    folder = made.written()
    for name in ("lora-000", "lora-002", "prompt_tuning-000"):
        adapter = made.folder.trial(name).adapter
        adapter.mkdir(parents=True)
        adapter.joinpath("adapter_model.safetensors").write_bytes(b"0" * 2_000_000)
    assert "2.0 MB freed" in cli("clean", folder).ok().out
    assert sorted(p.parent.name for p in folder.glob("trials/*/adapter")) == ["lora-000", "prompt_tuning-000"]


def test_an_unfinished_study_needs_force_and_keeps_its_adapters(cli: CommandLine, made: HandMade) -> None:
    folder = made.written("interrupted")
    for path in (made.folder.trial("lora-000").adapter, made.folder.checkpoints / "step_1"):
        path.mkdir(parents=True)
        path.joinpath("x.safetensors").write_bytes(b"0" * 1000)
    line = cli("clean", folder).error()
    assert "has not finished, and would lose the checkpoint it resumes from" in line
    assert "--force" in line
    assert (folder / "checkpoints/step_1").exists()
    cli("clean", folder, "--force").ok()
    assert not (folder / "checkpoints").exists()
    assert (folder / "trials/lora-000/adapter").exists()
