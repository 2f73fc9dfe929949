"""Frees the disk of what a study no longer needs; decisions, results and finalists' adapters stay."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from peft_study.engine import checkpoint
from peft_study.errors import OutputError
from peft_study.report.study_reader import StudyRecord, sizes
from peft_study.search.trials import best_first
from peft_study.storage.files import output_error


@dataclass(frozen=True, slots=True)
class Spare:
    """A folder that can be deleted: what it holds, where it is, and its size in bytes."""

    what: str
    path: Path
    size: int


def spare(study: StudyRecord) -> tuple[Spare, ...]:
    """Returns what can be freed: checkpoints, adapters of trials that are no finalists, TensorBoard events.

    The last checkpoint of a finished study stays. It holds no tensors and marks the study as done: without it the same
    command would restart the study. The adapters of an unfinished study stay too: its finalists are not chosen yet.
    """
    found = [("checkpoints", path) for path in _checkpoints(study)]
    kept = _kept(study) if _finished(study) else set(study.state.trials)
    for name in study.state.trials:
        folder = study.folder.trial(name)
        if name not in kept:
            found.append(("adapters of trials that are no finalists", folder.adapter))
        found.append(("TensorBoard events (metrics.jsonl has the same numbers)", folder.path / "tensorboard"))
    return tuple(Spare(what, path, sum(sizes(path).values())) for what, path in found if path.is_dir())


def clean(study: StudyRecord, *, force: bool) -> tuple[Spare, ...]:
    """Deletes what `spare` names, and returns it.

    Args:
        study: whose folder.
        force: also of a study that has not finished, which then restarts from step 0.

    Raises:
        OutputError: when a process writes to the folder, the study has not finished and nothing was forced, or a file
            cannot be deleted.
    """
    with study.folder.run.locked():
        if not _finished(study) and not force:
            raise OutputError(
                "has not finished, and would lose the checkpoint it resumes from",
                where=str(study.folder.path),
                remedy="let it finish (`peft-study status` says how), or add --force: it then restarts from step 0",
            )
        found = spare(study)
        for item in found:
            try:
                shutil.rmtree(item.path)
            except OSError as error:
                raise output_error(error, item.path) from error
    return found


def _finished(study: StudyRecord) -> bool:
    status = study.folder.run.status()
    return status is not None and status[0] == "finished"


def _checkpoints(study: StudyRecord) -> list[Path]:
    top = study.folder.checkpoints
    if not _finished(study):
        return [top]
    places = [top, *(path for path in top.iterdir() if path.is_dir())] if top.is_dir() else []
    whole = [found for place in places for found in checkpoint.find(place)[:-1]]
    return [found.folder for found in whole]


def _kept(study: StudyRecord) -> set[str]:
    """Returns the trials whose adapters stay: finalists and their seeds, or a method's best where it has none."""
    state = study.state
    kept = {trial.name for trial in state.trials.values() if trial.kind == "final"}
    for method in study.config.methods:
        searched = state.of(method, "search")
        numbers = state.finalists.get(method, ())
        chosen = [trial for trial in searched if trial.number in numbers] or best_first(searched)[:1]
        kept |= {trial.name for trial in chosen}
    return kept
