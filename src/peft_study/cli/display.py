"""What a person sees while a run goes on: live on a terminal, quiet lines elsewhere."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from peft_study.engine.guards import Trainable
    from peft_study.engine.trial import StepReport, Trial
    from peft_study.evaluate.statistics import Estimate
    from peft_study.study.comparison import Comparison, TrialResult
    from peft_study.study.findings import Row
    from peft_study.study.single import Finished

LINE_SECONDS = 10.0
"""Where there is no terminal, a step is told at most this often."""


def quiet_libraries() -> None:
    """Keeps the libraries' own bars and notices out of the display; errors stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.showwarning = _plain_warning
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # tells at import which kernels it could not load
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def _plain_warning(message: Warning | str, category: type[Warning], *_place: object, **_more: object) -> None:
    """Shows this program's own warnings in one line; notices of libraries about themselves are not the user's."""
    if category is UserWarning and "peft_study" in str(_place[0]):
        print(f"warning: {message}", file=sys.stderr)


class _Display:
    """Common to both displays: a bar of the trial under way below lines that stay."""

    def __init__(self, *, silent: bool = False) -> None:
        self.console = Console(highlight=False, soft_wrap=True, quiet=silent)
        if silent:
            warnings.simplefilter("ignore")  # the process that speaks has the same ones
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=self.console,
        )
        self._live = Live(self._progress, console=self.console, transient=True, refresh_per_second=4)
        self._tasks: dict[str, TaskID] = {}
        self._told = 0.0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def say(self, line: str) -> None:
        """Prints a line that stays."""
        self.console.print(line, markup=False)

    def warn(self, line: str) -> None:
        """Prints a warning that stays."""
        self.console.print(f"WARNING: {line}", style="bold yellow", markup=False)

    def stepped(self, trial: Trial, report: StepReport, base_loss: float | None) -> None:
        """Moves the bar; without a terminal, prints a line now and then."""
        numbers = f"loss {report.loss:.3f}"
        if base_loss is not None:
            numbers += f" (base {report.loss - base_loss:+.3f})"
        numbers += f"  lr {report.learning_rate:.2g}  {report.tokens / report.seconds:,.0f} tokens/s"
        if self.console.is_terminal:
            if trial.name not in self._tasks:
                self._tasks[trial.name] = self._progress.add_task(trial.name, total=trial.total_steps, numbers="")
            self._progress.update(self._tasks[trial.name], completed=report.step, numbers=numbers)
            if trial.finished:
                self._drop(trial.name)
        elif time.monotonic() - self._told > LINE_SECONDS or trial.finished:
            self._told = time.monotonic()
            self.say(f"{trial.name}  step {report.step}/{trial.total_steps}  {numbers}")

    def _drop(self, name: str) -> None:
        """Takes a trial's bar away."""
        task = self._tasks.pop(name, None)
        if task is not None:
            self._progress.remove_task(task)


class RunDisplay(_Display):
    """Shows one run."""

    def __enter__(self) -> RunDisplay:
        if self.console.is_terminal:
            self._live.start()
        return self

    def counted(self, trial: Trial, trainable: Trainable) -> None:
        """Prints what trains."""
        self.say(trainable.sentence(trial.name))

    def evaluated(self, trial: Trial, loss: float, minus_base: float) -> None:
        """Prints each held-out loss."""
        self.say(f"step {trial.step}: held-out loss {loss:.4f} ({minus_base:+.4f} against the untouched base)")

    def conclude(self, finished: Finished) -> None:
        """Prints how the run ended and what to do next."""
        if finished.diverged or finished.after is None:
            self.warn(f"the run diverged: {finished.diverged}; try a lower learning rate")
            return
        self.say(f"held-out loss {finished.before} before, {finished.after} after (95 % over examples)")
        self.say(f"against the untouched base: {finished.minus_base}")
        self.say(f"adapter: {finished.folder / 'adapter'}")
        self.say(f"try it: peft-study chat {finished.folder / 'adapter'}")


class StudyDisplay(_Display):
    """Shows a study: a line a trial as it ends, a bar for each one under way, and the table at the end."""

    def __init__(self) -> None:
        super().__init__()
        self._names: list[str] = []
        self._done = 0
        self._done_before = 0
        self._methods: set[str] = set()
        self._new_methods: set[str] = set()
        self._last: dict[str, str] = {}
        self._started = time.monotonic()

    def __enter__(self) -> StudyDisplay:
        if self.console.is_terminal:
            self._live.start()
        return self

    def planned(self, names: list[str]) -> None:
        """Notes the trials to come."""
        self._names = names
        self.say(f"{len(names)} trials")

    def counted(self, trial: Trial, trainable: Trainable) -> None:
        """Prints what trains, once a method."""
        if trial.adapter.method not in self._methods:
            self._methods.add(trial.adapter.method)
            self._new_methods.add(trial.name)
            self.say(trainable.sentence(trial.adapter.method))

    def evaluated(self, trial: Trial, loss: float, minus_base: float) -> None:
        """Prints the loss at step 0 against the base once a method: it shows what the initialisation does."""
        self._last[trial.name] = f"held-out loss {loss:.4f} ({minus_base:+.4f} against the untouched base)"
        if trial.step == 0 and trial.name in self._new_methods:
            self.say(f"  {trial.adapter.method} at step 0: {self._last[trial.name]}")

    def ended(self, name: str, result: TrialResult) -> None:
        """Prints a line for a trial that ended, now or in an earlier start of this study."""
        self._done += 1
        last = self._last.pop(name, None)
        self._done_before += last is None
        self._drop(name)
        numbers = f"{last}, " if last and result.status == "finished" else ""
        reason = f" ({result.reason})" if result.reason else ""
        self.say(f"  {name}: {numbers}{result.status}{reason} in {result.seconds:.0f} s")
        self._live.update(Group(f"{self._done} of {len(self._names)} trials ended{self._left()}", self._progress))

    def _left(self) -> str:
        here = self._done - self._done_before
        if not here or self._done == len(self._names):
            return ""
        seconds = (time.monotonic() - self._started) / here * (len(self._names) - self._done)
        return f", about {seconds / 60:.1f} min left"

    def conclude(self, comparison: Comparison, folder: Path) -> None:
        """Prints the table and a sentence a method."""
        from peft_study.study.findings import rows, sentences

        self.console.print(study_table(rows(comparison)))
        for sentence in sentences(comparison):
            self.say(f"- {sentence}")
        self.say(f"adapters, metrics and record: {folder}")


def study_table(rows: Sequence[Row]) -> Table:
    """Returns the table of a study, a row a setting; it fits 80 columns."""
    table = Table(
        title="Held-out loss, nats a token (95 % interval over examples, one seed)",
        caption="* best of its method",
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("method")
    for name in ("rate", "step 0", "after the last step", "against the base"):
        table.add_column(name, justify="right")
    for row in rows:
        rate = row.result.learning_rate
        mark = "*" if row.best and rate is not None else " "
        table.add_row(
            row.result.method.replace("_", " "),
            "" if rate is None else f"{rate:g} {mark}",
            f"{row.start.value:.3f}",
            _short(row.loss) if row.loss else row.result.status,
            _short(row.minus_base) if row.minus_base else "-",
            style="bold" if mark == "*" else None,
        )
    return table


def _short(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.2f}, {estimate.high:.2f}]"
