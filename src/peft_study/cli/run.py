"""``peft-study run | finetune``: parse, call, print."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from peft_study.study.yaml_file import SettingsFile


def run(
    study: Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="What to compare.", show_default=False)],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the study in its output folder.")] = False,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps a trial, instead of the file's.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps, instead of the file's.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto, float32, bfloat16 or float16, instead of the file's.")
    ] = None,
    slots: Annotated[
        str | None, typer.Option(help="Trials side by side: a number, or auto, instead of the file's.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes on this machine, one a GPU; on CPU they share its threads.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(metavar="auto|ADDRESS", help="Run the trials on a Ray cluster, with a worker on each device."),
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder, instead of the file's.")] = None,
    go_on: Annotated[
        bool, typer.Option("--continue", help="The study file changed: new trials under it, beside those of before.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print trials, tokens, memory and time it would take; write nothing.")
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any setting instead of the file's, as in --set methods.lora.rank='[8, 16]'; may be repeated.",
        ),
    ] = None,
) -> None:
    """Search every method's settings on one model and one data set, retrain the best, and compare them."""
    import os

    from peft_study.display.terminal import quiet_libraries
    from peft_study.engine.processes import refuse_several_processes
    from peft_study.study.yaml_file import load_yaml

    quiet_libraries()
    refuse_several_processes(os.environ)
    file = load_yaml(study)
    given = {"budget.steps": steps, "model.device": device, "model.dtype": dtype, "slots": slots}
    _set(file, {**given, "workers": workers, "ray": ray, "output": None if output is None else str(output)})
    for assignment in settings or ():
        file.assign(assignment)
    _run(file, where=str(study), overwrite=overwrite, go_on=go_on, dry_run=dry_run)


def _run(file: SettingsFile, *, where: str, overwrite: bool, go_on: bool, dry_run: bool) -> None:
    """Runs the study of a file, or says what it would take; errors name the file's line."""
    from peft_study.config import StudyConfig, validate
    from peft_study.display.study import StudyDisplay, show_estimate
    from peft_study.errors import UserError
    from peft_study.study.dry_run import estimate
    from peft_study.study.run import run_study
    from peft_study.training.interrupt import StopRequest

    config = validate(StudyConfig, file.values, where=where, place=file.place)
    try:
        if dry_run:
            show_estimate(estimate(config, typer.echo))
            return
        with StopRequest().listening() as stop, StudyDisplay() as display:
            finished = run_study(config, file.values, display, stop, overwrite=overwrite, go_on=go_on)
    except UserError as error:
        raise file.pointed(error) from None
    display.conclude(finished)


def _set(file: SettingsFile, given: Mapping[str, object]) -> None:
    """Puts the options in place of the values of the file."""
    if given["budget.steps"] is not None:  # one budget takes the place of another
        file.drop("training.steps")
        file.drop("budget.tokens")
    for key, value in given.items():
        if value is not None:
            file.set(key, value, f"--{key.rpartition('.')[2]}")


def finetune(context: typer.Context) -> None:
    """Train one adapter."""
    import os

    from peft_study.compat.command_line import parse, usage
    from peft_study.compat.finetune import given_arguments, pointed, to_run
    from peft_study.display.terminal import RunDisplay, quiet_libraries
    from peft_study.engine.processes import joined
    from peft_study.errors import UserError
    from peft_study.training.finetune import train
    from peft_study.training.interrupt import StopRequest

    arguments: list[str] = list(context.args)
    if not arguments or {"--help", "-h"} & set(arguments):
        typer.echo(usage())
        return
    quiet_libraries()
    command = parse(arguments, os.environ)
    planned = to_run(command)
    with (
        joined(os.environ) as processes,
        StopRequest().listening() as stop,
        RunDisplay(silent=not processes.writes) as display,
    ):
        for warning in planned.warnings:
            display.warn(warning)
        for note in planned.notes:
            display.say(note)
        try:
            finished = train(
                planned.config,
                given_arguments(command),
                display,
                stop,
                overwrite=planned.overwrite,
                resume_from=planned.resume_from,
                processes=processes,
            )
        except UserError as error:
            raise pointed(error, command) from None
        display.conclude(finished)
    if finished.diverged or finished.harmed:
        raise typer.Exit(1)
