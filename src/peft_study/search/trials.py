"""What a study knows of its trials, folded from its journal.

asked --> running --measured, measured--> finished | pruned | diverged | failed
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from peft_study.config import StudyConfig, TrialSettings, cells, grid_size
from peft_study.statistics import Losses
from peft_study.storage.journal import Event

Kind = Literal["reference", "range_test", "search", "final"]
State = Literal["running", "finished", "pruned", "diverged", "failed", "interrupted"]


@dataclass(slots=True)
class TrialRecord:
    """One trial.

    Attributes:
        name: its folder's.
        method: name of the space in the study file.
        kind: the untouched base, a rate of the range test, a searched setting, or a finalist's new seed.
        number: of the setting among its method's (a final has its setting's).
        values: of the searched dimensions.
        settings: all of them: the study file may change, a trial does not.
        status, reason: how it stands; interrupted only for who looks at a study that nobody runs (see report).
        sums: summed held-out losses of each example in nats, by optimizer step.
        audited: why it would have been pruned, where it ran on all the same to see whether that was right.
        facts: steps, tokens, seconds and parameters, once it has ended.
    """

    name: str
    method: str
    kind: Kind
    number: int
    values: dict[str, Any]
    settings: TrialSettings
    status: State = "running"
    reason: str | None = None
    sums: dict[int, Losses] = field(default_factory=dict)
    audited: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def seed(self) -> int:
        """Of initialisation, dropout and, in a final, the order of the data."""
        return self.settings.training.seed

    @property
    def last(self) -> Losses | None:
        """Held-out losses at the last step of a finished trial: its value."""
        return self.sums[max(self.sums)] if self.status == "finished" and self.sums else None

    @property
    def start(self) -> Losses | None:
        """Held-out losses before step 1."""
        return self.sums.get(0)


@dataclass(slots=True)
class StudyState:
    """All that the journal says.

    Attributes:
        trials: by name, in the order asked for.
        bounds: of each method's dimensions that are no longer the space's own: (low, high).
        fresh: dimensions whose next trial is to lie in what was added: method -> dimension -> (low, high).
        notes: what was decided about the ranges, in words.
        tested: methods whose range test is over.
        deadline: the time for the search was up.
        finalists: by method: numbers of the settings that are retrained.
        winner: method and number, once chosen; None with `concluded`: there is none.
        concluded: the winner was looked for.
        test: name -> losses of the test part, once it was opened.
        continued: how the study file changed on the way.
        earlier: by method: searched settings of before the last change of its space.
    """

    trials: dict[str, TrialRecord] = field(default_factory=dict)
    bounds: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    fresh: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    tested: set[str] = field(default_factory=set)
    deadline: bool = False
    finalists: dict[str, tuple[int, ...]] = field(default_factory=dict)
    winner: tuple[str, int] | None = None
    concluded: bool = False
    test: dict[str, Losses] = field(default_factory=dict)
    continued: list[Event] = field(default_factory=list)
    earlier: dict[str, int] = field(default_factory=dict)

    def of(self, method: str, kind: Kind) -> list[TrialRecord]:
        """Returns a method's trials of a kind."""
        return [t for t in self.trials.values() if t.method == method and t.kind == kind]

    def running(self) -> Iterator[TrialRecord]:
        """Yields the trials that have not ended."""
        return (t for t in self.trials.values() if t.status == "running")

    def setting(self, method: str, number: int) -> TrialRecord:
        """Returns the trial of the search that first had a setting."""
        return next(t for t in self.of(method, "search") if t.number == number)

    def present(self, method: str) -> list[TrialRecord]:
        """Returns a method's searched settings since its space last changed: those that its budget counts."""
        return self.of(method, "search")[self.earlier.get(method, 0) :]

    def due(self, method: str, config: StudyConfig) -> int:
        """Returns how many settings a method gets in its present space, begun or to come, if time allows.

        Args:
            method: of the file.
            config: filled.
        """
        assert config.budget.trials is not None
        begun, untried = len(self.present(method)), self._untried(method, config)
        left = config.budget.trials - begun
        return begun + max(0, left if untried is None else min(left, untried))

    def finals(self, method: str, config: StudyConfig) -> tuple[list[TrialRecord], int]:
        """Returns the finals of a method's present finalists that have begun, and how many there will be."""
        numbers = self.finalists.get(method)
        found = [t for t in self.of(method, "final") if t.number in (numbers or ()) and t.seed in final_seeds(config)]
        return found, (config.finals.best if numbers is None else len(numbers)) * config.finals.seeds

    def untuned(self, method: str, config: StudyConfig) -> bool:
        """True where a method had fewer trials than the others, by more than the one that a time limit may cost.

        A grid of which every cell was tried is tuned, however small; a single setting is no search.
        """
        if config.methods[method].dimensions() and self._untried(method, config) == 0:
            return False
        counts = {m: self._count(m, config) for m in config.searched}
        return counts[method] < max(counts.values()) - bool(self.deadline)

    def unequal(self, config: StudyConfig) -> str:
        """Returns in words which methods are not searched with as many settings as the others; "" where all are."""
        trials = {method: config.trials(method) for method in config.searched}
        said = []
        for method, count in trials.items():
            title = method.replace("_", " ")
            if count < max(trials.values()):
                said.append(
                    f"{title}: all {count} settings of its lists, where others have {max(trials.values())} trials"
                    if config.methods[method].dimensions()
                    else f"{title}: its only setting, so it is not ranked (untuned)"
                )
            other = self._other(method, config)
            if other:
                trial = "1 trial" if other == 1 else f"{other} trials"
                said.append(f"{title}: {trial} of an earlier space beside those of the present one")
        return f"searched unequally: {'; '.join(said)}" if said else ""

    def _untried(self, method: str, config: StudyConfig) -> int | None:
        """Returns how many cells of a method's grid were not tried; None where it is no grid.

        A cell is all its settings: under another fixed value it is another one.
        """
        if config.sampler(method) != "grid":
            return None
        space, tried = config.methods[method], [t.settings.flat for t in self.of(method, "search")]
        return sum(space.flat(cell) not in tried for cell in cells(space)) if tried else grid_size(space)

    def _count(self, method: str, config: StudyConfig) -> int:
        """Returns the settings of its present space that a method has had, the budget at most."""
        assert config.budget.trials is not None
        size, untried = grid_size(config.methods[method]), self._untried(method, config)
        found = len(self.present(method)) if size is None or untried is None else size - untried
        return min(found, config.budget.trials)

    def _other(self, method: str, config: StudyConfig) -> int:
        """Returns how many settings of before the last change do not count as cells of the present grid."""
        space, before = config.methods[method], self.of(method, "search")[: self.earlier.get(method, 0)]
        again = [space.flat(cell) for cell in cells(space)] if before and config.sampler(method) == "grid" else []
        return sum(trial.settings.flat not in again for trial in before)

    def apply(self, event: Event) -> None:
        """Adds what one event says."""
        getattr(self, f"_{event['event']}")(event)

    def _asked(self, e: Event) -> None:
        settings = TrialSettings.model_validate(e["settings"])
        self.trials[e["name"]] = TrialRecord(e["name"], e["method"], e["kind"], e["number"], e["values"], settings)
        if e["kind"] == "search":
            self.fresh.pop(e["method"], None)

    def _measured(self, e: Event) -> None:
        self.trials[e["name"]].sums[e["step"]] = np.array(e["sums"], dtype=np.float64)

    def _audited(self, e: Event) -> None:
        self.trials[e["name"]].audited = e["reason"]

    def _ended(self, e: Event) -> None:
        trial = self.trials[e["name"]]
        trial.status, trial.reason, trial.facts = e["status"], e["reason"], e["facts"]

    def _tested(self, e: Event) -> None:
        self.tested.add(e["method"])
        if e["bounds"]:
            self.bounds.setdefault(e["method"], {})["learning_rate"] = tuple(e["bounds"])
        self.notes.setdefault(e["method"], []).append(e["note"])

    def _widened(self, e: Event) -> None:
        self.bounds.setdefault(e["method"], {})[e["dimension"]] = tuple(e["bounds"])
        self.fresh.setdefault(e["method"], {})[e["dimension"]] = tuple(e["fresh"])
        self.notes.setdefault(e["method"], []).append(e["note"])

    def _deadline(self, e: Event) -> None:
        self.deadline = True

    def _finalists(self, e: Event) -> None:
        self.finalists[e["method"]] = tuple(e["numbers"])

    def _concluded(self, e: Event) -> None:
        self.concluded, self.winner = True, None if e["winner"] is None else (e["winner"][0], e["winner"][1])

    def _opened(self, e: Event) -> None:
        self.test = {name: np.array(sums, dtype=np.float64) for name, sums in e["sums"].items()}

    def _continued(self, e: Event) -> None:
        """The file changed: what the end of the search decided, and the ranges of changed spaces, are open again."""
        self.continued.append(e)
        for method in e["methods"]:
            for kept in (self.bounds, self.fresh, self.notes):
                kept.pop(method, None)
            self.tested.discard(method)
            self.earlier[method] = len(self.of(method, "search"))
        self.finalists.clear()
        self.winner, self.concluded, self.deadline = None, False, False
        self.test = {}


def final_seeds(config: StudyConfig) -> tuple[int, ...]:
    """Returns the finals' seeds: none of them is the search's."""
    first = config.training.seed + 1
    return tuple(range(first, first + config.finals.seeds))


def value_of(trial: TrialRecord) -> float:
    """Returns the summed held-out loss after the last step of a finished trial: what settings are ranked by."""
    assert trial.last is not None
    return float(trial.last.sum())
