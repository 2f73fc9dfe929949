"""Held-out examples of one source: whole sources are resampled where there are enough of them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from hand_made import BASE, COUNTS, RATE, HandMade, N
from peft_study.data.chat import ChatEncoder
from peft_study.data.dataset import Rows
from peft_study.data.tokens import tokenize
from peft_study.report.compare import compare
from peft_study.report.limit_findings import about_sources
from peft_study.report.study_reader import read_study
from peft_study.search.pruners import SuccessiveHalving
from peft_study.search.trials import TrialRecord
from peft_study.statistics import (
    LEAST_SOURCES,
    Losses,
    TokenCounts,
    chance_of_equals,
    difference,
    mean_loss,
    mean_over_seeds,
    seeds_difference,
    smallest_difference,
)
from peft_study.storage import held_out
from peft_study.storage.held_out import HeldOut
from peft_study.storage.run_dir import RunFolder
from tiny_tokenizer import tiny_tokenizer

SOURCES = np.arange(N) % 32
CLUSTERED = TokenCounts(COUNTS, SOURCES)
"""32 sources of two examples each."""


def drawn(sources: int, seed: int) -> tuple[Losses, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Returns summed losses of 2 to 9 examples a source, their tokens and sources; the mean is 1 nat a token.

    Two thirds of the variance are the source's: a gamma distribution of shape 4 with 0.5 nats, and 0.35 within it.
    """
    generator = np.random.default_rng(seed)
    source = np.repeat(np.arange(sources), generator.integers(2, 10, size=sources))
    counts = generator.integers(5, 40, size=len(source))
    losses = generator.gamma(4, 0.25, size=sources)[source] + 0.35 * (generator.gamma(4, 0.5, size=len(source)) - 2)
    return losses * counts, counts, source


@pytest.mark.slow
def test_sources_are_covered_and_rows_alone_do_not_cover() -> None:
    """30 sources of 2 to 9 examples. Counts on 2026-11-27: 944 of 1,000 intervals cover; over rows, 660."""
    covered = alone = 0
    for seed in range(1000):
        sums, counts, source = drawn(30, seed)
        found, rows = mean_loss(sums, TokenCounts(counts, source)), mean_loss(sums, counts)
        covered += found.low <= 1.0 <= found.high
        alone += rows.low <= 1.0 <= rows.high
    print(f"covered by sources {covered}, by rows {alone}")
    assert 930 <= covered <= 980
    assert alone <= 720


def test_every_statistic_of_sources_is_that_of_their_sums() -> None:
    """Examples i and i + 32 are of one source: their losses and tokens are added up by hand (in threes: exactly)."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(5, 40, size=N)
    one, other = (3 * np.round(tokens * generator.gamma(4, 0.25, size=(3, N))) for _ in range(2))
    counts = TokenCounts(tokens, SOURCES)
    ones, others, sums = one[:, :32] + one[:, 32:], other[:, :32] + other[:, 32:], tokens[:32] + tokens[32:]
    assert mean_loss(one[0], counts) == mean_loss(ones[0], sums)
    assert difference(one[0], other[0], counts) == difference(ones[0], others[0], sums)
    assert mean_over_seeds(one, counts) == mean_over_seeds(ones, sums)
    assert seeds_difference(one, other, counts) == seeds_difference(ones, others, sums)
    assert chance_of_equals(one, other, counts) == chance_of_equals(ones, others, sums)
    # 128 examples are twice as many, so 64 sources
    assert smallest_difference(one[0], other[0], counts, 128) == smallest_difference(ones[0], others[0], sums, 64)


@pytest.mark.parametrize("sources", [SOURCES % (LEAST_SOURCES - 1), np.arange(N), np.zeros(N, dtype=np.int64), None])
def test_of_too_few_sources_or_of_one_a_row_examples_are_resampled(sources: npt.NDArray[np.int64] | None) -> None:
    assert mean_loss(BASE, TokenCounts(COUNTS, sources)) == mean_loss(BASE, COUNTS)
    assert mean_loss(BASE, CLUSTERED) != mean_loss(BASE, COUNTS)


def test_it_is_said_what_is_resampled() -> None:
    many = about_sources(64, 20)
    assert many is not None
    assert many["en"] == "intervals resample the 20 sources of the 64 held-out rows, not single rows"
    few = about_sources(64, 19)
    assert few is not None
    assert few["en"].startswith(
        "the 64 held-out rows come from 19 sources, too few to resample whole ones (from 20 on)"
    )
    assert [about_sources(64, sources) for sources in (None, 1, 64)] == [None] * 3


@pytest.fixture
def study(tmp_path: Path) -> HandMade:
    """Two trials, of which the second is a little worse on the examples of some sources."""
    made = HandMade(tmp_path / "study", {"lora": RATE}, finals={"best": 1, "seeds": 2})
    made.examples = HeldOut(CLUSTERED, BASE, TokenCounts(COUNTS, np.arange(N) % 3))
    made.trial("lora", 1e-3, 0.5)
    made.trial("lora", 1e-2, 0.49)
    made.chosen(lora=[0])
    made.finals("lora", 0, [0.5, 0.52])
    made.concluded("lora")
    made.opened(**{"lora-000-seed-1": 0.5, "lora-000-seed-2": 0.5})
    made.written()
    return made


def test_a_study_resamples_sources_everywhere(study: HandMade) -> None:
    """Of its dev part's 32 sources; its test part has 3, so there examples are resampled, as is said."""
    results, trials = study.results(), study.state.trials
    first, second = trials["lora-000"].last, trials["lora-001"].last
    assert first is not None
    assert second is not None
    row = next(row for row in results.rows if row.trial.name == "lora-000")
    assert results.base_dev == mean_loss(BASE, CLUSTERED)
    assert (row.dev, row.minus_base) == (mean_loss(first, CLUSTERED), difference(first, BASE, CLUSTERED))
    seeds = np.stack([trials[f"lora-000-seed-{seed}"].last for seed in (1, 2)])
    assert results.finalists[0].dev == mean_over_seeds(seeds, CLUSTERED)
    assert results.base_test == mean_loss(study.state.test["none"], COUNTS)
    said = study.said()
    assert "intervals resample the 32 sources of the 64 held-out rows, not single rows" in said
    assert any(line.startswith("the 64 held-out rows come from 3 sources") for line in said)
    read = read_study(study.folder.path)
    found = compare(read, read.state.trials["lora-000"], read.state.trials["lora-001"])
    assert found.dev == difference(first, second, CLUSTERED) != difference(first, second, COUNTS)


def test_a_trial_worse_on_one_source_alone_is_not_pruned() -> None:
    """It is 10 nats worse on 6 of 8 examples of one of 32 sources, and equal elsewhere: rows tell, sources do not."""
    made = np.full(256, 10)
    one, other = TrialRecord("b", "lora", "search", 1, {}, None), TrialRecord("a", "lora", "search", 0, {}, None)  # type: ignore[arg-type]
    best = 10.0 * np.random.default_rng(0).gamma(4, 0.25, size=256)
    worse = np.zeros(256)
    worse[:6] = 10
    other.sums[11], one.sums[11] = best, best + worse
    rule = SuccessiveHalving(3)
    assert rule.judge(one, [other], 11, made) is not None
    assert rule.judge(one, [other], 11, TokenCounts(made, np.arange(256) // 8)) is None


def test_sources_are_kept_beside_the_tokens_and_old_folders_have_none(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    held_out.keep(folder, HeldOut(CLUSTERED, BASE, TokenCounts(COUNTS)))
    kept = held_out.kept(folder)
    assert kept is not None
    assert kept[0].counts_N.sources_N is not None
    assert kept[0].counts_N.sources_N.tolist() == SOURCES.tolist()
    assert kept[0].test_counts_N.sources is None
    path = tmp_path / "examples.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if not k.endswith("_sources")}))
    old = held_out.kept(folder)
    assert old is not None
    assert old[0].counts_N.tokens_N.tolist() == COUNTS.tolist()
    assert old[0].counts_N.sources is None


def test_rows_know_which_of_them_name_the_same_source(tmp_path: Path) -> None:
    """Rows 5, 0 and 2 are of the sources 2, 0 and 2, which are numbered as they come."""
    said = [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"messages": said, "source": f"s{n % 3}"}) + "\n" for n in range(6)))
    data = tokenize([path], ChatEncoder(tiny_tokenizer(), template="tulu"), cache_dir=tmp_path / "cache")
    counts = Rows(((data, 5), (data, 0), (data, 2))).counts()
    assert counts.sources_N is not None
    assert counts.sources_N.tolist() == [0, 1, 0]
    assert (len(counts), counts.sources, counts.sum()) == (3, 2, 3 * data.supervised_N[0])
