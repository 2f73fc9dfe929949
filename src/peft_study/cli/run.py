"""``peft-study run | finetune``: parse, call, print."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from peft_study.storage.yaml_file import SettingsFile


_WITHOUT = "Without a file"
_File = Annotated[
    Path | None,
    typer.Argument(metavar="[STUDY.yaml]", help="What to compare; or give --model and --data.", show_default=False),
]
_Model = Annotated[
    str | None, typer.Option(help=f"{_WITHOUT}: base model, a folder, a hub id, or smollm2-135m-instruct (embedded).")
]
_Data = Annotated[
    list[str] | None,
    typer.Option(metavar="SRC...", help=f"{_WITHOUT}: what `data convert` takes, or skills (embedded)."),
]
_Split = Annotated[str | None, typer.Option(help=f"{_WITHOUT}: split of each SRC, where one has several.")]
_Methods = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME...", help=f"{_WITHOUT}: some of lora, prefix_tuning, prompt_tuning, full."),
]
_Minutes = Annotated[float | None, typer.Option(help=f"{_WITHOUT}: plan trials and steps for so many minutes in all.")]
_Trials = Annotated[int | None, typer.Option(help="Settings a method, instead of the file's.")]
_Steps = Annotated[int | None, typer.Option(help="Optimizer steps a trial, instead of the file's.")]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the study in its output folder.")]
_Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps, instead of the file's.")]
_Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16, instead of the file's.")]
_Slots = Annotated[str | None, typer.Option(help="Trials side by side: a number, or auto, instead of the file's.")]
_Workers = Annotated[
    int | None, typer.Option(help="Processes on this machine, one a GPU; on CPU they share its threads.")
]
_Ray = Annotated[
    str | None,
    typer.Option(metavar="auto|ADDRESS", help="Run the trials on a Ray cluster, with a worker on each device."),
]
_Output = Annotated[Path | None, typer.Option("-o", "--output", help="Folder, instead of the file's.")]
_Continue = Annotated[
    bool, typer.Option("--continue", help="The study file changed: new trials under it, beside those of before.")
]
_DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print trials, tokens, memory and time it would take; write nothing.")
]
_Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Any setting instead of the file's, as in --set methods.lora.rank='[8, 16]'; may be repeated.",
    ),
]


def run(
    study: _File = None,
    model: _Model = None,
    data: _Data = None,
    split: _Split = None,
    methods: _Methods = None,
    trials: _Trials = None,
    steps: _Steps = None,
    minutes: _Minutes = None,
    overwrite: _Overwrite = False,
    device: _Device = None,
    dtype: _Dtype = None,
    slots: _Slots = None,
    workers: _Workers = None,
    ray: _Ray = None,
    output: _Output = None,
    go_on: _Continue = False,
    dry_run: _DryRun = False,
    settings: _Settings = None,
) -> None:
    """Search every method's settings on one model and one data set, retrain the best, and compare them."""
    import os

    from peft_study.api import Study
    from peft_study.display.study import show_estimate
    from peft_study.display.terminal import LiveDisplay, quiet_libraries
    from peft_study.engine.processes import refuse_several_processes
    from peft_study.errors import ConfigError
    from peft_study.storage.yaml_file import load_yaml
    from peft_study.study.without_file import Request, study_file

    quiet_libraries()
    refuse_several_processes(os.environ)
    options = {"budget.trials": trials, "budget.steps": steps, "model.device": device, "model.dtype": dtype}
    words = [word for key, value in {"--device": device, "--dtype": dtype}.items() if value for word in (key, value)]
    words += [word for assignment in settings or () for word in ("--set", assignment)]
    options |= {"slots": slots, "workers": workers, "ray": ray, "output": None if output is None else str(output)}
    if study is None:
        if not model or not data:
            what, remedy = "no study", "give STUDY.yaml, or --model and --data"
            raise ConfigError(what, remedy=remedy)
        asked = (model, tuple(data), split, tuple(methods or ()), trials, steps, minutes, tuple(words))
        with LiveDisplay() as display:
            change = partial(_change, options=options, assignments=settings or ())
            file = study_file(Request(*asked, output), change, display.say, overwrite=overwrite, write=not dry_run)
    else:
        alone = {"model": model, "data": data, "split": split, "methods": methods, "minutes": minutes}
        _refuse_no_study(study, [name for name, value in alone.items() if value is not None])
        file = load_yaml(study)
        _change(file, options, settings or ())
    found = Study.from_file(file)
    if dry_run:
        show_estimate(found.estimate())
    else:
        found.run(overwrite=overwrite, extend=go_on)


def _refuse_no_study(study: Path, alone: Sequence[str]) -> None:
    """Refuses options that go without a study file beside one, and data in place of one (a study may be .json)."""
    from peft_study.data.readers import COMPRESSED_SUFFIXES, data_suffix
    from peft_study.errors import ConfigError

    settings = {
        "model": "model.name=...",
        "data": "data.train=...",
        "split": "data.split=...",
        "methods": "'methods={lora: {}}'",
        "minutes": "budget.minutes=...",
    }
    if alone:
        remedy = f"leave it out, or change the file (--set {settings[alone[0]]})"
        raise ConfigError(f"goes without a study file, but {study} is given", where=f"--{alone[0]}", remedy=remedy)
    if study.suffix != ".json" and (data_suffix(study) or study.suffix in COMPRESSED_SUFFIXES):
        remedy = f"`peft-study run --model MODEL --data {study}`"
        raise ConfigError("is data, not a study file", where=str(study), remedy=remedy)


def _change(file: SettingsFile, options: Mapping[str, object], assignments: Sequence[str]) -> None:
    """Puts the options and the assignments of --set in place of the values of the file."""
    if options["budget.steps"] is not None:  # one budget takes the place of another
        file.drop("training.steps")
        file.drop("budget.tokens")
    for key, value in options.items():
        if value is not None:
            file.set(key, value, f"--{key.rpartition('.')[2]}")
    for assignment in assignments:
        file.assign(assignment)


def finetune(context: typer.Context) -> None:
    """Train one adapter."""
    import os

    from peft_study.compat.command_line import parse, usage
    from peft_study.compat.finetune import given_arguments, pointed, to_run
    from peft_study.display.terminal import QUIET, VERBOSE, RunDisplay, quiet_libraries, set_loudness
    from peft_study.engine.processes import joined
    from peft_study.errors import UserError
    from peft_study.report.writing import try_page
    from peft_study.training.finetune import train
    from peft_study.training.interrupt import StopRequest

    arguments: list[str] = list(context.args)
    if not arguments or {"--help", "-h"} & set(arguments):
        typer.echo(usage())
        return
    if _is_settings_file(Path(arguments[0])):
        quiet_libraries()
        _finetune_file(arguments)
        return
    command = parse(arguments, os.environ)
    if (quiet := bool(command.launch.get("quiet"))) or command.extra.verbose:
        set_loudness(QUIET if quiet else VERBOSE)
    quiet_libraries()
    planned = to_run(command)
    if command.arguments.wandb_entity is not None:
        os.environ["WANDB_ENTITY"] = command.arguments.wandb_entity
    with (
        joined(os.environ) as processes,
        StopRequest().listening() as stop,
        RunDisplay(silent=not processes.writes) as display,
    ):
        for warning in planned.warnings:
            display.say(f"WARNING: {warning}")
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
        display.conclude(finished, try_page(finished.folder, display.say) if processes.writes else None)
    if finished.diverged or finished.harmed:
        raise typer.Exit(1)


def _is_settings_file(path: Path) -> bool:
    """Returns whether a file holds settings in sections, as recommended.yaml, and not open-instruct's arguments.

    Raises:
        ConfigError: when it is a study.
    """
    import shlex

    from peft_study.errors import ConfigError, UserError
    from peft_study.storage.yaml_file import load_yaml

    if path.suffix not in (".yaml", ".yml"):
        return False
    try:
        values = load_yaml(path).values
    except UserError:
        return False  # the reader of arguments says what is wrong
    if "methods" in values:
        what, remedy = "is a study of several settings", f"peft-study run {shlex.quote(str(path))}"
        raise ConfigError(what, where=str(path), remedy=remedy)
    return "method" in values


def _finetune_file(arguments: list[str]) -> None:
    """Trains the adapter of a file of settings, such as a study's recommended.yaml."""
    from argparse import ArgumentParser
    from typing import NoReturn

    from peft_study.api import train_file
    from peft_study.errors import ConfigError
    from peft_study.storage.yaml_file import load_yaml

    class Parser(ArgumentParser):
        def error(self, message: str) -> NoReturn:
            remedy = "beside FILE.yaml there are -o, --overwrite_output_dir, and --set KEY=VALUE for its settings"
            raise ConfigError(message, where=arguments[0], remedy=remedy)

    parser = Parser("peft-study finetune", description="Train the setting of a file.", allow_abbrev=False)
    parser.add_argument("file", metavar="FILE.yaml", help="settings of one run, as a study's recommended.yaml has them")
    parser.add_argument("-o", "--output_dir", help="folder, instead of the file's")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="replace the run in that folder")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting; may be repeated")
    given = parser.parse_args(arguments)
    file = load_yaml(Path(given.file))
    if given.output_dir is not None:
        file.set("output", given.output_dir, "--output_dir")
    for assignment in given.set:
        file.assign(assignment)
    finished = train_file(file, overwrite=given.overwrite_output_dir)
    if finished.diverged or finished.harmed:
        raise typer.Exit(1)
