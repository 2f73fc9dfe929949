"""The commands: parse, call, print; no logic. Heavy imports stay inside the commands."""

from __future__ import annotations

import sys

import typer
from typer.exceptions import TyperException

from peft_study.cli import adapters, data, run, study_commands, study_file
from peft_study.errors import PeftStudyError, UserError

_STOPPED = 130

app = typer.Typer(
    help="Choose and tune parameter-efficient fine-tuning: every method trained fairly on one frozen base.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(data.app, name="data")
run.register(app)
study_file.register(app)
study_commands.register(app)
adapters.register(app)


def main() -> None:
    """Runs the command line; a user's mistake is one line on stderr and exit code 2."""
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        _fail(str(error), 2)
    except TyperException as error:
        _fail(error.format_message(), 2)
    except PeftStudyError as error:
        _fail(str(error), _STOPPED)
    except (KeyboardInterrupt, typer.Abort):
        _fail("stopped", _STOPPED)
    else:
        if code == _STOPPED:  # what typer makes of Ctrl-C in a command
            _fail("stopped", _STOPPED)
        sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> None:
    print(f"error: {message}" if code == 2 else message, file=sys.stderr)
    sys.exit(code)
