"""What people have on disk, as a stream of raw rows.

    a file, a folder or a hub id  --open_sources-->  Source (name, split, files)  --rows-->  RawRow

A folder may be what ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` wrote, a snapshot that the hub's
download command left (a card with ``configs``, shards, ``.cache``), or just files of one kind.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft_study.data.readers import RawRow, Tick, data_suffix, read_file, table_row
from peft_study.errors import DataError, nearest, nearest_path

_METADATA = {"state.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json"}
_SHARD = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})(?=\.)")
_SPLIT_WORDS = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
_CHOOSE_SPLIT = "choose one (--split NAME, in a study data.split), or give its files"
_AGAIN = "download or copy it again"

Splits = dict[str, list[Path]]


@dataclass(frozen=True, slots=True)
class Source:
    """One SRC of the command line, resolved to the files of one split in their order.

    ``name`` stands for rows that bring no ``source`` of their own. A source without files is a hub id to stream.
    """

    spec: str
    name: str
    split: str
    files: tuple[Path, ...] = ()
    size: int = 0  # bytes of all files

    def rows(self, tick: Tick) -> Iterator[RawRow]:
        """Yields every row; ``tick`` receives the share (0..1) of the source read so far.

        Raises:
            DataError: a file is missing, damaged, cut short or empty, or the source has no rows at all.
        """
        found = False
        for row in self._file_rows(tick) if self.files else _hub_rows(self.spec, self.split):
            found = True
            yield row
        if not found:
            raise DataError("the source holds no rows", where=self.spec, remedy="give a source that holds rows")

    def _file_rows(self, tick: Tick) -> Iterator[RawRow]:
        before = size = 0

        def tick_file(share: float) -> None:
            tick((before + share * size) / max(self.size, 1))

        for file in self.files:
            size = file.stat().st_size if file.exists() else 0
            yield from read_file(file, tick_file)
            before += size


def open_sources(specs: Sequence[str], split: str | None = None) -> list[Source]:
    """Resolves each SRC (file, folder or hub id) to its files; reads no row yet.

    Args:
        specs: what the user named, in order.
        split: the split to take of each; may be left out where a source has only one.

    Raises:
        DataError: nothing is there, the folder is no data set, or the split is unknown or has to be chosen.
    """
    return _sources([(spec, *_choose(spec, _splits_of(spec), split)) for spec in specs])


def open_splits(specs: Sequence[str]) -> dict[str, list[Source]]:
    """Resolves every split of each SRC; reads no row yet.

    Returns:
        The sources of each split, in the order of the SRC; one that has no such split is not among them.

    Raises:
        DataError: nothing is there, the folder is no data set, or a split's name cannot be that of a file.
    """
    found: dict[str, list[tuple[str, str, list[Path]]]] = {}
    for spec in specs:
        for name, files in _splits_of(spec).items():
            if Path(name).name != name:
                raise DataError(f"a split is called {name!r}", where=spec, remedy="convert it with --split NAME")
            found.setdefault(name, []).append((spec, name, files))
    return {name: _sources(chosen) for name, chosen in found.items()}


def _sources(chosen: Sequence[tuple[str, str, list[Path]]]) -> list[Source]:
    sources = []
    for spec, name, files in chosen:
        size = sum(file.stat().st_size for file in files if file.exists())
        sources.append(Source(spec, _stem(spec), name, tuple(files), size))
    return _with_unique_names(sources)


def _choose(spec: str, splits: Splits, wanted: str | None) -> tuple[str, list[Path]]:
    if wanted is None:
        if len(splits) > 1:
            names = ", ".join(sorted(splits))
            raise DataError(f"has several splits: {names}", where=spec, remedy=_CHOOSE_SPLIT)
        return next(iter(splits.items()))
    if wanted not in splits:
        remedy = nearest(wanted, splits) if len(splits) > 1 else f"its only split is {next(iter(splits))!r}"
        raise DataError(f"has no split {wanted!r}", where=spec, remedy=remedy)
    return wanted, splits[wanted]


def _with_unique_names(sources: list[Source]) -> list[Source]:
    """Puts folders before names that two sources share, as many as it takes to tell their rows apart, or a number."""
    plain = {source.spec: source.name for source in sources}
    folders = {spec: Path(spec).resolve().parent.parts[1:] for spec in plain}
    for number, spec in enumerate(_shared({spec: (folders[spec], plain[spec]) for spec in plain}), start=1):
        plain[spec] += f"-{number}"  # one.jsonl and one.jsonl.gz in one folder
    names = dict(plain)
    for depth in range(1, max(map(len, folders.values()), default=0) + 1):
        for spec in _shared(names):
            names[spec] = "/".join((*folders[spec][-depth:], plain[spec]))
    return [replace(source, name=names[source.spec]) for source in sources]


def _shared(names: Mapping[str, Any]) -> list[str]:
    """Returns the keys whose values are not theirs alone."""
    counts = Counter(names.values())
    return [key for key, name in names.items() if counts[name] > 1]


def _stem(spec: str) -> str:
    """Returns the folder's name, or the file's without its endings."""
    path = Path(spec)
    suffix = data_suffix(path)
    if suffix is None or path.is_dir():
        return path.resolve().name if path.exists() else spec
    name = path.name
    return name[: name.lower().rindex(suffix)] or name


def _splits_of(spec: str) -> Splits:
    path = Path(spec)
    if path.is_dir():
        return _folder_splits(path)
    if path.exists():
        return {_split_word(path.name) or "train": [path]}
    if _HUB_ID.match(spec) and data_suffix(path) is None and not path.parent.exists():
        return _hub_splits(spec)
    close = nearest_path(path)
    remedy = f"did you mean {close}?" if close else "check the path, or give a hub id as owner/name"
    raise DataError("no such file or folder", where=spec, remedy=remedy)


def _folder_splits(folder: Path) -> Splits:
    snapshots = [p for p in (folder / "snapshots").glob("*") if p.is_dir()]
    if len(snapshots) == 1 and (folder / "refs").is_dir():  # the hub's cache: models--owner--name and the like
        folder = snapshots[0]
    if (folder / "dataset_dict.json").is_file():
        names = _metadata(folder / "dataset_dict.json").get("splits")
        if not isinstance(names, list) or not names:
            raise DataError("names no splits", where=str(folder / "dataset_dict.json"), remedy=_AGAIN)
        return {str(name): _saved_files(folder / str(name)) for name in names}
    if (folder / "state.json").is_file():
        name = _metadata(folder / "state.json").get("_split") or "train"
        return {str(name): _saved_files(folder)}
    splits = _card_splits(folder) or _walked_splits(folder)
    for files in splits.values():
        _check_shards(files)
    return splits


def _saved_files(folder: Path) -> list[Path]:
    """Returns the .arrow files of a saved ``Dataset`` in the order that ``state.json`` states."""
    state_file = folder / "state.json"
    if not state_file.is_file():
        raise DataError("state.json is missing from the saved data set", where=str(folder), remedy=_AGAIN)
    state = _metadata(state_file)
    if state.get("_indices_files"):
        remedy = "save it again with `dataset.flatten_indices().save_to_disk(...)`"
        raise DataError("the saved data set selects its rows through an indices file", where=str(folder), remedy=remedy)
    try:
        files = [folder / entry["filename"] for entry in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise DataError("names no data files", where=str(state_file), remedy=_AGAIN) from error
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise DataError(f"lacks {', '.join(missing)}, which state.json names", where=str(folder), remedy=_AGAIN)
    if not files:
        raise DataError("the saved data set has no rows", where=str(folder), remedy="give a source that holds rows")
    return files


def _metadata(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError("cannot be read as JSON", where=str(path), remedy=_AGAIN) from error
    if not isinstance(value, dict):
        raise DataError("is no JSON object", where=str(path), remedy=_AGAIN)
    return value


def _card_splits(folder: Path) -> Splits:
    """Returns the splits that the card's YAML states; empty where it states none."""
    configs = [c for c in _card(folder).get("configs") or [] if isinstance(c, dict) and c.get("data_files")]
    default = [c for c in configs if c.get("default") or c.get("config_name", "default") == "default"]
    if not configs:
        return {}
    if len(configs) > 1 and len(default) != 1:
        names = ", ".join(str(c.get("config_name")) for c in configs)
        remedy = "give the files of one of them as SRC"
        raise DataError(f"the card names several configurations: {names}", where=str(folder), remedy=remedy)
    stated = (default or configs)[0]["data_files"]
    entries = stated if isinstance(stated, list) else [stated]
    splits: Splits = {}
    for entry in entries:
        split, patterns = (
            (entry.get("split", "train"), entry.get("path")) if isinstance(entry, dict) else ("train", entry)
        )
        for pattern in patterns if isinstance(patterns, list) else [patterns]:
            try:
                files = sorted(p for p in folder.glob(str(pattern)) if p.is_file() or p.is_symlink())
            except (NotImplementedError, ValueError) as error:  # an absolute path, or nothing
                what = f"the card names {pattern!r} for split {split!r}, which is no path inside the folder"
                raise DataError(what, where=str(folder), remedy=_AGAIN) from error
            if not files:
                what = f"the card names {pattern!r} for split {split!r}, but no such file is there"
                raise DataError(what, where=str(folder), remedy=_AGAIN)
            splits.setdefault(str(split), []).extend(files)
    return splits


def _card(folder: Path) -> dict[str, Any]:
    import yaml

    readme = folder / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    match = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", text, re.DOTALL)
    if match is None:
        return {}
    try:
        card = yaml.safe_load(match.group(1))
    except yaml.YAMLError as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"the card's YAML is broken ({reason})", where=str(readme), remedy="correct it") from error
    return card if isinstance(card, dict) else {}


def _walked_splits(folder: Path) -> Splits:
    """Returns the data files below a folder by split, by the rules that the hub has for names."""
    paths = [
        p for p in sorted(folder.rglob("*")) if not any(part.startswith(".") for part in p.relative_to(folder).parts)
    ]
    inner = sorted({str(p.parent.relative_to(folder)) for p in paths if p.name in ("state.json", "dataset_dict.json")})
    files = [p for p in paths if data_suffix(p) and p.name not in _METADATA and not p.is_dir()]
    if inner:
        outermost = [name for name in inner if not any(str(parent) in inner for parent in Path(name).parents)]
        names = ", ".join(outermost[:5])
        raise DataError(f"holds several data sets: {names}", where=str(folder), remedy="name one of them as SRC")
    if not files:
        remedy = "give a save_to_disk folder, a hub snapshot or a folder of .jsonl, .json, .parquet or .arrow files"
        raise DataError("the folder is no data set: no data files in it", where=str(folder), remedy=remedy)
    kinds = sorted({data_suffix(p) or "" for p in files})
    if len(kinds) > 1:
        what = f"holds files of several kinds ({', '.join(kinds)}), maybe the same rows twice"
        raise DataError(what, where=str(folder), remedy="name the files you mean as SRC")
    words = {p: _split_of_file(p, folder) for p in files}
    if not any(words.values()):
        return {"train": files}
    splits: Splits = {}
    for path in files:
        splits.setdefault(words[path] or _stem(path.name), []).append(path)
    return splits


def _split_of_file(path: Path, root: Path) -> str | None:
    """Returns the split that a shard's name, its file name or a folder on the way to it states."""
    shard = _SHARD.match(path.name)
    word = _split_word(path.name)
    if shard and not word:
        return shard["stem"]
    return word or next((w for part in path.relative_to(root).parts[-2::-1] if (w := _split_word(part))), None)


def _split_word(name: str) -> str | None:
    return next((_SPLIT_WORDS[word] for word in re.split(r"[-_. ]", name.lower()) if word in _SPLIT_WORDS), None)


def _check_shards(files: list[Path]) -> None:
    """Refuses a set of NAME-0000K-of-0000N files with a gap: an interrupted download is not whole."""
    groups: dict[tuple[Path, str, int], set[int]] = {}
    for file in files:
        if match := _SHARD.match(file.name):
            key = (file.parent, match["stem"], int(match["total"]))
            groups.setdefault(key, set()).add(int(match["number"]))
    for (folder, stem, total), present in groups.items():
        missing = sorted(set(range(total)) - present)
        if missing:
            names = ", ".join(f"{stem}-{number:05d}-of-{total:05d}" for number in missing[:3])
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise DataError(f"shards are missing: {names}{more}", where=str(folder), remedy=_AGAIN)


def _hub_splits(name: str) -> Splits:
    """Returns the splits of a data set on the hub, without files: its rows are streamed."""
    import datasets
    import huggingface_hub

    try:
        # Asked first because it answers at once where there is no network; `datasets` tries six times.
        huggingface_hub.HfApi().dataset_info(name, timeout=10)
        return {str(split): [] for split in datasets.get_dataset_split_names(name)}
    except Exception as error:  # which HTTP client, and so which error, changes between versions of the hub's library
        raise _hub_error(name, error) from error


def _hub_rows(name: str, split: str) -> Iterator[RawRow]:
    import datasets

    try:
        for number, values in enumerate(datasets.load_dataset(name, split=split, streaming=True), start=1):
            yield RawRow(Path(name), number, table_row(values))
    except Exception as error:  # as above
        raise _hub_error(name, error) from error


def _hub_error(name: str, error: Exception) -> DataError:
    reason = str(error).strip().partition("\n")[0][:200]
    remedy = (
        f"check the name and the network, or run `hf download --repo-type dataset {name} --local-dir DIR` "
        "on a machine that has one and give DIR"
    )
    return DataError(f"no such file, and the hub cannot be read ({reason})", where=name, remedy=remedy)
