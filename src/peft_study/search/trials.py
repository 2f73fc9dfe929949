"""The state of a study, computed from its journal.

asked --> running --measured, measured--> finished | pruned | diverged | failed
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
        kind: the untouched base, a rate of the range test, a searched setting, or a finalist with a new seed.
        number: of the setting in its method; a final has its setting's.
        values: of the searched dimensions.
        settings: complete, so that a later change of the study file cannot change the trial.
        status, reason: ``interrupted`` is set by report/ for a study that no process runs.
        sums: summed held-out losses of each example in nats, by optimizer step.
        audited: why it would have been pruned, if it ran on as a control.
        facts: steps, tokens, seconds and parameters of an ended trial.
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


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The setting that the model of a method's losses recommends.

    Attributes:
        values: of the searched dimensions.
        rates: between which the best learning rate lies, with 90 %, at the other settings; None where it is fixed.
        within: nats a token by which it is above the best of the space, at most, with 90 %.
    """

    values: dict[str, Any]
    rates: tuple[float, float] | None
    within: float


@dataclass(slots=True)
class StudyState:
    """A study as its journal describes it.

    Attributes:
        trials: by name, in the order they were asked for.
        bounds: ranges that were changed: method -> dimension -> (low, high).
        fresh: the part added to a range, in which the next trial must lie: method -> dimension -> (low, high).
        notes: the decisions on ranges in words, by method.
        tested: methods whose range test has ended.
        recommended: the setting that a method's search recommends so far.
        outdated: methods of which a trial has ended since their last recommendation.
        deadline: the time limit ended the search.
        stopped: why a callback ended the study before its plan, else None.
        finalists: numbers of the settings that are retrained, by method.
        winner: method and number; None with `concluded`: there is none.
        winner_by: the task that chose it; None: dev loss did.
        concluded: the search and the finals have ended.
        test: test losses by trial, once measured.
        continued: changes of the study file.
        earlier: number of settings searched before the last change of a method's space.
    """

    trials: dict[str, TrialRecord] = field(default_factory=dict)
    bounds: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    fresh: dict[str, dict[str, tuple[float, float]]] = field(default_factory=dict)
    notes: dict[str, list[str]] = field(default_factory=dict)
    tested: set[str] = field(default_factory=set)
    recommended: dict[str, Recommendation] = field(default_factory=dict)
    outdated: set[str] = field(default_factory=set)
    deadline: bool = False
    stopped: str | None = None
    finalists: dict[str, tuple[int, ...]] = field(default_factory=dict)
    winner: tuple[str, int] | None = None
    winner_by: str | None = None
    concluded: bool = False
    test: dict[str, Losses] = field(default_factory=dict)
    continued: list[Event] = field(default_factory=list)
    earlier: dict[str, int] = field(default_factory=dict)

    def of(self, method: str, kind: Kind) -> list[TrialRecord]:
        """Returns a method's trials of a kind."""
        return [t for t in self.trials.values() if t.method == method and t.kind == kind]

    def finals_of(self, method: str, number: int) -> list[TrialRecord]:
        """Returns a finalist's trials, one a seed."""
        return [t for t in self.of(method, "final") if t.number == number]

    def running(self) -> Iterator[TrialRecord]:
        """Yields the trials that have not ended."""
        return (t for t in self.trials.values() if t.status == "running")

    def setting(self, method: str, number: int) -> TrialRecord:
        """Returns the trial of the search that first had a setting."""
        return next(t for t in self.of(method, "search") if t.number == number)

    def present(self, method: str) -> list[TrialRecord]:
        """Returns a method's searched settings since its space last changed: those that count for its budget."""
        return self.of(method, "search")[self.earlier.get(method, 0) :]

    def due(self, method: str, config: StudyConfig) -> int:
        """Returns how many settings of its present space a method gets in all, if time allows.

        Args:
            method: of the file.
            config: filled.
        """
        assert config.budget.trials is not None
        begun, untried = len(self.present(method)), self._untried(method, config)
        left = config.budget.trials - begun
        return begun + max(0, left if untried is None else min(left, untried))

    def to_come(self, method: str, config: StudyConfig, due: int) -> int:
        """Returns how many settings a method's search has yet to begin: none once time is up or its best is known.

        Args:
            method: of the file.
            config: filled.
            due: settings in all (`due`, which stays the same for as long as the file does).
        """
        if self.deadline or self.stopped or self.settled(method, config):
            return 0
        return due - len(self.present(method))

    def finals(self, method: str, config: StudyConfig) -> tuple[list[TrialRecord], int]:
        """Returns the finals of a method that have begun, and how many there will be."""
        numbers = self.finalists.get(method)
        found = [t for t in self.of(method, "final") if t.number in (numbers or ()) and t.seed in final_seeds(config)]
        return found, (config.finals.best if numbers is None else len(numbers)) * config.finals.seeds

    def settled(self, method: str, config: StudyConfig) -> bool:
        """True where a method's best setting is known as well as `search.stop` asks, and enough have finished."""
        stop, known = config.search.stop, self.recommended.get(method)
        finished = sum(trial.status == "finished" for trial in self.present(method))
        return (
            stop is not None and known is not None and known.within <= stop and finished >= max(config.finals.best, 1)
        )

    def untuned(self, method: str, config: StudyConfig) -> bool:
        """True where a method had fewer trials than the others, by more than the one that a time limit may cost.

        A grid of which every cell was tried is tuned, however small, and so is a method whose best setting is known
        well enough; a single setting is no search.
        """
        if self.settled(method, config):
            return False
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
        if not config.tries_cells(method):
            return None
        space, tried = config.methods[method], [t.settings.flat for t in self.of(method, "search")]
        return sum(space.flat(cell) not in tried for cell in cells(space)) if tried else grid_size(space)

    def _count(self, method: str, config: StudyConfig) -> int:
        """Returns how many settings of its present space a method has tried, at most its budget."""
        assert config.budget.trials is not None
        size, untried = grid_size(config.methods[method]), self._untried(method, config)
        found = len(self.present(method)) if size is None or untried is None else size - untried
        return min(found, config.budget.trials)

    def _other(self, method: str, config: StudyConfig) -> int:
        """Returns how many earlier settings are not cells of the present grid."""
        space, before = config.methods[method], self.of(method, "search")[: self.earlier.get(method, 0)]
        again = [space.flat(cell) for cell in cells(space)] if before and config.tries_cells(method) else []
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
        if trial.kind == "search":
            self.outdated.add(trial.method)

    def _tested(self, e: Event) -> None:
        self.tested.add(e["method"])
        if e["bounds"]:
            self.bounds.setdefault(e["method"], {})["learning_rate"] = tuple(e["bounds"])
        self.notes.setdefault(e["method"], []).append(e["note"])

    def _recommended(self, e: Event) -> None:
        rates = None if e["rates"] is None else (e["rates"][0], e["rates"][1])
        self.recommended[e["method"]] = Recommendation(e["values"], rates, e["within"])
        self.outdated.discard(e["method"])

    def _widened(self, e: Event) -> None:
        self.bounds.setdefault(e["method"], {})[e["dimension"]] = tuple(e["bounds"])
        self.fresh.setdefault(e["method"], {})[e["dimension"]] = tuple(e["fresh"])
        self.notes.setdefault(e["method"], []).append(e["note"])

    def _deadline(self, e: Event) -> None:
        self.deadline = True

    def _stopped(self, e: Event) -> None:
        self.stopped = e["reason"]

    def _finalists(self, e: Event) -> None:
        self.finalists[e["method"]] = tuple(e["numbers"])

    def _concluded(self, e: Event) -> None:
        self.concluded, self.winner = True, None if e["winner"] is None else (e["winner"][0], e["winner"][1])

    def _chosen(self, e: Event) -> None:
        self.winner, self.winner_by = (e["winner"][0], e["winner"][1]), e["task"]

    def _opened(self, e: Event) -> None:
        self.test = {name: np.array(sums, dtype=np.float64) for name, sums in e["sums"].items()}

    def _continued(self, e: Event) -> None:
        """Reopens the study under a changed file: finals, winner and test, and the ranges of changed spaces."""
        self.continued.append(e)
        for method in e["methods"]:
            for kept in (self.bounds, self.fresh, self.notes, self.recommended):
                kept.pop(method, None)
            self.tested.discard(method)
            self.earlier[method] = len(self.of(method, "search"))
        self.finalists.clear()
        self.winner_by = None
        self.winner, self.concluded, self.deadline, self.stopped = None, False, False, None
        self.test = {}


def final_seeds(config: StudyConfig) -> tuple[int, ...]:
    """Returns the seeds of the finals; the search's is not among them."""
    first = config.training.seed + 1
    return tuple(range(first, first + config.finals.seeds))


def setting_name(method: str, number: int) -> str:
    """Returns the name of a searched setting, which is that of its trial."""
    return f"{method}-{number:03d}"


def best_of_search(state: StudyState, methods: Iterable[str]) -> dict[str, TrialRecord]:
    """Returns the best finished trial of each method's search; a method that has none is left out."""
    found = {method: best_first(state.of(method, "search")) for method in methods}
    return {method: trials[0] for method, trials in found.items() if trials}


def best_first(trials: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Returns the finished ones of some trials, least held-out loss first."""
    return sorted((trial for trial in trials if trial.last is not None), key=value_of)


def value_of(trial: TrialRecord) -> float:
    """Returns the summed held-out loss after the last step of a finished trial: what settings are ranked by."""
    assert trial.last is not None
    return float(trial.last.sum())
