"""Fingerprints of model folders."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path

from peft_study.storage.cache_dir import cache_root


def folder_digest(folder: Path) -> str:
    """Returns the sha256 over a model folder's config and weight files (names and contents).

    The digest of each file is cached under its path, size and time: reading tens of gigabytes takes a while.
    """
    memo_path = cache_root() / "digests.json"
    try:
        memo: dict[str, str] = json.loads(memo_path.read_text())
    except (OSError, ValueError):
        memo = {}
    state = dict(memo)
    total = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
        if not path.exists():
            continue
        stat = path.stat()
        key = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
        if key not in memo:
            memo[key] = file_digest(path)
        total.update(f"{path.name}:{memo[key]}\n".encode())
    if memo != state:
        with contextlib.suppress(OSError):  # a cache that cannot be written: it is computed again
            memo_path.parent.mkdir(parents=True, exist_ok=True)
            memo_path.write_text(json.dumps(memo))
    return total.hexdigest()


def file_digest(path: Path) -> str:
    """Returns the sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
