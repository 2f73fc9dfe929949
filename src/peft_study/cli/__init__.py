"""The commands: parse, call, print; no logic. Heavy imports stay inside the commands."""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Callable

import typer
from typer.exceptions import TyperException

from peft_study.cli import adapters, data, doctor, evaluate, report, run, study_commands
from peft_study.cli.loudness import LoudCommand, LoudGroup
from peft_study.display.terminal import NORMAL, echo, set_loudness
from peft_study.errors import ConfigError, PeftStudyError, UserError

_PATHS = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM)
"""The system's errors about a path that cannot be used."""

_STOPPED = 130

app = typer.Typer(
    help="Choose and tune parameter-efficient fine-tuning: every method trained fairly on one frozen base.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    cls=LoudGroup,
)
app.add_typer(data.app, name="data")
app.command(cls=LoudCommand)(run.run)
app.command(
    # its arguments are parsed by `compat`
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
    help="Train one adapter; takes the flags of open-instruct's finetune.py and of accelerate launch.",
)(run.finetune)
app.command(
    # behind `finetune` stand that command's arguments
    cls=LoudCommand,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
)(doctor.doctor)
COMMANDS: dict[str, Callable[..., None]] = {
    "init": study_commands.init,
    "schema": study_commands.schema,
    "status": study_commands.status,
    "list": study_commands.list_trials,
    "show": study_commands.show,
    "compare": study_commands.compare,
    "report": report.report,
    "rerun": study_commands.rerun,
    "clean": study_commands.clean,
    "merge": adapters.merge,
    "generate": adapters.generate,
    "chat": adapters.chat,
    "evaluate": evaluate.evaluate,
}
LOUD = ("init", "rerun", "merge", "generate", "evaluate")
"""Those of them that work for a while, and so take -q and -v; the others print what they were asked for."""
for name, command in COMMANDS.items():
    app.command(name, cls=LoudCommand if name in LOUD else None)(command)


def main() -> None:
    """Runs the command line; a user's mistake is one line on stderr and exit code 2."""
    set_loudness(NORMAL)
    try:
        _refuse_empty(sys.argv[1:])
        code = app(_repeated(sys.argv[1:]), standalone_mode=False)
    except UserError as error:
        _fail(str(error), 2)
    except TyperException as error:
        _fail(error.format_message(), 2)
    except PeftStudyError as error:
        _fail(str(error), _STOPPED)
    except OSError as error:  # from looking up a path that the user gave
        if error.errno not in _PATHS or error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}; give another path", 2)
    except (KeyboardInterrupt, typer.Abort):
        _fail("stopped", _STOPPED)
    else:
        if code == _STOPPED:  # Ctrl-C in a command, through typer
            _fail("stopped", _STOPPED)
        sys.exit(code if isinstance(code, int) else 0)


def _refuse_empty(words: list[str]) -> None:
    """Refuses an empty word, as from an unset shell variable: as a path it would mean the current folder.

    `finetune` checks its own arguments, as some may be empty.

    Raises:
        ConfigError: naming the option it belongs to.
    """
    if _command(words) == "finetune":
        return
    for before, word in zip(["", *words], words, strict=False):
        if not word.strip() or re.fullmatch(r"--?[\w-]+=\s*", word):
            option = word.partition("=")[0].strip() or (before if before.startswith("-") else "")
            where = option or (f"what follows {before}" if before else None)
            raise ConfigError("is empty" if where else "an argument is empty", where=where, remedy="give a value")


def _command(words: list[str]) -> str | None:
    """Returns the name of the command, before which -q and -v may stand."""
    return next((word for word in words if not word.startswith("-")), None)


_SEVERAL = ("--methods", "--data")
"""Options of `run` that take several words, as in ``--methods lora prompt_tuning``."""


def _repeated(words: list[str]) -> list[str]:
    """Returns the words with such an option before each of its values, which is the form that typer reads.

    Raises:
        ConfigError: when it has none.
    """
    if _command(words) != "run":
        return words
    for word, value in zip(words, [*words[1:], "-"], strict=True):
        if word in _SEVERAL and value.startswith("-"):
            raise ConfigError("is given without a value", where=word, remedy="give one or several")
    found: list[str] = []
    option: str | None = None
    for word in words:
        if word.startswith("-"):
            option = word if word in _SEVERAL else None
            found += [] if option else [word]
        elif option:
            found += [option, word]
        else:
            found.append(word)
    return found


def _fail(message: str, code: int) -> None:
    echo(f"error: {message}" if code == 2 else message, err=True)
    sys.exit(code)
