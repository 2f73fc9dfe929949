"""Progress: a line that fits, times that are right, nothing left behind; on terminals, in notebooks and in logs."""

from __future__ import annotations

import io
import re
import sys
import types
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console
from rich.control import ControlType
from rich.text import Text

from peft_study.display import terminal
from peft_study.display.progress import SteadyLive, Work, clock
from peft_study.display.terminal import NORMAL, QUIET, VERBOSE, LiveDisplay, progress, set_loudness, wrapped


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Returns the clock of all displays."""
    found = Clock()
    monkeypatch.setattr(terminal.time, "monotonic", found)
    monkeypatch.setattr(Work.__init__, "__defaults__", (0.0, found))
    return found


@pytest.fixture(autouse=True)
def _normal_again() -> Any:
    yield
    set_loudness(NORMAL)


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, width: int = 80) -> io.StringIO:
    """Makes displays take a text for a terminal, and returns it."""
    file = io.StringIO()
    made = Console(file=file, force_terminal=True, width=width, height=24, highlight=False, markup=False, emoji=False)
    monkeypatch.setattr(terminal, "console", lambda **_: made)
    return file


def test_times() -> None:
    assert [clock(seconds) for seconds in (0, 59.6, 61, 3599.4, 3661)] == ["0:00", "1:00", "1:01", "59:59", "1:01:01"]


def test_left_is_estimated_from_what_was_done_here(seconds: Clock) -> None:
    work = Work("training", first=0.5, clock=seconds)
    seconds.now += 60
    work.share = 0.75
    assert work.line() == "training: 75%, 1:00 elapsed, 1:00 left"
    work.share, work.left, work.count = 0.8, 7.0, "step 8/10"
    assert work.line() == "training: step 8/10, 1:00 elapsed, 0:07 left"
    assert Work("nothing known", clock=seconds).line() == "nothing known: 0:00 elapsed"


@given(
    st.integers(20, 160),
    st.text("ab 数据", min_size=1, max_size=90),
    st.floats(0, 1),
    st.text("cd", max_size=70),
    st.integers(0, 10**6),
)
def test_its_lines_fit_whatever_they_say(width: int, what: str, share: float, detail: str, elapsed: int) -> None:
    times = Clock()
    work = Work(what, clock=times)
    work.share, work.detail = share, detail
    times.now += elapsed
    for line in work.text(width).split("\n"):
        assert cell_len(line) <= width
    if width >= 80 and cell_len(what) < 40:
        assert "elapsed" in work.text(width)
        assert clock(elapsed) in work.text(width)


def test_in_80_columns_the_numbers_of_a_run_are_whole(seconds: Clock) -> None:
    work = Work("prefix_tuning", clock=seconds)
    work.share, work.count = 0.5, "step 1000/2000"
    work.detail = "loss 12.345 (base -10.123)  lr 0.00012  123,456 tokens/s"
    seconds.now += 3700
    text = work.text(80)
    assert work.detail in text
    assert "step 1000/2000  1:01:40 elapsed, 1:01:40 left" in text
    assert max(map(len, text.split("\n"))) <= 80


@given(st.lists(st.text("abc-/", max_size=30), max_size=30).map(" ".join), st.integers(1, 60))
def test_lines_wrap_at_spaces_alone(line: str, width: int) -> None:
    rows = wrapped(line, width).split("\n")
    assert " ".join(rows) == line
    assert all(len(row) <= width or " " not in row.strip() for row in rows)


def test_a_log_has_a_line_every_ten_seconds_with_elapsed_and_left(
    seconds: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with LiveDisplay() as display:
        for done in range(100):
            display.say("tokenising", done / 100)
            seconds.now += 1
        display.say("tokenising", 1.0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "tokenising"
    assert len(lines) == 11
    assert lines[1] == "tokenising: 11%, 0:11 elapsed, 1:29 left"
    assert lines[-1] == "tokenising: done after 1:40"
    assert "\x1b" not in "".join(lines)


def test_what_is_quick_says_one_line_in_a_log_and_none_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with LiveDisplay() as display:
        display.say("loading", 0.0)
        display.say("loading", 1.0)
    with progress("converting") as on_progress:
        on_progress(10, 0.5)
    assert capsys.readouterr() == ("loading\n", "")


def test_a_terminal_shows_a_bar_that_disappears(seconds: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    file = on_a_terminal(monkeypatch)
    with LiveDisplay() as display:
        live = display._live
        assert live is not None
        display.say("tokenising", 0.0)
        live.refresh()
        assert "tokenising" not in file.getvalue()  # it may be over within a second
        seconds.now += 30
        display.say("tokenising", 0.25)
        live.refresh()
        shown = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", file.getvalue()).split("\r")[-1]
        assert shown.startswith("tokenising  ━━━━━━╌")
        assert shown.endswith("25%  0:30 elapsed, 1:30 left")
        display.say("tokenising", 1.0)
    last = file.getvalue().rpartition("1:30 left")[2]
    assert last.startswith("\r\x1b[2K")  # the bar is erased
    assert re.sub(r"\x1b\[[\d;?]*[a-zA-Z]|\r", "", last) == "tokenising\n"  # and the line stays


def test_warnings_are_coloured_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    LiveDisplay().say("WARNING: look out")
    assert capsys.readouterr().out == "WARNING: look out\n"
    file = on_a_terminal(monkeypatch)
    LiveDisplay().say("WARNING: look out")
    assert "\x1b[1;33mWARNING" in file.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    file = on_a_terminal(monkeypatch)
    LiveDisplay().say("WARNING: look out")
    assert "WARNING" in file.getvalue()
    assert not re.search(r"\x1b\[[\d;]*3\dm", file.getvalue())


def test_quiet_keeps_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    set_loudness(QUIET)
    with LiveDisplay() as display:
        display.say("a note")
        display.say("loading", 0.0)
        display.say("loading", 1.0)
        display.say("WARNING: look out")
    assert capsys.readouterr().out == "WARNING: look out\n"
    set_loudness(VERBOSE)
    assert LiveDisplay().loudness == VERBOSE


def ups(live: SteadyLive) -> int:
    """Returns how many rows the cursor goes up before the next drawing."""
    codes = live._live_render.position_cursor().segment.control or ()
    return sum(code[0] is ControlType.CURSOR_UP for code in codes)


def test_a_narrower_terminal_wraps_what_was_drawn_and_all_of_it_is_removed() -> None:
    output = Console(file=io.StringIO(), force_terminal=True, width=80, height=24)
    live = SteadyLive(output, redirect_stdout=False, redirect_stderr=False)
    live._live_render.set_renderable(Text("x" * 80 + "\n" + "y" * 30 + "\n\n" + "z" * 45))
    output.print(live._live_render)
    assert ups(live) == 3
    output.width = 40
    assert ups(live) == 2 + 1 + 1 + 2 - 1
    output.width = 100
    live._live_render.set_renderable(Text("x" * 80))
    output.print(live._live_render)
    output.width = 120
    assert ups(live) == 0  # nothing is wrapped where there is more room


class Handle:
    """A line of a notebook."""

    def __init__(self, shown: list[str]) -> None:
        self._shown = shown

    def update(self, data: dict[str, str], *, raw: bool) -> None:
        assert raw
        self._shown.append(data["text/plain"])


def test_a_notebook_has_one_line_that_is_replaced(
    seconds: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    displayed: list[str] = []
    updated: list[str] = []

    def display(data: dict[str, str], *, raw: bool, display_id: bool) -> Handle:
        assert raw
        assert display_id
        displayed.append(data["text/plain"])
        return Handle(updated)

    module: Any = types.ModuleType("IPython.display")
    module.display = display
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")  # the output of newer kernels takes itself for a terminal, too
    with LiveDisplay() as shown:
        assert shown._live is None
        for done in range(100):
            shown.say("tokenising", done / 100)
            seconds.now += 0.1
        shown.say("tokenising", 1.0)
    assert displayed == ["tokenising: 0:00 elapsed"]
    assert 10 < len(updated) < 25
    assert updated[-2:] == ["", ""]
    assert "tokenising: 48%, 0:05 elapsed, 0:05 left" in updated
    assert capsys.readouterr().out == "tokenising\n"
