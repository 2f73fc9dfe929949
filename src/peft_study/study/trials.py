"""What a study knows of its trials, folded from its journal.

asked --> running --measured, measured--> finished | pruned | diverged | failed
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from peft_study.study.journal import Event

Losses = npt.NDArray[np.float64]
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
        seed: of initialisation, dropout and data order; None: those of the study.
        values: of the searched dimensions.
        settings: all of them, the method's and the optimizer's: the study file may change, a trial does not.
        status, reason: how it stands; interrupted only for who looks at a study that nobody runs (study/inspect.py).
        sums: summed held-out losses of each example in nats, by optimizer step.
        audited: why it would have been pruned, where it ran on all the same to see whether that was right.
        facts: steps, tokens, seconds and parameters, once it has ended.
    """

    name: str
    method: str
    kind: Kind
    number: int
    seed: int | None
    values: dict[str, Any]
    settings: dict[str, Any]
    status: State = "running"
    reason: str | None = None
    sums: dict[int, Losses] = field(default_factory=dict)
    audited: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def last(self) -> Losses | None:
        """Held-out losses at the last step of a finished trial: its value."""
        return self.sums[max(self.sums)] if self.status == "finished" and self.sums else None

    @property
    def start(self) -> Losses | None:
        """Held-out losses before step 1."""
        return self.sums.get(0)


@dataclass(slots=True)
class Known:
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

    def of(self, method: str, kind: Kind) -> list[TrialRecord]:
        """Returns a method's trials of a kind."""
        return [t for t in self.trials.values() if t.method == method and t.kind == kind]

    def running(self) -> Iterator[TrialRecord]:
        """Yields the trials that have not ended."""
        return (t for t in self.trials.values() if t.status == "running")

    def setting(self, method: str, number: int) -> TrialRecord:
        """Returns the trial of the search that first had a setting."""
        return next(t for t in self.of(method, "search") if t.number == number)

    def untuned(self, method: str, methods: Sequence[str]) -> bool:
        """True where a method had fewer trials than the others, by more than the one that a time limit may cost."""
        counts = {m: len(self.of(m, "search")) for m in methods}
        return counts[method] < max(counts.values()) - bool(self.deadline)

    def apply(self, event: Event) -> None:
        """Adds what one event says."""
        getattr(self, f"_{event['event']}")(event)

    def _asked(self, e: Event) -> None:
        fields = ("name", "method", "kind", "number", "seed", "values", "settings")
        self.trials[e["name"]] = TrialRecord(**{field: e[field] for field in fields})
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
        self.finalists.clear()
        self.winner, self.concluded, self.deadline = None, False, False
        self.test = {}
