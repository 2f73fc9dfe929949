"""Contract 4: a cut of the whole engine, continued, gives the same bits as never interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

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
from peft_study.engine.processes import ProcessGroup
from peft_study.engine.trial import Trial
from peft_study.errors import OutputError
from peft_study.methods import create
from peft_study.model.load import Base

CONFIGS: dict[str, MethodConfig] = {
    "lora with dropout": LoraConfig(rank=4, dropout=0.2),
    "prefix": PrefixTuningConfig(tokens=4, init="text"),
    "prefix, projected": PrefixTuningConfig(tokens=4, init="text", projection=True),
    "prompt": PromptTuningConfig(tokens=4, init="vocab"),
    "full": FullConfig(),
}


def trial_of(base: Base, config: MethodConfig, *, seed: int = 0, **changed: Any) -> Trial:
    values = {"learning_rate": 1e-3, "steps": 9, "batch_size": 3, "schedule": "cosine", "weight_decay": 0.1}
    training = TrainingConfig(**(values | changed))
    examples = tw.examples([9, 14, 11, 8, 20, 13, 10])
    return Trial("t", create(config, base, tw.material(), seed), training, examples)


def engine_of(trial: Trial, base: Base) -> Engine:
    engine = Engine(base, row_tokens=30)
    engine.admit(trial)
    return engine


def run(engine: Engine, trial: Trial, until: int) -> list[float]:
    losses = []
    while trial.step < until:
        losses += [event.report.loss for event in engine.step() if event.report]
    return losses


def values(trial: Trial) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trial.parameters.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_continued_run_is_bit_equal(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    whole = trial_of(base := tw.base("llama", dtype=dtype), CONFIGS[name])
    losses = run(engine_of(whole, base), whole, 9)

    first = trial_of(base := tw.base("llama", dtype=dtype), CONFIGS[name])
    engine = engine_of(first, base)
    early = run(engine, first, 4)
    checkpoint.save(engine, tmp_path, 4, "mine")

    # a fresh process: nothing of the first trial is left, and another initialisation must not matter
    second = trial_of(base := tw.base("llama", dtype=dtype), CONFIGS[name], seed=8)
    engine = Engine(base, row_tokens=64)
    (found,) = checkpoint.find(tmp_path)
    checkpoint.load(engine, found, {"t": second})
    assert second.step == 4
    assert engine.row_tokens == 30
    late = run(engine, second, 9)
    assert early + late == losses
    assert second.tokens == whole.tokens
    for parameter, tensor in values(second).items():
        assert torch.equal(tensor, values(whole)[parameter]), parameter


@pytest.mark.parametrize(("saved", "loaded"), [(1, 2), (2, 1), (2, 2)])
def test_processes_that_share_a_batch_start_it_again(saved: int, loaded: int, tmp_path: Path) -> None:
    """Each has a part of its gradients, and only one writes."""
    first = trial_of(base := tw.base("llama"), CONFIGS["prompt"])
    engine = engine_of(first, base)
    run(engine, first, 2)
    while not first.progress().sums:
        engine.step()
    engine.processes = ProcessGroup(count=saved)
    checkpoint.save(engine, tmp_path, 2, "mine")
    second = trial_of(base := tw.base("llama"), CONFIGS["prompt"])
    (found,) = checkpoint.find(tmp_path)
    checkpoint.load(Engine(base, processes=ProcessGroup(count=loaded)), found, {"t": second})
    assert (second.step, second.progress().sums) == (first.step, {})
    assert all(parameter.grad is None for parameter in second.parameters.values())


COMPANY: dict[str, tuple[MethodConfig, dict[str, Any]]] = {
    "a": (LoraConfig(rank=4, dropout=0.2), {"batch_size": 5}),
    "b": (PrefixTuningConfig(tokens=4, init="text"), {"batch_size": 2, "data_seed": 1}),
    "c": (PromptTuningConfig(tokens=4, init="vocab"), {"batch_size": 3, "data_seed": 2, "steps": 4}),
    "d": (LoraConfig(rank=2, target_modules=("q_proj",)), {"batch_size": 7, "seed": 5}),
}


def company(base: Base) -> dict[str, Trial]:
    made = {}
    for name, (config, changed) in COMPANY.items():
        made[name] = trial_of(base, config, **changed)
        made[name].name = name
    return made


def drive(engine: Engine, late: list[Trial], rows: int | None = None) -> list[tuple[str, int, float]]:
    """Runs to the end, or for some rows; trials leave when finished, and those in `late` take their slots."""
    told = []
    while engine.trials and rows != 0:
        for event in engine.step():
            assert event.report is not None
            told.append((event.trial.name, event.report.step, event.report.loss))
            if event.trial.finished:
                engine.evict(event.trial)
                if late:
                    engine.admit(late.pop(0))
        rows = None if rows is None else rows - 1
    return told


@pytest.mark.parametrize("rows", [1, 2, 5, 9, 17, 26])
def test_all_slots_with_unfinished_batches_are_one_cut(rows: int, tmp_path: Path) -> None:
    """Rows of 40 tokens cut every batch; what was summed of it, and whose turn it is, must survive."""
    whole = company(base := tw.base("llama"))
    engine = Engine(base, row_tokens=40, slots=3)
    for name in "abc":
        engine.admit(whole[name])
    told = drive(engine, [whole["d"]])

    first = company(base := tw.base("llama"))
    engine = Engine(base, row_tokens=40, slots=3)
    for name in "abc":
        engine.admit(first[name])
    waiting = [first["d"]]
    early = drive(engine, waiting, rows)
    inside = [trial for trial, _ in engine.places.values() if trial.progress().sums]
    assert inside, "no batch was cut: the test tests nothing"
    checkpoint.save(engine, tmp_path, rows, "mine", {"waiting": [t.name for t in waiting]})

    second = company(base := tw.base("llama"))
    engine = Engine(base, slots=3)
    (found,) = checkpoint.find(tmp_path)
    checkpoint.load(engine, found, {name: second[name] for name in found.trials})
    assert early + drive(engine, [second[name] for name in found.decided["waiting"]]) == told
    for name, trial in whole.items():
        for parameter, tensor in values(trial).items():
            if trial.step == second[name].step:  # else it had ended before the cut
                assert torch.equal(tensor, values(second[name])[parameter]), (name, parameter)


def saved(folder: Path, step: int = 2) -> tuple[Engine, Trial, checkpoint.Checkpoint]:
    base = tw.base("llama")
    trial = trial_of(base, LoraConfig(rank=2))
    engine = engine_of(trial, base)
    run(engine, trial, step)
    checkpoint.save(engine, folder, step, "mine")
    return engine, trial, checkpoint.find(folder)[-1]


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "missing"])
def test_a_damaged_checkpoint_is_refused_and_the_trial_untouched(damage: str, tmp_path: Path) -> None:
    _, trial, found = saved(tmp_path)
    path = found.folder / "slot-0.safetensors"
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[-3] ^= 1
    elif damage == "truncate":
        content = content[: len(content) // 2]
    elif damage == "empty":
        content = bytearray()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content)
    before, engine = values(trial), Engine(tw.base("llama"))
    with pytest.raises(OutputError, match=r"damaged.*resume from an earlier one"):
        checkpoint.load(engine, found, {"t": trial})
    assert all(torch.equal(before[name], p) for name, p in values(trial).items())
    assert engine.trials == ()


@pytest.mark.parametrize("manifest", ['{"step": 2', "", "[]", "{}", '{"step": 2}', '{"version": 1, "step": 2}'])
def test_a_folder_without_a_whole_manifest_is_no_checkpoint(manifest: str, tmp_path: Path) -> None:
    *_, found = saved(tmp_path)
    (found.folder / "checkpoint.json").write_text(manifest)
    assert checkpoint.read(found.folder) is None
    assert checkpoint.find(tmp_path) == []
    (found.folder / "checkpoint.json").unlink()
    assert checkpoint.find(tmp_path) == []


def test_another_settings_checkpoint_is_refused_by_parameter(tmp_path: Path) -> None:
    *_, found = saved(tmp_path)
    other = trial_of(base := tw.base("llama"), LoraConfig(rank=3))
    before = values(other)
    with pytest.raises(OutputError, match=r"does not fit at model\.layers\.0\.self_attn\.q_proj\.lora_A"):
        checkpoint.load(Engine(base), found, {"t": other})
    assert all(torch.equal(before[name], p) for name, p in values(other).items())


def fake(folder: Path, step: int) -> None:
    target = folder / f"step_{step}"
    target.mkdir(parents=True)
    (target / "checkpoint.json").write_text(
        json.dumps({"version": 2, "step": step, "identity": "mine", "trials": [], "decided": {}})
    )


def test_checkpoints_are_ordered_by_number(tmp_path: Path) -> None:
    for step in (1000, 900, 50):
        fake(tmp_path, step)
    assert [found.step for found in checkpoint.find(tmp_path)] == [50, 900, 1000]


@pytest.mark.parametrize(
    ("keep", "left"), [(-1, [50, 900, 1000]), (0, []), (1, [1000]), (2, [900, 1000]), (5, [50, 900, 1000])]
)
def test_the_newest_are_kept(keep: int, left: list[int], tmp_path: Path) -> None:
    for step in (1000, 900, 50):
        fake(tmp_path, step)
    checkpoint.prune(tmp_path, keep)
    assert [found.step for found in checkpoint.find(tmp_path)] == left


def test_saving_twice_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    engine, *_ = saved(tmp_path)
    checkpoint.save(engine, tmp_path, 2, "again")
    (found,) = checkpoint.find(tmp_path)
    assert (found.step, found.identity) == (2, "again")
    assert [path.name for path in tmp_path.iterdir()] == ["step_2"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / ".step-abcdef").mkdir()
    (tmp_path / ".step-abcdef" / "slot-0.safetensors").write_bytes(b"half")
    assert len(checkpoint.find(tmp_path)) == 1
    checkpoint.prune(tmp_path, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["step_2"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_full_disk_is_one_error_and_leaves_nothing(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, *_ = saved(tmp_path)

    def full(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OutputError, match="No space left on device"):
        checkpoint.save(engine, tmp_path, 3, "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["step_2"]


def test_a_resumed_loss_scale_doubles_when_it_would_have(tmp_path: Path) -> None:
    base = tw.base("llama")
    first, second = trial_of(base, LoraConfig(rank=2)), trial_of(base, LoraConfig(rank=2))
    first.step, first.good_steps, first.loss_scale = 4, 999, 512.0
    checkpoint.save(engine_of(first, base), tmp_path, 4, "mine")
    checkpoint.load(Engine(base), checkpoint.find(tmp_path)[0], {"t": second})
    assert (second.step, second.good_steps, second.loss_scale) == (4, 999, 512.0)
