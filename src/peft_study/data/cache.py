"""Tokens on disk: made once, memory-mapped ever after.

    $PEFT_STUDY_CACHE/tokens/<key>/        the files of ``peft_study.data.tokenized``

The key is a hash of the data files' content, the split, the column mapping, everything that decides the tokens (the
encoder's fingerprint), and this package's data code. A folder appears whole or not at all: it is written under another
name and renamed. Two processes that build the same key both succeed, and one result stays. A folder that fails its
checksums is built again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import secrets
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_study.data.chat import ChatEncoder
from peft_study.data.formats import read_conversations
from peft_study.data.parallel import encode_rows
from peft_study.data.sources import open_sources
from peft_study.data.tokenized import LAYOUT_VERSION, TokenizedData, TokenWriter, valid_meta
from peft_study.errors import DataError
from peft_study.storage.cache_dir import cache_root
from peft_study.storage.files import output_error

_LEFTOVER_SECONDS = 24 * 3600


__all__ = ["TokenizedData", "cache_root", "tokenize"]


def tokenize(
    sources: Sequence[str | Path],
    encoder: ChatEncoder,
    *,
    split: str | None = None,
    mapping: Mapping[str, str] | None = None,
    cache_dir: Path | None = None,
    workers: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> TokenizedData:
    """Returns the tokens of the conversations in ``sources``, from the cache where they are there already.

    Args:
        sources: files, folders or hub ids, in order.
        encoder: template, tokenizer and ``max_length``.
        split: the split to take of each source.
        mapping: what ``parse_mapping`` returned.
        cache_dir: instead of ``cache_root() / "tokens"``.
        workers: processes; None for one a core.
        on_progress: hears the number of rows encoded so far; not called when the cache serves.

    Raises:
        DataError: a source or row cannot be used, or ``max_length`` leaves no row anything to learn.
        TemplateError: the template refuses a row, or its answers cannot be located.
        OutputError: the cache cannot be written.
    """
    specs = [str(source) for source in sources]
    key = _cache_key(specs, encoder, split, mapping)
    root = cache_dir or cache_root() / "tokens"
    folder = root / key
    if (meta := valid_meta(folder)) is not None:
        return TokenizedData(folder, meta)
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(root)
        temporary = root / f".{key[:16]}.{secrets.token_hex(4)}"
        temporary.mkdir()
    except OSError as error:
        raise output_error(error, root) from error
    try:
        writer = TokenWriter(temporary)
        rows = read_conversations(specs, split=split, mapping=mapping)
        try:
            for chunk in encode_rows(rows, encoder, workers):
                writer.add(chunk)
                if on_progress is not None:
                    on_progress(writer.rows_seen)
        finally:
            writer.close()
        if writer.rows_kept == 0:
            raise _nothing_supervised(writer, encoder)
        meta = writer.finish({"key": key, **_description(encoder, specs, split, mapping)})
        _install(temporary, folder)
    except OSError as error:
        raise output_error(error, root) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return TokenizedData(folder, valid_meta(folder) or meta)


def _nothing_supervised(writer: TokenWriter, encoder: ChatEncoder) -> DataError:
    if writer.rows_seen == 0:
        return DataError("there are no rows", remedy="give a source that holds conversations")
    if writer.shortest_first is None:
        return DataError(
            f"chat template {encoder.template_name!r} leaves nothing to learn in any of {writer.rows_seen} rows",
            remedy="choose another chat template",
        )
    return DataError(
        f"max_length {encoder.max_length} is so short that nothing is supervised in any of {writer.rows_seen} rows",
        where="max_length",
        remedy=f"give at least {writer.shortest_first + 1}, which keeps one token of one row; the longest row has "
        f"{max(writer.dropped_lengths)}",
    )


def _description(
    encoder: ChatEncoder, specs: list[str], split: str | None, mapping: Mapping[str, str] | None
) -> dict[str, Any]:
    """What a person who finds the folder wants to know."""
    return {
        "from": specs,
        "split": split,
        "mapping": None if mapping is None else dict(mapping),
        "template": encoder.template_name,
        "clock": encoder.clock.isoformat(),
        "max_length": encoder.max_length,
        "fingerprint": encoder.fingerprint,
    }


def _install(temporary: Path, folder: Path) -> None:
    """Renames the finished folder into place; keeps the one that is there if it is whole."""
    for _ in range(10):
        try:
            temporary.rename(folder)
            return
        except OSError:
            if not folder.exists():
                raise
        if valid_meta(folder) is not None:
            return  # another process was first
        # Out of the way by a rename: whoever has its files mapped keeps them.
        with contextlib.suppress(FileNotFoundError):
            broken = folder.rename(temporary.with_name(f"{temporary.name}.broken"))
            shutil.rmtree(broken, ignore_errors=True)
    temporary.rename(folder)


def _remove_leftovers(root: Path) -> None:
    """Removes what killed processes left, once nobody can still be writing it."""
    for path in root.glob(f".{'[0-9a-f]' * 16}.*"):
        with contextlib.suppress(OSError):
            if time.time() - max(p.stat().st_mtime for p in (path, *path.iterdir())) > _LEFTOVER_SECONDS:
                shutil.rmtree(path)


def _cache_key(specs: Sequence[str], encoder: ChatEncoder, split: str | None, mapping: Mapping[str, str] | None) -> str:
    data = [
        [source.name, source.split, [_sha256(file) for file in source.files] or _hub_revision(source.spec)]
        for source in open_sources(specs, split)
    ]
    parts = [LAYOUT_VERSION, data, dict(mapping or {}), encoder.fingerprint, _code_digest()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"cannot read it: {error.strerror}", where=str(path), remedy="check the path") from error


def _hub_revision(name: str) -> str:
    import huggingface_hub

    # `open_sources` has just asked the hub for the same name, so a failure here is no mistake of the user.
    return str(huggingface_hub.HfApi().dataset_info(name, timeout=10).sha)


@functools.cache
def _code_digest() -> str:
    """Hash of the code that reads and encodes rows: who edits it never meets tokens of the version before."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
