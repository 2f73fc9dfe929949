"""Shows a study: live on a terminal, quiet lines elsewhere, and the tables at its end."""

from __future__ import annotations

import shlex
import time
from collections import Counter
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from peft_study.display.progress import Work
from peft_study.display.terminal import NORMAL, VERBOSE, LiveDisplay, console, plus_minus, table, write
from peft_study.search.progress import StudySteps, study_steps
from peft_study.statistics import duration, short

if TYPE_CHECKING:
    from rich.table import Table

    from peft_study.config import StudyConfig
    from peft_study.report.results import Results, Row
    from peft_study.report.study_result import TrainedAdapter
    from peft_study.search.trials import StudyState, TrialRecord
    from peft_study.study.dry_run import StudyEstimate
    from peft_study.study.run import FinishedStudy
    from peft_study.training.fit import Fit
    from peft_study.workers.worker import Facts, Pace, Report

SPEED_SECONDS = 60.0
"""Tokens a second are counted over about so long."""
DRAWN_SECONDS = 0.1
"""The progress is computed at most this often: a row of a small model takes less."""
STARTING_SECONDS = 5.0
"""Before that, the speed says nothing about the time left."""
STATES = ("running", "finished", "pruned", "diverged", "failed")
RARE = ("diverged", "failed")
"""They have a column only where there is one."""


class StudyDisplay(LiveDisplay):
    """Shows a study."""

    def __init__(self, *, silent: bool = False) -> None:
        super().__init__(silent=silent)
        self._config: StudyConfig | None = None
        self._state: StudyState | None = None
        self._due: dict[str, int] = {}
        self._slots = 0
        self._paces: dict[str, Pace] = {}
        self._tokens: list[tuple[float, int]] = []
        self._best: dict[str, float] = {}
        self._methods: set[str] = set()
        self._bar = Work("study")
        self._first_step: tuple[float, float] | None = None  # its time, and the steps that were done before
        self._drawn = 0.0

    def planned(self, config: StudyConfig, state: StudyState, slots: int) -> None:
        """Prints the plan, or the rest of it."""
        self._config, self._state, self._slots = config, state, slots
        self._due = {method: state.due(method, config) for method in config.searched}
        steps = study_steps(state, config, self._due, {})
        self._bar = Work("study", first=steps.done / max(sum(steps), 1))
        trials = ", ".join(f"{count} of {m.replace('_', ' ')}" for m, count in self._due.items())
        finals = config.finals.best * config.finals.seeds * len(self._due)
        self.say(f"{trials or 'no'} trials ({config.search.sampler}), then up to {finals} finals, on {slots} slots")
        if unequal := state.unequal(config):
            self.say(unequal)
        if state.trials:
            self.say(f"resumes: {sum(t.status != 'running' for t in state.trials.values())} trials have ended")

    def reported(self, report: Report, state: StudyState) -> None:
        """Moves the display; without a terminal, prints a line now and then."""
        self._state = state
        for line in report.lines:
            self.say(line)
        for name, trainable in report.trainable.items():
            method = state.trials[name].method
            if method not in self._methods and state.trials[name].kind != "reference":
                self._methods.add(method)
                self.say(trainable.sentence(method))
        running = {trial.name for trial in state.running()}
        self._paces = {n: p for n, p in {**self._paces, **report.paces}.items() if n in running}
        now, new = time.monotonic(), sum(p.tokens for p in report.paces.values())
        self._tokens = [(t, n) for t, n in self._tokens if now - t < SPEED_SECONDS] + [(now, new)]
        if self.loudness == VERBOSE:
            for name, pace in report.paces.items():
                self.say(f"  {name}: step {pace.step}/{pace.total}, loss {pace.loss:.3f}")
        if now - self._drawn > DRAWN_SECONDS:
            self._drawn = now
            self._measure()
            self.refresh()

    def moving(self) -> RenderableType:
        """Returns the bar of the study over the live table; before it begins and at its end, the work under way."""
        return super().moving() if self._state is None or self._work is not None else self._view()

    def progress_line(self) -> str:
        """Returns the study in one line."""
        return super().progress_line() if self._state is None or self._work is not None else self._line()

    def ended(self, trial: TrialRecord, facts: Facts) -> None:
        """Prints a line for a trial that ended."""
        numbers = ""
        if trial.sums and trial.status in ("finished", "pruned"):
            total = facts.counts_N.sum()
            loss = trial.sums[max(trial.sums)].sum() / total
            numbers = f"dev {loss:.4f}, {loss - facts.base_N.sum() / total:+.4f} against the base, "
            if trial.kind == "search" and trial.status == "finished":
                self._best[trial.method] = min(loss, self._best.get(trial.method, loss))
        values = ", ".join(f"{n} {short(v)}" for n, v in trial.values.items())
        settings = f"; {values}" if values and trial.kind in ("search", "range_test") else ""
        reason = f" ({trial.reason})" if trial.reason else ""
        name = "untouched base" if trial.kind == "reference" else trial.name
        self.say(f"  {name}: {numbers}{trial.status}{reason} in {trial.facts.get('seconds', 0):.0f} s{settings}")

    def conclude(self, study: FinishedStudy, best: TrainedAdapter | None) -> None:
        """Prints the tables, what they say, and what to do next; `best` is the winner."""
        from peft_study.display.evaluation import print_evaluation
        from peft_study.evaluation.scores import EVALUATION, read_scores
        from peft_study.report.findings import texts

        self.loudness = max(self.loudness, NORMAL)  # these are the results
        self.console.print(search_table(study.results))
        for sentence in texts(study.findings):
            self.say(f"- {sentence}")
        if study.results.finalists:
            self.console.print(finals_table(study.results))
        if (scores := read_scores(study.folder / EVALUATION)) is not None:
            print_evaluation(scores)
        self.say(
            f"a row a trial: {study.folder / 'results.csv'}; all findings: {study.folder / 'findings.json'}; adapters, "
            f"metrics and record: {study.folder}"
        )
        if study.report is not None:
            self.say(f"all of it as a page, to be opened in a browser: {study.report}")
        self.say("what next:")
        for what, command in next_steps(study, best):
            self.say(f"  {what}:")
            self.command(f"    {command}")

    def _speed(self) -> float:
        if len(self._tokens) < 2:
            return 0.0
        return sum(n for _, n in self._tokens[1:]) / max(self._tokens[-1][0] - self._tokens[0][0], 1e-9)

    def _measure(self) -> None:
        """Brings the bar up to date."""
        config, state = self._config, self._state
        assert config is not None
        assert state is not None
        steps = study_steps(state, config, self._due, {name: pace.step for name, pace in self._paces.items()})
        self._bar.share = steps.done / max(sum(steps), 1)
        self._bar.count = f"{steps.done:,.0f} of {sum(steps):,.0f} steps"
        self._bar.left = self._left(steps, config.budget.minutes)

    def _left(self, steps: StudySteps, minutes: float | None) -> float | None:
        """Returns the seconds left at the speed since the first step, finals included; None where there is none yet."""
        now = time.monotonic()
        if self._first_step is None or steps.done <= self._first_step[1]:
            self._first_step = now, steps.done  # until there is a step, nothing is known of their speed
        seconds, taken = now - self._first_step[0], steps.done - self._first_step[1]
        if taken <= 0 or seconds < STARTING_SECONDS:
            return None
        search = steps.search * seconds / taken
        if minutes is not None:
            search = min(search, max(0.0, 60 * minutes - self._bar.elapsed))
        return search + steps.finals * seconds / taken

    def _line(self) -> str:
        state = self._state
        assert state is not None
        running = [f"{n} {p.step}/{p.total}" for n, p in list(self._paces.items())[:4]]
        more = "" if len(self._paces) <= 4 else f" and {len(self._paces) - 4} more"
        ended = sum(t.status != "running" for t in state.trials.values())
        slots = f"{', '.join(running) or 'between trials'}{more}"
        trials = "1 trial" if ended == 1 else f"{ended} trials"
        return f"{self._bar.line()}; {trials} ended; {slots}; {self._speed():,.0f} tokens/s"

    def _to_come(self, method: str) -> int:
        assert self._config is not None
        assert self._state is not None
        return self._state.to_come(method, self._config, self._due[method])

    def _view(self) -> Group:
        """Returns the bar, methods x trials, what is in the slots, and the speed."""
        config, state = self._config, self._state
        assert config is not None
        assert state is not None
        counts: dict[str, Counter[str]] = {m: Counter(t.status for t in state.of(m, "search")) for m in config.searched}
        shown = [s for s in STATES if s not in RARE or any(found[s] for found in counts.values())]
        methods = table(["method", "to come", *shown, "finals", "best"], left=["method"])
        for method in config.searched:
            begun, planned = state.finals(method, config)
            finals = f"{sum(t.status == 'finished' for t in begun)}/{planned}"
            best = f"{self._best[method]:.4f}" if method in self._best else "-"
            numbers = [str(counts[method][status]) for status in shown]
            methods.add_row(method.replace("_", " "), str(self._to_come(method)), *numbers, finals, best)
        for column in methods.columns:
            column.no_wrap = True
        slots = [f"{n} {p.step}/{p.total} loss {p.loss:.3f}" for n, p in self._paces.items()]
        rows = slots[:8] + ([f"and {len(slots) - 8} more"] if len(slots) > 8 else [])
        foot = f"{len(slots)} of {self._slots} slots; {self._speed():,.0f} tokens/s; best: dev loss so far"
        lines = "\n".join([*(f"  {row}" for row in rows), foot])
        return Group(self._bar, methods, Text(lines, no_wrap=True, overflow="ellipsis"))


def next_steps(study: FinishedStudy, best: TrainedAdapter | None) -> list[tuple[str, str]]:
    """Returns what to do with a study, each with a command that can be pasted."""
    folder = shlex.quote(str(study.folder))
    steps = [("every trial with its settings", f"peft-study list {folder}")]
    if best is not None:
        adapter = shlex.quote(str(best.adapter_path))
        steps = [
            (f"talk to the winner, {best.name}", f"peft-study chat {adapter}"),
            ("its answers to prompts, a line each", f"peft-study generate {adapter} --prompts FILE -o answers.jsonl"),
            *steps,
        ]
    # a model in memory cannot be named on a command line
    for recommended in study.recommended[:1] if best is None or best.in_memory is None else ():
        about = "" if recommended.seconds is None else f", about {duration(recommended.seconds)}"
        what = f"train it longer, {recommended.steps:,} steps{about} (its first lines say why)"
        steps.append((what, f"peft-study finetune {shlex.quote(str(recommended.path))}"))
    return steps


def show_estimate(found: StudyEstimate) -> None:
    """Prints the estimate of a study."""
    output = console()
    names = ["method", "range\ntest", "trials", "steps", "million\ntokens", "minutes"]
    names += [] if found.memory is not None else ["MB/slot"]
    rows = table(names, left=["method"], title="What it would take (nothing was written)")
    rows.padding = 0
    for column in rows.columns:
        column.no_wrap = True
    for m in found.methods:
        rows.add_row(
            m.method,
            f"{m.range_rates} x {m.range_steps}" if m.range_rates else "-",
            str(m.trials),
            str(m.steps),
            f"{m.expected_tokens / 1e6:.3g} - {m.tokens / 1e6:.3g}",
            f"{m.expected_seconds / 60:.3g} - {m.seconds / 60:.3g}",
            *([] if found.memory is not None else [f"{m.slot_bytes / 2**20:,.0f}"]),
        )
    output.print(rows)
    least, most = (sum(getattr(m, n) for m in found.methods) / 60 for n in ("expected_seconds", "seconds"))
    tests = " and range tests too" if any(m.range_rates for m in found.methods) else ""
    free = "" if found.free_bytes is None else f"; {found.free_bytes / 2**30:.1f} GB of memory are free beside the base"
    lines = [
        f"{found.train_rows:,} training rows, {found.dev_rows} dev, {found.test_rows} test; "
        f"together {least:.3g} to {most:.3g} minutes of training, finals included{tests}{free}",
        "from measured steps of each method alone; the first number is with all the pruning its rule allows, "
        "and held-out losses come on top. Side by side in full rows trials take less.",
    ]
    if found.memory is not None:
        output.print(_memory_table(found.memory))
    for line in (*lines, *found.notes):
        write(output, line)


def _memory_table(memory: Fit) -> Table:
    """Returns the memory that each method is expected to take, in MB."""
    kinds = ", ".join(f"{size / 2**20:,.0f} in {precision}" for precision, size in memory.weights.items())
    title = f"Memory expected (MB, rows of {memory.row_tokens:,} tokens)\nThe base: {kinds}"
    rows = table(["method", "a trial", "a row", "together", "a row, layers\nrecomputed"], left=["method"], title=title)
    for name, found in memory.plain.items():
        row, again = (kind[name].row(memory.row_tokens) for kind in (memory.plain, memory.recomputed))
        whole = memory.weights[memory.precision] + found.trial + row
        rows.add_row(name, *(f"{size / 2**20:,.0f}" for size in (found.trial, row, whole, again)))
    return rows


def search_table(results: Results) -> Table:
    """Returns the table of the search, a row a setting, best first in each method; it fits 80 columns."""
    title = "Search: dev loss, nats a token (± 95 % over examples, one seed)"
    rows = table(["trial", "rate", "dev loss", "against the base", "status"], left=["trial", "status"], title=title)
    ranked = {(f.method, f.number) for f in results.finalists}
    rows.add_row("untouched base", "", plus_minus(results.base_dev), "", "")
    for method in results.methods:
        own = [row for row in results.rows if row.trial.kind == "search" and row.trial.method == method]
        for row in sorted(own, key=_order):
            rows.add_row(
                row.trial.name,
                f"{row.settings['learning_rate']:.3g}",
                plus_minus(row.dev),
                plus_minus(row.minus_base),
                row.trial.status,
                style="bold" if (method, row.trial.number) in ranked else None,
            )
    return rows


def _order(row: Row) -> tuple[bool, float]:
    return row.trial.status != "finished", row.dev.value if row.dev else float("inf")


def finals_table(results: Results) -> Table:
    """Returns the table of finalists, best first; it fits 80 columns."""
    seeds = max(len(f.dev_of_seeds) for f in results.finalists)
    title = f"Finals: mean over {seeds} seeds, nats a token (± 95 % over seeds and examples)"
    by = "mean dev loss" if results.winner_by is None else f"mean score on {results.winner_by}"
    caption = f"* winner by {by}; the test part was opened after that"
    names = ["setting", "dev", "test", "test against base"]
    rows = table(names, left=["setting"], title=title, caption=caption)
    for f in results.finalists:
        mark = " *" if f.winner else " (untuned)" if f.untuned else f" ({f.failed} failed)" if f.failed else ""
        rows.add_row(
            f"{f.name}{mark}",
            plus_minus(f.dev),
            plus_minus(f.test),
            plus_minus(f.test_minus_base),
            style="bold" if f.winner else None,
        )
    rows.add_row("untouched base", plus_minus(results.base_dev), plus_minus(results.base_test), "")
    return rows
