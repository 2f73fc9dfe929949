"""Vega-Lite charts as picture files: vl-convert draws them, without a browser or a network."""

from __future__ import annotations

import struct
import zlib
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
        picture = _compressed(vl_convert.vegalite_to_png(dict(spec), scale=_SCALE))
    with made_folder(path.parent), AtomicFiles() as files:
        files.open(path).write(picture)


def _compressed(png: bytes) -> bytes:
    """Returns a PNG with its pixels compressed well: vl-convert's take four times the room.

    A PNG is eight bytes, then chunks: length, name, content, CRC of the two (ISO/IEC 15948, section 5).
    """
    chunks: list[tuple[bytes, bytes]] = []
    place = 8
    while place < len(png):
        length, name = struct.unpack(">I4s", png[place : place + 8])
        chunks.append((name, png[place + 8 : place + 8 + length]))
        place += length + 12
    pixels = zlib.decompress(b"".join(content for name, content in chunks if name == b"IDAT"))
    first = next(i for i, (name, _) in enumerate(chunks) if name == b"IDAT")
    rest = [(name, content) for name, content in chunks if name != b"IDAT"]
    written = [*rest[:first], (b"IDAT", zlib.compress(pixels, 9)), *rest[first:]]
    return png[:8] + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in written
    )
