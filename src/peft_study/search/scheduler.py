"""What a study does next: which trial begins, which stops, what is retrained, who wins.

    reference     the untouched base
    range test    many rates of a method, briefly
    search        the same number of settings for every method; hopeless ones stop at a rung
    finals        the best settings of each method with new seeds
    conclusion    the winner by mean dev loss; then, once, the test part

Methods do not wait for each other: each goes through this on its own, until the conclusion. Everything decided goes
into the journal first, and everything here is a function of the journal.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from peft_study.config import StudyConfig, TrainingConfig, setting_of
from peft_study.methods.registry import is_exclusive
from peft_study.search import lr_range_test, range_expansion
from peft_study.search.pruners import pruner, rungs
from peft_study.search.samplers import Suggestions
from peft_study.search.trials import StudyState, TrialRecord, final_seeds, value_of
from peft_study.seeds import key
from peft_study.statistics import loss_value
from peft_study.storage.journal import Event, Journal
from peft_study.training.loop import Ended, Evaluated, TrialEvent


@dataclass(frozen=True, slots=True)
class Setting:
    """What a trial trains with: its method's setting, its optimizer's, and the steps at which it is judged."""

    method: Any
    training: TrainingConfig
    rungs: tuple[int, ...]
    keep: bool


class Scheduler:
    """The decisions of a study.

    Args:
        config: filled.
        journal: what happened so far.
        suggestions: of each method's Optuna study.
        steps: returns the optimizer steps that the budget allows a trial with these settings.
        counts_N: supervised tokens of each dev example.
    """

    def __init__(
        self,
        config: StudyConfig,
        journal: Journal,
        suggestions: Mapping[str, Suggestions],
        steps: Callable[[TrainingConfig], int],
        counts_N: npt.NDArray[np.int64],
    ) -> None:
        self._config, self._journal, self._suggestions = config, journal, suggestions
        self._steps, self._counts_N = steps, counts_N
        self._pruner = pruner(config.search.pruner, config.search.reduction)
        self.state = StudyState()
        for event in journal.events:
            self.state.apply(event)
        self.methods = config.searched
        self._tests = {
            method: {rate: config.methods[method].flat(self._at(method, rate)) for rate in rates}
            for method, rates in lr_range_test.planned(config, steps(config.training)).items()
        }
        # a grid gives out what was not tried: what is due does not change while the file stays the same
        self._due = {method: self.state.due(method, config) for method in self.methods}
        for method, book in suggestions.items():
            book.adopt(self.state.of(method, "search"), counts_N)
        for trial in self.state.trials.values():
            self._mirror(trial)

    @property
    def finished(self) -> bool:
        """True when nothing is left but to open the test part."""
        return self.state.concluded

    def next(self, room: int, *, empty: bool) -> list[TrialRecord]:
        """Returns the trials that begin now.

        Args:
            room: free slots.
            empty: the engine has no trials, so that one which changes the base may enter.
        """
        found: list[TrialRecord] = []
        while room > 0:
            trial = self._next(alone=False)
            if trial is None:
                break
            found.append(trial)
            room -= trial.kind != "reference"  # the base trains nothing and takes no slot
        if not found and empty and room > 0:
            alone = self._next(alone=True)
            found += [alone] if alone else []
        if not found and not self.state.concluded and not any(self.state.running()):
            self._conclude()
        return found

    def heard(self, events: Sequence[TrialEvent]) -> dict[str, str]:
        """Takes in what happened; returns the trials that are to stop, with the reason."""
        leave: dict[str, str] = {}
        for message in events:
            trial = self.state.trials[message.name]
            if trial.status != "running":
                continue  # of a trial that ended in an earlier start, on its way to the same end
            if isinstance(message, Ended):
                self._end(trial, message)
            else:
                # a trial that went on from a checkpoint measures again what the journal has already
                if message.step not in trial.sums:
                    sums = message.sums_N.tolist()
                    self._add({"event": "measured", "name": trial.name, "step": message.step, "sums": sums})
                self._mirror(trial)
                reason = self._judge(trial, message)
                if reason is not None:
                    leave[trial.name] = reason
        return leave

    def time_is_up(self) -> None:
        """No further settings are searched; what runs is run to its end, and the finals follow."""
        if not self.state.deadline and any(self._to_come(method) > 0 for method in self.methods):
            self._add({"event": "deadline"})

    def opened(self, sums: Mapping[str, npt.NDArray[np.float64]]) -> None:
        """Takes in the losses of the test part, by trial."""
        self._add({"event": "opened", "sums": {name: values.tolist() for name, values in sums.items()}})

    def setting(self, trial: TrialRecord) -> Setting:
        """Returns what a trial trains with."""
        config = self._config
        method, training = setting_of(trial.settings, config.training)
        if trial.kind == "reference":
            return Setting(method, training.model_copy(update={"steps": 1}), (), False)
        if trial.seed is not None:
            training = training.model_copy(update={"seed": trial.seed, "data_seed": trial.seed})
        steps = trial.steps or self._steps(training)
        training = training.model_copy(update={"steps": steps})
        judged = self._rungs(trial.method, steps) if trial.kind == "search" else ()
        keep = trial.kind == "final" or (trial.kind == "search" and not is_exclusive(method.method))
        return Setting(method, training, judged, keep)

    # -- what begins ------------------------------------------------------------------------------------------------

    def _next(self, *, alone: bool) -> TrialRecord | None:
        if not alone and not any(t.kind == "reference" for t in self.state.trials.values()):
            return self._ask("none", "none", "reference", 0, None, {})
        methods = [m for m in self.methods if is_exclusive(self._config.methods[m].kind) == alone]
        return self._next_range_test(methods) or self._next_search(methods) or self._next_final(methods)

    def _next_range_test(self, methods: Sequence[str]) -> TrialRecord | None:
        if self.state.deadline:
            return None
        for method in methods:
            if method in self.state.tested or not self._to_come(method):
                continue
            there = self._range_trials(method)
            missing = [rate for rate in self.range_rates(method) if rate not in there]
            if missing:
                number = len(self.state.of(method, "range_test"))
                return self._ask(
                    f"{method}-range-{number}", method, "range_test", number, None, self._at(method, missing[0])
                )
            self._close_range_test(method)  # where nothing is missing, the trials of before a change may be all
        return None

    def range_rates(self, method: str) -> tuple[float, ...]:
        """Returns the rates of a method's range test; none where there is no test."""
        return tuple(self._tests.get(method, ()))

    def _at(self, method: str, rate: float) -> dict[str, Any]:
        return {**lr_range_test.central(self._config.methods[method]), "learning_rate": rate}

    def _range_trials(self, method: str) -> dict[float, TrialRecord]:
        """Returns a method's range test by rate: the trials with its very settings, be they of an earlier space."""
        asked = [t for t in self.state.of(method, "range_test") if t.steps == self._config.search.range_steps]
        tests = self._tests.get(method, {})
        return {rate: trial for rate, settings in tests.items() for trial in asked if trial.settings == settings}

    def _to_come(self, method: str) -> int:
        return self._due[method] - len(self.state.present(method))

    def _next_search(self, methods: Sequence[str]) -> TrialRecord | None:
        if self.state.deadline:
            return None
        open_methods = [
            m for m in methods if self._to_come(m) > 0 and (m in self.state.tested or not self.range_rates(m))
        ]
        if not open_methods:
            return None
        method = min(open_methods, key=lambda m: len(self.state.present(m)))
        number = len(self.state.of(method, "search"))
        bounds = self._bounds(method)
        values = self._suggestions[method].ask(number, bounds)
        return self._ask(f"{method}-{number:03d}", method, "search", number, None, values)

    def _bounds(self, method: str) -> dict[str, tuple[float, float]]:
        """Returns the ranges of a method's next trial, after widening what wants it."""
        space = self._config.methods[method]
        if self._config.search.widen:
            found = range_expansion.widened(self.state, method, space)
            if found is not None:
                event = {"event": "widened", "method": method, "dimension": found.dimension}
                self._add({**event, "bounds": found.bounds, "fresh": found.added, "note": found.note})
        return {**self.state.bounds.get(method, {}), **self.state.fresh.get(method, {})}

    def _next_final(self, methods: Sequence[str]) -> TrialRecord | None:
        for method in methods:
            if not self.searched(method):
                continue
            if method not in self.state.finalists:
                self._choose_finalists(method)
            there = {(t.number, t.seed) for t in self.state.of(method, "final")}
            for number, seed in itertools.product(self.state.finalists[method], final_seeds(self._config)):
                if (number, seed) not in there:
                    found = self.state.setting(method, number)
                    name = f"{method}-{number:03d}-seed-{seed}"
                    return self._ask_for(name, method, "final", number, seed, found.values, found.settings)
        return None

    def searched(self, method: str) -> bool:
        """True where the search of a method is over."""
        trials = self.state.of(method, "search")
        enough = self.state.deadline or self._to_come(method) <= 0
        return enough and all(t.status != "running" for t in (*trials, *self.state.of(method, "range_test")))

    def _choose_finalists(self, method: str) -> None:
        finished = [t for t in self.state.of(method, "search") if t.last is not None]
        best = sorted(finished, key=value_of)[: self._config.finals.best]
        self._add({"event": "finalists", "method": method, "numbers": [t.number for t in best]})

    def _ask(
        self, name: str, method: str, kind: str, number: int, seed: int | None, values: Mapping[str, Any]
    ) -> TrialRecord:
        settings = {"method": "none"} if kind == "reference" else self._config.methods[method].flat(values)
        return self._ask_for(name, method, kind, number, seed, dict(values), settings)

    def _ask_for(
        self,
        name: str,
        method: str,
        kind: str,
        number: int,
        seed: int | None,
        values: Mapping[str, Any],
        settings: Mapping[str, Any],
    ) -> TrialRecord:
        event = {"event": "asked", "name": name, "method": method, "kind": kind, "number": number, "seed": seed}
        steps = self._config.search.range_steps if kind == "range_test" else None
        self._add({**event, "values": values, "settings": settings, "steps": steps})
        return self.state.trials[name]

    # -- what stops, and how it ends --------------------------------------------------------------------------------

    def _rungs(self, method: str, steps: int) -> tuple[int, ...]:
        if self._config.search.pruner == "none":
            return ()
        space = self._config.methods.get(method)
        if space is None:  # the study file no longer has it: what runs of it is run to its end
            return ()
        warmup = space.dimensions().get("warmup_ratio")
        if warmup is None:
            longest = space.training({}, self._config.training).warmup_ratio
        else:
            longest = max(warmup.choices) if hasattr(warmup, "choices") else warmup.high
        return rungs(steps, self._config.search.reduction, int(longest * steps))

    def _judge(self, trial: TrialRecord, message: Evaluated) -> str | None:
        """Returns why a trial is to stop at this rung; a random share runs on, to see whether that was right."""
        if trial.kind != "search" or trial.audited or message.step not in self.setting(trial).rungs:
            return None
        # what diverged later is no measure for the others: it would stop them, and then be gone itself
        group = [t for t in self.state.of(trial.method, "search") if t.status not in ("diverged", "failed")]
        reached = {t.name: t.sums[message.step] for t in group if message.step in t.sums}
        found = self._pruner.judge(trial.name, reached, self._counts_N)
        if found is None:
            return None
        reason = f"at step {message.step} {found}"
        draw = np.random.default_rng(key(self._config.search.seed, "audit", trial.method, trial.number)).random()
        if draw < self._config.search.audit:
            self._add({"event": "audited", "name": trial.name, "reason": reason})
            return None
        return reason

    def _end(self, trial: TrialRecord, message: Ended) -> None:
        outcome = message.outcome
        facts = {
            "steps": outcome.steps,
            "tokens": outcome.tokens,
            "virtual_tokens": outcome.virtual_tokens,
            "seconds": outcome.seconds,
            "trainable": None if outcome.trainable is None else outcome.trainable.trainable,
        }
        ended = {"event": "ended", "name": trial.name, "status": outcome.status, "reason": outcome.reason}
        self._add({**ended, "facts": facts})
        self._mirror(trial)
        if trial.kind == "range_test":
            self._close_range_test(trial.method)

    def _close_range_test(self, method: str) -> None:
        rates = self.range_rates(method)
        if not rates or method in self.state.tested:  # of a method or space that the file no longer has
            return
        trials = list(self._range_trials(method).values())
        if len(trials) == len(rates) and all(t.status != "running" for t in trials):
            bounds, note = lr_range_test.verdict(rates, trials, self._counts_N)
            self._add({"event": "tested", "method": method, "bounds": bounds, "note": note})

    def _conclude(self) -> None:
        """Chooses the winner: the finalist with the least mean dev loss, of methods that were searched alike."""
        means = {
            setting: mean
            for method in self.methods
            if not self.state.untuned(method, self._config)
            for setting, mean in self._finalist_means(method).items()
        }
        winner = min(means, key=lambda s: means[s], default=None)
        self._add({"event": "concluded", "winner": winner})

    def _finalist_means(self, method: str) -> dict[tuple[str, int], float]:
        found = {}
        for number in self.state.finalists.get(method, ()):
            finals = [t for t in self.state.of(method, "final") if t.number == number]
            values = [value_of(t) for t in finals if t.last is not None]
            if values and len(values) == len(finals):  # one seed that failed says: not to be relied on
                found[method, number] = sum(values) / len(values)
        return found

    # -- books ------------------------------------------------------------------------------------------------------

    def _add(self, event: Event) -> None:
        self._journal.append([event])
        self.state.apply(event)

    def _mirror(self, trial: TrialRecord) -> None:
        """Shows Optuna what is known of a trial; what it has already is left alone."""
        if trial.kind != "search" or trial.method not in self._suggestions:
            return
        book = self._suggestions[trial.method]
        for step, sums_N in trial.sums.items():
            book.report(trial.number, step, loss_value(sums_N, self._counts_N))
        if trial.status != "running":
            last = trial.last
            value = None if last is None else loss_value(last, self._counts_N)
            book.tell(trial.number, trial.status, value, {"reason": trial.reason} if trial.reason else {})
