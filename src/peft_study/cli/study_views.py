"""Prints what status, list, show, compare, rerun and clean found, in tables and lines."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from peft_study.display.terminal import console, table
from peft_study.statistics import duration, short

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console
    from rich.table import Table

    from peft_study.report.compare import Comparison
    from peft_study.report.results import Row
    from peft_study.report.status import MethodStatus, StudyStatus
    from peft_study.report.study_reader import Details, StudyRecord
    from peft_study.statistics import Estimate
    from peft_study.storage.study_dir import Owner
    from peft_study.study.cleanup import Spare
    from peft_study.study.rerun import Rerun

_COUNTED = ("running", "interrupted", "finished", "pruned", "diverged", "failed")


def show_status(study: StudyRecord, found: StudyStatus) -> None:
    """Prints the state of a study."""
    from peft_study.report.findings import recommendation

    output = console()
    say(output, state_text(study.folder.path, found.state, found.reason, study.owner))
    if found.resume is not None:
        say(output, f"to resume it, in the folder it was started in: {found.resume}")
    if study.began is None or found.elapsed is None:
        say(output, "it was not far enough to have trials")
    else:
        began = study.began.astimezone().strftime("%Y-%m-%d %H:%M")
        elapsed = duration(found.elapsed.total_seconds())
        say(output, f"began {began}, {elapsed} {'ago' if found.state == 'running' else 'in all'}")
    output.print(_methods_table(found.methods))
    if found.base is not None:
        say(output, f"untouched base: dev loss {_interval(found.base)}")
    for method, known in study.state.recommended.items():
        say(output, recommendation(method, known))
    if study.state.winner is not None:
        method, number = study.state.winner
        say(output, f"winner by mean dev loss of its seeds: {method}-{number:03d}")
    if found.unfinished:
        shown = ", ".join(f"{name} {steps_text(step, total)}" for name, step, total in found.unfinished[:8])
        more = f" and {len(found.unfinished) - 8} more" if len(found.unfinished) > 8 else ""
        say(output, f"under way: {shown}{more}")
    say(output, disk_text(found.disk))


def state_text(path: Path, state: str, reason: str | None, owner: Owner | None) -> str:
    """Returns the line that begins with a folder and says how its study or run is."""
    who = "" if owner is None else f" by process {owner.process} on {owner.machine}"
    told = {
        "running": f"running{who}",
        "unclear": f"begun{who}; cannot tell from this machine whether it is still running",
        "killed": "its process was killed; nothing runs it now",
    }
    return f"{path}: {told.get(state, state)}{f' ({reason})' if reason else ''}"


def disk_text(found: Mapping[str, int]) -> str:
    """Returns the line on the bytes of a folder by part."""
    parts = ", ".join(f"{name} {megabytes(size)}" for name, size in found.items() if size)
    return f"disk: {megabytes(sum(found.values()))} ({parts})"


def _methods_table(methods: Sequence[MethodStatus]) -> Table:
    states = [state for state in _COUNTED if any(m.counts.get(state) for m in methods)]
    tests = ["range test"] if any(m.range_tests[1] for m in methods) else []
    names = ["method", *tests, "to come", *states, "finals", "best of its search"]
    caption = "best: dev loss, nats a token, one seed (against the untouched base, 95 % over examples)"
    rows = table(names, left=("method", "best of its search"), caption=caption)
    for m in methods:
        best = "-"
        if m.best is not None and m.best.dev is not None and m.best.minus_base is not None:
            best = f"{m.best.trial.name}: {m.best.dev.value:.3f} ({m.best.minus_base.text('+.3f')})"
        counts = [str(m.counts.get(state, 0)) for state in states]
        tested = [f"{m.range_tests[0]}/{m.range_tests[1]}"] if tests else []
        rows.add_row(m.method, *tested, str(m.to_come), *counts, f"{m.finals[0]}/{m.finals[1]}", best)
    return rows


def show_rows(study: StudyRecord, rows: Sequence[Row]) -> None:
    """Prints a row a trial."""
    from peft_study.report.study_reader import progress

    shown = table(
        ["trial", "searched", "status", "dev loss", "against the base", "steps", "tokens", "seconds"],
        left=("trial", "searched", "status"),
        caption="losses in nats a token, 95 % over examples, one seed a row",
    )
    for row in rows:
        trial = row.trial
        steps = trial.facts.get("steps", progress(study, trial) if trial.kind != "reference" else 0)
        tokens, seconds = trial.facts.get("tokens"), trial.facts.get("seconds")
        shown.add_row(
            trial.name,
            ", ".join(f"{name} {short(value)}" for name, value in trial.values.items()),
            trial.status,
            _interval(row.dev),
            _interval(row.minus_base),
            str(steps),
            "-" if tokens is None else f"{tokens:,}",
            "-" if seconds is None else f"{seconds:.0f}",
        )
    console().print(shown)


def print_json(rows: Iterable[Row]) -> None:
    """Prints every column of every trial as a JSON list."""
    from peft_study.report.results import flat
    from peft_study.storage.files import json_text

    values = [{**flat(row), "settings": row.settings} for row in rows]
    print(json_text(values, indent=1, ensure_ascii=False))


def print_csv(rows: Iterable[Row]) -> None:
    """Prints every column of every trial as in results.csv."""
    from peft_study.report.results import write_csv

    write_csv(rows, sys.stdout)


def show_details(study: StudyRecord, found: Details) -> None:
    """Prints everything about a trial."""
    output, row = console(), found.row
    trial = row.trial
    kinds = {
        "reference": "the untouched base",
        "range_test": "a rate of the range test",
        "search": "a setting of the search",
        "final": f"a retrained setting, seed {trial.seed}",
    }
    reason = f" ({trial.reason})" if trial.reason else ""
    say(output, f"{trial.name}: {kinds[trial.kind]}, {trial.status}{reason}")
    if trial.audited:
        say(output, f"ran on to check pruning, which would have stopped it: {trial.audited}")
    total = None if trial.kind == "reference" else trial.settings.training.steps
    for title in ("method", "training") if trial.kind != "reference" else ():
        values = getattr(trial.settings, title).model_dump(mode="json")
        say(output, f"{title}: " + ", ".join(f"{name} {short(value)}" for name, value in values.items()))
    say(output, f"dev loss {_interval(row.dev)}; against the untouched base {_interval(row.minus_base)}")
    if row.test is not None:
        say(output, f"test loss {_interval(row.test)}")
    if found.curve:
        rows = table(["step", "dev loss", ""], left=("",))
        for step, loss in found.curve:
            best = "best; shown, never ranked by" if step == row.best_step else ""
            rows.add_row(steps_text(step, total), loss.text(".4f"), best)
        output.print(rows)
    facts = trial.facts
    if facts:
        cost = f"{facts['steps']} steps, {facts['tokens']:,} tokens and {facts['virtual_tokens']:,} virtual ones"
        trained = "" if facts["trainable"] is None else f", {facts['trainable']:,} parameters trained"
        say(output, f"{cost} in {facts['seconds']:.1f} s beside its neighbours{trained}")
    folder = study.folder.trial(trial.name).path
    files = ", ".join(f"{name} {megabytes(size)}" for name, size in found.files.items())
    say(output, f"{folder}: {files or 'has no files'}")


def show_comparison(found: Comparison) -> None:
    """Prints two trials side by side and what their difference says."""
    from peft_study.report.compare import sentences

    output = console()
    first, second = found.first, found.second
    rows = table(["", first.name, second.name, f"{first.name} minus {second.name}"], left=("",))
    rows.add_row("dev loss", _interval(first.dev), _interval(second.dev), _interval(found.dev))
    if found.test is not None:
        rows.add_row("test loss", _interval(first.test), _interval(second.test), _interval(found.test))
    rows.add_row("seeds", *(str(side.seeds or "-") for side in (first, second)), "")
    for name, (mine, other) in found.settings.items():
        rows.add_row(name, *("-" if value is None else short(value) for value in (mine, other)), "")
    output.print(rows)
    for sentence in sentences(found):
        say(output, f"- {sentence}")


def show_rerun(found: Rerun) -> None:
    """Prints the dev losses then and now, and whether they are the same."""
    output = console()
    rows = table(["step", "dev loss in the study", "now, alone", "difference"], left=())
    for step, then, now in found.curve:
        rows.add_row(str(step), f"{then:.7f}", f"{now:.7f}", f"{now - then:+.1e}")
    output.print(rows)
    before, now_ended = (f"{status}{f' ({reason})' if reason else ''}" for status, reason in (found.before, found.now))
    if found.tolerance is not None:
        _, then, now = found.curve[-1]
        verdict = "the same" if found.same else "NOT the same"
        say(output, f"{found.name}: {verdict}: apart by {abs(now - then):.1e}, of {found.tolerance:.1e} allowed")
    elif found.same:
        say(output, f"{found.name}: the same: {now_ended}")
    else:
        say(output, f"{found.name}: NOT the same: then {before}, now {now_ended}")
    say(output, f"the new run: {found.folder}")


def show_spare(found: Sequence[Spare], *, dry_run: bool) -> None:
    """Prints what was or would be deleted."""
    output = console()
    for what in dict.fromkeys(item.what for item in found):
        own = [item for item in found if item.what == what]
        say(output, f"{what}: {len(own)} folders, {megabytes(sum(item.size for item in own))}")
    total = megabytes(sum(item.size for item in found))
    say(output, f"{total} would be freed; nothing was deleted" if dry_run else f"{total} freed")


def say(output: Console, line: str) -> None:
    """Prints a line as it is."""
    output.print(line, markup=False)


def _interval(estimate: Estimate | None) -> str:
    return "-" if estimate is None else str(estimate)


def steps_text(step: int, total: int | None) -> str:
    """Returns how far a trial or run is."""
    return str(step) if total is None else f"{step}/{total}"


def megabytes(size: int) -> str:
    """Returns a number of bytes in the unit that suits it."""
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB" if size >= 1000 else f"{size} B"
