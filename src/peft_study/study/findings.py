"""What a comparison says, in a sentence a method, with its noise.

Everything is paired by example: a difference between two settings is measured on the same held-out rows, and a
setting is told from another only where the 95 % interval of that difference excludes zero.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from peft_study.evaluate.statistics import Estimate, difference, mean_loss
from peft_study.study.comparison import Comparison, TrialResult
from peft_study.study.store import RunFolder


@dataclass(frozen=True, slots=True)
class Row:
    """One setting with its numbers.

    Attributes:
        result: the trial.
        start, loss: held-out loss before step 1 and after the last step; None where it did not finish.
        minus_base: loss above the untouched base's.
        minus_best: loss above that of the method's best setting.
    """

    result: TrialResult
    start: Estimate
    loss: Estimate | None
    minus_base: Estimate | None
    minus_best: Estimate | None
    best: bool


def rows(comparison: Comparison) -> list[Row]:
    """Returns every setting with its numbers, in the comparison's order."""
    best = {id(result) for result in (_best(group) for group in _groups(comparison)) if result is not None}
    champions = {r.method: r for r in comparison.results if id(r) in best}
    made = []
    for result in comparison.results:
        loss = above = behind = None
        if result.sums_N is not None:
            loss = mean_loss(result.sums_N, comparison.counts_N)
            above = difference(result.sums_N, comparison.base_N, comparison.counts_N)
            champion = champions[result.method].sums_N
            assert champion is not None
            behind = difference(result.sums_N, champion, comparison.counts_N)
        assert result.start_N is not None
        start = mean_loss(result.start_N, comparison.counts_N)
        made.append(Row(result, start, loss, above, behind, id(result) in best))
    return made


def sentences(comparison: Comparison) -> list[str]:
    """Returns a sentence a method: its best setting, the noise, the edge of the range, and what does not work."""
    table = rows(comparison)
    said = []
    for group in _groups(comparison):
        own = [row for row in table if row.result.method == group[0].method]
        said.append(_sentence(own, len(comparison.counts_N)))
    return said


def save(comparison: Comparison, folder: RunFolder) -> None:
    """Writes ``results.json``: every row with its estimates, and the sentences."""

    def numbers(estimate: Estimate | None) -> dict[str, float] | None:
        return None if estimate is None else dataclasses.asdict(estimate)

    table = [
        {
            "method": row.result.method,
            "learning_rate": row.result.learning_rate,
            "status": row.result.status,
            "reason": row.result.reason,
            "best_of_method": row.best,
            "step_0": numbers(row.start),
            "loss": numbers(row.loss),
            "minus_base": numbers(row.minus_base),
            "minus_best": numbers(row.minus_best),
            "trainable": row.result.trainable,
            "seconds": row.result.seconds,
        }
        for row in rows(comparison)
    ]
    folder.write("results.json", {"rows": table, "sentences": sentences(comparison)})


def _groups(comparison: Comparison) -> list[list[TrialResult]]:
    methods = dict.fromkeys(result.method for result in comparison.results)
    return [[r for r in comparison.results if r.method == method] for method in methods]


def _best(group: Sequence[TrialResult]) -> TrialResult | None:
    finished = [result for result in group if result.sums_N is not None]
    return min(finished, key=lambda r: float(r.sums_N.sum()), default=None)  # type: ignore[union-attr]


def _sentence(own: Sequence[Row], examples: int) -> str:
    method = own[0].result.method.replace("_", " ")
    if own[0].result.learning_rate is None:
        loss = own[0].loss
        assert loss is not None
        return (
            f"untouched base: {loss.value:.2f} (95 % {loss.low:.2f}-{loss.high:.2f} over {examples} held-out examples)"
        )
    failed = [row for row in own if row.loss is None]
    best = next((row for row in own if row.best), None)
    if best is None:
        return f"{method}: none of {len(own)} learning rates finished ({failed[0].result.reason})"
    assert best.loss is not None
    assert best.minus_base is not None
    rates = sorted(row.result.learning_rate or 0.0 for row in own)
    noise = f"{best.loss.value:.2f}, 95 % {best.loss.low:.2f}-{best.loss.high:.2f} over {examples} held-out examples"
    text = f"{method}: {_rate(best)} is best of {len(own)} ({noise}, one seed{_edge(best, rates)})"
    if best.minus_base.low > 0:
        text += "; even so it is worse than the untouched base"
    elif not best.minus_base.excludes_zero():
        text += "; even so it cannot be told from the base"
    for verdict, members in _verdicts(own, best).items():
        text += f"; {verdict.format(_list(members))}"
    return text


def _edge(best: Row, rates: Sequence[float]) -> str:
    """Returns the warning that the best rate lies at the end of the rates tried, if it does."""
    rate = best.result.learning_rate
    if len(rates) == 1:
        return "; the only one tried"
    if rate == rates[-1]:
        return "; at the edge of the range: try higher"
    if rate == rates[0]:
        return "; at the edge of the range: try lower"
    return ""


def _verdicts(own: Sequence[Row], best: Row) -> dict[str, list[Row]]:
    """Sorts the other settings: as good within noise, no different from the base, worse than it, not finished."""
    found: dict[str, list[Row]] = {
        "{} cannot be told from it": [],
        "at {} it cannot be told from the base": [],
        "at {} it is worse than the base": [],
        "at {} it diverged": [],
    }
    alike, idle, worse, diverged = found.values()
    for row in own:
        if row is best:
            continue
        if row.loss is None or row.minus_base is None or row.minus_best is None:
            diverged.append(row)
        elif not row.minus_best.excludes_zero():
            alike.append(row)
        elif not row.minus_base.excludes_zero():
            idle.append(row)
        elif row.minus_base.low > 0:
            worse.append(row)
    return {verdict: members for verdict, members in found.items() if members}


def _rate(row: Row) -> str:
    return f"{row.result.learning_rate:g}"


def _list(members: Sequence[Row]) -> str:
    names = [_rate(row) for row in members]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
