"""``peft-study data convert | sample | stats``: parse, call, print."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import typer
from typer.core import TyperCommand

app = typer.Typer(name="data", help="Convert, sample and measure instruction data.", no_args_is_help=True)

_Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="SRC...",
        help="save_to_disk folder, hub snapshot, folder of shards, .arrow, .parquet, .json or .jsonl file "
        "(also .gz, .zst), or a hub id owner/name.",
        show_default=False,
    ),
]
_Split = Annotated[str | None, typer.Option(help="Split to take of each SRC; needed where one has several.")]
_Map = Annotated[
    str | None,
    typer.Option(
        "--map", help="Column names: messages=COL or prompt=COL,response=COL; also system, tools, id, source."
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]


class _OnProgress(Protocol):
    """Receives the rows so far, and the share (0..1) that is done where the caller knows it."""

    def __call__(self, rows: int, share: float | None = None, /) -> None: ...


_SIZE = re.compile(r"(-?\d[\d_,]*)([kKmM]?)")
_TIMES = {"": 1, "k": 1000, "m": 1_000_000}


def _size(text: str) -> int:
    """Reads a number of rows: 9000, 9_000, 9,000 or 9k; 1m is a million.

    Raises:
        ConfigError: it is none.
    """
    from peft_study.errors import ConfigError

    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise ConfigError(f"{text!r} is no number of rows", where="--sizes", remedy="write 9000, 9_000 or 9k")
    return int(re.sub("[_,]", "", found[1])) * _TIMES[found[2].lower()]


class _ManyValues(TyperCommand):
    """A command whose ``--sizes`` takes several values in a row, as in ``--sizes 9000 90000``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeats the option before each further number; the parser knows only one value an option."""
        spread: list[str] = []
        in_sizes = False
        for arg in args:
            number = _SIZE.fullmatch(arg) is not None
            if in_sizes and number and spread[-1] != "--sizes":
                spread.append("--sizes")
            spread.append(arg)
            in_sizes = arg.partition("=")[0] == "--sizes" or (in_sizes and number)
        return super().parse_args(ctx, spread)


@app.command()
def convert(
    sources: _Sources,
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--output",
            help="File to write: .jsonl, also .jsonl.gz or .jsonl.zst; with --split all the folder for SPLIT.jsonl.",
        ),
    ],
    split: Annotated[
        str | None, typer.Option(help="Split to take of each SRC, or all: every split into a file of its own.")
    ] = None,
    mapping: _Map = None,
    on_error: Annotated[
        Literal["fail", "skip"],
        typer.Option(help="At an unusable row: stop, or leave it out and write it to OUT.rejects.jsonl."),
    ] = "fail",
    overwrite: Overwrite = False,
) -> None:
    """Turn data of any known form into JSON lines of {"id", "messages", "source"}."""
    from peft_study.data.convert import convert as convert_one
    from peft_study.data.convert import convert_splits
    from peft_study.data.formats import parse_mapping

    columns = parse_mapping(mapping)
    with progress("converting") as on_progress:
        if split == "all":
            reports = convert_splits(
                sources, output, mapping=columns, on_error=on_error, overwrite=overwrite, on_progress=on_progress
            )
        else:
            reports = [
                convert_one(
                    sources,
                    output,
                    split=split,
                    mapping=columns,
                    on_error=on_error,
                    overwrite=overwrite,
                    on_progress=on_progress,
                )
            ]
    for report in reports:
        speed = report.rows / max(report.seconds, 1e-9)
        typer.echo(f"{report.rows:,} rows in {report.seconds:.1f} s ({speed:,.0f} rows/s) -> {report.output}")
        typer.echo(f"sha256 {report.sha256}")
        if report.rejects is not None:
            typer.echo(f"{report.rejected:,} rows left out, with their reasons -> {report.rejects}")


@app.command(cls=_ManyValues)
def sample(
    sources: _Sources,
    sizes: Annotated[
        list[int],
        typer.Option(
            help="Rows of each sample, as in --sizes 9000 90000 or --sizes 9k 90k.",
            parser=_size,
            metavar="N...",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="Folder for sample-N.jsonl and manifest.json.")],
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 42,
    by: Annotated[str | None, typer.Option(help="Column whose proportions to keep, for example source.")] = None,
    split: _Split = None,
    mapping: _Map = None,
    overwrite: Overwrite = False,
) -> None:
    """Draw nested random samples, uniform or stratified by a column, in one pass."""
    from peft_study.data.formats import parse_mapping
    from peft_study.data.sample import SampleSpec
    from peft_study.data.sample import sample as draw

    spec = SampleSpec(tuple(sizes), seed=seed, by=by, split=split, mapping=parse_mapping(mapping))
    with progress("sampling") as on_progress:
        manifest = draw(sources, output, spec, overwrite=overwrite, on_progress=on_progress)
    for size, entry in manifest["samples"].items():
        typer.echo(f"{int(size):,} of {manifest['rows']:,} rows -> {output / entry['file']}")
    typer.echo(f"seed, counts per source and sha256 -> {output / 'manifest.json'}")


@app.command()
def stats(
    sources: _Sources,
    model: Annotated[str, typer.Option(help="Model folder or name whose tokenizer and chat template to use.")],
    max_length: Annotated[int | None, typer.Option(help="Tokens after which an example is cut.")] = None,
    chat_template: Annotated[
        str | None, typer.Option(help="tulu, another built-in name, or a Jinja file; else the tokenizer's own.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture of the lengths to write, as .png.")] = None,
    split: _Split = None,
    mapping: _Map = None,
) -> None:
    """Count rows and tokens per source, lengths, what is cut, what is supervised, duplicates."""
    from rich.console import Console

    from peft_study.data.chat import ChatEncoder
    from peft_study.data.formats import parse_mapping
    from peft_study.data.stats import compute_stats, plot_stats, render_stats
    from peft_study.errors import TemplateError
    from peft_study.model.load import load_tokenizer
    from peft_study.storage.files import refuse_unwritable

    if plot is not None:
        refuse_unwritable(plot)
    try:
        encoder = ChatEncoder(load_tokenizer(model), template=chat_template)
    except TemplateError as error:
        raise error.within("--chat-template") from error
    with progress("counting") as on_progress:
        measured = compute_stats(
            sources,
            encoder,
            model=model,
            max_length=max_length,
            split=split,
            mapping=parse_mapping(mapping),
            on_progress=on_progress,
        )
    Console().print(render_stats(measured))
    if encoder.bos_warning:
        typer.echo(encoder.bos_warning)
    if plot is not None:
        plot_stats(measured, plot)
        typer.echo(f"histogram -> {plot}")


@app.command()
def skills(
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write.")],
    count: Annotated[int, typer.Option(help="Conversations.")] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
) -> None:
    """Write the embedded data set: short instructions in twelve skills with checkable answers."""
    from peft_study.data.skills import write

    typer.echo(f"{count:,} conversations -> {write(output, count, seed)}")


@contextlib.contextmanager
def progress(what: str) -> Iterator[_OnProgress]:
    """Shows rows and rows per second while the block runs, with a bar once a share is known.

    Shows nothing where stderr is no terminal.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %  {task.fields[rows]:,} rows, {task.fields[speed]:,.0f} rows/s"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None, rows=0, speed=0.0)

        def on_progress(rows: int, share: float | None = None) -> None:
            elapsed = bar.tasks[0].elapsed or 1e-9
            total = None if share is None else 1.0
            bar.update(task, completed=share or 0.0, total=total, rows=rows, speed=rows / elapsed)

        yield on_progress
