"""Statistics of a data set, against counts made by hand."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from peft_study.data.chat import ChatEncoder
from peft_study.data.stats import (
    DataStats,
    compute_stats,
    plot_stats,
    render_stats,
    shortened,
    stats_json,
    write_stats_csv,
)
from peft_study.data.stream import read_conversations
from peft_study.errors import ConfigError, OutputError
from tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
MAX_LENGTH = 60


def row(number: int, source: str, question: str, answer: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"id": str(number), "messages": messages, "source": source}


ROWS = [
    row(0, "a", "short?", "yes"),
    row(1, "a", "short?", "yes " + "indeed " * 20),
    row(2, "b", "long " * 60, "lost"),
    row(3, "b", "short?", "yes"),
    row(4, "b", " short?\n", "yes"),
    row(5, "b", "short?", "no"),
]


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PEFT_STUDY_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in ROWS))
    return str(path)


@pytest.fixture
def model(tmp_path: Path) -> str:
    TOKENIZER.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama"}')
    return str(tmp_path / "model")


def stats(source: str, model: str, max_length: int | None) -> DataStats:
    return compute_stats([source], ChatEncoder(TOKENIZER, template="tulu"), model=model, max_length=max_length)


def test_counts(source: str, model: str) -> None:
    result = stats(source, model, MAX_LENGTH)
    encode = ChatEncoder(TOKENIZER, template="tulu")
    examples = [encode.encode(conversation) for conversation in read_conversations([source])]
    assert result.total.rows == 6
    assert result.total.tokens == sum(map(len, examples))
    assert result.total.kept_tokens == sum(min(len(e), MAX_LENGTH) for e in examples)
    assert result.total.supervised == sum(int(e.supervised_L[:MAX_LENGTH].sum()) for e in examples)
    assert result.total.truncated == 2
    assert result.total.unsupervised == 1
    # Rows 3 and 4 say what row 0 says: source, id and white space do not count.
    assert result.total.duplicates == 2
    assert [(s.name, s.rows, s.truncated, s.unsupervised, s.duplicates) for s in result.by_source] == [
        ("b", 4, 1, 1, 2),
        ("a", 2, 1, 0, 0),
    ]
    assert sum(s.tokens for s in result.by_source) == result.total.tokens
    assert sum(s.supervised for s in result.by_source) == result.total.supervised
    lengths = sorted(map(len, examples))
    assert result.quantiles[0.0] == lengths[0]
    assert result.quantiles[0.5] == lengths[3]
    assert result.quantiles[1.0] == lengths[-1]


def test_without_a_cut(source: str, model: str) -> None:
    result = stats(source, model, None)
    assert (result.total.truncated, result.total.unsupervised) == (0, 0)
    assert result.total.kept_tokens == result.total.tokens


def test_what_is_printed(source: str, model: str) -> None:
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115 - not to the screen
    result = stats(source, model, MAX_LENGTH)
    console.print(render_stats(result))
    text = console.export_text()
    assert "cuts 2 of 6 rows (33.3%)" in text
    assert "1 row left with nothing supervised" in text
    assert "2 rows saying the same as an earlier one" in text
    assert f"{result.total.tokens:,}" in text
    console.print(render_stats(stats(source, model, None)))
    assert "lost" not in console.export_text()


def test_no_number_is_cut_and_no_two_sources_look_the_same_in_80_columns(tmp_path: Path, model: str) -> None:
    names = [f"some-owner/some-mixture:the_{part}_part_of_it" for part in ("first", "second", "third")]
    names += [f"some-owner/a-very-long-mixture:{middle}_of_the_same_ending" for middle in ("one", "two")]
    path = tmp_path / "rows.jsonl"
    rows = [row(n, name, "long " * 200, "yes " * 300) for n, name in enumerate(names * 300)]
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    result = stats(str(path), model, MAX_LENGTH)
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: PTH123, SIM115 - not to the screen
    console.print(render_stats(result))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    assert any(f"{result.total.rows:,} {result.total.tokens:,}" in line for line in lines)
    assert sum("300 " in line for line in lines) == 5
    first = [line[:30] for line in lines if " 300 " in line]
    assert len(set(first)) == 5
    assert {line[4:] for line in lines if line.startswith("[")} == set(names[3:])


def test_names_are_cut_only_where_they_are_too_long() -> None:
    assert shortened(["ab", "abcdefghij"], 10) == (["ab", "abcdefghij"], [])
    assert shortened(["ab", "abcdefghijk"], 10) == (["ab", "abcd…ghijk"], [])
    short, lines = shortened(["abcd-1-ghijk", "abcd-2-ghijk", "b" * 12], 10)
    assert (short, lines) == (["[1] ab…ijk", "[2] ab…ijk", "bbbb…bbbbb"], ["[1] abcd-1-ghijk", "[2] abcd-2-ghijk"])


def test_for_machines(source: str, model: str) -> None:
    result = stats(source, model, MAX_LENGTH)
    values = json.loads(stats_json(result))
    assert (values["total"]["rows"], values["total"]["unsupervised"], values["max_length"]) == (6, 1, MAX_LENGTH)
    assert values["quantiles"]["0.5"] == result.quantiles[0.5]
    assert [one["name"] for one in values["sources"]] == ["b", "a"]
    file = io.StringIO()
    write_stats_csv(result, file)
    rows = list(csv.DictReader(io.StringIO(file.getvalue())))
    assert rows == [{name: str(value) for name, value in one.items()} for one in values["sources"]]


def test_rows_that_lose_everything_are_a_warning_with_their_share(source: str, model: str) -> None:
    cut, copies = stats(source, model, MAX_LENGTH).diagnosis.short()
    text = "WARNING: rows are cut: 1 of 6 rows (16.7%) lose all supervised tokens to max_length"
    assert cut.startswith(f"{text} {MAX_LENGTH}; raise max_length")
    assert copies.startswith("WARNING: rows say the same as earlier ones: 2 of 6 rows (33.3%) are copies")
    assert stats(source, model, 10_000).diagnosis.short() == [copies]


def test_picture(source: str, model: str, tmp_path: Path) -> None:
    plot_stats(stats(source, model, MAX_LENGTH), tmp_path / "lengths.png")
    picture = (tmp_path / "lengths.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) > 5000
    with pytest.raises(ConfigError, match="pictures are PNG or SVG"):
        plot_stats(stats(source, model, None), tmp_path / "lengths.pdf")
    with pytest.raises(OutputError):  # a file stands in the folder's place
        plot_stats(stats(source, model, None), tmp_path / "lengths.png" / "lengths.png")


def test_a_picture_names_what_it_marks(source: str, model: str, tmp_path: Path) -> None:
    result = stats(source, model, MAX_LENGTH)
    plot_stats(result, tmp_path / "lengths.svg")
    text = (tmp_path / "lengths.svg").read_text()
    share = f"{result.total.truncated / 6:.1%}"
    for said in (
        f"median {result.quantiles[0.5]}",
        f"95% {result.quantiles[0.95]}",
        f"max_length ({share} cut) {MAX_LENGTH}",
        f"6 rows, {result.total.tokens:,} tokens of {model}",
        "length of a row in tokens (log scale)",
    ):
        assert said in text


def test_rows_of_one_length_can_be_drawn(tmp_path: Path, model: str, source: str) -> None:
    Path(source).write_text("".join(json.dumps(one) + "\n" for one in ROWS[:1]))
    plot_stats(stats(source, model, None), tmp_path / "one.png")
    assert (tmp_path / "one.png").exists()


def test_length_below_one(source: str, model: str) -> None:
    with pytest.raises(ConfigError, match="max_length is 0"):
        stats(source, model, 0)
