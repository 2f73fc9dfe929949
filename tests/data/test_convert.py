"""Conversion of real and of planted data; what it leaves behind when it fails."""

from __future__ import annotations

import errno
import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from typer.testing import CliRunner

from peft_study.cli.data import app
from peft_study.data.convert import convert, convert_splits
from peft_study.errors import DataError, OutputError, UserError
from peft_study.storage.files import AtomicFiles, atomic_writer, made_folder
from tiny_tokenizer import tiny_tokenizer

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the shared data sets are not at {SHARED}")
MIX = SHARED / "tulu-like-mix"
GOOD = {"prompt": "Grüße \u2028 \x85", "completion": "日本 \\ud83d 😀"}


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@needs_shared
def test_all_layouts_convert_to_the_very_bytes_of_the_json_lines(tmp_path: Path) -> None:
    truth = hashlib.sha256(gzip.decompress((MIX / "train.jsonl.gz").read_bytes())).hexdigest()
    for layout in ("train.jsonl.gz", "arrow", "parquet"):
        report = convert([str(MIX / layout)], tmp_path / f"{layout}.jsonl")
        assert (report.rows, report.rejected, report.rejects) == (12000, 0, None)
        assert report.sha256 == truth
        assert hashlib.sha256(report.output.read_bytes()).hexdigest() == truth


@needs_shared
@pytest.mark.parametrize(("split", "rows"), [("train", slice(0, 200)), ("test", slice(200, 250))])
def test_saved_dict_converts_split_by_split(tmp_path: Path, split: str, rows: slice) -> None:
    convert([str(MIX / "arrow-datasetdict-small")], tmp_path / "out.jsonl", split=split)
    truth = gzip.decompress((MIX / "train.jsonl.gz").read_bytes()).splitlines(keepends=True)[rows]
    assert (tmp_path / "out.jsonl").read_bytes() == b"".join(truth)


@needs_shared
def test_all_splits_of_a_saved_dict_are_the_files_of_each_split(tmp_path: Path) -> None:
    saved, progress = str(MIX / "arrow-datasetdict-small"), list[tuple[int, float]]()
    reports = convert_splits([saved], tmp_path / "out", on_progress=lambda rows, share: progress.append((rows, share)))
    assert [(report.output.name, report.rows) for report in reports] == [("train.jsonl", 200), ("test.jsonl", 50)]
    for report in reports:
        alone = convert([saved], tmp_path / report.output.name, split=report.output.stem)
        assert (report.sha256, report.output.read_bytes()) == (alone.sha256, alone.output.read_bytes())
    assert progress[-1] == (250, pytest.approx(1.0, abs=1e-3))  # an Arrow stream ends in a mark
    assert progress == sorted(progress)


def test_all_splits_appear_or_none(tmp_path: Path) -> None:
    folder = tmp_path / "snapshot"
    folder.mkdir()
    write(folder / "train.jsonl", GOOD)
    write(folder / "test.jsonl", GOOD, {"other": 1})
    before = listing(tmp_path)
    with pytest.raises(DataError, match=r"test\.jsonl row 2"):
        convert_splits([str(folder)], tmp_path / "out")
    assert listing(tmp_path) == before
    assert not (tmp_path / "out").exists()
    done = run("convert", folder, "--split", "all", "-o", tmp_path / "out", "--on-error", "skip")
    assert done.exit_code == 0, done.exception
    assert sorted(listing(tmp_path / "out")) == ["test.jsonl", "test.rejects.jsonl", "train.jsonl"]
    (tmp_path / "out" / "train.jsonl").unlink()
    with pytest.raises(OutputError, match="is there already"):  # the other split is in the way
        convert_splits([str(folder)], tmp_path / "out", on_error="skip")
    assert not (tmp_path / "out" / "train.jsonl").exists()
    with pytest.raises(OutputError, match="name the folder"):
        convert_splits([str(folder)], tmp_path / "all.jsonl")


def test_all_splits_of_several_sources(tmp_path: Path) -> None:
    for name, splits in (("a", ("train", "test")), ("b", ("train",))):
        (tmp_path / name).mkdir()
        for split in splits:
            write(tmp_path / name / f"{split}.jsonl", {**GOOD, "id": f"{name} {split}"})
    convert_splits([str(tmp_path / "a"), str(tmp_path / "b")], tmp_path / "out")
    ids = {path.stem: [json.loads(line)["id"] for line in path.open()] for path in (tmp_path / "out").iterdir()}
    assert ids == {"train": ["a train", "b train"], "test": ["a test"]}


@needs_shared
@pytest.mark.parametrize("name", ["gsm8k/test", "chat-demo/train", "humaneval/humaneval"])
def test_real_files_of_other_forms(tmp_path: Path, name: str) -> None:
    source = SHARED / f"{name}.jsonl.gz"
    raw = [json.loads(line) for line in gzip.decompress(source.read_bytes()).splitlines()]
    if name.startswith("humaneval"):  # prompt and canonical_solution: no form that is known
        with pytest.raises(DataError, match=r"row 1: no known columns: found .*prompt.*--map"):
            convert([str(source)], tmp_path / "out.jsonl")
        convert([str(source)], tmp_path / "out.jsonl", mapping={"prompt": "prompt", "response": "canonical_solution"})
        pairs = [(row["prompt"], row["canonical_solution"]) for row in raw]
    else:
        convert([str(source)], tmp_path / "out.jsonl")
        pairs = [(row["question"], row["answer"]) for row in raw] if "answer" in raw[0] else []
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_bytes().splitlines()]
    assert [row["id"] for row in rows] == [row.get("id", f"humaneval-{n}") for n, row in enumerate(raw, start=1)]
    if pairs:
        assert [tuple(turn["content"] for turn in row["messages"]) for row in rows] == pairs
    else:
        assert [row["messages"] for row in rows] == [row["messages"] for row in raw]


def test_text_stays_as_it_is_and_a_line_is_a_line(tmp_path: Path) -> None:
    report = convert([write(tmp_path / "a.jsonl", GOOD, GOOD)], tmp_path / "out.jsonl")
    text = report.output.read_text(encoding="utf-8")
    assert text.split("\n")[0] == (
        '{"id": "a-1", "messages": [{"role": "user", "content": "Grüße \u2028 \x85"}, '
        '{"role": "assistant", "content": "日本 \\\\ud83d 😀"}], "source": "a"}'
    )
    assert convert([str(report.output)], tmp_path / "again.jsonl").sha256 == report.sha256


@pytest.mark.parametrize(
    ("ending", "unpack"), [("gz", gzip.decompress), ("zst", zstandard.ZstdDecompressor().decompressobj)]
)
def test_compressed_output(tmp_path: Path, ending: str, unpack: Any) -> None:
    source = write(tmp_path / "a.jsonl", GOOD)
    plain = convert([source], tmp_path / "out.jsonl").output.read_bytes()
    first, second = (convert([source], tmp_path / f"{name}.jsonl.{ending}") for name in ("one", "two"))
    packed = first.output.read_bytes()
    assert ending != "gz" or packed[3:8] == bytes(5)  # neither name nor time in the header
    assert (unpack(packed) if ending == "gz" else unpack().decompress(packed)) == plain
    assert first.sha256 == second.sha256 == hashlib.sha256(packed).hexdigest()


def test_skip_keeps_the_good_rows_and_lists_the_others(tmp_path: Path) -> None:
    surrogate = json.dumps({"prompt": "x\ud800", "completion": "c"})
    bad_id = json.dumps({"prompt": "x", "completion": "c", "id": "\udfff"})
    rows = (GOOD, "{broken", {"prompt": "p", "completion": ""}, surrogate, {"messages": []}, bad_id, GOOD)
    source = write(tmp_path / "a.jsonl", *rows)
    report = convert([source], tmp_path / "out.jsonl", on_error="skip")
    assert (report.rows, report.rejected) == (2, 5)
    assert [json.loads(line)["id"] for line in report.output.read_bytes().splitlines()] == ["a-1", "a-7"]
    assert report.rejects == tmp_path / "out.rejects.jsonl"
    rejects = [json.loads(line) for line in report.rejects.read_bytes().splitlines()]
    assert [(entry["file"], entry["row"]) for entry in rejects] == [(source, row) for row in range(2, 7)]
    assert "broken JSON line" in rejects[0]["reason"]
    assert rejects[1]["reason"] == "turn 2 (assistant) has empty content"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out.jsonl", "out.rejects.jsonl"]
    with pytest.raises(DataError, match=r"a\.jsonl row 2: broken JSON line"):
        convert([source], tmp_path / "other.jsonl")
    clean = write(tmp_path / "clean.jsonl", GOOD)
    assert convert([clean], tmp_path / "out.jsonl", on_error="skip", overwrite=True).rejects is None
    assert not (tmp_path / "out.rejects.jsonl").exists()


def _cut_gzip(folder: Path) -> str:
    path = folder / "cut.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(json.dumps(GOOD | {"n": n}).encode() + b"\n" for n in range(2000)))[:-9])
    return str(path)


@pytest.mark.parametrize("on_error", ["fail", "skip"])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: str(folder / "none.jsonl"), "none.jsonl: no such file or folder"),
        (lambda folder: write(folder / "empty.jsonl"), "empty.jsonl: the file is empty"),
        (_cut_gzip, "cut.jsonl.gz: the compressed file is cut short"),
        (lambda folder: write(folder / "a.jsonl", {"text": "x"}, {"text": "y"}), "no known columns: found text"),
    ],
)
@pytest.mark.parametrize("old", [False, True])
def test_failure_leaves_the_folder_as_it_was(
    tmp_path: Path, make: Callable[[Path], str], message: str, on_error: Any, old: bool
) -> None:
    source = make(tmp_path)
    if old:
        (tmp_path / "out.jsonl").write_text("what was there")
    before = listing(tmp_path)
    with pytest.raises(DataError, match=message):
        convert([source], tmp_path / "out.jsonl", on_error=on_error, overwrite=True)
    with pytest.raises(DataError, match=message):
        convert([source], tmp_path / "new" / "folder" / "out.jsonl", on_error=on_error)
    assert listing(tmp_path) == before
    assert not (tmp_path / "new").exists()


def test_a_row_in_the_middle_that_fails_leaves_nothing(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", *[GOOD] * 500, {"prompt": 3, "completion": "c"})
    with pytest.raises(DataError, match=r"a\.jsonl row 501: prompt is not a text"):
        convert([source], tmp_path / "out.jsonl")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_second_source_is_looked_at_before_the_first_is_read(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", "{broken")
    with pytest.raises(DataError, match=r"none\.jsonl: no such file"):
        convert([source, str(tmp_path / "none.jsonl")], tmp_path / "out.jsonl")


def test_outputs_that_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", GOOD)
    (tmp_path / "link.jsonl").symlink_to(source)
    (tmp_path / "out.jsonl").write_text("x")
    (tmp_path / "dir.jsonl").mkdir()
    for name, overwrite, message in [
        ("a.jsonl", True, "a.jsonl: is one of the sources; name another output file"),
        ("link.jsonl", True, "link.jsonl: is one of the sources"),
        ("out.jsonl", False, "out.jsonl: is there already; replace it with --overwrite"),
        ("out.parquet", False, "out.parquet: JSON lines are written; name a file ending in .jsonl"),
        ("dir.jsonl", True, "dir.jsonl: is a folder"),
        ("a.jsonl/out.jsonl", True, "a.jsonl: is a file, not a folder"),
    ]:
        with pytest.raises(OutputError, match=message):
            convert([source], tmp_path / name, overwrite=overwrite)
    assert listing(tmp_path) == {name: Path(source).read_bytes() for name in ("a.jsonl", "link.jsonl")} | {
        "out.jsonl": b"x"
    }
    assert convert([source], tmp_path / "out.jsonl", overwrite=True).rows == 1


def test_disk_full_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", *[GOOD] * 3000)
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "from pathlib import Path\nfrom peft_study.data.convert import convert\n"
        "from peft_study.errors import OutputError\n"
        "try: convert([sys.argv[1]], Path(sys.argv[2]))\nexcept OutputError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, source, str(tmp_path / "out.jsonl")], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"{tmp_path}/out.jsonl: writing failed: File too large; ")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def _no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_no_space_left_while_writing_or_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    message = r"a\.txt: the disk is full; free some space"
    with pytest.raises(OutputError, match=message), AtomicFiles() as files:  # noqa: PT012 - the block is what fails
        files.open(tmp_path / "a.txt").write(b"half")
        _no_space()
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(os, "fsync", _no_space)
    with pytest.raises(OutputError, match=message), atomic_writer(tmp_path / "a.txt") as file:
        file.write("whole")
    assert list(tmp_path.iterdir()) == []


def test_killed_conversion_leaves_no_half_file_and_the_next_one_sweeps(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom peft_study.storage.files import AtomicFiles\n"
        "with AtomicFiles() as files:\n"
        "    handle = files.open(Path(sys.argv[1])); handle.write(b'half'); handle.flush()\n"
        "    print('writing', flush=True); time.sleep(60)"
    )
    out = tmp_path / "out.jsonl"
    with subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with atomic_writer(out) as file:  # beside a living writer: its file is left alone
            file.write("mine")
        assert len(list(tmp_path.glob(".out.jsonl.*.tmp"))) == 1
        out.unlink()
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    source = write(tmp_path / "a.jsonl", GOOD)
    convert([source], out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "out.jsonl"]


def test_files_appear_together_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "b").write_bytes(b"old")
    with pytest.raises(KeyError), AtomicFiles() as files:  # noqa: PT012 - the block is what fails
        files.open(tmp_path / "a").write(b"1")
        files.open(tmp_path / "b").write(b"2")
        raise KeyError
    assert listing(tmp_path) == {"b": b"old"}
    with AtomicFiles() as files:
        files.open(tmp_path / "a").write(b"1")
        files.open(tmp_path / "b").write(b"2")
        assert (tmp_path / "b").read_bytes() == b"old"
    assert listing(tmp_path) == {"a": b"1", "b": b"2"}
    with pytest.raises(ValueError, match="mine"), made_folder(tmp_path / "x" / "y"):
        raise ValueError("mine")
    assert not (tmp_path / "x").exists()


def test_text_writer(tmp_path: Path) -> None:
    with atomic_writer(tmp_path / "a.json") as file:
        json.dump({"ü": "\n"}, file, ensure_ascii=False)
    assert (tmp_path / "a.json").read_bytes() == '{"ü": "\\n"}'.encode()


def run(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_command_line(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", {"q": "x", "gold": "y"}, {"q": "x"})
    arguments = ("convert", source, "-o", tmp_path / "out.jsonl", "--map", "prompt=q,response=gold")
    failed = run(*arguments)
    assert isinstance(failed.exception, UserError)  # the program's entry point prints it and exits with 2
    done = run(*arguments, "--on-error", "skip")
    assert done.exit_code == 0, done.output
    assert "1 rows in 0.0 s" in done.output
    assert "1 rows left out, with their reasons ->" in done.output.replace("\n", " ")


def test_command_line_of_stats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_STUDY_CACHE", str(tmp_path / "cache"))
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    source = write(tmp_path / "a.jsonl", *[{"q": "Is it so?", "gold": "It is."}] * 9)
    arguments = ("--model", tmp_path / "model", "--chat-template", "tulu", "--max-length", "64")
    picture = tmp_path / "lengths.png"
    done = run("stats", source, *arguments, "--map", "prompt=q,response=gold", "--plot", picture)
    assert done.exit_code == 0, done.exception
    assert "9" in done.output
    assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Peak memory of 40,000 rows in one JSON array (24 MB) stays near that of 4,000."""
    code = (
        "import sys\nfrom pathlib import Path\nfrom peft_study.data.convert import convert\n"
        "convert([sys.argv[1]], Path(sys.argv[2]))\n"
        "print(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0])"
    )
    peaks = []
    for rows in (4_000, 40_000):
        path = tmp_path / f"{rows}.json"
        path.write_text(json.dumps([{"prompt": "p" * 300, "completion": "c" * 300}] * rows))
        done = subprocess.run(
            [sys.executable, "-c", code, str(path), str(tmp_path / f"{rows}.jsonl")], capture_output=True, check=True
        )
        peaks.append(int(done.stdout))
    assert peaks[1] < peaks[0] + 6_000  # KiB; the file alone has 24,000
