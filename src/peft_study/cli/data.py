"""``peft-study data convert | sample | stats``: parse, call, print."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from peft_study.cli.loudness import LoudCommand
from peft_study.display.terminal import console, echo, progress

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


class _ManyValues(LoudCommand):
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


@app.command(cls=LoudCommand)
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
        echo(f"{report.rows:,} rows in {report.seconds:.1f} s ({speed:,.0f} rows/s) -> {report.output}")
        echo(f"sha256 {report.sha256}")
        if report.rejects is not None:
            echo(f"{report.rejected:,} rows left out, with their reasons -> {report.rejects}")


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
        echo(f"{int(size):,} of {manifest['rows']:,} rows -> {output / entry['file']}")
    echo(f"seed, counts per source and sha256 -> {output / 'manifest.json'}")


@app.command(cls=LoudCommand)
def stats(
    sources: _Sources,
    model: Annotated[str, typer.Option(help="Model folder or name whose tokenizer and chat template to use.")],
    max_length: Annotated[int | None, typer.Option(help="Tokens after which an example is cut.")] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(help="tulu, another built-in name, a Jinja file, or own: the tokenizer's own (if left out)."),
    ] = None,
    form: Annotated[
        Literal["text", "json", "csv"], typer.Option("--format", help="csv: a row a source; json: everything.")
    ] = "text",
    all_sources: Annotated[
        bool, typer.Option("--all-sources", help="Show every source, not only the 20 largest.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(help="Picture of the lengths to write, .png or .svg.")] = None,
    split: _Split = None,
    mapping: _Map = None,
) -> None:
    """Count rows and tokens per source, lengths, what is cut, what is supervised, duplicates."""
    import sys

    from peft_study.data.chat import ChatEncoder
    from peft_study.data.formats import parse_mapping
    from peft_study.data.stats import compute_stats, plot_stats, render_stats, stats_json, write_stats_csv
    from peft_study.errors import TemplateError
    from peft_study.model.load import load_tokenizer
    from peft_study.storage.files import refuse_unwritable
    from peft_study.storage.picture import refuse_other_suffix

    if plot is not None:
        refuse_other_suffix(plot)
        refuse_unwritable(plot)
    template = None if chat_template == "own" else chat_template
    with progress("counting") as on_progress:
        try:
            encoder = ChatEncoder(load_tokenizer(model), template=template)
        except TemplateError as error:
            raise error.within("--chat-template") from error
        measured = compute_stats(
            sources,
            encoder,
            model=model,
            max_length=max_length,
            split=split,
            mapping=parse_mapping(mapping),
            on_progress=on_progress,
        )
    if form == "json":
        print(stats_json(measured))
    elif form == "csv":
        write_stats_csv(measured, sys.stdout)
    else:
        output = console()
        output.print(render_stats(measured, width=output.width, all_sources=all_sources))
    notes = [_seen_by_training(template), *measured.diagnosis.short()]
    if plot is not None:
        plot_stats(measured, plot)
        notes.append(f"histogram -> {plot}")
    for note in notes:
        echo(note, err=form != "text")


def _seen_by_training(template: str | None) -> str:
    """Returns which commands train with this chat template, since their defaults differ."""
    from peft_study.compat.arguments import FinetuneArguments

    default = FinetuneArguments.chat_template_name
    if template is None:
        return (
            f"`run` trains with this template, too; `finetune` with {default}, unless it has --chat_template own "
            f"(to count as it does: --chat-template {default})"
        )
    finetune = "" if template == default else f" with --chat_template {template}"
    return f"`finetune`{finetune} trains with this template, and `run` with data.chat_template: {template}"


@app.command(cls=LoudCommand)
def skills(
    output: Annotated[Path, typer.Option("-o", "--output", help="File to write.")],
    count: Annotated[int, typer.Option(help="Conversations.")] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of the draw.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Write the embedded data set: short instructions in twelve skills with checkable answers."""
    from peft_study.data.skills import write
    from peft_study.storage.files import refuse_existing

    refuse_existing(output, overwrite=overwrite)
    echo(f"{count:,} conversations -> {write(output, count, seed)}")
