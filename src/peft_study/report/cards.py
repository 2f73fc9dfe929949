"""The answer of a study: a card a method, best first."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peft_study.report.page_values import Shown, Strip, setting, shown, strips
from peft_study.report.page_words import Words
from peft_study.report.results import Finalist, Results, Row
from peft_study.report.view import StudyView
from peft_study.report.wording import title
from peft_study.search.trials import best_first, value_of
from peft_study.statistics import Estimate, seeds_difference, size_text

Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Card:
    """One method's best setting.

    Attributes:
        method: its name in words.
        place: its colour's number.
        tags: its group, what it cannot be told from, or why it is not ranked.
        winner: of the study.
        name: of the setting, as ``lora-003``; None where none finished.
        settings: what was searched, and `all_settings`.
        part: `test_loss` or `dev_loss`, the key of what the loss is.
        loss, against: the loss, and how far it is above the base's.
        base: the base's loss as text.
        verdict: key of what the difference says, and `mood`: good, bad or none.
        seeds: how many, in words.
        strip: the loss's interval beside the base.
        costs: what it costs.
        commands: what to do with it.
    """

    method: str
    place: int
    tags: tuple[str, ...]
    winner: bool
    name: str | None
    settings: Pairs
    all_settings: Pairs
    part: str
    loss: Shown | None
    against: Shown | None
    base: str
    verdict: str | None
    mood: str
    seeds: str
    strip: Strip | None
    costs: Pairs
    commands: Pairs


def cards(view: StudyView, t: Words) -> list[Card]:
    """Returns a card a method: the winner's first, then those that are ranked, best first, then in the file's order."""
    results = view.results
    if results is None:
        return []
    finals: dict[str, Finalist] = {}
    for final in results.winner_first:
        if final.dev is not None and math.isfinite(final.dev.value):
            finals.setdefault(final.method, final)
    order = [*finals, *(method for method in results.methods if method not in finals)]
    ranked = {final.method for group in results.groups for final in group}
    order.sort(key=lambda method: method not in ranked)
    on_test = all(final.test is not None for final in finals.values()) and results.base_test is not None
    base = results.base_test if on_test and finals else results.base_dev
    losses = {method: _loss(view, results, finals.get(method), method, on_test=on_test)[0] for method in order}
    drawn = strips(losses, base)
    return [_card(view, results, t, method, finals.get(method), drawn.get(method), on_test=on_test) for method in order]


def best_row(results: Results, method: str) -> Row | None:
    """Returns the best finished trial of a method's search."""
    own = {row.trial.name: row for row in results.rows if row.trial.method == method and row.trial.kind == "search"}
    best = best_first(row.trial for row in own.values())
    return own[best[0].name] if best and math.isfinite(value_of(best[0])) else None


def _loss(
    view: StudyView, results: Results, final: Finalist | None, method: str, *, on_test: bool
) -> tuple[Estimate | None, Estimate | None]:
    """Returns a method's loss and how far it is above the base's: of its final, else of its best trial on dev."""
    if final is None:
        row = best_row(results, method)
        return (None, None) if row is None else (row.dev, row.minus_base)
    if on_test:
        return final.test, final.test_minus_base
    examples = view.record.examples
    done = [x.last for x in view.record.state.finals_of(method, final.number) if x.last is not None]
    if examples is None or not done:
        return final.dev, None
    return final.dev, seeds_difference(np.stack(done), examples.base_N[None], examples.counts_N)


def _is(row: Row, final: Finalist) -> bool:
    return (row.trial.method, row.trial.number) == (final.method, final.number)


def _card(
    view: StudyView,
    results: Results,
    t: Words,
    method: str,
    final: Finalist | None,
    strip: Strip | None,
    *,
    on_test: bool,
) -> Card:
    row = best_row(results, method) if final is None else None
    settings = final.settings if final is not None else row.settings if row is not None else {}
    loss, above = _loss(view, results, final, method, on_test=on_test)
    name = final.name if final is not None else row.trial.name if row is not None else None
    use_test = final is not None and on_test
    base = shown(results.base_test if use_test else results.base_dev, t)
    verdict, mood = verdict_of(above)
    searched = list(view.record.config.methods[method].dimensions()) or ["learning_rate"]
    seeds = len(final.dev_of_seeds) if final is not None else 1
    return Card(
        title(method)[t.lang],
        results.methods.index(method),
        _tags(results, t, method, final, row),
        final is not None and final.winner,
        name,
        tuple((key, setting(settings[key])) for key in searched if key in settings),
        tuple((key, setting(value)) for key, value in settings.items()),
        "test_loss" if use_test else "dev_loss",
        shown(loss, t),
        shown(above, t, sign=True),
        base.value if base else "-",
        verdict,
        mood,
        t("over_seeds", n=seeds) if seeds > 1 else t("one_seed"),
        strip,
        _costs(view, results, t, method, final),
        () if name is None else _commands(view, t, method, final, row),
    )


def verdict_of(above: Estimate | None) -> tuple[str | None, str]:
    """Returns the key of what a difference from the base says, None without an interval, and its mood."""
    if above is None or not above.bounded:
        return None, ""
    if not above.excludes_zero():
        return "verdict_same", ""
    return ("verdict_better", "good") if above.value < 0 else ("verdict_worse", "bad")


def _tags(results: Results, t: Words, method: str, final: Finalist | None, row: Row | None) -> tuple[str, ...]:
    if final is None:
        if row is None:
            return (t("not_ranked_none"),)
        count = sum(each.trial.method == method and each.trial.kind == "search" for each in results.rows)
        return (t("not_ranked_search", n=count) if count > 1 else t("not_ranked_only"),)
    if final.untuned:
        return (t("not_ranked_untuned"),)
    if final.failed:
        return (t("not_ranked_failed", failed=final.failed, seeds=final.failed + len(final.dev_of_seeds)),)
    for number, group in enumerate(results.groups, start=1):
        if final in group:
            others = dict.fromkeys(title(other.method)[t.lang] for other in group if other.method != method)
            alike = (t("alike", methods=", ".join(others)),) if others else ()
            return (t("place", n=number), *alike)
    return ()


def _costs(view: StudyView, results: Results, t: Words, method: str, final: Finalist | None) -> Pairs:
    found: list[tuple[str, str]] = []
    trained = [r.trial.facts.get("trainable") for r in results.rows if r.trial.method == method]
    if final is not None:
        trained = [r.trial.facts.get("trainable") for r in results.rows if _is(r, final)]
    cost = view.costs.get(method)
    trainable = cost.trainable if cost else next((number for number in trained if number), None)
    if trainable:
        found.append((t("trainable"), f"{trainable:,}"))
    for key, number in (("adapter_bytes", cost and cost.adapter_bytes), ("peak_bytes", cost and cost.peak_bytes)):
        if number:
            found.append((t(key), size_text(number)))
    if cost:
        found.append((t("tokens_per_second"), f"{float(f'{cost.tokens_per_second:.3g}'):,.10g}"))
    found.append((t("data_tokens"), f"{results.tokens.get(method, 0):,}"))
    return tuple(found)


def _commands(view: StudyView, t: Words, method: str, final: Finalist | None, row: Row | None) -> Pairs:
    """Returns what can be done with a method's best adapter, where it is there."""
    trials: Sequence[Any] = [row.trial] if row is not None else []
    if final is not None:
        trials = sorted(
            (x for x in view.record.state.finals_of(method, final.number) if x.last is not None), key=value_of
        )
    folder, found = view.folder.path, []
    if trials and (adapter := view.folder.trial(trials[0].name).adapter).is_dir():
        found.append((t("use"), command("chat", adapter)))
    names = [f"recommended-{method}.yaml", *(["recommended.yaml"] if final is not None and final.winner else [])]
    for path in (folder / name for name in reversed(names)):
        if path.exists():
            found.append((t("longer"), command("finetune", path)))
            break
    return tuple(found)


def command(name: str, *words: str | Path) -> str:
    """Returns a command line of this program, to be pasted into a shell."""
    return shlex.join(["peft-study", name, *map(str, words)])
