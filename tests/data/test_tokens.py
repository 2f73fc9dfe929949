"""The token cache: what it holds, when it serves, and what breaks it."""

from __future__ import annotations

import errno
import json
import multiprocessing
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from command_line import largest_file
from peft_study.data import parallel, tokens
from peft_study.data.chat import ChatEncoder
from peft_study.data.stream import read_conversations
from peft_study.data.tokens import TokenizedData, tokenize
from peft_study.errors import DataError, OutputError, TemplateError
from peft_study.storage import files
from peft_study.storage.cache_dir import cache_root
from tiny_tokenizer import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def row(number: int, answer: str = "The sum is {}.") -> dict[str, object]:
    return {
        "id": f"r{number}",
        "messages": [
            {"role": "user", "content": f"What is {number} + 1?" + " please" * (number % 7)},
            {"role": "assistant", "content": answer.format(number + 1)},
        ],
        "source": f"s{number % 3}",
    }


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows), encoding="utf-8")
    return path


def encoder(max_length: int | None = None) -> ChatEncoder:
    return ChatEncoder(TOKENIZER, template="tulu", max_length=max_length)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "rows.jsonl", [row(n) for n in range(20)])


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of rows of every chunk that is encoded."""
    chunks: list[int] = []
    genuine = parallel.encode_chunk

    def counted(conversations: list[object], encode: ChatEncoder) -> object:
        chunks.append(len(conversations))
        return genuine(conversations, encode)  # type: ignore[arg-type]

    monkeypatch.setattr(parallel, "encode_chunk", counted)
    return chunks


def assert_same(data: TokenizedData, other: TokenizedData) -> None:
    assert list(data.ids) == list(other.ids)
    assert list(data.sources) == list(other.sources)
    assert data.digests == other.digests
    for one, two in zip(data, other, strict=True):
        assert one.tokens_L.tolist() == two.tokens_L.tolist()
        assert one.supervised_L.tolist() == two.supervised_L.tolist()


def test_holds_what_the_encoder_gives(data: Path, tmp_path: Path) -> None:
    encode = encoder(60)
    result = tokenize([data], encode, cache_dir=tmp_path / "cache")
    conversations = list(read_conversations([str(data)]))
    assert len(result) == 20
    assert list(result.ids) == [f"r{n}" for n in range(20)]
    assert list(result.sources) == [f"s{n % 3}" for n in range(20)]
    for number, conversation in enumerate(conversations):
        whole, example = encode.encode_whole(conversation), encode.encode(conversation)
        stored = result[number]
        assert stored.tokens_L.dtype == np.int32
        assert stored.supervised_L.dtype == np.bool_
        assert stored.tokens_L.tolist() == example.tokens_L.tolist()
        assert stored.supervised_L.tolist() == example.supervised_L.tolist()
        assert result.lengths_N[number] == len(example)
        assert result.whole_lengths_N[number] == len(whole)
        assert result.supervised_N[number] == example.supervised_L.sum() > 0
        assert result.first_N[number] == whole.supervised_L.argmax()
    assert result.truncated == sum(len(encode.encode_whole(c)) > 60 for c in conversations) > 0
    assert result[-1].tokens_L.tolist() == result[19].tokens_L.tolist()
    with pytest.raises(IndexError):
        result[20]


def test_second_start_does_not_tokenise_again(data: Path, tmp_path: Path, encoded: list[int]) -> None:
    first = tokenize([data], encoder(), cache_dir=tmp_path / "cache")
    assert encoded == [20]
    assert_same(first, tokenize([data], encoder(), cache_dir=tmp_path / "cache"))
    assert encoded == [20]


def test_key_follows_what_decides_the_tokens(
    data: Path, tmp_path: Path, encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(source: Path, encode: ChatEncoder, **options: object) -> str:
        return tokenize([source], encode, cache_dir=tmp_path / "cache", **options).key  # type: ignore[arg-type]

    base = key(data, encoder())
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    assert key(Path(shutil.copy(data, moved / data.name)), encoder()) == base  # content counts, not the path
    assert encoded == [20]
    others = {base, key(data, encoder(70)), key(data, encoder(), mapping={"id": "source"})}
    data.write_text(data.read_text().replace("The sum", "the sum"), encoding="utf-8")
    others.add(key(data, encoder()))
    assert len(others) == 4
    assert encoded == [20] * 4
    monkeypatch.setattr(tokens, "code_digest", lambda *_: "edited")
    assert key(data, encoder()) not in others
    assert encoded == [20] * 5


@pytest.mark.parametrize("damage", ["token", "count", "start", "end", "cut", "half", "empty", "removed"])
def test_damaged_cache_is_built_again(damage: str, data: Path, tmp_path: Path, encoded: list[int]) -> None:
    good = tokenize([data], encoder(), cache_dir=tmp_path / "fresh")
    (tmp_path / "cache").mkdir()
    path = Path(shutil.copy(good.path, tmp_path / "cache"))
    content = path.read_bytes()
    places = {
        "token": content.index(good[7].tokens_L.tobytes()),
        "count": content.index(b'"truncated": 0') + len(b'"truncated": '),
        "start": 0,
        "end": len(content) - 1,
    }
    if damage in places:
        place = places[damage]
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    else:
        path.write_bytes(content[: {"cut": -1, "half": len(content) // 2, "empty": 0, "removed": 0}[damage]])
    if damage == "removed":
        path.unlink()
    again = tokenize([data], encoder(), cache_dir=tmp_path / "cache")
    assert_same(again, good)
    assert again.truncated == 0
    assert encoded == [20, 20]
    tokenize([data], encoder(), cache_dir=tmp_path / "cache")
    assert encoded == [20, 20]
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [f"{good.key}.arrow"]


def test_killed_writer_leaves_nothing_that_counts(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoded: list[int]
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            tokenize([data], encoder(), cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    tokenize([data], encoder(), cache_dir=tmp_path / "cache")
    assert encoded == [20, 20]


def _tokenize_elsewhere(data: Path, folder: Path, barrier: object) -> None:
    barrier.wait(30)  # type: ignore[attr-defined]
    tokenize([data], ChatEncoder(TOKENIZER, template="tulu"), cache_dir=folder, workers=1)


def test_two_writers_of_one_key(data: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    others = [context.Process(target=_tokenize_elsewhere, args=(data, tmp_path / "cache", barrier)) for _ in range(3)]
    for process in others:
        process.start()
    for process in others:
        process.join(60)
    assert [process.exitcode for process in others] == [0, 0, 0]
    assert len(list((tmp_path / "cache").iterdir())) == 1
    result = tokenize([data], encoder(), cache_dir=tmp_path / "cache")
    assert_same(result, tokenize([data], encoder(), cache_dir=tmp_path / "fresh"))


def test_processes_give_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "IN_PROCESS_ROWS", 40)
    monkeypatch.setattr(parallel, "CHUNK_ROWS", 16)
    data = write(tmp_path / "rows.jsonl", [row(n) for n in range(150)])
    seen: list[int] = []
    shares: list[float] = []

    def heard(rows: int, share: float) -> None:
        seen.append(rows)
        shares.append(share)

    encode = encoder(50)
    pooled = tokenize([data], encode, cache_dir=tmp_path / "a", workers=2, on_progress=heard)
    alone = tokenize([data], encode, cache_dir=tmp_path / "b", workers=1)
    assert_same(pooled, alone)
    whole = {conversation.id: conversation for conversation in read_conversations([str(data)])}
    assert 100 < len(pooled) == 150 - pooled.dropped
    conversations = [whole[name] for name in pooled.ids]
    for conversation, stored in zip(conversations, pooled, strict=True):
        assert stored.tokens_L.tolist() == encode.encode(conversation).tokens_L.tolist()
    assert seen == [*range(16, 150, 16), 150]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    assert (pooled.truncated, pooled.dropped) == (alone.truncated, alone.dropped)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(("untold", "broken"), [(60, 100), (100, 60)])
def test_first_error_in_row_order(
    workers: int, untold: int, broken: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row cannot be rendered, another cannot be read: the earlier one is reported, with all its parts."""
    monkeypatch.setattr(parallel, "IN_PROCESS_ROWS", 40)
    monkeypatch.setattr(parallel, "CHUNK_ROWS", 16)
    rows = [row(n) for n in range(150)]
    rows[untold]["messages"][1]["content"] = "forbidden"  # type: ignore[index]
    rows[broken]["messages"] = []
    template = tmp_path / "t.jinja"
    template.write_text(
        "{% for m in messages %}{% if m.content == 'forbidden' %}{{ raise_exception('no') }}{% endif %}"
        "{{ m.content + eos_token }}{% endfor %}"
    )
    encode = ChatEncoder(TOKENIZER, template=str(template))
    source = write(tmp_path / "rows.jsonl", rows)
    expected = TemplateError if untold < broken else DataError
    with pytest.raises(expected) as caught:
        tokenize([source], encode, cache_dir=tmp_path / "cache", workers=workers)
    assert str(min(untold, broken) + (expected is DataError)) in str(caught.value.where)
    assert caught.value.remedy
    assert list((tmp_path / "cache").iterdir()) == []


def test_rows_that_lose_all_supervision(tmp_path: Path) -> None:
    rows = [row(0), row(1), row(2)]
    rows[1]["messages"][0]["content"] = "long " * 100  # type: ignore[index]
    result = tokenize([write(tmp_path / "r.jsonl", rows)], encoder(100), cache_dir=tmp_path / "cache")
    assert list(result.ids) == ["r0", "r2"]
    assert (result.dropped, result.truncated, len(result.dropped_lengths)) == (1, 1, 1)
    again = tokenize([tmp_path / "r.jsonl"], encoder(100), cache_dir=tmp_path / "cache")
    assert (again.dropped, again.truncated) == (1, 1)


def test_a_length_at_which_nothing_is_supervised(data: Path, tmp_path: Path) -> None:
    shortest = min(int(e.supervised_L.argmax()) for e in tokenize([data], encoder(), cache_dir=tmp_path / "cache")) + 1
    with pytest.raises(
        DataError, match=rf"lose all supervised tokens to max_length {shortest - 1}; give at least {shortest},"
    ):
        tokenize([data], encoder(shortest - 1), cache_dir=tmp_path / "cache")
    assert len(tokenize([data], encoder(shortest), cache_dir=tmp_path / "cache")) > 0


def test_disk_full(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OutputError, match="disk is full"):
        tokenize([data], encoder(), cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_disk_full_amid_the_rows(data: Path, tmp_path: Path) -> None:
    with largest_file(2_000), pytest.raises(OutputError, match="File too large"):
        tokenize([data], encoder(), cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_cache_folder_that_cannot_be_made(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError):
        tokenize([data], encoder(), cache_dir=tmp_path / "file" / "cache")


def test_missing_source(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        tokenize([tmp_path / "absent.jsonl"], encoder(), cache_dir=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_cache_lies_where_the_user_says(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PEFT_STUDY_CACHE", str(tmp_path / "mine"))
    assert cache_root() == tmp_path / "mine"
    assert tokenize([data], encoder()).path.parent == tmp_path / "mine" / "tokens"


def test_memory_holds_no_more_than_the_chunks_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are read only as chunks are taken: a slow consumer keeps a million rows on disk."""
    monkeypatch.setattr(parallel, "CHUNK_ROWS", 4)
    monkeypatch.setattr(parallel, "IN_PROCESS_ROWS", 8)
    source = write(tmp_path / "rows.jsonl", [row(n) for n in range(200)])
    read = 0

    def counted() -> Iterator[object]:
        nonlocal read
        for conversation in read_conversations([str(source)]):
            read += 1
            yield conversation

    chunks = parallel.encode_rows(counted(), encoder(), workers=2)  # type: ignore[arg-type]
    assert next(chunks).ids == ["r0", "r1", "r2", "r3"]
    assert read <= 4 * 3 * 2 + 4
    assert sum(len(chunk.ids) for chunk in chunks) == 196
