"""``-q`` and ``-v`` of every command that works for a while, and of the program itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from peft_study.display.terminal import QUIET, VERBOSE, set_loudness


def _sets(level: int) -> Callable[[bool], None]:
    def chosen(given: bool) -> None:
        if given:
            set_loudness(level)

    return chosen


def _options(
    quiet: Annotated[
        bool,
        typer.Option(
            "-q", "--quiet", callback=_sets(QUIET), expose_value=False, help="Print only warnings, errors and results."
        ),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "-v",
            "--verbose",
            callback=_sets(VERBOSE),
            expose_value=False,
            help="Print every step and the libraries' own warnings, too.",
        ),
    ] = False,
) -> None:
    """Declares the two options."""


def _made() -> list[Any]:
    """Returns the two options, as typer makes them."""
    declared = typer.Typer(add_completion=False)
    declared.command()(_options)
    return [option for option in typer.main.get_command(declared).params if option.name in ("quiet", "verbose")]


class LoudCommand(TyperCommand):
    """A command that takes them."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.params += _made()


class LoudGroup(TyperGroup):
    """The program, which takes them before the name of a command."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.params += _made()
