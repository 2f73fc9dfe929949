"""What the doctor sees of our own runs and studies, in any state; nothing is written.

RUN/: config.resolved.json, parameters.json, metrics.jsonl, status.json, record.json ──► Observations
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peft_study.config import TrainConfig, validate
from peft_study.doctor.diagnosis import Diagnosis, Problem, Said
from peft_study.doctor.observations import (
    FILE,
    DataCounts,
    Floats,
    LossCurve,
    Observations,
    ParameterCounts,
    UsedSettings,
    configured,
    from_json,
)
from peft_study.doctor.readers.adapter_files import read_adapter
from peft_study.doctor.rule import examine, together
from peft_study.errors import OutputError
from peft_study.report.status import state_of
from peft_study.report.study_reader import StudyRecord, read_study
from peft_study.search.trials import best_first
from peft_study.storage import metrics
from peft_study.storage.run_dir import RunFolder
from peft_study.storage.study_dir import owner

_BASE_LOSS = Said(
    "the run does not log the base's loss (logging.base_loss, not for full fine-tuning)",
    "训练没有记录基座损失（logging.base_loss；全参数微调时没有）",
)
_BEGUN = ("the run has begun", "该运行已经开始")
_UNIGRAM = Said("the run began before there were checkups", "该运行开始时还没有检查记录")


def observe_run(folder: Path, *, weights: bool = False) -> Observations:
    """Returns what is known of one of our runs, or of a trial: running, killed, diverged or finished.

    Args:
        folder: of the run.
        weights: the adapter's are read too, which loads torch.

    Raises:
        OutputError: where there is none, another version wrote it, or its files are damaged.
        ConfigError: where its settings cannot be used.
    """
    run = RunFolder(folder)
    run.refuse_other_version()
    values = run.read_if_there("config.resolved.json")
    if not isinstance(values, dict) or "method" not in values:
        raise OutputError("holds no run", where=str(folder), remedy="give the output folder of a run or study")
    config = validate(TrainConfig, values, where=str(folder / "config.resolved.json"))
    # a trial's record is its study's: STUDY/trials/NAME
    above = RunFolder(folder.parent.parent) if folder.resolve().parent.name == "trials" else None
    record = run.record() or (above.record() if above else None) or {}
    state, reason = state_of(run, owner(run))
    ended = state in ("finished", "diverged", "failed") or (run.status() or ("", None))[0] == "pruned"
    records = metrics.read(run.metrics)
    rows = record.get("data", {}).get("train_rows")
    passes = config.training.batch_size / rows if rows else None
    curve = _curve(records, reason if state == "diverged" else None, passes)
    reasons: dict[str, tuple[str, str]] = {"curve.unigram_loss": _UNIGRAM, "settings.seconds": _BEGUN}
    if curve is not None and curve.minus_base is None:
        reasons["curve.minus_base"] = _BASE_LOSS
    seen = Observations(
        stage="after" if ended else "during",
        steps_done=max((each["step"] for each in records), default=0),
        settings=_settings(config, record),
        parameters=_parameters(config, run.read_if_there("parameters.json")),
        data=_data(config, record),
        curve=curve,
        reasons=reasons,
    )
    if weights and (run.adapter / "adapter_model.safetensors").is_file():
        of_files = read_adapter(run.adapter)
        assert of_files.adapter is not None
        # the run knows its base; a folder that was copied to another machine is no fault
        adapter = dataclasses.replace(of_files.adapter, base_found=None)
        seen = dataclasses.replace(seen, adapter=adapter, reasons={**of_files.reasons, **reasons})
    kept = run.read_if_there(FILE) or (above.read_if_there(FILE) if above else None)
    return seen if kept is None else _with_checkup(seen, from_json(kept["observations"]))


def _with_checkup(seen: Observations, before: Observations) -> Observations:
    """Returns what a run's folder tells, with what its checkup saw of the data, and of settings that the rest lacks.

    Args:
        seen: of the folder.
        before: of doctor.json.
    """
    names = [field.name for field in dataclasses.fields(seen.settings)]
    lacking = {name: getattr(before.settings, name) for name in names if getattr(seen.settings, name) is None}
    curve = seen.curve
    if curve is not None and before.curve is not None and before.curve.unigram_loss is not None:
        curve = dataclasses.replace(curve, unigram_loss=before.curve.unigram_loss)
    data = None if before.data is None else dataclasses.replace(before.data, virtual_tokens=seen.settings.tokens)
    same_reasons = {name: why for name, why in before.reasons.items() if name.startswith("data.")}
    return dataclasses.replace(
        seen,
        settings=dataclasses.replace(seen.settings, **lacking),
        data=data or seen.data,
        curve=curve,
        reasons={**same_reasons, **seen.reasons},
    )


def _settings(config: TrainConfig, record: Mapping[str, Any]) -> UsedSettings:
    training, method = config.training, config.method
    rows = record.get("data", {}).get("train_rows")
    total = training.steps or (None if rows is None else training.epochs * math.ceil(rows / training.batch_size))
    dtype = record.get("base", {}).get("dtype")
    found = configured(method, training, steps=total, dtype=dtype)
    return dataclasses.replace(found, parameter_dtype=dtype) if method.method == "full" else found


def _parameters(config: TrainConfig, values: Mapping[str, Any] | None) -> ParameterCounts | None:
    if values is None or config.method.method == "none":
        return None
    total, trainable = values["total"], values["trainable"]
    if config.method.method == "full":
        return ParameterCounts(base=total, base_trainable=trainable, adapter=0, adapter_trainable=0, own_base=True)
    return ParameterCounts(base=total - trainable, base_trainable=0, adapter=trainable, adapter_trainable=trainable)


def _data(config: TrainConfig, record: Mapping[str, Any]) -> DataCounts | None:
    data = record.get("data")
    if data is None:
        return None
    return DataCounts(
        rows=data.get("train_rows"), held_out_rows=data.get("held_out_rows"), max_length=config.data.max_length
    )


def _curve(records: Sequence[Mapping[str, Any]], diverged: str | None, epochs_a_step: float | None) -> LossCurve | None:
    """Returns the curve; a loss that became NaN ends our runs before it is logged, so it is added here."""
    train = [each for each in records if each["event"] == "train"]
    held_out = [each for each in records if each["event"] == "held_out"]
    if not train and diverged is None:
        return None
    steps, loss = _column(train, "step"), _column(train, "loss")
    rate, norm, above = (_column(train, name) for name in ("learning_rate", "gradient_norm", "loss_minus_base"))
    if diverged is not None:
        told = re.search(r"at step (\d+)", diverged)
        step = float(told.group(1)) if told else (steps[-1] + 1 if len(steps) else 1.0)
        steps, (loss, rate, norm, above) = (
            np.append(steps, step),
            (np.append(a, np.nan) for a in (loss, rate, norm, above)),
        )
    first = held_out[0] if held_out else None
    start = first["loss"] if first is not None and first["step"] == 0 else None
    base = None
    if first is not None and first["loss"] is not None and first["minus_base"] is not None:
        base = first["loss"] - first["minus_base"]
    return LossCurve(
        steps=steps,
        loss=loss,
        rate=rate,
        gradient_norm=norm,
        epoch=None if epochs_a_step is None else steps * epochs_a_step,
        minus_base=above if np.isfinite(above).any() else None,
        held_out_steps=_column(held_out, "step") if held_out else None,
        held_out_loss=_column(held_out, "loss") if held_out else None,
        held_out_minus_base=_column(held_out, "minus_base") if held_out else None,
        held_out_low=_column(held_out, "minus_base_low") if held_out else None,
        held_out_high=_column(held_out, "minus_base_high") if held_out else None,
        base_loss=base,
        start_loss=start,
        skipped=sum(bool(each.get("skipped")) for each in train),
    )


def _column(records: Sequence[Mapping[str, Any]], name: str) -> Floats:
    """Returns a number of each record; null, which is no finite number, is NaN."""
    values = [each.get(name) for each in records]
    return np.array([math.nan if value is None else float(value) for value in values], dtype=np.float64)


def diagnose_study(folder: Path) -> Diagnosis:
    """Returns what is wrong with a study: with its finals and each method's best setting.

    That a search tries a bad rate, or a pruner stops a trial, is no fault: of all other trials only notes are made.

    Args:
        folder: of the study.

    Raises:
        OutputError, ConfigError: as `read_study`.
    """
    study = read_study(folder)
    chosen = _chosen(study)
    judged = {name: _of_trial(study, name) for name in chosen}
    rest = [t.name for t in study.state.trials.values() if t.name not in chosen and t.kind != "reference"]
    others = {name: _of_trial(study, name) for name in rest}
    whole = together(judged, about=f"{study.folder.path}: {len(chosen)} of {len(chosen) + len(rest)} trials judged")
    told = {problem.check for problem in whole.problems}
    notes = [
        _as_note(problem, len(rest))
        for problem in together(others, about="").problems
        if problem.level != "note" and problem.check not in told
    ]
    return dataclasses.replace(whole, problems=(*whole.problems, *notes))


def _chosen(study: StudyRecord) -> list[str]:
    """Returns the trials that a study stands for: finals, or a method's best setting; all where none has succeeded."""
    found = []
    for method in study.config.searched:
        finals = [trial.name for trial in study.state.of(method, "final")]
        searched = [t for t in study.state.of(method, "search") if t.status not in ("running", "interrupted")]
        best = best_first(searched)[:1] or searched
        found += finals or [trial.name for trial in best]
    return found


def _of_trial(study: StudyRecord, name: str) -> Diagnosis:
    return examine(observe_run(study.folder.trial(name).path), about=name)


def _as_note(problem: Problem, trials: int) -> Problem:
    count = len(problem.places)
    return dataclasses.replace(
        problem,
        level="note",
        cause=Said(
            f"of the {trials} other trials of the search, {count} show: {problem.cause.en}",
            f"其余 {trials} 个搜索试验中，有 {count} 个出现：{problem.cause.zh}",
        ),
        consequence=Said("the search is there to find such settings", "搜索本来就是为了找出这样的设置"),
        change=Said("nothing, unless it is most of them: then narrow the space", "不用改；如果占多数，就缩小搜索空间"),
        paste=None,
    )
