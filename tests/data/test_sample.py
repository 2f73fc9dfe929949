"""Samples: uniform, nested, proportional, the same again; and what is refused."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from typer.testing import CliRunner

from peft_study.cli.data import app
from peft_study.data.sample import SampleSpec, allocate, sample
from peft_study.errors import ConfigError, DataError, OutputError

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the shared data sets are not at {SHARED}")


def write(path: Path, sources: list[str]) -> str:
    """One row for each source; the id is the row's number."""
    rows = (
        {"id": str(n), "prompt": "p", "completion": "c", "source": s, "level": n % 3} for n, s in enumerate(sources)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def ids(path: Path) -> list[int]:
    return [int(json.loads(line)["id"]) for line in path.read_bytes().splitlines()]


def test_every_row_is_equally_likely_at_every_place(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", ["s"] * 40)
    member: Counter[int] = Counter()
    first: Counter[int] = Counter()
    for seed in range(400):
        sample([source], tmp_path / "out", SampleSpec((10,), seed=seed), overwrite=True)
        drawn = ids(tmp_path / "out" / "sample-10.jsonl")
        assert len(set(drawn)) == 10
        member.update(drawn)
        first[drawn[0]] += 1
    # Membership counts vary less than a multinomial's (draws without replacement), hence the factor 39/30.
    statistic = chisquare([member[row] for row in range(40)]).statistic * 39 / 30
    assert 17 < statistic < 70  # 39 degrees of freedom: both tails below 0.001
    assert chisquare([first[row] for row in range(40)]).pvalue > 0.001


def test_neighbours_are_drawn_independently(tmp_path: Path) -> None:
    """Rows 2n and 2n+1 together as often as a uniform draw has it: 10/40 x 9/39 of the samples."""
    source = write(tmp_path / "a.jsonl", ["s"] * 40)
    pairs = 0
    for seed in range(300):
        sample([source], tmp_path / "out", SampleSpec((10,), seed=seed), overwrite=True)
        drawn = set(ids(tmp_path / "out" / "sample-10.jsonl"))
        pairs += sum({row, row + 1} <= drawn for row in range(0, 40, 2))
    expected = 300 * 20 * 10 / 40 * 9 / 39
    assert abs(pairs - expected) < 4 * expected**0.5


_strata = st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 60), min_size=1)


@st.composite
def _populations_and_sizes(draw: st.DrawFn) -> tuple[dict[str, int], list[int]]:
    population = draw(_strata)
    total = sum(population.values())
    return population, sorted(draw(st.sets(st.integers(1, total), min_size=1, max_size=4)))


def _check_allocation(population: dict[str, int], sizes: list[int], counts: list[dict[str, int]]) -> None:
    total = sum(population.values())
    before = dict.fromkeys(population, 0)
    for size, count in zip(sizes, counts, strict=True):
        assert sum(count.values()) == size
        for name, rows in population.items():
            assert abs(count[name] - Fraction(size * rows, total)) < 2
            assert before[name] <= count[name] <= rows
        before = count


@given(_populations_and_sizes())
@settings(max_examples=300, deadline=None)
def test_counts_are_near_the_quota_and_nested(case: tuple[dict[str, int], list[int]]) -> None:
    population, sizes = case
    _check_allocation(population, sizes, allocate(population, sizes))
    total, (size, count) = sum(population.values()), (sizes[-1], allocate(population, sizes)[-1])
    up = [size * rows % total for name, rows in population.items() if count[name] > size * rows // total]
    down = [size * rows % total for name, rows in population.items() if count[name] == size * rows // total]
    assert not up or not down or min(up) >= max(down), "the largest sample follows the largest remainders"


@pytest.mark.parametrize(
    ("population", "sizes", "alone"),
    [
        # Quotas 4.29, 4.29, 1.43 give (4, 4, 2); one row more, 4.71, 4.71, 1.57, gives (5, 5, 1): c loses a row.
        ({"a": 6, "b": 6, "c": 2}, [10, 11], [(4, 4, 2), (5, 5, 1)]),
        ({"a": 20, "b": 1, "c": 1, "d": 4}, [17, 18], [(13, 1, 1, 2), (14, 1, 0, 3)]),
    ],
)
def test_alabama_paradox_still_nests(
    population: dict[str, int], sizes: list[int], alone: list[tuple[int, ...]]
) -> None:
    assert [tuple(allocate(population, [size])[0].values()) for size in sizes] == alone
    counts = allocate(population, sizes)
    assert tuple(counts[1].values()) == alone[1]
    _check_allocation(population, sizes, counts)


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=60), st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_files_are_nested_proportional_and_truthfully_described(
    tmp_path: Path, sources: list[str], data: st.DataObject
) -> None:
    sizes = sorted(data.draw(st.sets(st.integers(1, len(sources)), min_size=1, max_size=3)))
    by = data.draw(st.sampled_from([None, "source", "level"]))
    path, out = write(tmp_path / "a.jsonl", sources), tmp_path / "out"
    spec = SampleSpec(tuple(reversed(sizes)), seed=data.draw(st.integers(0, 99)), by=by)
    manifest = sample([path], out, spec, overwrite=True)
    before = b""
    for size in sizes:
        content = (out / f"sample-{size}.jsonl").read_bytes()
        assert content.startswith(before)
        before = content
        drawn = ids(out / f"sample-{size}.jsonl")
        assert len(set(drawn)) == size
        entry = manifest["samples"][str(size)]
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert entry["counts"] == dict(sorted(Counter(sources[row] for row in drawn).items()))
        strata = {"source": sources, "level": [str(row % 3) for row in range(len(sources))], None: None}[by]
        for name, rows in Counter(strata or []).items():
            count = sum((strata or [])[row] == name for row in drawn)
            assert abs(count - Fraction(size * rows, len(sources))) < 1
            if by == "level":
                assert entry["strata"][name] == count
    assert manifest == json.loads((out / "manifest.json").read_text())
    assert manifest["counts"] == dict(sorted(Counter(sources).items()))
    assert manifest["files"] == [{"file": path, "sha256": hashlib.sha256(Path(path).read_bytes()).hexdigest()}]
    assert (manifest["rows"], manifest["seed"], manifest["sizes"]) == (len(sources), spec.seed, sizes)
    assert sorted(p.name for p in out.iterdir()) == sorted(["manifest.json", *(f"sample-{n}.jsonl" for n in sizes)])


def test_same_seed_same_bytes_other_seed_others(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", ["a", "b"] * 50)
    contents = []
    for folder, seed in (("one", 1), ("two", 1), ("three", 2)):
        sample([source], tmp_path / folder, SampleSpec((20, 5), seed=seed, by="source"))
        contents.append({path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()})
    assert contents[0] == contents[1]
    assert contents[0]["sample-20.jsonl"] != contents[2]["sample-20.jsonl"]


def test_a_size_of_its_own_draws_the_same_rows(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", ["a"] * 100)
    sample([source], tmp_path / "both", SampleSpec((9, 50)))
    sample([source], tmp_path / "one", SampleSpec((9,)))
    assert ids(tmp_path / "both" / "sample-9.jsonl") == ids(tmp_path / "one" / "sample-9.jsonl")


@needs_shared
def test_real_mixture_by_source(tmp_path: Path) -> None:
    manifest = sample([str(SHARED / "tulu-like-mix" / "arrow")], tmp_path, SampleSpec((900, 9000), by="source"))
    assert manifest["rows"] == sum(manifest["counts"].values()) == 12000
    for size in (900, 9000):
        counts = manifest["samples"][str(size)]["counts"]
        assert sum(counts.values()) == size
        for name, rows in manifest["counts"].items():
            assert abs(counts.get(name, 0) - Fraction(size * rows, 12000)) < 1


def test_refusals_leave_nothing(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", ["a"] * 5)
    with pytest.raises(DataError, match=r"a\.jsonl: a sample of 7 rows is wanted, but there are only 5 rows; ask for"):
        sample([source], tmp_path / "new" / "out", SampleSpec((2, 7)))
    with pytest.raises(DataError, match=r"a\.jsonl row 1: no value in column 'levle'.*; did you mean 'level'"):
        sample([source], tmp_path / "new" / "out", SampleSpec((2,), by="levle"))
    (tmp_path / "bad.jsonl").write_text('{"prompt": "p", "completion": ""}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl row 1: turn 2 .assistant. has empty content"):
        sample([source, str(tmp_path / "bad.jsonl")], tmp_path / "new" / "out", SampleSpec((2,)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "bad.jsonl"]


def test_folder_that_holds_samples(tmp_path: Path) -> None:
    source, out = write(tmp_path / "a.jsonl", ["a"] * 5), tmp_path / "out"
    sample([source], out, SampleSpec((2,)))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(OutputError, match=r"holds samples already \(manifest.json, sample-2.jsonl\); give --overwrite"):
        sample([source], out, SampleSpec((3,)))
    with pytest.raises(OutputError, match=r"sample-2\.jsonl: is one of the sources"):
        sample([str(out / "sample-2.jsonl")], out, SampleSpec((2,)), overwrite=True)
    with pytest.raises(OutputError, match=r"sample-2\.jsonl: is one of the sources"):
        sample([str(out / "sample-2.jsonl")], out, SampleSpec((1,)), overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "sample-of-mine.jsonl").write_text("mine")
    sample([source], out, SampleSpec((3,)), overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "sample-3.jsonl", "sample-of-mine.jsonl"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"sizes": ()}, "--sizes: no size is given"),
        ({"sizes": (5, 0)}, "--sizes: a sample of 0 rows; give sizes of 1 or more"),
        ({"sizes": (-3,)}, "--sizes: a sample of -3 rows"),
        ({"sizes": (5, 5)}, "--sizes: 5 is given twice"),
        ({"sizes": (5,), "seed": -1}, "--seed: a seed of -1"),
    ],
)
def test_specs_that_cannot_be_drawn(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SampleSpec(**spec)


@pytest.mark.parametrize("sizes", [["--sizes", "2", "4"], ["--sizes", "2", "--sizes", "4"], ["--sizes=2", "4"]])
@pytest.mark.parametrize("first", [True, False])
def test_command_line_takes_sizes_in_a_row(tmp_path: Path, sizes: list[str], first: bool) -> None:
    source = [write(tmp_path / "a.jsonl", ["a"] * 5)]
    rest = [*sizes, "--seed", "3", "--by", "source", "-o", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["sample", *(source + rest if first else [*rest, *source])])
    assert done.exit_code == 0, done.output
    assert [len(ids(tmp_path / "out" / f"sample-{size}.jsonl")) for size in (2, 4)] == [2, 4]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["seed"] == 3
    failed = CliRunner().invoke(app, ["sample", *source, "--sizes", "0", "-o", str(tmp_path / "new")])
    assert isinstance(failed.exception, ConfigError)
