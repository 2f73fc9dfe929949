"""Sources against independent readers (`datasets`, pandas, json), and every file that cannot be read."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard

from peft_study.data import readers
from peft_study.data.sources import open_sources
from peft_study.errors import DataError

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the shared data sets are not at {SHARED}")

ROWS = [{"id": f"r{n}", "prompt": f"ask {n} \u2028 é", "completion": "x" * n} for n in range(1, 8)]


def read(*specs: Path | str, split: str | None = None) -> list[dict[str, Any]]:
    rows = []
    for source in open_sources([str(spec) for spec in specs], split):
        for row in source.rows(lambda _: None):
            if row.broken:
                raise row.broken
            rows.append(row.values)
    return rows


def lines(rows: list[dict[str, Any]] = ROWS) -> bytes:
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def write_arrow(path: Path, rows: list[dict[str, Any]] = ROWS, *, file_format: bool = False) -> Path:
    table = pa.Table.from_pylist(rows)
    make = pa.ipc.new_file if file_format else pa.ipc.new_stream
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file, make(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    return path


def saved(folder: Path, rows: list[dict[str, Any]], **state: Any) -> Path:
    """A save_to_disk folder by hand, two shards whose order in state.json is not that of their names."""
    write_arrow(folder / "data-00001-of-00002.arrow", rows[:4])
    write_arrow(folder / "data-00000-of-00002.arrow", rows[4:])
    names = ["data-00001-of-00002.arrow", "data-00000-of-00002.arrow"]
    content = {"_data_files": [{"filename": name} for name in names], "_split": None, **state}
    (folder / "state.json").write_text(json.dumps(content))
    (folder / "dataset_info.json").write_text("{}")
    return folder


@needs_shared
def test_saved_folder_equals_what_datasets_loads() -> None:
    datasets = pytest.importorskip("datasets")
    folder = SHARED / "tulu-like-mix" / "arrow"
    assert read(folder) == datasets.load_from_disk(str(folder)).to_list()


@needs_shared
@pytest.mark.parametrize("split", ["train", "test"])
def test_saved_dict_equals_what_datasets_loads(split: str) -> None:
    datasets = pytest.importorskip("datasets")
    folder = SHARED / "tulu-like-mix" / "arrow-datasetdict-small"
    assert read(folder, split=split) == datasets.load_from_disk(str(folder))[split].to_list()


@needs_shared
def test_parquet_snapshot_equals_what_pandas_reads() -> None:
    pandas = pytest.importorskip("pandas")
    folder = SHARED / "tulu-like-mix" / "parquet"
    frame = pandas.concat([pandas.read_parquet(path) for path in sorted(folder.glob("data/*.parquet"))])
    rows = read(folder)
    assert [row["id"] for row in rows] == frame["id"].tolist()
    assert [row["messages"] for row in rows] == [list(messages) for messages in frame["messages"]]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines()),
        ("a.jsonl.gz", gzip.compress(lines())),
        ("a.jsonl.zst", zstandard.compress(lines())),
        ("two-frames.jsonl.zst", zstandard.compress(lines(ROWS[:3])) + zstandard.compress(lines(ROWS[3:]))),
        ("lines-named.json", lines()),
        ("named-gz-but-plain.jsonl.gz", lines()),
        ("blank-lines.jsonl", b"\xef\xbb\xbf\n\n" + lines(ROWS[:2]) + b"  \r\n" + lines(ROWS[2:]).rstrip()),
        ("array.json", json.dumps(ROWS).encode()),
        ("indented.json", b"\n " + json.dumps(ROWS, indent=2, ensure_ascii=False).encode() + b"\n"),
        ("array.json.gz", gzip.compress(json.dumps(ROWS).encode())),
    ],
)
@pytest.mark.parametrize("piece", [1, 7, 1 << 20])
def test_json_in_any_dress_and_any_piece_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes, piece: int
) -> None:
    monkeypatch.setattr(readers, "_PIECE", piece)
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == ROWS


def test_a_number_cut_by_the_end_of_a_piece_is_one_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_PIECE", 1)
    (tmp_path / "a.json").write_bytes(b"[123, 45]")
    rows = list(readers.read_file(tmp_path / "a.json", lambda _: None))
    assert ["int '123'" in str(rows[0].broken), "int '45'" in str(rows[1].broken), len(rows)] == [True, True, 2]


def test_arrow_and_parquet_files(tmp_path: Path) -> None:
    arrow, parquet = write_arrow(tmp_path / "a.arrow"), write_parquet(tmp_path / "b.parquet")
    assert read(arrow) == read(parquet) == read(write_arrow(tmp_path / "c.arrow", file_format=True)) == ROWS
    for path in (arrow, parquet):
        (tmp_path / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        (tmp_path / f"{path.name}.zst").write_bytes(zstandard.compress(path.read_bytes()))
        assert read(tmp_path / f"{path.name}.gz") == read(tmp_path / f"{path.name}.zst") == ROWS


def test_struct_fields_that_arrow_fills_with_null_are_absent(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": ["c"]}]}
    ]
    assert read(write_arrow(tmp_path / "a.arrow", rows)) == read(write_parquet(tmp_path / "a.parquet", rows)) == rows


def test_shards_follow_state_json_and_rows_are_counted_by_file(tmp_path: Path) -> None:
    (source,) = open_sources([str(saved(tmp_path / "set", ROWS))])
    rows = list(source.rows(lambda _: None))
    assert [row.values for row in rows] == ROWS
    assert [(row.file.name[:10], row.row) for row in rows][3:5] == [("data-00001", 4), ("data-00000", 1)]
    assert source.name == "set"


def test_progress_rises_to_one(tmp_path: Path) -> None:
    for folder in (saved(tmp_path / "set", ROWS), write_parquet(tmp_path / "p" / "a.parquet").parent):
        shares: list[float] = []
        (source,) = open_sources([str(folder)])
        list(source.rows(shares.append))
        assert shares == sorted(shares)
        assert 0.95 < shares[-1] <= 1


def snapshot(folder: Path) -> Path:
    """What the hub's download command leaves: card, shards, .gitattributes, .cache with unfinished files."""
    for number in range(2):
        write_parquet(folder / f"data/train-{number:05d}-of-00002.parquet", ROWS[number * 4 : number * 4 + 4])
    write_parquet(folder / "data/test-00000-of-00001.parquet", ROWS[:1])
    card = "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: data/train-*\n"
    (folder / "README.md").write_text(f"---\n{card}  - split: test\n    path: data/test-*\n---\n# A set\n")
    (folder / ".gitattributes").write_text("*.parquet filter=lfs\n")
    cache = folder / ".cache" / "huggingface" / "download" / "data"
    cache.mkdir(parents=True)
    (cache / "train-00000-of-00002.parquet.metadata").write_text("x")
    write_parquet(cache / "train-00009-of-00002.parquet")
    return folder


@pytest.mark.parametrize("with_card", [True, False])
def test_hub_snapshot(tmp_path: Path, with_card: bool) -> None:
    folder = snapshot(tmp_path / "snap")
    if not with_card:
        (folder / "README.md").unlink()
    assert read(folder, split="train") == ROWS
    assert read(folder, split="test") == ROWS[:1]
    with pytest.raises(DataError, match=r"several splits: test, train; choose one \(--split"):
        read(folder)


def test_hub_cache_folder_with_links_to_blobs(tmp_path: Path) -> None:
    blob = write_parquet(tmp_path / "datasets--a--b" / "blobs" / "0123")
    link = tmp_path / "datasets--a--b" / "snapshots" / "rev" / "data" / "train-00000-of-00001.parquet"
    link.parent.mkdir(parents=True)
    (tmp_path / "datasets--a--b" / "refs").mkdir()
    link.symlink_to(blob)
    assert read(tmp_path / "datasets--a--b") == ROWS


def test_folder_of_files_and_several_sources(tmp_path: Path) -> None:
    folder = tmp_path / "many"
    folder.mkdir()
    (folder / "b.jsonl").write_bytes(lines(ROWS[3:]))
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines(ROWS[:3])))
    (folder / "notes.txt").write_text("not data")
    other = tmp_path / "other" / "b.jsonl"
    other.parent.mkdir()
    other.write_bytes(lines(ROWS[:1]))
    assert read(folder, other) == [*ROWS, ROWS[0]]
    assert [s.name for s in open_sources([str(folder / "b.jsonl"), str(other)])] == ["many/b", "other/b"]
    deep = tmp_path / "deep" / "other" / "b.jsonl"
    deep.parent.mkdir(parents=True)
    packed = deep.with_name("b.jsonl.gz")
    for path in (deep, packed):
        path.write_bytes(lines(ROWS[:1]) if path is deep else gzip.compress(lines(ROWS[:1])))
    names = [s.name for s in open_sources([str(other), str(deep), str(packed), str(folder / "a.jsonl.gz")])]
    assert names == ["b", "b-1", "b-2", "a"]
    names = [s.name for s in open_sources([str(other), str(deep), str(folder / "b.jsonl")])]
    assert names == [f"{tmp_path.name}/other/b", "deep/other/b", "many/b"]


def test_splits_by_file_name_and_the_name_of_an_only_split(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_bytes(lines())
    assert read(tmp_path / "train.jsonl", split="train") == ROWS
    with pytest.raises(DataError, match="no split 'test'; its only split is 'train'"):
        read(tmp_path, split="test")
    (tmp_path / "dev.jsonl").write_bytes(lines(ROWS[:2]))
    assert read(tmp_path, split="validation") == ROWS[:2]
    with pytest.raises(DataError, match="no split 'validatoin'; did you mean 'validation'"):
        read(tmp_path, split="validatoin")


def _missing(path: Path) -> Path:
    (path / "train.jsonl").write_bytes(lines())
    return path / "trian.jsonl"


def _file(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        (path / name).write_bytes(content)
        return path / name

    return make


def _folder(*names: str) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        for name in names:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(lines())
        return path

    return make


def _saved_without_shard(path: Path) -> Path:
    (saved(path / "set", ROWS) / "data-00000-of-00002.arrow").unlink()
    return path / "set"


def _cut(make: Callable[[Path], Path]) -> Callable[[Path], Path]:
    def cut(path: Path) -> Path:
        file = make(path / ("a.arrow" if make is write_arrow else "a.parquet"))
        file.write_bytes(file.read_bytes()[:-600])
        return file

    return cut


ARRAY = json.dumps(ROWS).encode()


@pytest.mark.parametrize(
    ("make", "what", "remedy"),
    [
        (_missing, "trian.jsonl: no such file", "did you mean .*train.jsonl"),
        (lambda path: path / "nowhere" / "x.parquet", "x.parquet: no such file", "check the path"),
        (_file("a.jsonl", b""), "a.jsonl: the file is empty", "give a file"),
        (_file("a.jsonl.gz", gzip.compress(b"")), "a.jsonl.gz: the file holds no rows", "give a file"),
        (_file("a.json", b" \n"), "a.json: the file holds no rows", "give a file"),
        (_file("a.json", b"[ ]"), "a.json: the source holds no rows", "give a source"),
        (_file("a.jsonl.gz", gzip.compress(lines())[:-12]), "a.jsonl.gz: the compressed file is cut short", "again"),
        (_file("a.jsonl.zst", zstandard.compress(lines())[:-5]), "a.jsonl.zst: the compressed file is cut", "again"),
        (_file("a.jsonl.gz", gzip.compress(lines())[:30] + b"\0" * 60), "the compressed file is damaged", "again"),
        (_file("a.jsonl", lines() + b'{"prompt": "x'), r"a.jsonl row 8: broken JSON line \(Unterminated", "correct"),
        (_file("a.jsonl", lines() + b"[1]\n"), "a.jsonl row 8: a row must be an object", "correct"),
        (_file("a.jsonl", lines() + b'{"a": "\xff"}'), "a.jsonl row 8: not UTF-8", "save the file as UTF-8"),
        (_file("a.json", ARRAY[:-20]), "a.json row 7: the array is broken or ends early", "again"),
        (_file("a.json", ARRAY[:-1]), "a.json after row 7: the array ends early", "again"),
        (_file("a.json", ARRAY.replace(b'"prompt"', b"prompt", 1)), "a.json row 1: broken JSON array", "again"),
        (_file("a.json", ARRAY + b" {}"), "a.json: '{' after the end of the array", "keep one array"),
        (_file("a.json", b'[{"a": 1} {"a": 2}]'), "after row 1: broken JSON: '{' where", "again"),
        (_file("a.json", b"[3]"), "a.json row 1: a row must be an object", "correct"),
        (_file("a.parquet", b"PAR1 no more than that"), "a.parquet: cannot be read", "again"),
        (_file("a.txt", b"hello"), "a.txt: is no data file", "name a file ending in"),
        (_cut(write_parquet), "a.parquet: cannot be read", "again"),
        (_cut(write_arrow), "a.arrow after row 3: cannot be read", "again"),
        (_folder("notes.txt", ".cache/a.jsonl"), "the folder is no data set", "give a save_to_disk folder"),
        (_folder("a/state.json", "b/state.json"), "holds several data sets: a, b", "name one of them"),
        (_folder("a.jsonl", "a.parquet"), "holds files of several kinds", "name the files"),
        (_folder("train-00000-of-00002.jsonl"), "shards are missing: train-00001-of-00002", "again"),
        (_saved_without_shard, "set: lacks data-00000-of-00002.arrow", "again"),
        (
            lambda path: saved(path / "set", ROWS, _indices_files=[{"filename": "i.arrow"}]),
            "indices file",
            "flatten_in",
        ),
    ],
)
def test_what_cannot_be_read(tmp_path: Path, make: Callable[[Path], Path], what: str, remedy: str) -> None:
    with pytest.raises(DataError, match=f"(?s)^{tmp_path}.*{what}.*; .*{remedy}") as caught:
        read(make(tmp_path))
    assert "\n" not in str(caught.value)


def test_card_that_names_absent_files_or_several_configurations(tmp_path: Path) -> None:
    folder = snapshot(tmp_path / "snap")
    for path in folder.glob("data/test-*"):
        path.unlink()
    with pytest.raises(DataError, match="the card names 'data/test-\\*' for split 'test', but no such file"):
        read(folder, split="train")
    configs = "configs:\n- {config_name: a, data_files: a.jsonl}\n- {config_name: b, data_files: b.jsonl}\n"
    (folder / "README.md").write_text(f"---\n{configs}---\n")
    with pytest.raises(DataError, match="several configurations: a, b"):
        read(folder)
    (folder / "README.md").write_text("---\nconfigs: [\n---\n")
    with pytest.raises(DataError, match="the card's YAML is broken"):
        read(folder)


def test_one_row_much_longer_than_a_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_PIECE", 1 << 12)
    rows = [{"text": "y" * (1 << 22)}, {"text": "z"}]
    (tmp_path / "a.json").write_bytes(json.dumps(rows).encode())
    assert read(tmp_path / "a.json") == rows


def test_hub_id_without_a_network_is_one_line() -> None:
    code = (
        "import os; os.environ['HF_HUB_OFFLINE'] = '1'\n"
        "from peft_study.data.sources import open_sources\n"
        "from peft_study.errors import DataError\n"
        "try: open_sources(['owner/name'])\n"
        "except DataError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("owner/name: no such file, and the hub cannot be read (")
    assert "hf download --repo-type dataset owner/name" in done.stdout
    assert len(done.stdout.splitlines()) == 1
    assert done.stderr == ""
