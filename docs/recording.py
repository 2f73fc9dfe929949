"""Records a command in a terminal of 80 columns as an animated SVG; made docs/quickstart.svg.

    pip install pyte
    python docs/recording.py docs/quickstart.svg peft-study run examples/quickstart.yaml

Times are shortened: a frame a change of the screen, `FRAMES` of them at most, and the last one stays.
"""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from html import escape
from pathlib import Path

import pyte

COLUMNS, ROWS = 80, 44
FRAMES, SECONDS, LAST = 40, 0.35, 12.0
"""Frames at most, seconds of each, and of the last."""
WIDTH, HEIGHT, MARGIN = 8.4, 18, 14
"""Of a character, in pixels, and around the text."""
COLOURS = {"default": "#d8dee9", "red": "#bf616a", "green": "#a3be8c", "brown": "#ebcb8b", "yellow": "#ebcb8b",
           "blue": "#81a1c1", "magenta": "#b48ead", "cyan": "#88c0d0"}  # fmt: skip

Line = list[tuple[int, str, str]]
"""Column, style and text of each run of equal characters."""


def record(command: list[str]) -> list[list[Line]]:
    """Runs the command in a terminal and returns the screens it showed, at most four a second."""
    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.ByteStream(screen)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    stream.feed(f"$ {' '.join(command)}\r\n".encode())
    frames, shown = [lines(screen)], 0.0
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(COLUMNS), "LINES": str(ROWS)}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        while True:
            ready, _, _ = select.select([ours], [], [], 0.2)
            try:
                data = os.read(ours, 65536) if ready else b""
            except OSError:  # the terminal is closed
                break
            stream.feed(data)
            if time.monotonic() - shown > 0.25 and lines(screen) != frames[-1]:
                frames.append(lines(screen))
                shown = time.monotonic()
            if not ready and process.poll() is not None:
                break
    if process.returncode:
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    return [*frames, lines(screen)]


def lines(screen: pyte.Screen) -> list[Line]:
    """Returns what a screen shows."""
    found = []
    for row in range(ROWS):
        runs: Line = []
        for column in range(COLUMNS):
            char = screen.buffer[row][column]
            style = f"{COLOURS.get(char.fg, COLOURS['default'])}{' bold' if char.bold else ''}"
            if runs and runs[-1][1] == style:
                runs[-1] = (runs[-1][0], style, runs[-1][2] + char.data)
            else:
                runs.append((column, style, char.data))
        bare = [(column + len(text) - len(text.lstrip()), style, text.strip()) for column, style, text in runs]
        found.append([run for run in bare if run[2]])
    return found


def svg(frames: list[list[Line]]) -> str:
    """Returns the animation: each frame is visible for its part of the time."""
    if len(frames) > FRAMES:
        chosen = [round(i * (len(frames) - 1) / (FRAMES - 1)) for i in range(FRAMES)]
        frames = [frames[i] for i in chosen]
    total = SECONDS * (len(frames) - 1) + LAST
    width, height = COLUMNS * WIDTH + 2 * MARGIN, ROWS * HEIGHT + 2 * MARGIN
    styles, groups = [], []
    for number, frame in enumerate(frames):
        begin, end = 100 * SECONDS * number / total, 100 * SECONDS * (number + 1) / total
        last = number == len(frames) - 1
        hide = "" if last else f"{end:.3f}%{{visibility:hidden}}"
        styles.append(
            f"@keyframes f{number}{{0%{{visibility:hidden}}{begin:.3f}%{{visibility:visible}}{hide}"
            f"100%{{visibility:{'visible' if last else 'hidden'}}}}}"
            f"#f{number}{{animation:f{number} {total:.1f}s step-end infinite}}"
        )
        # where nothing is animated, the last frame is seen
        groups.append(f'<g id="f{number}" visibility="{"visible" if last else "hidden"}">{_texts(frame)}</g>')
    font = "font-family:ui-monospace,'DejaVu Sans Mono',Menlo,Consolas,monospace;font-size:14px;white-space:pre"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}">'
        f"<style>text{{{font}}}{''.join(styles)}</style>"
        f'<rect width="100%" height="100%" rx="8" fill="#242933"/>{"".join(groups)}</svg>\n'
    )


def _texts(frame: list[Line]) -> str:
    found = []
    for row, runs in enumerate(frame):
        for column, style, text in runs:
            colour, _, bold = style.partition(" ")
            x, y = MARGIN + column * WIDTH, MARGIN + (row + 0.75) * HEIGHT
            weight = ' font-weight="bold"' if bold else ""
            length = f' textLength="{len(text) * WIDTH:.1f}" lengthAdjust="spacingAndGlyphs"'
            found.append(f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}"{weight}{length}>{escape(text)}</text>')
    return "".join(found)


if __name__ == "__main__":
    target, *words = sys.argv[1:]
    Path(target).write_text(svg(record(words)), encoding="utf-8")
