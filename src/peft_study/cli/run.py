"""``peft-study run | finetune``: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Adds the commands to the program."""
    app.command()(run)
    app.command(
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []},
        help="Train one adapter; takes the flags of open-instruct's finetune.py and of accelerate launch.",
    )(finetune)


def run(
    study: Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="What to compare.", show_default=False)],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a study that lies in its output folder.")
    ] = False,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps a trial, instead of the file's.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps, instead of the file's.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="auto, float32, bfloat16 or float16, instead of the file's.")
    ] = None,
    slots: Annotated[
        str | None, typer.Option(help="Trials side by side: a number, or auto, instead of the file's.")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder, instead of the file's.")] = None,
    go_on: Annotated[
        bool, typer.Option("--continue", help="The study file changed: new trials under it, beside those of before.")
    ] = False,
) -> None:
    """Search every method's settings on one model and one data set, retrain the best, and compare them."""
    import os

    from peft_study.cli.display import quiet_libraries
    from peft_study.cli.study_display import StudyDisplay
    from peft_study.cli.yaml_file import load_yaml, override
    from peft_study.config import StudyConfig, validate
    from peft_study.engine.processes import refuse_several_processes
    from peft_study.study.conduct import run_study
    from peft_study.study.stop import StopRequest

    quiet_libraries()
    refuse_several_processes(os.environ)
    given = load_yaml(study)
    override(given, "training.steps", steps)
    override(given, "model.device", device)
    override(given, "model.dtype", dtype)
    override(given, "slots", slots)
    override(given, "output", None if output is None else str(output))
    config = validate(StudyConfig, given, where=str(study))
    with StopRequest().listening() as stop, StudyDisplay() as display:
        finished = run_study(config, given, display, stop, overwrite=overwrite, go_on=go_on)
    display.conclude(finished)


def finetune(context: typer.Context) -> None:
    """Train one adapter."""
    import os

    from peft_study.cli.display import RunDisplay, quiet_libraries
    from peft_study.compat.finetune import said, to_run
    from peft_study.compat.parsing import parse, usage
    from peft_study.engine.processes import joined
    from peft_study.study.single import train
    from peft_study.study.stop import StopRequest

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
        finished = train(
            planned.config,
            said(command),
            display,
            stop,
            overwrite=planned.overwrite,
            resume_from=planned.resume_from,
            processes=processes,
        )
        display.conclude(finished)
    if finished.diverged:
        raise typer.Exit(1)
