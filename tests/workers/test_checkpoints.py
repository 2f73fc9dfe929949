"""Checkpoints of several workers: at a folder or a URL, and one trial of a cut alone, in another engine."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny_world as tw
from peft_study.config import (
    FullConfig,
    LoraConfig,
    MethodConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    TrainingConfig,
)
from peft_study.engine import checkpoint
from peft_study.engine.engine import Engine
from peft_study.engine.trial import Trial
from peft_study.errors import OutputError
from peft_study.methods import create
from peft_study.model.load import Base
from peft_study.workers.checkpoints import WorkerCheckpoints


def trial_of(base: Base, name: str, config: MethodConfig, **changed: Any) -> Trial:
    values = {"learning_rate": 1e-3, "steps": 9, "batch_size": 3, "schedule": "cosine", "weight_decay": 0.1}
    examples = tw.examples([9, 14, 11, 8, 20, 13, 10])
    return Trial(name, create(config, base, tw.material(), 0), TrainingConfig(**(values | changed)), examples)


def losses_of(engine: Engine, trial: Trial) -> list[float]:
    found = []
    while not trial.finished:
        found += [e.report.loss for e in engine.step() if e.report is not None and e.trial is trial]
    return found


@pytest.mark.parametrize(
    "config",
    [LoraConfig(rank=4, dropout=0.2), PrefixTuningConfig(tokens=4, init="text"), PromptTuningConfig(tokens=4)],
    ids=lambda config: config.method,
)
def test_one_trial_of_a_cut_goes_on_among_others(config: MethodConfig, tmp_path: Path) -> None:
    alone = trial_of(base := tw.base("llama"), "t", config)
    engine = Engine(base, row_tokens=30)
    engine.admit(alone)
    expected = losses_of(engine, alone)

    engine = Engine(base := tw.base("llama"), row_tokens=30)
    first, neighbour = trial_of(base, "t", config), trial_of(base, "n", LoraConfig(rank=2), batch_size=5)
    engine.admit(neighbour)
    engine.admit(first)
    early = []
    # between two rows of a batch: gradients and loss sums of its first examples are in the cut, too
    while first.step < 4 or not first.progress().sums:
        early += [e.report.loss for e in engine.step() if e.report is not None and e.trial is first]
    checkpoint.save(engine, tmp_path, 4, "mine")

    engine = Engine(base := tw.base("llama"), row_tokens=64)
    others = [trial_of(base, name, PrefixTuningConfig(tokens=2, init="text"), batch_size=4) for name in "ab"]
    for other in others:
        engine.admit(other)
    engine.step()
    engine.evict(others[0])
    second = trial_of(base, "t", config)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert dict(zip(found.trials, found.steps, strict=True)) == {"n": neighbour.step, "t": 4}
    checkpoint.load_one(engine, found, second)
    assert second.step == 4
    assert engine.row_tokens == 64
    assert early + losses_of(engine, second) == pytest.approx(expected, rel=2e-4)


def test_a_trial_of_all_weights_goes_on_elsewhere(tmp_path: Path) -> None:
    whole = trial_of(base := tw.base("llama"), "t", FullConfig())
    engine = Engine(base, row_tokens=30)
    engine.admit(whole)
    expected = losses_of(engine, whole)
    engine = Engine(base := tw.base("llama"), row_tokens=30)
    engine.admit(first := trial_of(base, "t", FullConfig()))
    while first.step < 4:
        engine.step()
    checkpoint.save(engine, tmp_path, 4, "mine")
    engine = Engine(base := tw.base("llama"), row_tokens=30)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    checkpoint.load_one(engine, found, second := trial_of(base, "t", FullConfig()))
    assert losses_of(engine, second) == pytest.approx(expected[4:], rel=1e-5)


def test_a_damaged_file_leaves_the_trial_as_it_was(tmp_path: Path) -> None:
    engine = Engine(base := tw.base("llama"), row_tokens=30)
    engine.admit(trial_of(base, "t", LoraConfig(rank=4)))
    engine.step()
    found = checkpoint.read(checkpoint.save(engine, tmp_path, 1, "mine"))
    assert found is not None
    (file,) = found.folder.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:-9] + b"123456789")
    engine = Engine(base := tw.base("llama"), row_tokens=30)
    trial = trial_of(base, "t", LoraConfig(rank=4))
    before = {name: p.detach().clone() for name, p in trial.parameters.items()}
    with pytest.raises(OutputError, match="damaged"):
        checkpoint.load_one(engine, found, trial)
    assert not engine.trials
    assert all(torch.equal(p, before[name]) for name, p in trial.parameters.items())
    shutil.rmtree(found.folder)
    with pytest.raises(OutputError, match="damaged"):
        checkpoint.load_one(engine, found, trial)


def written(folder: Path, trials: dict[str, int], identity: str = "mine") -> Path:
    """Writes what looks like a checkpoint."""
    folder.mkdir(parents=True)
    entries = [{"name": name, "step": step} for name, step in trials.items()]
    values = {"version": 2, "step": 3, "identity": identity, "trials": entries, "decided": {"seconds": 2.0}}
    (folder / "slot-0.safetensors").write_bytes(b"tensors")
    (folder / checkpoint.MANIFEST).write_text(json.dumps(values))
    return folder


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"file://{tmp_path}/away" if request.param == "file" else f"memory://{tmp_path.name}"


def test_a_cut_sent_to_a_url_is_found_and_fetched(url: str, tmp_path: Path) -> None:
    here, there = (WorkerCheckpoints(tmp_path / name, url, "study", "mine") for name in ("here", "there"))
    assert here.find() == []
    for number, step in enumerate((4, 7)):
        here.send("worker-0", written(tmp_path / f"cut-{number}", {"a": step, "b": 1}), number)
    (found,) = there.find()
    assert (found.trials, found.steps) == (("a", "b"), (7, 1))
    fetched = there.fetch(found)
    assert (fetched.folder / "slot-0.safetensors").read_bytes() == b"tensors"
    assert checkpoint.read(fetched.folder) is not None
    assert WorkerCheckpoints(tmp_path / "there", url, "study", "of other settings").find() == []
    assert WorkerCheckpoints(tmp_path / "there", url, "another", "mine").find() == []
    there.close()
    assert not fetched.folder.exists()


def test_half_a_cut_is_none(url: str, tmp_path: Path) -> None:
    cuts = WorkerCheckpoints(tmp_path / "here", url, "study", "mine")
    cuts.send("worker-0", written(tmp_path / "whole", {"a": 4}), 0)
    half = written(tmp_path / "half", {"a": 9})
    (half / checkpoint.MANIFEST).unlink()  # the sender dies before it comes to the manifest
    cuts.send("worker-1", half, 0)
    assert [cut.steps for cut in cuts.find()] == [(4,)]


def test_cuts_that_no_trial_needs_are_swept(url: str, tmp_path: Path) -> None:
    cuts = WorkerCheckpoints(tmp_path / "here", url, "study", "mine")
    for name, trials in (("worker-0", {"a": 4}), ("worker-1", {"b": 2})):
        cuts.send(name, written(tmp_path / name, trials), 0)
    written(tmp_path / "here" / "worker-2" / "step_3", {"c": 1})
    cuts.sweep(cut for cut in cuts.find() if "b" in cut.trials)
    assert [cut.trials for cut in cuts.find()] == [("b",)]


def test_the_word_of_another_start_is_not_enough(url: str, tmp_path: Path) -> None:
    for one, other in ((url, url), (None, None)):
        cuts = WorkerCheckpoints(tmp_path / "here", one, "study", "mine")
        assert not cuts.sees_token("now")
        cuts.leave_token("before")
        assert not cuts.sees_token("now")
        cuts.leave_token("now")
        assert WorkerCheckpoints(tmp_path / "here", other, "study", "mine").sees_token("now")
        assert not WorkerCheckpoints(tmp_path / "elsewhere", None, "study", "mine").sees_token("now")
