"""The files ``recommended.yaml`` and ``recommended-METHOD.yaml``: a study's best setting as one longer run.

Rate, batch, warm-up and schedule stay as they were found; the steps become one pass over all the data, at most
`LONGER` times the study's. Over that ratio, from 300 to 3,000 rows, the rate that was best in the short run was seldom
the best in the long one, and lost at most `LOST` against it (docs/findings.md, studies/sample).
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from peft_study.config import StudyConfig, TrialSettings
from peft_study.report.findings import Finding
from peft_study.report.results import Finalist, Results
from peft_study.search.trials import StudyState
from peft_study.storage.files import atomic_writer

LONGER = 10
"""Times the steps of the study, at most."""
LOST = 0.04
"""Nats that keeping the rate lost in `LONGER` times the steps: the most of three methods, six pairs of seeds each."""
_ALWAYS = ("learning_rate", "steps", "batch_size", "schedule", "warmup_ratio", "weight_decay")
"""Settings of the training that the file names even where they are the defaults."""
_TOPICS = ("base", "final", "recommendation", "range", "edge", "never_learned", "diverged", "cost", "limits")
"""Findings that the file has as comments: those of its method, and of the study."""


@dataclass(frozen=True, slots=True)
class Recommended:
    """A run that a study recommends.

    Attributes:
        method, path: of the file.
        steps: optimizer steps.
        seconds: that it takes about, at the speed of the study; None where the study was too short to tell.
    """

    method: str
    path: Path
    steps: int
    seconds: float | None


@dataclass(frozen=True, slots=True)
class Scale:
    """What a longer run depends on.

    Attributes:
        rows: training rows of the longer run: without the study's ``data.limit``, its test rows among them.
        tokens: of one of them, on average.
        seconds_a_token: at the speed of the study; None where it trained nothing.
    """

    rows: int
    tokens: float
    seconds_a_token: float | None


def write_recommended(
    config: StudyConfig,
    state: StudyState,
    results: Results,
    findings: Sequence[Finding],
    folder: Path,
    scale: Scale,
) -> tuple[Recommended, ...]:
    """Writes a file for the best final of each method; the winner's is ``recommended.yaml`` and comes first.

    Args:
        config: filled.
        state, results, findings: of the study.
        folder: of the study.
        scale: of the longer run.
    """
    for old in folder.glob("recommended*.yaml"):  # of an earlier study file
        old.unlink()
    found = []
    best: dict[str, Finalist] = {}
    for final in results.winner_first:
        if final.dev is not None and not final.failed:
            best.setdefault(final.method, final)
    for final in best.values():
        settings = state.setting(final.method, final.number).settings
        steps = _steps(settings, scale)
        path = folder / ("recommended.yaml" if final.winner else f"recommended-{final.method}.yaml")
        lines = _comments(config, state, findings, final, settings, steps, path, scale)
        values = _values(config, settings, steps, folder, final)
        with atomic_writer(path) as file:
            file.write("".join(f"# {line}\n" for line in lines))
            yaml.safe_dump(values, file, sort_keys=False, allow_unicode=True)
        seconds = None
        if scale.seconds_a_token is not None:
            seconds = steps * settings.training.batch_size * scale.tokens * scale.seconds_a_token
        found.append(Recommended(final.method, path, steps, seconds))
    return tuple(found)


def _steps(settings: TrialSettings, scale: Scale) -> int:
    assert settings.training.steps is not None
    return min(math.ceil(scale.rows / settings.training.batch_size), LONGER * settings.training.steps)


def _values(
    config: StudyConfig, settings: TrialSettings, steps: int, folder: Path, final: Finalist
) -> Mapping[str, Any]:
    """Returns the settings of the run (`TrainConfig`), without those that are the defaults."""
    shared: dict[str, Any] = config.model_dump(mode="json", include={"model", "data", "logging"}, exclude_defaults=True)
    for name in ("limit", "test"):
        shared["data"].pop(name, None)
    held_out = config.data.held_out
    if isinstance(held_out, float) and held_out >= 1:
        shared["data"]["held_out"] = int(held_out)  # rows, and no share
    training = settings.training.model_copy(update={"steps": steps}).model_dump(mode="json")
    defaults = type(settings.training)().model_dump(mode="json")
    return {
        **shared,
        "method": settings.method.model_dump(mode="json", exclude_none=True),
        "training": {n: v for n, v in training.items() if n in _ALWAYS or v != defaults[n]},
        "output": f"{folder}-recommended" if final.winner else f"{folder}-recommended-{final.method}",
    }


def _comments(
    config: StudyConfig,
    state: StudyState,
    findings: Sequence[Finding],
    final: Finalist,
    settings: TrialSettings,
    steps: int,
    path: Path,
    scale: Scale,
) -> Sequence[str]:
    """Returns why these settings, how sure, and at how many steps they were found."""
    training, title = settings.training, final.method.replace("_", " ")
    searched = len(state.of(final.method, "search"))
    rank = "the winner of the study" if final.winner else "not the winner of the study"
    if final.untuned:
        rank = "not ranked: its method was searched less than the others"
    said = [f for f in findings if f.topic in _TOPICS and f.method in (None, final.method)]
    lines = [
        f"The best of {searched} settings of {title} in the study {config.output}; {rank}.",
        f"  peft-study finetune {shlex.quote(str(path))}",
        *(f"- {finding.text['en']}" for finding in said),
    ]
    a_pass = math.ceil(scale.rows / training.batch_size)
    cut = "" if steps == a_pass else f", cut to {LONGER} times the study's"
    assert training.steps is not None
    kept = f"Rate, batch, warm-up and schedule are those of the study, which found them at {training.steps} steps."
    if steps > training.steps:
        kept += f" At {LONGER} times the steps another rate may be better, by {LOST} nats at most (docs/findings.md)."
    return [
        *lines,
        kept,
        f"Steps: one pass over {scale.rows:,} rows is {a_pass:,}{cut}.",
    ]
