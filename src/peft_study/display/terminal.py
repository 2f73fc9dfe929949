"""Shows one run, live on a terminal and in quiet lines elsewhere; and what all displays share."""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
import warnings
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from pathlib import Path

    from peft_study.config import TrainConfig
    from peft_study.engine.guards import Trainable
    from peft_study.engine.trial import StepReport, Trial
    from peft_study.training.finetune import Finished

LINE_SECONDS = 10.0
"""Where there is no terminal, progress is printed at most this often."""
WIDE = 240
"""Columns where there is no terminal: a file or a pipe cuts nothing off."""


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


def console(*, quiet: bool = False) -> Console:
    """Returns a console on stdout."""
    found = Console(highlight=False, soft_wrap=True, quiet=quiet)
    if not found.is_terminal:
        found.width = WIDE
    return found


def table(names: Sequence[str], *, left: Sequence[str], title: str | None = None, caption: str | None = None) -> Table:
    """Returns an empty table: the columns `left` hold words, the others numbers."""
    found = Table(title=title, caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    found.title_justify = found.caption_justify = "left"
    for name in names:
        found.add_column(name, justify="left" if name in left else "right")
    return found


class LiveDisplay:
    """Lines that stay and, on a terminal, a part below them that moves.

    Args:
        console: where to.
        live: the moving part.
    """

    def __init__(self, console: Console, live: Live) -> None:
        self.console, self._live = console, live
        self._told = 0.0

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.console.is_terminal:
            self._live.stop()

    def say(self, line: str) -> None:
        """Prints a line that stays."""
        self.console.print(line, markup=False)

    def tell(self, line: str, *, now: bool = False) -> None:
        """Prints a line of progress where there is no terminal, `LINE_SECONDS` after the last one or `now`."""
        if now or time.monotonic() - self._told > LINE_SECONDS:
            self._told = time.monotonic()
            self.say(line)


class RunDisplay(LiveDisplay):
    """Shows one run: a bar below lines that stay."""

    def __init__(self, *, silent: bool = False) -> None:
        output = console(quiet=silent)
        if silent:
            warnings.simplefilter("ignore")  # the process that speaks has the same ones
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=output,
        )
        super().__init__(output, Live(self._progress, console=output, transient=True, refresh_per_second=4))
        self._task: TaskID | None = None

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
            if self._task is None:
                self._task = self._progress.add_task(trial.name, total=trial.total_steps, numbers="")
            self._progress.update(self._task, completed=report.step, numbers=numbers)
        else:
            self.tell(f"{trial.name}  step {report.step}/{trial.total_steps}  {numbers}", now=trial.finished)

    def counted(self, trial: Trial, trainable: Trainable) -> None:
        """Prints what trains."""
        self.say(trainable.sentence(trial.name))

    def evaluated(self, trial: Trial, loss: float, minus_base: float) -> None:
        """Prints each held-out loss."""
        self.say(f"step {trial.step}: held-out loss {loss:.4f} ({minus_base:+.4f} against the untouched base)")

    def conclude(self, finished: Finished) -> None:
        """Prints how the run ended and what to do next."""
        from peft_study.statistics import duration, few_examples

        folder, best = finished.folder, finished.best_step
        begun = f" (resumed at step {finished.resumed_at})" if finished.resumed_at else ""
        where = f"total time {duration(finished.seconds)}{begun}; losses by step: {folder / 'metrics.jsonl'}"
        if finished.diverged or finished.after is None:
            self.warn(f"the run diverged: {finished.diverged}; try a lower learning rate")
            if best is not None:
                self.say(f"the adapter of step {best}, whose held-out loss was the lowest: {folder / 'best'}")
            self.say(where)
            return
        if best is not None:
            early = (
                f"stopped at step {finished.steps} of {finished.planned}: " if finished.steps < finished.planned else ""
            )
            self.say(f"{early}the held-out loss was lowest after step {best}, whose adapter is kept")
        self.say(f"held-out loss {finished.before} before, {finished.after} after (95 % over examples)")
        self.say(f"against the untouched base: {finished.minus_base}")
        if note := few_examples(finished.examples):
            self.say(note)
        self.say(f"{where}; everything else: {folder}")
        self.say(f"adapter: {folder / 'adapter'}")
        for what, command in next_commands(finished.config, folder):
            self.say(f"{what}: {command}")
        if finished.worse:
            self.warn(f"the run {finished.worse}")


def next_commands(config: TrainConfig, folder: Path) -> list[tuple[str, str]]:
    """Returns what can be done with a finished run, each with the command for it, ready to be pasted into a shell."""
    method, data = config.method.method, config.data.train
    adapter = folder / "adapter"
    found: list[tuple[str, list[object]]] = [
        ("try it", ["peft-study", "chat", adapter]),
        ("answer a file", ["peft-study", "generate", adapter, "--prompts", "prompts.txt"]),
    ]
    if config.logging.tensorboard:
        found.append(("curves", ["tensorboard", "--logdir", folder / "tensorboard"]))
    if method == "lora":
        found.append(("merge", ["peft-study", "merge", adapter, "-o", f"{folder}_merged"]))
    if method != "full" and all(source.take == 1 for source in data):
        sources = [word for source in data for word in ("--data", source.path)]
        study = ["peft-study", "run", "--model", config.model.name, *sources, "--methods", method]
        found.append(("a study of its learning rate", [*study]))
    return [(what, shlex.join(map(str, words))) for what, words in found]
