"""Training, held-out and test rows: no text in two parts, exact sizes, the proportions of the sources."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import assume, given, reject
from hypothesis import strategies as st

from chat_cases import encoder
from peft_study.config import DataConfig
from peft_study.config.common import validate
from peft_study.data import split
from peft_study.data.conversation import Example
from peft_study.data.dataset import Rows
from peft_study.data.split import Split, make_split
from peft_study.errors import ConfigError
from peft_study.seeds import key


@dataclass(frozen=True)
class Row:
    """A row: its source, what its text is (the digest), and the tokens the model sees of it."""

    source: str
    said: int
    seen: int


class Fake:
    """Tokenised data of such rows."""

    def __init__(self, key: str, rows: Sequence[Row]) -> None:
        self.key, self.rows = key, rows
        self.dropped = self.truncated = 0
        self.sources = [row.source for row in rows]
        self.digests = [hashlib.blake2b(bytes([row.said % 256, row.said // 256])).digest()[:16] for row in rows]
        # two lengths, so that equal tokens are looked for among rows of equal length only
        self.lengths_N = np.array([2 + row.seen % 2 for row in rows])
        self.supervised_N = np.ones(len(rows), dtype=np.int64)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Example:
        tokens = np.array([self.rows[i].seen] * int(self.lengths_N[i]), dtype=np.int32)
        return Example(tokens, np.arange(len(tokens)) == 1)


def different(**sources: int) -> list[Row]:
    """Returns so many rows of each source, no two of them alike."""
    names = [name for name, count in sources.items() for _ in range(count)]
    return [Row(name, i, i) for i, name in enumerate(names)]


def divided(files: dict[str, Sequence[Row]], *, seed: int = 0, with_test: bool = True, **settings: Any) -> Split:
    """Returns the split of a data set whose training file is `train`."""
    with patch.object(split, "tokenize", lambda paths, *_, **__: Fake(paths[0], files[paths[0]])):
        return make_split(DataConfig(**{"train": "train", **settings}), encoder(), seed, test=with_test)


def parts(made: Split) -> list[Rows]:
    return [made.train, made.held_out, *([made.test] if made.test is not None else [])]


def rows_of(part: Rows | None) -> list[Row]:
    assert part is not None
    return [data.rows[row] for data, row in part.places]


def numbers(part: Rows | None) -> list[int]:
    assert part is not None
    return [row for _, row in part.places]


def assert_apart(made: Split) -> None:
    """Asserts that no two parts share a text: neither its digest nor its tokens."""
    for what in ("said", "seen"):
        texts = [{getattr(row, what) for row in rows_of(part)} for part in parts(made)]
        assert sum(map(len, texts)) == len(set().union(*texts)), what


TEXTS = st.integers(0, 40)
ROWS = st.lists(st.builds(Row, st.sampled_from("abc"), TEXTS, TEXTS), min_size=12, max_size=40)
SEEDS = st.integers(0, 5)


@given(rows=ROWS, held_out=st.integers(1, 4), test=st.integers(1, 4), seed=SEEDS, stratify=st.booleans())
def test_no_text_in_two_parts_and_exact_sizes(
    rows: list[Row], held_out: int, test: int, seed: int, stratify: bool
) -> None:
    settings: dict[str, Any] = {"held_out": held_out, "test": test, "seed": seed, "stratify": stratify}
    try:
        made = divided({"train": rows}, **settings)
    except ConfigError:  # too few rows that differ
        reject()
    assert_apart(made)
    assert (len(made.held_out), len(rows_of(made.test))) == (held_out, test)
    used = [row for part in parts(made) for row in numbers(part)]
    assert len(used) == len(set(used))
    for part in parts(made):
        assert len(part) > 0
        assert numbers(part) == sorted(numbers(part))
    drawn = [*rows_of(made.held_out), *rows_of(made.test)]
    for i in set(range(len(rows))) - set(used):  # whoever is in no part says what a drawn row says
        assert any(rows[i].said == other.said or rows[i].seen == other.seen for other in drawn)
    left_out = len(rows) - len(used)
    assert any(str(left_out) in note for note in made.notes) == (left_out > 0)
    again = divided({"train": rows}, **settings)
    assert [part.fingerprint() for part in parts(again)] == [part.fingerprint() for part in parts(made)]


@given(
    sizes=st.lists(st.integers(2, 60), min_size=1, max_size=6),
    fractions=st.tuples(st.floats(0, 0.5), st.floats(0, 0.5)),
    seed=SEEDS,
)
def test_each_source_in_proportion(sizes: list[int], fractions: tuple[float, float], seed: int) -> None:
    rows = different(**{f"s{i}": size for i, size in enumerate(sizes)})
    spare = len(rows) - len(sizes)  # as many can be drawn without emptying a source
    counts = [max(1, int(fraction * spare)) for fraction in fractions]
    assume(sum(counts) <= spare)
    made = divided({"train": rows}, held_out=counts[0], test=counts[1], seed=seed)
    for part, count in ((made.held_out, counts[0]), (made.test, counts[1])):
        assert len(rows_of(part)) == count
        found = Counter(row.source for row in rows_of(part))
        shares = {f"s{i}": count * size / len(rows) for i, size in enumerate(sizes)}
        roomy = all(size > sum(c * size / len(rows) + 1 for c in counts) for size in sizes)
        for source, share in shares.items():
            # where all sources are large enough to give what is theirs and keep a row
            assert not roomy or abs(found[source] - share) < 1, (source, share, found)


def test_proportions_by_hand() -> None:
    rows = different(a=50, b=30, c=20)
    made = divided({"train": rows}, held_out=10, test=21)
    assert Counter(row.source for row in rows_of(made.held_out)) == {"a": 5, "b": 3, "c": 2}
    # 10.5, 6.3 and 4.2 rows: the last goes to the largest remainder
    assert Counter(row.source for row in rows_of(made.test)) == {"a": 11, "b": 6, "c": 4}
    assert Counter(row.source for row in rows_of(made.train)) == {"a": 34, "b": 21, "c": 14}


def test_a_source_of_one_row_stays_in_training() -> None:
    for seed in range(20):
        made = divided({"train": different(a=30, lone=1)}, held_out=12, test=12, seed=seed)
        assert {row.source for row in rows_of(made.train)} == {"a", "lone"}


def test_a_source_that_repeats_one_text_stays_in_training() -> None:
    rows = [*different(a=30), *[Row("b", 100, 100)] * 30]
    for seed in range(20):
        made = divided({"train": rows}, held_out=10, test=10, seed=seed)
        assert Counter(row.source for row in rows_of(made.train)) == {"a": 10, "b": 30}


def test_rows_that_each_name_their_own_source_are_drawn_in_proportion_and_at_random() -> None:
    rows = [*different(a=100), *(Row(f"https://{i}", i, i) for i in range(100, 200))]
    seen = Counter[int]()
    for seed in range(20):
        made = divided({"train": rows}, held_out=20, test=10, seed=seed)
        for part, count in ((made.held_out, 10), (made.test, 5)):
            assert sum(row.source == "a" for row in rows_of(part)) == count
            seen.update(row for row in numbers(part) if row >= 100)
    assert len(seen) > 80  # of 100, in 20 x 15 draws


def test_the_same_configured_source_is_one_stratum_and_two_are_two() -> None:
    files = {"train": different(x=40), "other": [Row("x", i, i) for i in range(40, 60)]}
    with patch.object(split, "tokenize", lambda paths, *_, **__: Fake(paths[0], files[paths[0]])):
        made = make_split(DataConfig(train=("train", "other"), held_out=6), encoder(), 0)
    assert Counter(data.key for data, _ in made.held_out.places) == {"train": 4, "other": 2}


@given(count=st.integers(1, 30), seed=SEEDS)
def test_one_stratum_is_drawn_as_before_there_were_strata(count: int, seed: int) -> None:
    order = np.random.default_rng(key(seed, "held out")).permutation(62)[:count]
    expected = sorted(order.tolist())
    for rows, stratify in ((different(a=62), True), (different(a=2, b=60), False)):
        for with_test in (False, True):  # a test part does not move it
            settings: dict[str, Any] = {"held_out": count, "test": 31 - count if count < 31 else 1}
            made = divided({"train": rows}, seed=seed, with_test=with_test, stratify=stratify, **settings)
            assert numbers(made.held_out) == expected
            assert (made.test is not None) == with_test


def test_the_rows_of_a_seed_stay_what_they_are() -> None:
    made = divided({"train": different(a=60)}, held_out=6)
    assert numbers(made.held_out) == [0, 7, 10, 18, 35, 47]  # as before there was a test part
    assert numbers(made.test) == [14, 17, 24, 26, 31, 51]


def test_another_seed_draws_other_rows() -> None:
    files = {"train": different(a=60), "held": [Row("x", 100, 100)]}
    for settings in ({"held_out": 6}, {"held_out": "held", "test": 6}):
        drawn = [divided(files, seed=seed, **settings).test for seed in range(5)]
        assert len({tuple(numbers(part)) for part in drawn}) == 5
    halves = [divided({**files, "held": different(b=20)}, held_out="held", seed=seed).test for seed in range(5)]
    assert len({tuple(numbers(part)) for part in halves}) == 5


def test_the_test_setting_is_nothing_to_one_run() -> None:
    made = divided({"train": different(a=60)}, held_out=6, test="not there", with_test=False)
    assert made.test is None
    assert (len(made.train), len(made.held_out)) == (54, 6)


def test_how_many_where_little_is_said() -> None:
    sizes = [
        ({}, 1000, (64, 64)),
        ({}, 60, (6, 6)),
        ({"held_out": 0.1}, 60, (6, 6)),
        ({"held_out": 8}, 60, (8, 8)),
        ({"held_out": 8, "test": 0.5}, 60, (8, 30)),
        ({"test": 3}, 60, (6, 3)),
    ]
    for settings, count, expected in sizes:
        made = divided({"train": different(a=count)}, **settings)
        assert (len(made.held_out), len(rows_of(made.test))) == expected, settings


def test_a_held_out_file_is_divided_in_halves() -> None:
    files = {"train": different(a=10), "held": [Row("x", i, i) for i in range(8, 18)] + [Row("y", 20, 20)]}
    made = divided({**files, "held": [*files["held"], Row("x", 17, 90), Row("y", 91, 17)]}, held_out="held")
    assert_apart(made)
    assert len(made.held_out) == 6  # 11 texts
    assert len(rows_of(made.test)) == 5
    assert sorted(row.said for part in (made.held_out, made.test) for row in rows_of(part)) == [*range(8, 18), 20]
    assert made.notes == (
        "held: 2 rows equal another row of it and were left out",
        "2 training rows equal a held-out or test row and were left out",
    )
    whole = divided(files, held_out="held", with_test=False)
    assert len(whole.held_out) == 11
    assert whole.notes == ("2 training rows equal a held-out row and were left out",)


def test_halves_keep_the_proportions() -> None:
    files = {"train": [Row("t", 500, 500)], "held": different(a=21, b=10, c=9)}
    made = divided(files, held_out="held")
    for part in (made.held_out, made.test):
        found = Counter(row.source for row in rows_of(part))
        assert [found[name] in (half, half + 1) for name, half in (("a", 10), ("b", 5), ("c", 4))] == [True] * 3


def test_rows_of_the_test_file_that_are_held_out_are_left_out_of_it() -> None:
    held = [Row("x", i, i) for i in range(20, 25)]
    files = {
        "train": different(a=10),
        "held": held,
        "test": [Row("y", 3, 3), held[0], Row("y", 30, 21), Row("y", 9, 9)],
    }
    made = divided(files, held_out="held", test="test")
    assert_apart(made)
    assert numbers(made.test) == [0, 3]
    assert numbers(made.held_out) == [0, 1, 2, 3, 4]
    assert numbers(made.train) == [0, 1, 2, 4, 5, 6, 7, 8]
    assert made.notes == (
        "test: 2 test rows equal a held-out row and were left out",
        "2 training rows equal a held-out or test row and were left out",
    )


@given(rows=ROWS, file=ROWS, count=st.integers(1, 3), file_is=st.sampled_from(["held_out", "test", "both"]), seed=SEEDS)
def test_files_and_draws_share_no_text(rows: list[Row], file: list[Row], count: int, file_is: str, seed: int) -> None:
    settings: dict[str, Any] = {"held_out": count, "test": count}
    settings |= {"held_out": "file"} if file_is != "test" else {}
    settings |= {"test": "file" if file_is == "test" else "other"} if file_is != "held_out" else {}
    files = {"train": rows, "file": file, "other": [*file[::2], Row("d", 70, 70)]}
    try:
        made = divided(files, seed=seed, **settings)
    except ConfigError:  # too few rows that differ
        reject()
    assert_apart(made)
    whole = made.test if file_is == "test" else made.held_out
    assert rows_of(whole) == file  # a file's rows are all there, whatever is drawn beside it
    if file_is == "both":
        assert Row("d", 70, 70) in rows_of(made.test)
    else:
        assert len(rows_of(made.held_out if file_is == "test" else made.test)) == count


MISTAKES: dict[str, tuple[dict[str, Sequence[Row]], dict[str, Any], str]] = {
    "all held out": (
        {},
        {"held_out": 60, "with_test": False},
        "data.held_out: 60 rows would be held out, but there are 60; hold out fewer",
    ),
    "both are too many": (
        {},
        {"held_out": 30},
        "data.held_out: 30 rows and 30 for the test would be held out, but there are 60; hold out fewer",
    ),
    "test is too many": (
        {},
        {"held_out": 10, "test": 50},
        "data.test: 10 rows and 50 for the test would be held out, but there are 60; hold out fewer",
    ),
    "test beside a file is too many": (
        {"held": [Row("x", 100, 100), Row("a", 0, 0)]},
        {"held_out": "held", "test": 59},
        "data.test: 59 rows would be held out, but there are 59; hold out fewer",
    ),
    "none of a source": (
        {},
        {"train": ({"path": "train", "take": 0.001},)},
        "train: a share of 0.001 of 60 rows is none; take a larger share",
    ),
    "none": (
        {},
        {"held_out": 0.001},
        "data.held_out: of 60 rows none would be held out; give a number of rows, or a file",
    ),
    "none to test": (
        {},
        {"test": 0.001},
        "data.test: of 60 rows none would be held out; give a number of rows, or a file",
    ),
    "one text": (
        {"train": [Row("a", 1, 1)] * 9},
        {"held_out": 1, "with_test": False},
        "data: no training rows are left beside the held-out ones; hold out fewer",
    ),
    "too many repeat": (
        {"train": [*[Row("a", 1, 1)] * 9, Row("a", 2, 2), Row("a", 3, 3)]},
        {"held_out": 2, "test": 2},
        "data.test: 2 rows leave nothing to train on: only 2 rows say what no held-out row says; hold out fewer",
    ),
    "file holds all": (
        {"held": different(a=70)},
        {"held_out": "held", "with_test": False},
        "data.held_out: every row of train is also in held; give a file of other rows, or a number of rows to draw",
    ),
    "files hold all": (
        {"held": different(a=30), "test": different(a=70)},
        {"held_out": "held", "test": "test"},
        "data.held_out and data.test: every row of train is also in held or test; "
        "give a file of other rows, or a number of rows to draw",
    ),
    "test file is held out": (
        {"held": different(a=5), "test": different(b=3)},
        {"held_out": "held", "test": "test"},
        "data.test: every row of test is also in held; "
        "give a file of other rows, or leave it out to divide the one of held_out",
    ),
    "file of one text": (
        {"held": [Row("x", 100, 100), Row("x", 100, 101)]},
        {"held_out": "held"},
        "data.held_out: held says one thing only, and cannot be divided into held-out and test rows; "
        "give more rows, or a `test` of its own",
    ),
}


@pytest.mark.parametrize("case", MISTAKES, ids=[name.replace(" ", "-") for name in MISTAKES])
def test_mistakes(case: str) -> None:
    files, settings, said = MISTAKES[case]
    with pytest.raises(ConfigError) as raised:
        divided({"train": different(a=60), **files}, **settings)
    assert str(raised.value) == said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"held_out": -1}, ("data.yaml, held_out: ", "above 0", "-1")),
        ({"test": 0}, ("data.yaml, test: ", "above 0", "0")),
        ({"test": -0.5}, ("data.yaml, test: ", "above 0", "-0.5")),
        ({"test": float("nan")}, ("data.yaml, test: ", "nan")),
        ({"test": float("inf")}, ("data.yaml, test: ", "inf")),
        ({"held_out": 1.5}, ("data.yaml, held_out: ", "neither a whole number of rows nor a share below 1", "1.5")),
        ({"held_out": True}, ("data.yaml, held_out: ", "neither a number", "True")),
        ({"test": ""}, ("data.yaml, test: ", "is empty")),
        ({"held_out": 0.5, "test": 0.5}, ("data.yaml, test: ", "beside held_out 0.5", "less than 1", "value: 0.5")),
        ({"stratify": "perhaps"}, ("data.yaml, stratify: ", "perhaps")),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], said: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as raised:
        validate(DataConfig, {"train": "a.jsonl", **settings}, where="data.yaml")
    line = str(raised.value)
    assert "\n" not in line
    for words in said:
        assert words in line, line


def test_settings_that_can_be() -> None:
    for settings in ({"held_out": 0.5, "test": 0.4}, {"held_out": 1, "test": 0.9}, {"held_out": 0.9}, {"test": "a"}):
        DataConfig(train="a.jsonl", **settings)
