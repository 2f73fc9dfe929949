"""Prints what status, list, show, compare, rerun and clean found, in tables and lines."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from peft_study.display.terminal import console, fits, plus_minus, table, write
from peft_study.statistics import duration, short

if TYPE_CHECKING:
    from pathlib import Path

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
    from peft_study.search.trials import setting_name

    output = console()
    write(output, state_text(study.folder.path, found.state, found.reason, study.owner))
    if found.resume is not None:
        write(output, f"to resume it, in the folder it was started in: {found.resume}")
    if study.began is None or found.elapsed is None:
        write(output, "it was not far enough to have trials")
    else:
        began = study.began.astimezone().strftime("%Y-%m-%d %H:%M")
        elapsed = duration(found.elapsed.total_seconds())
        write(output, f"began {began}, {elapsed} {'ago' if found.state == 'running' else 'in all'}")
    methods = _methods_table(found.methods)
    if fits(output, methods):
        output.print(methods)
    else:
        output.print(_methods_table(found.methods, with_best=False))
        for method in found.methods:
            if method.best is not None:
                write(output, f"{method.method}, best of its search, one seed: {_best(method)}")
    if found.base is not None:
        write(output, f"untouched base: dev loss {_interval(found.base)}")
    for name in study.state.recommended:
        write(output, recommendation(name, study.state).text["en"])
    if study.state.winner is not None:
        by = "dev loss" if study.state.winner_by is None else f"score on {study.state.winner_by}"
        write(output, f"winner by mean {by} of its seeds: {setting_name(*study.state.winner)}")
    if found.unfinished:
        shown = ", ".join(f"{name} {steps_text(step, total)}" for name, step, total in found.unfinished[:8])
        more = f" and {len(found.unfinished) - 8} more" if len(found.unfinished) > 8 else ""
        write(output, f"under way: {shown}{more}")
    write(output, disk_text(found.disk))


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


def _methods_table(methods: Sequence[MethodStatus], *, with_best: bool = True) -> Table:
    states = [state for state in _COUNTED if any(m.counts.get(state) for m in methods)]
    tests = ["range test"] if any(m.range_tests[1] for m in methods) else []
    names = ["method", *tests, "to come", *states, "finals", *(["best of its search"] if with_best else [])]
    caption = "best: dev loss, nats a token, one seed (against the untouched base, 95 % over examples)"
    rows = table(names, left=("method", "best of its search"), caption=caption if with_best else None)
    for m in methods:
        counts = [str(m.counts.get(state, 0)) for state in states]
        tested = [f"{m.range_tests[0]}/{m.range_tests[1]}"] if tests else []
        best = [_best(m)] if with_best else []
        rows.add_row(m.method, *tested, str(m.to_come), *counts, f"{m.finals[0]}/{m.finals[1]}", *best)
    return rows


def _best(m: MethodStatus) -> str:
    if m.best is None or m.best.dev is None or m.best.minus_base is None:
        return "-"
    return f"{m.best.trial.name}: {m.best.dev.value:.3f} ({m.best.minus_base.text('+.3f')})"


def show_rows(study: StudyRecord, rows: Sequence[Row]) -> None:
    """Prints a row a trial; where that is too wide, what was searched in a line below each."""
    output = console()
    wide = _rows_table(study, rows, narrow=False)
    if fits(output, wide):
        output.print(wide)
        return
    with output.capture() as captured:
        output.print(_rows_table(study, rows, narrow=True))
    lines = captured.get().splitlines()
    first = next(place for place, line in enumerate(lines) if "─" in line) + 1
    for place, line in enumerate(lines):
        output.out(line)
        if 0 <= place - first < len(rows) and (searched := _searched(rows[place - first])):
            write(output, f"   {searched}")


def _rows_table(study: StudyRecord, rows: Sequence[Row], *, narrow: bool) -> Table:
    """Returns a row a trial; a narrow one has half the interval, and leaves out tokens and what was searched."""
    from peft_study.report.study_reader import progress

    names = ["trial", "searched", "status", "dev loss", "against the base", "steps", "tokens", "seconds"]
    wanted = [name for name in names if not narrow or name not in ("searched", "tokens")]
    caption = "losses in nats a token, 95 % over examples, one seed a row"
    caption += "\n± is half the interval; --json and --csv have both ends" if narrow else ""
    headings = [name if name != "against the base" or not narrow else "minus base" for name in wanted]
    shown = table(headings, left=("trial", "searched", "status"), caption=caption)
    interval = plus_minus if narrow else _interval
    for row in rows:
        trial = row.trial
        steps = trial.facts.get("steps", progress(study, trial) if trial.kind != "reference" else 0)
        tokens, seconds = trial.facts.get("tokens"), trial.facts.get("seconds")
        cells = {
            "trial": trial.name,
            "searched": _searched(row),
            "status": trial.status,
            "dev loss": interval(row.dev),
            "against the base": interval(row.minus_base),
            "steps": str(steps),
            "tokens": "-" if tokens is None else f"{tokens:,}",
            "seconds": "-" if seconds is None else f"{seconds:.0f}",
        }
        shown.add_row(*(cells[name] for name in wanted))
    if narrow:
        shown.padding = 0
        for column in shown.columns:
            column.no_wrap = True
    return shown


def _searched(row: Row) -> str:
    return ", ".join(f"{name} {short(value)}" for name, value in row.trial.values.items())


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
    write(output, f"{trial.name}: {kinds[trial.kind]}, {trial.status}{reason}")
    if trial.audited:
        write(output, f"ran on to check pruning, which would have stopped it: {trial.audited}")
    total = None if trial.kind == "reference" else trial.settings.training.steps
    for title in ("method", "training") if trial.kind != "reference" else ():
        values = getattr(trial.settings, title).model_dump(mode="json")
        write(output, f"{title}: " + ", ".join(f"{name} {short(value)}" for name, value in values.items()))
    write(output, f"dev loss {_interval(row.dev)}; against the untouched base {_interval(row.minus_base)}")
    if row.test is not None:
        write(output, f"test loss {_interval(row.test)}")
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
        write(output, f"{cost} in {facts['seconds']:.1f} s beside its neighbours{trained}")
    folder = study.folder.trial(trial.name).path
    files = ", ".join(f"{name} {megabytes(size)}" for name, size in found.files.items())
    write(output, f"{folder}: {files or 'has no files'}")


def show_comparison(found: Comparison) -> None:
    """Prints two trials side by side and what their difference says."""
    from peft_study.report.compare import sentences

    output = console()
    first, second = found.first, found.second
    rows = _comparison(found, first.name, second.name)
    if not fits(output, rows):
        write(output, f"A: {first.name}, B: {second.name}")
        rows = _comparison(found, "A", "B")
        rows.columns[0].no_wrap = True
    output.print(rows)
    for sentence in sentences(found):
        write(output, f"- {sentence}")


def _comparison(found: Comparison, one: str, other: str) -> Table:
    """Returns two trials side by side, under these names."""
    first, second = found.first, found.second
    rows = table(["", one, other, f"{one} minus {other}"], left=("",))
    rows.add_row("dev loss", _interval(first.dev), _interval(second.dev), _interval(found.dev))
    if found.test is not None:
        rows.add_row("test loss", _interval(first.test), _interval(second.test), _interval(found.test))
    rows.add_row("seeds", *(str(side.seeds or "-") for side in (first, second)), "")
    for name, values in found.settings.items():
        rows.add_row(name, *("-" if value is None else short(value) for value in values), "")
    for column in rows.columns:
        column.overflow = "fold"
    return rows


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
        write(output, f"{found.name}: {verdict}: apart by {abs(now - then):.1e}, of {found.tolerance:.1e} allowed")
    elif found.same:
        write(output, f"{found.name}: the same: {now_ended}")
    else:
        write(output, f"{found.name}: NOT the same: then {before}, now {now_ended}")
    write(output, f"the new run: {found.folder}")


def show_spare(found: Sequence[Spare], *, dry_run: bool) -> None:
    """Prints what was or would be deleted."""
    output = console()
    for what in dict.fromkeys(item.what for item in found):
        own = [item for item in found if item.what == what]
        write(output, f"{what}: {len(own)} folders, {megabytes(sum(item.size for item in own))}")
    total = megabytes(sum(item.size for item in found))
    write(output, f"{total} would be freed; nothing was deleted" if dry_run else f"{total} freed")


def _interval(estimate: Estimate | None) -> str:
    return "-" if estimate is None else str(estimate)


def steps_text(step: int, total: int | None) -> str:
    """Returns how far a trial or run is."""
    return str(step) if total is None else f"{step}/{total}"


def megabytes(size: int) -> str:
    """Returns a number of bytes in the unit that suits it."""
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB" if size >= 1000 else f"{size} B"
