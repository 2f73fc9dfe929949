"""What systems reached on a task: accuracy or loss with intervals, differences from the base, groups that are equal."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from peft_study.errors import ConfigError, OutputError, first_line, nearest
from peft_study.evaluation.accuracies import accuracy, accuracy_difference, mcnemar
from peft_study.evaluation.answer_files import Row
from peft_study.statistics import (
    Counts,
    Estimate,
    Losses,
    TokenCounts,
    chance_of_equals,
    difference,
    mean_loss,
    told_apart,
)
from peft_study.storage.files import atomic_writer, finite

if TYPE_CHECKING:
    import pandas

BASE = "base"
"""Name of the untouched base among the systems."""
SCORES = "scores.json"
EVALUATION = "evaluation"
"""Folder of the tasks' answers in that of a study."""
_FEW_ANSWERS = 10
"""Different right answers of a task, up to which one of them given every time may look like knowledge."""
MOST_SOURCES = 12
"""Sources of a loss that have a line of their own; of more, only all together are shown."""


@dataclass(frozen=True, slots=True)
class Score:
    """What a system reached on a task.

    Attributes:
        task, system: whose.
        source: of the rows; None: all of them.
        metric: ``accuracy``, a share of right answers; ``mean`` of what lm-eval gave; or ``loss``, nats a token.
        value: with its 95 % interval; None where nothing could be judged.
        right, judged: answers; of a loss both count rows.
        unjudged: rows without a right answer, or without room for an answer: counted apart, never as wrong.
        normalised: of choices, the accuracy with losses divided by the characters of the texts; else None.
        minus_base: the base's value subtracted, on the rows that both have; None for the base.
        p_value: of "equal to the base": McNemar's for accuracies, else of the paired bootstrap; None for the base.
        group: 1 for the best, and for those that cannot be told from the best of the group; None where not compared.
        constant: share that would be right if the answer that is right most often were given every time; None where
            there are more than a few answers.
    """

    task: str
    system: str
    source: str | None
    metric: str
    value: Estimate | None
    right: int
    judged: int
    unjudged: int
    normalised: Estimate | None = None
    minus_base: Estimate | None = None
    p_value: float | None = None
    group: int | None = None
    constant: float | None = None

    @property
    def to_minimise(self) -> float:
        """The value where less is better, else its negative; infinite where there is none."""
        return math.inf if self.value is None else _to_minimise(self.metric, self.value)

    @property
    def flat(self) -> dict[str, Any]:
        """Every number as a plain column; of an interval ``low`` and ``high``."""
        found: dict[str, Any] = {}
        for name, value in ((field.name, getattr(self, field.name)) for field in fields(self)):
            if "Estimate" in str(self.__annotations__[name]):
                ends = (None, None, None) if value is None else (value.value, value.low, value.high)
                found |= dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
            else:
                found[name] = value
        return found


@dataclass(frozen=True, slots=True)
class AnswerCost:
    """What a system's answer to a prompt costs, alone.

    Attributes:
        prompt_tokens: of the prompt, worked examples included; without virtual ones.
        first_token_seconds: from the prompt to the first token, median of 3.
        tokens_per_second: after the first, median of 3.
        cache_bytes: keys and values of the prompt and of the virtual tokens.
    """

    prompt_tokens: int
    first_token_seconds: float
    tokens_per_second: float
    cache_bytes: int

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """The four of them in words, in this order, as a table shows them."""
        first, cache = f"{1000 * self.first_token_seconds:.0f} ms", f"{self.cache_bytes / 2**20:.2f} MiB"
        return str(self.prompt_tokens), first, f"{self.tokens_per_second:.1f}", cache


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation found.

    Attributes:
        folder: with every output, in ``TASK.parquet``.
        scores: of each task and system, the base first.
        costs: of an answer, by system; empty where no task has answers that are generated.
    """

    folder: Path
    scores: tuple[Score, ...]
    costs: Mapping[str, AnswerCost]

    @property
    def tables(self) -> list[list[Score]]:
        """The scores of each task, of a loss also those of each source, in lists of their own, best first."""
        groups = itertools.groupby(self.scores, key=lambda score: (score.task, score.source))
        return [sorted(group, key=_rank) for _, group in groups]

    def dataframe(self) -> pandas.DataFrame:
        """Returns a row a task and system; `value` is a share of right answers or a loss in nats a token."""
        import pandas

        return pandas.DataFrame([score.flat for score in self.scores])

    def answers(self, task: str) -> pandas.DataFrame:
        """Returns every output of a task, a row each.

        Raises:
            ConfigError: when there is no such task.
        """
        import pandas

        path = self.folder / table_of(task)
        if not path.exists():
            there = sorted({score.task for score in self.scores})
            raise ConfigError(f"no task {task!r}", remedy=nearest(task, there))
        return pandas.read_parquet(path)


def _rank(score: Score) -> tuple[float, float]:
    return math.inf if score.group is None else score.group, score.to_minimise  # nothing judged: in no group, and last


def most_frequent(scores: Sequence[Score]) -> float | None:
    """Returns what the most frequent answer, given every time, would reach on a task; None where it is not known."""
    return next((score.constant for score in scores if score.constant is not None), None)


def table_of(task: str) -> str:
    """Returns the file of a task's answers in the folder of its evaluation."""
    return f"{task.replace(':', '-').replace('/', '-')}.parquet"


def write_scores(found: EvaluationResult) -> None:
    """Writes ``scores.json`` into the folder of an evaluation.

    Raises:
        OutputError: when it cannot be written.
    """
    scores = [{f.name: _plain(getattr(score, f.name)) for f in fields(score)} for score in found.scores]
    values = {"scores": scores, "costs": {name: asdict(cost) for name, cost in found.costs.items()}}
    with atomic_writer(found.folder / SCORES) as file:
        file.write(json.dumps(values, indent=1) + "\n")


def read_scores(folder: Path) -> EvaluationResult | None:
    """Returns what an evaluation's folder keeps; None where it has no scores (yet).

    Raises:
        OutputError: when the file is damaged.
    """
    path = folder / SCORES
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        scores = tuple(Score(**{name: _read(value) for name, value in score.items()}) for score in values["scores"])
        costs = {name: AnswerCost(**cost) for name, cost in values["costs"].items()}
        return EvaluationResult(folder, scores, costs)
    except (ValueError, KeyError, TypeError) as error:
        what, remedy = f"is damaged ({first_line(error)})", "remove it; `peft-study evaluate --rescore` writes it again"
        raise OutputError(what, where=str(path), remedy=remedy) from error


def _plain(value: Any) -> Any:
    return list(finite((value.value, value.low, value.high))) if isinstance(value, Estimate) else value


def _read(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    found, low, high = value
    return Estimate(found, -math.inf if low is None else low, math.inf if high is None else high)


def scores_of(task: str, rows: Sequence[Row], *, has_answers: bool) -> list[Score]:
    """Returns the scores of a task, the base first; of a loss also those of each source.

    Args:
        task: its name.
        rows: of all systems.
        has_answers: False where a loss is all.
    """
    if has_answers:
        values = {row["score"] for row in rows} - {None}
        return _compared(task, None, rows, _accuracies if values <= {0, 1} else _means)
    found = _compared(task, None, rows, _losses)
    sources = sorted({row["source"] for row in rows})
    for source in sources if 1 < len(sources) <= MOST_SOURCES else ():
        found += _compared(task, source, [row for row in rows if row["source"] == source], _losses)
    return found


@dataclass(frozen=True, slots=True)
class _Compared:
    """What one metric has to say about systems, all on the same rows.

    Attributes:
        metric: its name.
        kept: whether a row can be judged.
        alone: returns a system's value.
        pair: returns the difference of two systems and the p-value of "equal".
    """

    metric: str
    kept: Callable[[Row], bool]
    alone: Callable[[Sequence[Row]], Estimate]
    pair: Callable[[Sequence[Row], Sequence[Row]], tuple[Estimate, float] | None]


def _compared(task: str, source: str | None, rows: Sequence[Row], by: _Compared) -> list[Score]:
    systems: dict[str, dict[str, Row]] = {}
    for row in rows:
        systems.setdefault(row["system"], {})[row["id"]] = row
    names = sorted(systems, key=lambda name: name != BASE)
    kept = {name: {i: row for i, row in systems[name].items() if by.kept(row)} for name in names}
    groups = _groups(kept, by)
    found = []
    for name in names:
        own = list(kept[name].values())
        against = _against(kept[name], kept.get(BASE, {}), by) if name != BASE else None
        normalised = [row["normalised"] for row in own if row.get("normalised") is not None]
        found.append(
            Score(
                task=task,
                system=name,
                source=source,
                metric=by.metric,
                value=by.alone(own) if own else None,
                right=sum(row.get("score", True) == 1 for row in own),
                judged=len(own),
                unjudged=len(systems[name]) - len(own),
                normalised=accuracy(sum(normalised), len(normalised)) if normalised else None,
                minus_base=None if against is None else against[0],
                p_value=None if against is None else against[1],
                group=groups.get(name),
                constant=_constant(own) if by.metric == "accuracy" else None,
            )
        )
    return found


def _constant(rows: Sequence[Row]) -> float | None:
    golds = Counter(str(row["gold"]) for row in rows)
    return max(golds.values()) / len(rows) if 1 < len(golds) <= _FEW_ANSWERS else None


def _against(first: Mapping[str, Row], second: Mapping[str, Row], by: _Compared) -> tuple[Estimate, float] | None:
    both = [i for i in first if i in second]
    return by.pair([first[i] for i in both], [second[i] for i in both]) if both else None


def _groups(kept: Mapping[str, Mapping[str, Row]], by: _Compared) -> dict[str, int]:
    """Returns the group of each system, on the rows that all have; empty where two of them cannot be compared.

    A system without rows has no group.
    """
    kept = {name: rows for name, rows in kept.items() if rows}
    if len(kept) < 2 or not (common := sorted(set.intersection(*(set(rows) for rows in kept.values())))):
        return {}
    rows = {name: [own[i] for i in common] for name, own in kept.items()}
    ranked = sorted(rows, key=lambda name: _to_minimise(by.metric, by.alone(rows[name])))
    chances: dict[tuple[int, int], float] = {}
    for first, second in itertools.combinations(range(len(ranked)), 2):
        found = by.pair(rows[ranked[first]], rows[ranked[second]])
        if found is None:
            return {}
        chances[first, second] = found[1]

    return {
        ranked[place]: number
        for number, group in enumerate(told_apart(len(ranked), lambda *pair: chances[pair]), start=1)
        for place in group
    }


def _to_minimise(metric: str, value: Estimate) -> float:
    return value.value if metric == "loss" else -value.value


def _right(rows: Sequence[Row]) -> Losses:
    return np.array([row["score"] for row in rows], dtype=np.float64)


def _pair_of_accuracies(first: Sequence[Row], second: Sequence[Row]) -> tuple[Estimate, float]:
    own, other = _right(first) > 0, _right(second) > 0
    return accuracy_difference(own, other), mcnemar(own, other)


def _pair_of_means(first: Sequence[Row], second: Sequence[Row]) -> tuple[Estimate, float]:
    own, other, ones = _right(first), _right(second), np.ones(len(first), dtype=np.int64)
    return difference(own, other, ones), chance_of_equals(own[None], other[None], ones)


def _sums(rows: Sequence[Row]) -> Losses:
    return np.array([row["loss"] for row in rows], dtype=np.float64)


def _counts(rows: Sequence[Row]) -> Counts:
    _, sources_N = np.unique([row["source"] for row in rows], return_inverse=True)
    return TokenCounts(np.array([row["tokens"] for row in rows], dtype=np.int64), sources_N)


def _pair_of_losses(first: Sequence[Row], second: Sequence[Row]) -> tuple[Estimate, float] | None:
    """Returns None where their templates made other tokens of the rows: such losses cannot be compared."""
    if any(a["tokens"] != b["tokens"] for a, b in zip(first, second, strict=True)):
        return None
    counts, own, other = _counts(first), _sums(first), _sums(second)
    return difference(own, other, counts), chance_of_equals(own[None], other[None], counts)


_accuracies = _Compared(
    "accuracy",
    kept=lambda row: row["score"] is not None,
    alone=lambda rows: accuracy(int(_right(rows).sum()), len(rows)),
    pair=_pair_of_accuracies,
)
_means = replace(
    _accuracies,
    metric="mean",
    alone=lambda rows: difference(_right(rows), np.zeros(len(rows)), np.ones(len(rows), dtype=np.int64)),
    pair=_pair_of_means,
)
_losses = _Compared(
    "loss",
    kept=lambda row: row["tokens"] > 0,
    alone=lambda rows: mean_loss(_sums(rows), _counts(rows)),
    pair=_pair_of_losses,
)
