"""Work under way as one line: what, a bar, how far, time spent, time left; and where that line moves on a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.control import Control
from rich.live import Live
from rich.live_render import LiveRender
from rich.segment import Segment
from rich.text import Text

SHOWN_AFTER = 1.0
"""Seconds; what is done by then shows no bar."""
_LEAST_SHARE = 0.01
"""From here on the time left is estimated."""
_BAR, _LEAST_BAR = 24, 8
_SPINNER = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"


class Work:
    """A piece of work under way.

    Attributes:
        share: of it that is done, 0 to 1; 0: nobody knows, and a spinner stands for the bar.
        count: how far it is in its own unit (``12/100``), instead of a percentage.
        detail: what else is known; on a narrow terminal it gets a line of its own.
        left: seconds left, where somebody knows them better than this class; None: estimated from the share.

    Args:
        what: the work, in a few words.
        first: share that was done before; it took none of the time that is shown.
        clock: returns seconds.
    """

    def __init__(self, what: str, first: float = 0.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.what, self._first, self._clock = what, first, clock
        self.share, self.count, self.detail = first, "", ""
        self.left: float | None = None
        self.started = clock()

    @property
    def elapsed(self) -> float:
        """Seconds since it began."""
        return self._clock() - self.started

    def line(self) -> str:
        """Returns it as a line of a log."""
        return f"{self.what}: {', '.join(part for part in (self._count(), self.detail, self._times()) if part)}"

    def text(self, width: int, *, ascii_only: bool = False) -> str:
        """Returns it as one line of a terminal, or two, of at most `width` columns."""
        count, times = self._count(), self._times()
        numbers = "  ".join(part for part in (count, times) if part)
        bare = cell_len(self.what) + len(numbers) + 4
        beside = f"  {self.detail}" if self.detail and bare + len(self.detail) + 2 + _LEAST_BAR <= width else ""
        below = f"\n  {self.detail}" if self.detail and not beside else ""
        below = below if len(below) <= width else below[: width - 1]
        room = min(_BAR, width - bare - len(beside))
        if not self.share:
            marks = "-\\|/" if ascii_only else _SPINNER
            first = f"{marks[int(self._clock() * 8) % len(marks)]} {self.what}  {numbers}{beside}"
        elif room >= _LEAST_BAR:
            done, rest = "#-" if ascii_only else "━╌"
            full = round(min(self.share, 1.0) * room)
            first = f"{self.what}  {done * full}{rest * (room - full)}  {numbers}{beside}"
        else:
            most = max(width - len(numbers) - 2, 0)
            name = self.what if cell_len(self.what) <= most else set_cell_size(self.what, max(most - 3, 0)) + "..."
            first = f"{name}  {numbers}"
        return (first if cell_len(first) <= width else set_cell_size(first, width)) + below

    def _count(self) -> str:
        return self.count or (f"{self.share:.0%}" if self.share else "")

    def _times(self) -> str:
        left, done = self.left, self.share - self._first
        if left is None and done >= _LEAST_SHARE and self.elapsed >= SHOWN_AFTER:
            left = self.elapsed * (1 - min(self.share, 1.0)) / done
        return f"{clock(self.elapsed)} elapsed" + ("" if left is None else f", {clock(left)} left")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Returns a new drawing at each refresh, as wide as the terminal is then."""
        if self.elapsed >= SHOWN_AFTER:
            text = self.text(options.max_width, ascii_only=options.ascii_only)
            yield Text(text, no_wrap=True, overflow="crop")


def clock(seconds: float) -> str:
    """Returns seconds as 0:05 or 1:02:03."""
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class SteadyLive(Live):
    """rich's Live, cropped to the terminal, that leaves nothing behind when it ends or the terminal gets narrower."""

    def __init__(self, console: Console, *, redirect_stdout: bool, redirect_stderr: bool) -> None:
        super().__init__(
            console=console,
            transient=True,
            vertical_overflow="crop",
            redirect_stdout=redirect_stdout,
            redirect_stderr=redirect_stderr,
        )
        self._live_render = _Drawing(console)

    def stop(self) -> None:
        """Removes the moving part."""
        self.update(Group())  # the last drawing is not cropped, and could not be removed from a low terminal
        super().stop()


class _Drawing(LiveRender):
    """What was drawn last. A terminal that gets narrower wraps its lines: then it is as many rows higher."""

    def __init__(self, console: Console) -> None:
        super().__init__(Group(), vertical_overflow="crop")
        self._console, self._width, self._lengths = console, 0, [0]

    def position_cursor(self) -> Control:
        """Returns what moves the cursor to the first row of the drawing, and erases it."""
        width = self._console.width
        if self._shape is not None and width < self._width:
            self._shape = width, sum(max(1, -(-length // width)) for length in self._lengths)
        return super().position_cursor()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draws it, and keeps the length of each line."""
        self._width, self._lengths = options.max_width, [0]
        for segment in super().__rich_console__(console, options):
            if segment == Segment.line():
                self._lengths.append(0)
            elif isinstance(segment, Segment):
                self._lengths[-1] += segment.cell_length
            yield segment
