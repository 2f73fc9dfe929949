"""``peft-study doctor``: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def doctor(
    context: typer.Context,
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="WHAT",
            help="Study file; folder of a study, of a run or of an adapter; log of another tool (trainer_state.json, "
            "TensorBoard events, JSON lines, CSV) or its folder; or `finetune` and its arguments.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, in both languages.")] = False,
    lang: Annotated[str, typer.Option(help="en or zh.")] = "en",
    base: Annotated[
        str | None, typer.Option(help="Base model of an adapter's folder: a folder.", show_default=False)
    ] = None,
    columns: Annotated[
        list[str] | None,
        typer.Option("--map", metavar="NAME=COL", help="Column of a log: loss=COL, step=COL.", show_default=False),
    ] = None,
    training_args: Annotated[
        Path | None,
        typer.Option("--training-args", help="JSON or YAML with the settings behind a log.", show_default=False),
    ] = None,
    checks: Annotated[bool, typer.Option("--checks", help="List all checks instead.")] = False,
) -> None:
    """Say what is wrong with a training run: before it starts, while it runs, after its end. Exit code 1: something."""
    import json
    import shutil

    from peft_study.doctor.readers.log_text import SUBJECTS
    from peft_study.doctor.rule import table_of_checks
    from peft_study.errors import ConfigError, nearest
    from peft_study.report.wording import LANGUAGES
    from peft_study.study.diagnose import diagnose

    if lang not in LANGUAGES:
        raise ConfigError(f"unknown {lang!r}", where="--lang", remedy=nearest(lang, LANGUAGES))
    if checks:
        typer.echo(table_of_checks(), nl=False)
        return
    if what is None:
        remedy = f"{SUBJECTS}; --help tells more"
        raise ConfigError("is not given", where="WHAT", remedy=remedy)
    if context.args and what != "finetune":
        names = [option for parameter in context.command.params for option in parameter.opts]
        raise ConfigError("is no option of doctor", where=context.args[0], remedy=nearest(context.args[0], names))
    found = diagnose(
        [what, *context.args] if what == "finetune" else what,
        base=base,
        training_args=training_args,
        columns=_columns(columns or []),
    )
    if as_json:
        typer.echo(json.dumps(found.json(), indent=1, ensure_ascii=False))
    else:
        typer.echo(found.text(lang, width=min(shutil.get_terminal_size().columns, 120)))
    raise typer.Exit(1 if found.wrong else 0)


def _columns(given: list[str]) -> dict[str, str]:
    """Returns the columns of a log by what they mean."""
    from peft_study.errors import ConfigError

    found = {}
    for word in given:
        name, equals, column = word.partition("=")
        if not equals or not name or not column:
            raise ConfigError(f"{word!r} is not NAME=COLUMN", where="--map", remedy="as in --map loss=train/loss")
        found[name] = column
    return found
