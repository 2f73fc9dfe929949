"""Shows one run, live on a terminal and in quiet lines elsewhere; and what all displays share.

a terminal    lines that stay, and below them a part that moves (rich's Live)
a notebook    lines by print, and one line of progress that is replaced
a file        lines; one of progress every 10 s
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from peft_study.display.progress import SteadyLive, Work, clock

if TYPE_CHECKING:
    from pathlib import Path

    from peft_study.config import TrainConfig
    from peft_study.engine.guards import Trainable
    from peft_study.engine.trial import StepReport, Trial
    from peft_study.statistics import Estimate
    from peft_study.training.finetune import Finished

LINE_SECONDS = 10.0
"""Where there is no terminal, progress is printed at most this often."""
NOTEBOOK_SECONDS = 0.5
"""A notebook's line of progress is replaced at most this often."""
WIDE = 240
"""Columns where there is no terminal: a file or a pipe cuts nothing off."""
QUIET, NORMAL, VERBOSE = -1, 0, 1

_loudness = NORMAL


def set_loudness(level: int) -> None:
    """Sets what all displays of this process show.

    Args:
        level: QUIET: warnings, errors and results; NORMAL: also progress and notes; VERBOSE: also every step, and the
            libraries' own warnings.
    """
    global _loudness
    _loudness = level


def quiet_libraries() -> None:
    """Keeps the libraries' own bars and notices out of the display; errors stay."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "warning" if _loudness == VERBOSE else "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    if _loudness < VERBOSE:
        warnings.showwarning = _plain_warning
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # tells at import which kernels it could not load
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()


def _plain_warning(message: Warning | str, category: type[Warning], *_place: object, **_more: object) -> None:
    """Shows this program's own warnings in one line; notices of libraries about themselves are not the user's."""
    if category is UserWarning and "peft_study" in str(_place[0]):
        echo(f"warning: {message}", err=True)


def console(*, err: bool = False) -> Console:
    """Returns a console on stdout or stderr: as wide as the terminal, and `WIDE` where there is none."""
    # in a notebook rich would print HTML, or take the output for a terminal; plain text is printed there, as in a file
    terminal = False if _in_notebook() else None
    found = Console(
        highlight=False, markup=False, emoji=False, stderr=err, force_jupyter=False, force_terminal=terminal
    )
    if not found.is_terminal:
        found.width, found.soft_wrap = WIDE, True
    return found


def write(output: Console, line: str, style: str = "") -> None:
    """Prints a line. On a terminal it wraps at spaces; a longer word (a path) is left to the terminal, to be copied."""
    text = wrapped(line, output.width) if output.is_terminal else line
    output.print(Text(text, style), soft_wrap=True)  # a style of `print` would also be that of the moving part below


def wrapped(line: str, width: int) -> str:
    """Returns a line with line feeds in place of spaces, so that no word that fits into `width` columns is broken."""
    rows = [""]
    for place, word in enumerate(line.split(" ")):
        longer = f"{rows[-1]} {word}" if place else word
        if cell_len(longer) <= width or not rows[-1].strip():
            rows[-1] = longer
        else:
            rows.append(word)
    return "\n".join(rows)


def echo(line: str, *, err: bool = False) -> None:
    """Prints a line on stdout or stderr, as `write` does."""
    write(console(err=err), line)


def table(names: Sequence[str], *, left: Sequence[str], title: str | None = None, caption: str | None = None) -> Table:
    """Returns an empty table: the columns `left` hold words, the others numbers."""
    found = Table(title=title, caption=caption, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    found.title_justify = found.caption_justify = "left"
    for name in names:
        found.add_column(name, justify="left" if name in left else "right")
    return found


def fits(output: Console, shown: Table) -> bool:
    """Returns whether a table can be printed without wrapping or cutting a cell."""
    unbounded = output.options.update(width=10_000)
    return output.measure(shown, options=unbounded).maximum <= output.width


def plus_minus(estimate: Estimate | None) -> str:
    """Returns a value with half its interval; the results' files have both ends."""
    if estimate is None:
        return "-"
    half = f"{(estimate.high - estimate.low) / 2:.3f}" if estimate.bounded else "?"
    return f"{estimate.value:.3f} ±{half}"


class LiveDisplay:
    """Lines that stay, and progress: below them on a terminal, a line now and then elsewhere.

    Args:
        err: print on stderr.
        silent: print nothing.
    """

    def __init__(self, *, err: bool = False, silent: bool = False) -> None:
        self.console = console(err=err)
        self.console.quiet = silent
        self.loudness = _loudness
        self._work: Work | None = None
        self._unnamed = Work("working")
        moves = not silent and self.loudness > QUIET
        self._notebook = _NotebookLine() if moves and _in_notebook() and not err else None
        self._told = time.monotonic()
        self._live: SteadyLive | None = None
        if moves and self.console.is_interactive:
            # what is redirected to a file must get there
            self._live = SteadyLive(
                self.console, redirect_stdout=sys.stdout.isatty(), redirect_stderr=sys.stderr.isatty()
            )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.update(self.moving())
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
        if self._notebook is not None:
            self._notebook.show(str, now=True)

    def say(self, line: str, share: float | None = None) -> None:
        """Prints a line that stays, or shows work under way, as `peft_study.training.session.Say`."""
        if share is None:
            warning = line[:8].lower() == "warning:"
            if warning or self.loudness > QUIET:
                write(self.console, line, "bold yellow" if warning else "")
            self._unnamed = Work("working")
            if self._live is not None:
                self._live.update(self.moving())
        elif share < 1:
            if self._work is None or self._work.what != line:
                self._work = Work(line)
                if self._live is None and self._notebook is None:
                    self._told = time.monotonic()
                    self.say(line)
            self.working(line, share)
        else:
            work, self._work, self._unnamed = self._work, None, Work("working")
            self.refresh(now=True)
            if self._live is not None or self._notebook is not None:
                self.say(line)
            elif work is not None and work.what == line and work.elapsed > LINE_SECONDS:
                self.say(f"{line}: done after {clock(work.elapsed)}")

    def command(self, line: str) -> None:
        """Prints a line with a command in it, which can be pasted: it is not wrapped, however long it is."""
        self.console.print(Text(line), soft_wrap=True)

    def working(self, what: str, share: float, detail: str = "") -> None:
        """Moves the line of the work under way.

        Args:
            what: names it; another name begins another work.
            share: 0 to 1; 0: unknown.
            detail: numbers.
        """
        if self._work is None or self._work.what != what:
            self._work = Work(what)
        self._work.share, self._work.detail = share, detail
        self.refresh()

    def refresh(self, *, now: bool = False) -> None:
        """Shows the progress as it is; `now`: also where it was shown a moment ago."""
        if self._live is not None:
            self._live.update(self.moving(), refresh=now)
        elif self._notebook is not None:
            self._notebook.show(self.progress_line, now=now)
        elif not now:
            self.tell(self.progress_line)

    def moving(self) -> RenderableType:
        """Returns what a terminal shows below the lines that stay: the work under way, if only that there is some."""
        return self._work or self._unnamed

    def progress_line(self) -> str:
        """Returns the progress in one line; empty: there is none."""
        return "" if self._work is None else self._work.line()

    def tell(self, line: Callable[[], str], *, now: bool = False) -> None:
        """Prints a line of progress in a log, `LINE_SECONDS` after the last one or `now`."""
        if now or time.monotonic() - self._told > LINE_SECONDS:
            self._told = time.monotonic()
            if text := line():
                self.say(text)


class _NotebookLine:
    """One line of a notebook that is replaced. IPython is there where this is made."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._shown = 0.0

    def show(self, line: Callable[[], str], *, now: bool) -> None:
        """Replaces the line, `NOTEBOOK_SECONDS` after the last time or `now`."""
        if not now and time.monotonic() - self._shown < NOTEBOOK_SECONDS:
            return
        from IPython.display import display

        self._shown, text = time.monotonic(), line()
        if self._handle is not None:
            self._handle.update({"text/plain": text}, raw=True)
        elif text:
            self._handle = display({"text/plain": text}, raw=True, display_id=True)


def _in_notebook() -> bool:
    return Console().is_jupyter


@contextmanager
def progress(what: str) -> Iterator[Callable[..., None]]:
    """Shows rows, rows a second and time on stderr while the block runs; yields what receives rows and share (0..1)."""
    with LiveDisplay(err=True) as display:
        started = time.monotonic()
        display.working(what, 0.0)

        def on_progress(rows: int, share: float = 0.0) -> None:
            speed = rows / max(time.monotonic() - started, 1e-9)
            display.working(what, share, f"{rows:,} rows, {speed:,.0f} rows/s")

        yield on_progress


class RunDisplay(LiveDisplay):
    """Shows one run: a bar below lines that stay."""

    def __init__(self, *, silent: bool = False) -> None:
        super().__init__(silent=silent)
        if silent:
            warnings.simplefilter("ignore")  # the process that speaks has the same ones

    def stepped(self, trial: Trial, report: StepReport, base_loss: float | None) -> None:
        """Moves the bar; without a terminal, prints a line now and then."""
        if self._work is None or self._work.what != trial.name:
            self._work = Work(trial.name, first=report.step / trial.total_steps)
        work = self._work
        work.detail = f"loss {report.loss:.3f}"
        if base_loss is not None:
            work.detail += f" (base {report.loss - base_loss:+.3f})"
        work.detail += f"  lr {report.learning_rate:.2g}  {report.tokens / report.seconds:,.0f} tokens/s"
        work.share, work.count = report.step / trial.total_steps, f"step {report.step}/{trial.total_steps}"
        if self.loudness == VERBOSE:
            self.say(work.line())
        elif trial.finished and self._live is None and self._notebook is None:
            self.tell(work.line, now=True)
        self.refresh()
        if trial.finished:
            self._work = None

    def counted(self, trial: Trial, trainable: Trainable) -> None:
        """Prints what trains."""
        self.say(trainable.sentence(trial.name))

    def evaluated(self, trial: Trial, loss: float, minus_base: float) -> None:
        """Prints each held-out loss."""
        self.say(f"step {trial.step}: held-out loss {loss:.4f} ({minus_base:+.4f} against the untouched base)")

    def conclude(self, finished: Finished, report: Path | None) -> None:
        """Prints how the run ended and what to do next; `report`: its page, where there is one."""
        from peft_study.report.limit_findings import about_sources, few_examples
        from peft_study.statistics import duration

        self.loudness = max(self.loudness, NORMAL)  # these are the results
        folder, best = finished.folder, finished.best_step
        begun = f" (resumed at step {finished.resumed_at})" if finished.resumed_at else ""
        where = f"total time {duration(finished.seconds)}{begun}; losses by step: {folder / 'metrics.jsonl'}"
        if report is not None:
            where += f", as a page: {report}"
        if finished.diverged or finished.after is None:
            self.say(f"WARNING: the run diverged: {finished.diverged}; try a lower learning rate")
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
        for note in (few_examples(finished.examples), about_sources(finished.examples, finished.sources)):
            if note is not None:
                self.say(note["en"])
        self.say(f"{where}; everything else: {folder}")
        self.say(f"adapter: {folder / 'adapter'}")
        for what, command in next_commands(finished.config, folder):
            self.command(f"{what}: {command}")
        if finished.worse:
            self.say(f"WARNING: the run {finished.worse}")


def next_commands(config: TrainConfig, folder: Path) -> list[tuple[str, str]]:
    """Returns what can be done with a finished run, each with the command for it, ready to be pasted into a shell."""
    from peft_study.model.load import MEMORY

    method, data, model = config.method.method, config.data.train, config.model.name
    adapter = folder / "adapter"
    found: list[tuple[str, list[object]]] = [
        ("try it", ["peft-study", "chat", adapter]),
        ("answer a file", ["peft-study", "generate", adapter, "--prompts", "prompts.txt"]),
    ]
    if config.logging.tensorboard:
        found.append(("curves", ["tensorboard", "--logdir", folder / "tensorboard"]))
    if method == "lora":
        found.append(("merge", ["peft-study", "merge", adapter, "-o", f"{folder}_merged"]))
    if method != "full" and not model.startswith(MEMORY) and all(source.take == 1 for source in data):
        sources = [word for source in data for word in ("--data", source.path)]
        study = ["peft-study", "run", "--model", model, *sources, "--methods", method]
        found.append(("a study of its learning rate", [*study]))
    return [(what, shlex.join(map(str, words))) for what, words in found]
