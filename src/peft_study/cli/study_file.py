"""``peft-study init | schema``: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peft_study.model.embedded import EMBEDDED


def register(app: typer.Typer) -> None:
    """Adds the commands to the program."""
    app.command()(init)
    app.command()(schema)


def init(
    data: Annotated[
        list[str],
        typer.Option(
            help="What `data convert` takes, or skills (embedded); may be repeated.", metavar="SRC", show_default=False
        ),
    ],
    model: Annotated[str, typer.Option(help="Base model: folder, hub id, or the embedded one.")] = EMBEDDED,
    output: Annotated[Path, typer.Option("-o", "--output", help="Study file to write.")] = Path("study.yaml"),
    split: Annotated[str | None, typer.Option(help="Split to take of each SRC; needed where one has several.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file that is there.")] = False,
) -> None:
    """Write a commented study file for a model and data, with every setting in it."""
    import shlex

    from peft_study.cli.data import progress
    from peft_study.cli.display import quiet_libraries
    from peft_study.storage.files import refuse_existing, refuse_unwritable
    from peft_study.study.template import WHY_BOS, look, write_study_file

    quiet_libraries()
    refuse_existing(output, overwrite=overwrite)
    refuse_unwritable(output)
    with progress("reading") as on_progress:
        start = look(model, data, split=split, on_progress=on_progress)
    write_study_file(output, start)
    typer.echo(f"a study of {', '.join(data)} ({start.rows}) -> {output}")
    if start.add_bos:
        typer.echo(f"add_bos: true, since {WHY_BOS}")
    typer.echo(f"look through it, then: peft-study run {shlex.quote(str(output))}")


def schema(
    output: Annotated[Path | None, typer.Option("-o", "--output", help="File to write; left out: printed.")] = None,
) -> None:
    """Print the JSON schema of a study file, with which an editor completes and checks one."""
    from peft_study.config.schema import schema_text
    from peft_study.storage.files import atomic_writer, made_folder

    if output is None:
        typer.echo(schema_text(), nl=False)
        return
    with made_folder(output.parent), atomic_writer(output) as file:
        file.write(schema_text())
    typer.echo(f"schema of a study file -> {output}")
