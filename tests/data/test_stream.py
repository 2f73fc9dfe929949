"""A first look at data: all of it is counted, the drawn rows stand for it, and it stops in time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from command_line import conversation
from peft_study.data.chat import ChatEncoder
from peft_study.data.stream import ROWS_TOKENISED, read_conversations, survey
from peft_study.errors import DataError
from tiny_tokenizer import tiny_tokenizer


@pytest.fixture(scope="module")
def encoder() -> ChatEncoder:
    return ChatEncoder(tiny_tokenizer(300))


def written(path: Path, words: list[int]) -> str:
    made = [conversation(number) for number in range(len(words))]
    for row, length in zip(made, words, strict=True):
        row["messages"][1]["content"] = "a" * length
    path.write_text("".join(json.dumps(row) + "\n" for row in made))
    return str(path)


def test_a_small_data_set_is_known_whole(tmp_path: Path, encoder: ChatEncoder) -> None:
    path = written(tmp_path / "a.jsonl", [5, 90, 1, 30])
    found = survey([path], encoder)
    lengths = sorted(len(encoder.encode(row)) for row in read_conversations([path]))
    assert (found.rows, found.whole, found.lengths_N.tolist()) == (4, True, lengths)
    assert found.within(lengths[1]) == 0.5
    assert (found.quantile(0.5), found.quantile(1.0)) == (lengths[2], lengths[3])


def test_the_drawn_rows_stand_for_all_of_a_sorted_mixture(tmp_path: Path, encoder: ChatEncoder) -> None:
    count = 3 * ROWS_TOKENISED
    path = written(tmp_path / "a.jsonl", [1] * (count // 2) + [100] * (count // 2))
    found = survey([path], encoder)
    assert len(found.lengths_N) == ROWS_TOKENISED
    long = np.mean(found.lengths_N > 80)
    # a standard error of half in a thousand draws is 0.016
    assert 0.45 < long < 0.55
    assert survey([path], encoder).lengths_N.tolist() == found.lengths_N.tolist()


def test_it_stops(tmp_path: Path, encoder: ChatEncoder) -> None:
    path = written(tmp_path / "a.jsonl", [1] * 20)
    assert (survey([path], encoder, rows_read=19).rows, survey([path], encoder, rows_read=19).whole) == (19, False)
    assert (survey([path], encoder, rows_read=20).rows, survey([path], encoder, rows_read=20).whole) == (20, True)


def test_several_sources_the_embedded_one_among_them(tmp_path: Path, encoder: ChatEncoder) -> None:
    heard: list[int] = []
    found = survey([written(tmp_path / "a.jsonl", [1] * 20), "skills"], encoder, on_progress=heard.append)
    assert (found.rows, found.whole) == (2020, True)
    assert heard == list(range(256, 2020, 256))
    with pytest.raises(DataError, match=r"no\.jsonl"):
        survey(["skills", "no.jsonl"], encoder)
