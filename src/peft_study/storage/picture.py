"""Vega-Lite charts as picture files: vl-convert draws them, without a browser or a network."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from peft_study.errors import ConfigError
from peft_study.storage.files import AtomicFiles, made_folder

SUFFIXES = (".png", ".svg")
_SCALE = 2
"""Pixels of a PNG a pixel of the chart: text stays sharp in print and on dense screens."""


def refuse_other_suffix(path: Path) -> None:
    """Refuses a picture that is neither PNG nor SVG.

    Raises:
        ConfigError: when the file's name says another kind.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(
            f"{path.suffix or 'no suffix'}: pictures are PNG or SVG",
            where=str(path),
            remedy=f"name it {path.stem or 'picture'}.png or .svg",
        )


def write_picture(spec: Mapping[str, Any], path: Path) -> None:
    """Writes a Vega-Lite specification as SVG or, at twice its size in pixels, as PNG, by the file's suffix.

    Raises:
        ConfigError: when the suffix is another one.
        OutputError: when the file cannot be written.
    """
    import vl_convert

    refuse_other_suffix(path)
    if path.suffix.lower() == ".svg":
        picture = vl_convert.vegalite_to_svg(dict(spec)).encode()
    else:
        picture = vl_convert.vegalite_to_png(dict(spec), scale=_SCALE)
    with made_folder(path.parent), AtomicFiles() as files:
        files.open(path).write(picture)
