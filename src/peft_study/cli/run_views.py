"""Prints what status, show and list found of single runs."""

from __future__ import annotations

import csv
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from peft_study.cli.study_views import disk_text, megabytes, state_text, steps_text
from peft_study.display.terminal import console, table, write
from peft_study.statistics import duration, short

if TYPE_CHECKING:
    from peft_study.report.run_reader import Entry, RunStatus


def show_run(found: RunStatus, *, everything: bool) -> None:
    """Prints the state of a run; `everything`: with its settings, its curve and its files."""
    output, config, path = console(), found.config, found.folder.path
    write(output, state_text(path, found.state, found.reason, found.owner))
    if found.resume is not None:
        step = f"at step {found.checkpoint}" if found.checkpoint is not None else "at step 0, for want of a checkpoint"
        write(output, f"to resume it {step}, in the folder it was started in: {found.resume}")
    elif found.state in ("killed", "interrupted", "failed"):
        write(output, "the same command resumes it")
    if found.began is not None and found.elapsed is not None:
        began, took = found.began.astimezone().strftime("%Y-%m-%d %H:%M"), duration(found.elapsed.total_seconds())
        write(output, f"last started {began}, {f'{took} ago' if found.state == 'running' else f'ran {took}'}")
    data = ", ".join(source.path + (f" ({source.take:g})" if source.take != 1 else "") for source in config.data.train)
    write(output, f"{config.method.method.replace('_', ' ')} of {config.model.name} on {data}")
    progress = [f"step {steps_text(found.step, found.total)}"]
    if found.loss is not None:
        progress.append(f"loss of the last batch {found.loss:.3f}")
    if found.speed is not None:
        progress.append(f"{found.speed:,.0f} tokens/s")
    write(output, ", ".join(progress))
    if (kept := found.kept) is not None:
        best = " (the lowest so far: early stopping keeps its adapter)" if kept.best else ""
        write(output, f"held-out loss after step {kept.step}{best}: {kept.loss}")
        write(output, f"against the untouched base: {kept.minus_base}")
    if found.folder.adapter.is_dir():
        write(output, f"adapter: {shlex.quote(str(found.folder.adapter))}")
    if everything:
        _show_everything(found)
    write(output, disk_text(found.disk))


def _show_everything(found: RunStatus) -> None:
    output = console()
    for title in ("method", "training", "data", "model"):
        values = getattr(found.config, title).model_dump(mode="json", exclude={"train", "name"}).items()
        shown = ", ".join(f"{name} {short(value)}" for name, value in values if value is not None)
        write(output, f"{title}: {shown}")
    if found.config.early_stopping is not None:
        write(output, f"early stopping: after {found.config.early_stopping} held-out losses without a lower one")
    rows = table(["step", "held-out loss", "against the base", ""], left=("",))
    for point in found.curve:
        mark = "" if found.kept is None or not found.kept.best or point.step != found.kept.step else "kept"
        rows.add_row(steps_text(point.step, found.total), point.loss.text(".4f"), point.minus_base.text("+.4f"), mark)
    if found.curve:
        output.print(rows)
    parts: dict[str, int] = {}
    for name, size in found.files.items():
        top, inner, _ = name.partition("/")
        parts[top + inner] = parts.get(top + inner, 0) + size
    write(output, "files: " + ", ".join(f"{name} {megabytes(size)}" for name, size in parts.items()))


def show_entries(entries: Sequence[Entry]) -> None:
    """Prints a row a run or study of a folder."""
    names = ["folder", "what", "state", "progress", "held-out loss", "against the base"]
    rows = table(names, left=("folder", "what", "state"), caption="losses in nats a token, 95 % over examples")
    for entry in entries:
        kept = None if entry.run is None else entry.run.kept
        losses = ("-", "-") if kept is None else (str(kept.loss), kept.minus_base.text("+.3f"))
        rows.add_row(str(entry.path), entry.what, entry.state, entry.progress, *losses)
    console().print(rows)


def entry_values(entry: Entry) -> dict[str, Any]:
    """Returns an entry as one JSON object, the same names for all."""
    run = entry.run
    kept = None if run is None else run.kept
    return {
        "folder": str(entry.path),
        "what": entry.what,
        "state": entry.state,
        "steps": None if run is None else run.step,
        "total_steps": None if run is None else run.total,
        "loss_step": None if kept is None else kept.step,
        "loss": None if kept is None else kept.loss.value,
        "loss_low": None if kept is None else kept.loss.low,
        "loss_high": None if kept is None else kept.loss.high,
        "minus_base": None if kept is None else kept.minus_base.value,
        "minus_base_low": None if kept is None else kept.minus_base.low,
        "minus_base_high": None if kept is None else kept.minus_base.high,
    }


def print_entries(entries: Sequence[Entry], *, as_csv: bool) -> None:
    """Prints the entries as a JSON list, or as CSV."""
    from peft_study.storage.files import finite, json_text

    values = [entry_values(entry) for entry in entries]
    if as_csv:
        writer = csv.DictWriter(sys.stdout, list(values[0]))
        writer.writeheader()
        writer.writerows(finite(values))
    else:
        print(json_text(values, indent=1, ensure_ascii=False))
