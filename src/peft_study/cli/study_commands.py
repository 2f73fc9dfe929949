"""``peft-study init | schema | status | list | show | compare | rerun | clean``: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from peft_study.model.embedded import EMBEDDED


def _folder(of: str) -> Any:
    """Returns the argument that names a folder of what a command looks at."""
    where = f"Output folder of {of}; left out: the current folder, or the only study under runs/."
    return typer.Argument(metavar="[STUDY_FOLDER]", help=where, show_default=False)


_Folder = Annotated[Path | None, _folder("a study or run")]
_Study = Annotated[
    Path | None,
    typer.Option("-s", "--study", help="Folder of the study; left out: as for `status`.", show_default=False),
]
_Trial = Annotated[
    str, typer.Argument(metavar="TRIAL", help="Its name in the study, or STUDY/trials/NAME.", show_default=False)
]


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

    from peft_study.api import Study
    from peft_study.display.terminal import echo, progress, quiet_libraries
    from peft_study.storage.files import refuse_existing, refuse_unwritable
    from peft_study.study.template import look, write_study_file

    quiet_libraries()
    refuse_existing(output, overwrite=overwrite)
    refuse_unwritable(output)
    with progress("reading") as on_progress:
        start = look(model, data, split=split, on_progress=on_progress)
    write_study_file(output, start)
    echo(f"a study of {', '.join(data)} ({start.rows}) -> {output}")
    if start.why_bos:
        echo(f"add_bos: true, since {start.why_bos}")
    memory = Study.from_yaml(output).memory()
    for line in () if memory is None else memory.lines():
        echo(line)
    echo(f"look through it, then: peft-study run {shlex.quote(str(output))}")


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


def status(study: _Folder = None) -> None:
    """Print the state of a study or of a run of `finetune`: running, killed or finished, and how far it is."""
    from peft_study.cli.run_views import show_run
    from peft_study.cli.study_views import show_status
    from peft_study.report.run_reader import is_run, read_run
    from peft_study.report.status import study_status
    from peft_study.report.study_reader import read_study

    if is_run(study or Path()):
        show_run(read_run(study or Path()), everything=False)
        return
    found = read_study(study)
    show_status(found, study_status(found))


def list_trials(
    study: _Folder = None,
    method: Annotated[str | None, typer.Option(help="Only trials of this method.")] = None,
    status: Annotated[
        str | None, typer.Option(help="Only trials that are finished, pruned, diverged, failed, running, interrupted.")
    ] = None,
    sort: Annotated[
        str, typer.Option(help="began, name, method, status, dev, steps, tokens or seconds; least first.")
    ] = "began",
    as_json: Annotated[bool, typer.Option("--json", help="All columns, as a JSON list.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="All columns, as in results.csv.")] = False,
) -> None:
    """List the trials of a study, or the runs and studies in a folder, a row each, also while they run."""
    from peft_study.cli.run_views import print_entries, show_entries
    from peft_study.cli.study_views import print_csv, print_json, show_rows
    from peft_study.errors import ConfigError
    from peft_study.report.run_reader import list_folder
    from peft_study.report.study_reader import read_study, rows

    if as_json and as_csv:
        raise ConfigError("--json and --csv exclude each other", remedy="give one of them")
    if entries := list_folder(study):
        if method or status or sort != "began":
            raise ConfigError("--method, --status and --sort are for the trials of a study", remedy="leave them out")
        if as_json or as_csv:
            print_entries(entries, as_csv=as_csv)
        else:
            show_entries(entries)
        return
    found = read_study(study)
    chosen = rows(found, method=method, status=status, sort=sort)
    if as_json:
        print_json(chosen)
    elif as_csv:
        print_csv(chosen)
    else:
        show_rows(found, chosen)


def show(trial: _Trial, study: _Study = None) -> None:
    """Show one trial, or a run of `finetune`: every setting, how it ended, its curve, its cost, its files."""
    from peft_study.cli.run_views import show_run
    from peft_study.cli.study_views import show_details
    from peft_study.report.run_reader import is_run, read_run
    from peft_study.report.study_reader import details, find_trials

    if study is None and is_run(Path(trial)):
        show_run(read_run(Path(trial)), everything=True)
        return
    found, (record,) = find_trials([trial], study)
    show_details(found, details(found, record))


def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="A trial, or a setting that was retrained with new seeds.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another; `none` is the untouched base.")],
    study: _Study = None,
) -> None:
    """Compare two trials example by example; settings that were both retrained are compared over their seeds."""
    from peft_study.cli.study_views import show_comparison
    from peft_study.report.compare import compare as compare_trials
    from peft_study.report.study_reader import find_trials

    found, (one, other) = find_trials([first, second], study)
    show_comparison(compare_trials(found, one, other))


def rerun(trial: _Trial, study: _Study = None) -> None:
    """Train a trial again, alone, and say whether its dev loss is the same; exit code 1 where it is not."""
    from peft_study.cli.study_views import show_rerun
    from peft_study.display.terminal import RunDisplay, quiet_libraries
    from peft_study.report.study_reader import find_trials
    from peft_study.study.rerun import rerun as train_again
    from peft_study.training.interrupt import StopRequest

    quiet_libraries()
    found, (record,) = find_trials([trial], study)
    with StopRequest().listening() as stop, RunDisplay() as display:
        result = train_again(found, record, display, stop)
    show_rerun(result)
    if not result.same:
        raise typer.Exit(1)


def clean(
    study: Annotated[Path | None, _folder("a study")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and delete nothing.")] = False,
    force: Annotated[
        bool,
        typer.Option("--force", help="Also where the study has not finished: it then restarts from step 0."),
    ] = False,
) -> None:
    """Free disk space: checkpoints, event files, and adapters of trials that are no finalists."""
    from peft_study.cli.study_views import show_spare
    from peft_study.report.study_reader import read_study
    from peft_study.study.cleanup import clean as delete
    from peft_study.study.cleanup import spare

    found = read_study(study)
    show_spare(spare(found) if dry_run else delete(found, force=force), dry_run=dry_run)
