"""The results of a study: a row a trial, a ranking of finalists, and how often pruning was wrong."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from peft_study.config import METHODS, NoneConfig, StudyConfig, TrainingConfig, TrialSettings
from peft_study.search import range_expansion
from peft_study.search.trials import StudyState, TrialRecord, best_first, setting_name
from peft_study.statistics import (
    Estimate,
    Losses,
    chance_of_equals,
    difference,
    mean_loss,
    mean_over_seeds,
    seeds_difference,
    smallest_difference,
    told_apart,
)
from peft_study.storage import metrics
from peft_study.storage.files import AtomicFiles, finite, json_text
from peft_study.storage.held_out import HeldOut
from peft_study.storage.study_dir import StudyFolder

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True)
class Row:
    """One trial with its numbers; losses are in nats a supervised token.

    Attributes:
        trial: its kind, settings and end.
        settings: every setting of its method and its optimizer's searched ones.
        start, dev: dev loss before step 1 and at its last measurement.
        minus_base: dev loss above the untouched base's.
        best_step, best_loss: where its dev loss was least; shown, never ranked by.
        test: of a finalist.
    """

    trial: TrialRecord
    settings: dict[str, Any]
    start: Estimate | None
    dev: Estimate | None
    minus_base: Estimate | None
    best_step: int | None
    best_loss: float | None
    test: Estimate | None


@dataclass(frozen=True, slots=True)
class Finalist:
    """One setting over its seeds.

    Attributes:
        method, number, settings: which.
        dev, test: mean over seeds, with the interval over seeds and examples.
        dev_of_seeds: dev loss of each seed.
        failed: seeds that did not finish; then it is not ranked.
        test_minus_base: test loss above the untouched base's, and
        test_minus_winner: above the winner's, paired by example.
        edges: values at the end of what was tried: dimension -> low or high.
        untuned: its method had fewer trials than the others, so it is not ranked.
        winner: it has the least mean dev loss of those ranked, or the best score of the task that chooses.
    """

    method: str
    number: int
    settings: dict[str, Any]
    dev: Estimate | None
    dev_of_seeds: tuple[float, ...]
    failed: int
    test: Estimate | None
    test_minus_base: Estimate | None
    test_minus_winner: Estimate | None
    edges: dict[str, str]
    untuned: bool
    winner: bool

    @property
    def name(self) -> str:
        """Of the setting: ``lora-003``."""
        return setting_name(self.method, self.number)


@dataclass(frozen=True, slots=True)
class Pruning:
    """Trials that were stopped early, those that were kept as a control, and how many of these would be finalists."""

    pruned: int
    audited: int
    wrong: int


@dataclass(frozen=True, slots=True)
class Results:
    """What a study found.

    Attributes:
        methods: in the order of the file.
        rows: a trial each, in the order in which they began.
        finalists: best first by mean dev loss; those that are not ranked last.
        groups: the ranked ones in the same order, in groups that cannot be told apart:
        winner_by: the task that chose the winner; None: dev loss did.
        on_test: by their test losses; else, where one of them has none, by their dev losses.
        smallest: the difference of two finalists, in nats a token, that these held-out examples show with 80 % power,
            and that four times as many would; None where there are no two.
        base_dev, base_test: of the untouched base.
        notes: of each method's ranges.
        pruning: of all methods.
        tokens: data tokens by method, range tests and finals included.
        dev_examples, test_examples: held-out examples.
        deadline: the time limit ended the search before all its trials.
        stopped: why a callback ended the study before its plan, else None.
        continued: how often the study file was changed.
    """

    methods: tuple[str, ...]
    rows: tuple[Row, ...]
    finalists: tuple[Finalist, ...]
    groups: tuple[tuple[Finalist, ...], ...]
    winner_by: str | None
    on_test: bool
    smallest: tuple[float, float] | None
    base_dev: Estimate
    base_test: Estimate | None
    notes: dict[str, list[str]]
    pruning: Pruning
    tokens: dict[str, int]
    dev_examples: int
    test_examples: int
    deadline: bool
    stopped: str | None
    continued: int

    @property
    def winner_first(self) -> tuple[Finalist, ...]:
        """The finalists, the winner first: a task may have chosen one that is not the best by dev loss."""
        return tuple(sorted(self.finalists, key=lambda final: not final.winner))


def collect(config: StudyConfig, state: StudyState, examples: HeldOut, folder: StudyFolder) -> Results:
    """Returns the results of a study so far.

    Args:
        config: filled.
        state: its trials.
        examples: held out.
        folder: with the trials' metrics.
    """
    methods = config.searched
    rows = tuple(row_of(trial, state, examples, folder) for trial in state.trials.values())
    base_test = mean_loss(state.test["none"], examples.test_counts_N) if state.test else None
    finalists = _finalists(config, state, examples)
    ranked = [f for f in finalists if not (f.untuned or f.failed or f.dev is None)]
    on_test = bool(ranked) and all(final.test is not None for final in ranked)
    groups, smallest = _rank(ranked, state, examples, on_test=on_test)
    return Results(
        methods,
        rows,
        finalists,
        groups,
        state.winner_by,
        on_test,
        smallest,
        mean_loss(examples.base_N, examples.counts_N),
        base_test,
        dict(state.notes),
        _pruning(config, state),
        {m: sum(t.facts.get("tokens", 0) for t in state.trials.values() if t.method == m) for m in methods},
        len(examples.counts_N),
        len(examples.test_counts_N),
        state.deadline,
        state.stopped,
        len(state.continued),
    )


def settings_of(trial: TrialRecord) -> dict[str, Any]:
    """Returns every setting of a trial's method, and the searched ones of its optimizer; none of the base."""
    return {n: v for n, v in trial.settings.flat.items() if n != "method" and trial.kind != "reference"}


def row_of(trial: TrialRecord, state: StudyState, examples: HeldOut, folder: StudyFolder) -> Row:
    """Returns one trial's numbers; arguments as of `collect`."""
    last = trial.sums[max(trial.sums)] if trial.sums and trial.status in ("finished", "pruned") else None
    curve = [r for r in metrics.read(folder.trial(trial.name).metrics) if r["event"] == "held_out" and r["step"] > 0]
    curve = [r for r in curve if r["loss"] is not None]
    best = min(curve, key=lambda r: r["loss"], default=None) if trial.status != "failed" else None
    test = state.test.get(trial.name) if trial.kind != "reference" else state.test.get("none")
    return Row(
        trial,
        settings_of(trial),
        None if trial.start is None else mean_loss(trial.start, examples.counts_N),
        None if last is None else mean_loss(last, examples.counts_N),
        None if last is None else difference(last, examples.base_N, examples.counts_N),
        None if best is None else best["step"],
        None if best is None else best["loss"],
        None if test is None else mean_loss(test, examples.test_counts_N),
    )


def _finalists(config: StudyConfig, state: StudyState, examples: HeldOut) -> tuple[Finalist, ...]:
    found = []
    winner_test = _stacked(state, state.finals_of(*state.winner)) if state.winner else None
    counts_N = examples.test_counts_N
    for method in config.searched:
        for number in state.finalists.get(method, ()):
            trials = state.finals_of(method, number)
            setting = state.setting(method, number)  # its seeds may not have begun
            done = [t.last for t in trials if t.last is not None]
            dev = mean_over_seeds(np.stack(done), examples.counts_N) if done else None
            test_SN = _stacked(state, trials)
            not_begun = config.finals.seeds - len(trials) if state.stopped else 0
            found.append(
                Finalist(
                    method,
                    number,
                    settings_of(setting),
                    dev,
                    tuple(float(x.sum() / examples.counts_N.sum()) for x in done),
                    sum(t.status not in ("running", "finished") for t in trials) + max(0, not_begun),
                    None if test_SN is None else mean_over_seeds(test_SN, counts_N),
                    None if test_SN is None else seeds_difference(test_SN, state.test["none"][None], counts_N),
                    None
                    if test_SN is None or winner_test is None or state.winner == (method, number)
                    else seeds_difference(test_SN, winner_test, counts_N),
                    range_expansion.edges(setting.values, config.methods[method], state.bounds.get(method, {})),
                    state.untuned(method, config),
                    state.winner == (method, number),
                )
            )
    return tuple(sorted(found, key=lambda f: (f.untuned or f.failed > 0, f.dev.value if f.dev else float("inf"))))


def _rank(
    ranked: Sequence[Finalist], state: StudyState, examples: HeldOut, *, on_test: bool
) -> tuple[tuple[tuple[Finalist, ...], ...], tuple[float, float] | None]:
    """Parts finalists, best first, into groups as of `told_apart`.

    Beside the groups stands the least difference of the two best that this part, and one four times as large, would
    show.
    """
    counts_N = examples.test_counts_N if on_test else examples.counts_N
    sums: list[Losses] = []
    for final in ranked:
        trials = state.finals_of(final.method, final.number)
        there = [state.test.get(t.name) if on_test else t.last for t in trials]
        sums.append(np.stack([losses for losses in there if losses is not None]))
    groups = told_apart(len(ranked), lambda i, j: chance_of_equals(sums[i], sums[j], counts_N))
    smallest = None
    if len(ranked) > 1 and (number := len(counts_N)) > 2:
        first, second = sums[0].mean(0), sums[1].mean(0)
        now, later = (smallest_difference(first, second, counts_N, count) for count in (number, 4 * number))
        smallest = (now, later) if now > 0 else None
    return tuple(tuple(ranked[place] for place in group) for group in groups), smallest


def _stacked(state: StudyState, trials: Sequence[TrialRecord]) -> Losses | None:
    """Returns the test losses of the seeds that finished, seed by example; None before the test part is opened."""
    sums = [state.test[t.name] for t in trials if t.name in state.test]
    return np.stack(sums) if sums else None


def _pruning(config: StudyConfig, state: StudyState) -> Pruning:
    pruned = audited = wrong = 0
    for method in config.searched:
        trials = state.of(method, "search")
        pruned += sum(t.status == "pruned" for t in trials)
        checked = [t for t in trials if t.audited and t.status != "running"]
        audited += len(checked)
        best = best_first(trials)[: max(1, config.finals.best)]
        wrong += sum(any(t is b for b in best) for t in checked)
    return Pruning(pruned, audited, wrong)


def write_rows(results: Results, folder: StudyFolder) -> None:
    """Writes ``results.parquet`` and ``results.csv``: one row a trial, every setting a column."""
    import pyarrow as pa
    import pyarrow.parquet

    table = pa.Table.from_pylist([flat(row) for row in results.rows], schema=_schema())
    text = io.StringIO()
    write_csv(results.rows, text)
    with AtomicFiles() as files:
        pa.parquet.write_table(table, files.open(folder.path / "results.parquet"))
        files.open(folder.path / "results.csv").write(text.getvalue().encode())


def write_csv(rows: Iterable[Row], file: TextIO) -> None:
    """Writes every column of trials, as ``results.csv`` and ``peft-study list --csv`` have them."""
    writer = csv.DictWriter(file, columns(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat(row) for row in rows)


def flat(row: Row) -> dict[str, Any]:
    """Returns a trial as plain columns; losses in nats a token, without an interval None, `settings` as JSON."""
    trial = row.trial
    own = {name: row.settings.get(name) for name in ("learning_rate", "warmup_ratio", "weight_decay")}
    return {
        "name": trial.name,
        "method": trial.method,
        "kind": trial.kind,
        "number": trial.number,
        "seed": trial.seed,
        "status": trial.status,
        "reason": trial.reason,
        **own,
        **{name: _scalar(row.settings.get(name)) for name in _method_columns()},
        **_numbers("start", row.start),
        **_numbers("dev", row.dev),
        **_numbers("dev_minus_base", row.minus_base),
        **_numbers("test", row.test),
        "best_step": row.best_step,
        "best_dev": row.best_loss,
        "audited": trial.audited,
        "steps": trial.facts.get("steps"),
        "data_tokens": trial.facts.get("tokens"),
        "virtual_tokens": trial.facts.get("virtual_tokens"),
        "seconds": trial.facts.get("seconds"),
        "trainable": trial.facts.get("trainable"),
        "settings": json_text(row.settings),
    }


def columns() -> tuple[str, ...]:
    """Returns the names of the columns, also where there is no trial yet."""
    nobody = TrialRecord("", "none", "search", 0, {}, TrialSettings(method=NoneConfig(), training=TrainingConfig()))
    return tuple(flat(Row(nobody, {}, None, None, None, None, None, None)))


def _numbers(name: str, estimate: Estimate | None) -> dict[str, float | None]:
    ends = (None, None, None) if estimate is None else finite((estimate.value, estimate.low, estimate.high))
    return dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))


def _method_columns() -> tuple[str, ...]:
    return tuple(dict.fromkeys(n for config in METHODS.values() for n in config.model_fields if n != "method"))


def _scalar(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int, float, str)) else json.dumps(value)


_TEXT = {"name", "method", "kind", "status", "reason", "audited", "settings"}
_WHOLE = {"number", "seed", "best_step", "steps", "data_tokens", "virtual_tokens", "trainable"}


def _schema() -> pa.Schema:
    """Returns fixed column types, so that a column has its type also where it is empty."""
    import pyarrow as pa

    settings = {name: str(field.annotation) for c in METHODS.values() for name, field in c.model_fields.items()}

    def kind(name: str) -> pa.DataType:
        own = settings.get(name, "")
        if name in _TEXT or "Literal" in own or "str" in own:
            return pa.string()
        return pa.int64() if name in _WHOLE or "int" in own else pa.bool_() if "bool" in own else pa.float64()

    return pa.schema([(name, kind(name)) for name in columns()])


def summary(results: Results) -> dict[str, Any]:
    """Returns finalists, base and pruning as JSON values."""
    return {
        "base": {
            "dev": dataclasses.asdict(results.base_dev),
            "test": None if results.base_test is None else dataclasses.asdict(results.base_test),
        },
        "finalists": [dataclasses.asdict(finalist) for finalist in results.finalists],
        "pruning": dataclasses.asdict(results.pruning),
        "tokens": results.tokens,
        "notes": results.notes,
        "deadline": results.deadline,
        "stopped": results.stopped,
        "continued": results.continued,
    }
