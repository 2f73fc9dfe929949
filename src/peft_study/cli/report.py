"""``peft-study report``: parse, call, print."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

_FORMATS = ("html", "md", "json", "csv", "svg", "png")


def report(
    studies: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[STUDY...]",
            help="Output folders of studies, or of one run; left out: the current folder, or the only study under "
            "runs/. Several studies are put side by side.",
            show_default=False,
        ),
    ] = None,
    form: Annotated[
        str, typer.Option("--format", help="html, md, json, csv; or svg, png: a picture of each chart.")
    ] = "html",
    lang: Annotated[str, typer.Option(help="en or zh.")] = "en",
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="File, or the pictures' folder; left out: report.html and charts/ in the study's folder, the other "
            "formats are printed.",
            show_default=False,
        ),
    ] = None,
    show: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Write what a study or a run says as one page that opens from disk, as text, or as pictures."""
    import webbrowser

    from peft_study.errors import ConfigError, nearest
    from peft_study.report.findings import LANGUAGES
    from peft_study.report.writing import folder_of, text_of, views_of, write_page, write_pictures
    from peft_study.storage.files import atomic_writer, made_folder

    for given, valid, what in ((form, _FORMATS, "--format"), (lang, LANGUAGES, "--lang")):
        if given not in valid:
            raise ConfigError(f"unknown {given!r}", where=what, remedy=nearest(given, valid))
    if show and form != "html":
        raise ConfigError("opens the page, which is --format html", where="--open", remedy="leave one of them out")
    views = views_of(studies or ())
    if form == "html":
        path = write_page(views, lang, output)
        typer.echo(f"report: {path}")
        if show:
            webbrowser.open(path.resolve().as_uri())
    elif form in ("svg", "png"):
        folder = output or (folder_of(views[0]) / "charts" if len(views) == 1 else Path("charts"))
        paths = write_pictures(views, form, folder)
        typer.echo(f"{len(paths)} charts: {folder}")
    elif output is None:
        typer.echo(text_of(views, form, lang), nl=False)
    else:
        text = text_of(views, form, lang)
        with made_folder(output.parent), atomic_writer(output) as file:
            file.write(text)
        typer.echo(f"report: {output}")
