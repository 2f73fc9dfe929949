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
from typing import Any

import numpy as np
import numpy.typing as npt

from peft_study.config import Choices, MethodSpace, NoneConfig, StudyConfig, TrainingConfig, TrialSettings
from peft_study.methods.registry import is_exclusive
from peft_study.search import lr_range_test, range_expansion
from peft_study.search.prior import RatePrior, rate_prior
from peft_study.search.pruners import pruner, rungs
from peft_study.search.samplers import SpaceSampler
from peft_study.search.surrogate import Surrogate
from peft_study.search.trials import StudyState, TrialRecord, best_first, final_seeds, setting_name, value_of
from peft_study.seeds import key
from peft_study.statistics import Counts
from peft_study.storage.journal import Event, Journal
from peft_study.training.loop import Ended, Evaluated, TrialEvent


class Scheduler:
    """The decisions of a study.

    Args:
        config: filled.
        journal: what happened so far.
        steps: returns the optimizer steps that the budget allows a trial with these settings.
        counts_N: supervised tokens of each dev example.
    """

    def __init__(
        self,
        config: StudyConfig,
        journal: Journal,
        steps: Callable[[TrainingConfig], int],
        counts_N: Counts,
    ) -> None:
        self.config, self._journal = config, journal
        self._steps, self._counts_N = steps, counts_N
        self._pruner = pruner(config.search.pruner, config.search.reduction, self._model)
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
        self.samplers = {
            method: SpaceSampler(
                method,
                config.methods[method],
                config.sampler(method),
                config.search.seed,
                counts_N,
                self._prior(config.methods[method]),
            )
            for method in self.methods
        }

    def _prior(self, space: MethodSpace) -> RatePrior | None:
        if "learning_rate" not in space.dimensions():
            return None
        return rate_prior(space, self._steps(self.config.training), informed=self.config.search.prior)

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
        for method in self.methods:
            # here, not at the end of the trial: after a kill between the two it is made up for
            if method in self.state.outdated and self._modelled(method):
                self._recommend(method)
        found: list[TrialRecord] = []
        while room > 0 and self.state.stopped is None:
            trial = self._next(alone=False)
            if trial is None:
                break
            found.append(trial)
            room -= trial.kind != "reference"  # the base trains nothing and takes no slot
        if not found and empty and room > 0 and self.state.stopped is None:
            alone = self._next(alone=True)
            found += [alone] if alone else []
        if not found and not self.state.concluded and not any(self.state.running()):
            self._conclude()
        return found

    def receive(self, events: Sequence[TrialEvent]) -> dict[str, str]:
        """Writes events to the journal; returns the trials to stop, with the reason."""
        leave: dict[str, str] = {}
        for event in events:
            trial = self.state.trials[event.name]
            if trial.status != "running":
                continue  # it ended in an earlier start, and is repeated from a checkpoint
            if isinstance(event, Ended):
                self._end(trial, event)
            else:
                # a trial resumed from a checkpoint measures again what the journal has
                if event.step not in trial.sums:
                    sums = event.sums_N.tolist()
                    self._add({"event": "measured", "name": trial.name, "step": event.step, "sums": sums})
                reason = self._judge(trial, event)
                if reason is not None:
                    leave[trial.name] = reason
        return leave

    def time_is_up(self) -> None:
        """Ends the search: no new settings are tried, running trials finish, and the finals follow."""
        if not self.state.deadline and any(self._to_come(method) > 0 for method in self.methods):
            self._add({"event": "deadline"})

    def stop(self, reason: str) -> None:
        """Ends the study: nothing new begins, and the conclusion is drawn from what there is."""
        if self.state.stopped is None and not self.state.concluded:
            self._add({"event": "stopped", "reason": reason})

    def chosen(self, task: str, scores: Mapping[str, float]) -> None:
        """Takes as winner, of the settings that may win, the one with the greatest mean score over its seeds.

        Where two have the same, it is the one with the lower dev loss; without any score the winner stays.

        Args:
            task: that was asked.
            scores: of each final, by its trial's name; more is better.
        """
        means = {}
        for setting, loss in self._ranked().items():
            found = [scores[t.name] for t in self.state.finals_of(*setting) if t.name in scores]
            if found:
                means[setting] = (-sum(found) / len(found), loss)
        if means:
            winner = min(means, key=lambda setting: means[setting])
            self._add({"event": "chosen", "task": task, "scores": dict(scores), "winner": winner})

    def opened(self, sums: Mapping[str, npt.NDArray[np.float64]]) -> None:
        """Writes the test losses of each trial to the journal."""
        self._add({"event": "opened", "sums": {name: values.tolist() for name, values in sums.items()}})

    # -- what begins ------------------------------------------------------------------------------------------------

    def _next(self, *, alone: bool) -> TrialRecord | None:
        if not alone and not any(t.kind == "reference" for t in self.state.trials.values()):
            training = self.config.training.model_copy(update={"steps": 1})
            settings = TrialSettings(method=NoneConfig(), training=training, keep=False)
            return self._ask("none", "none", "reference", 0, {}, settings)
        methods = [m for m in self.methods if is_exclusive(self.config.methods[m].kind) == alone]
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
                number, values = len(self.state.of(method, "range_test")), self._at(method, missing[0])
                steps, shared = self.config.search.range_steps, self.config.training
                settings = self.config.methods[method].at(values, shared.model_copy(update={"steps": steps}))
                settings = settings.model_copy(update={"keep": False})
                return self._ask(f"{method}-range-{number}", method, "range_test", number, values, settings)
            self._close_range_test(method)  # all of its trials may be from before a change of the file
        return None

    def range_rates(self, method: str) -> tuple[float, ...]:
        """Returns the rates of a method's range test; none where there is no test."""
        return tuple(self._tests.get(method, ()))

    def _at(self, method: str, rate: float) -> dict[str, Any]:
        return {**lr_range_test.central(self.config.methods[method]), "learning_rate": rate}

    def _range_trials(self, method: str) -> dict[float, TrialRecord]:
        """Returns the trials of a method's range test by rate, also those begun under an earlier study file."""
        steps, tests = self.config.search.range_steps, self._tests.get(method, {})
        asked = [t for t in self.state.of(method, "range_test") if t.settings.training.steps == steps]
        return {rate: trial for rate, flat in tests.items() for trial in asked if trial.settings.flat == flat}

    def _to_come(self, method: str) -> int:
        return self.state.to_come(method, self.config, self._due[method])

    def _next_search(self, methods: Sequence[str]) -> TrialRecord | None:
        if self.state.deadline:
            return None
        open_methods = [
            m for m in methods if self._to_come(m) > 0 and (m in self.state.tested or not self.range_rates(m))
        ]
        if not open_methods:
            return None
        method = min(open_methods, key=lambda m: len(self.state.present(m)))
        if self.config.search.widen:
            found = range_expansion.widened(self.state, method, self.config.methods[method])
            if found is not None:
                event = {"event": "widened", "method": method, "dimension": found.dimension}
                self._add({**event, "bounds": found.bounds, "fresh": found.added, "note": found.note})
        trials = self.state.of(method, "search")
        bounds, fresh = self.state.bounds.get(method, {}), self.state.fresh.get(method, {})
        values = self.samplers[method].suggest(trials, bounds, fresh)
        space = self.config.methods[method]
        uncounted = space.at(values, self.config.training)
        training = self._counted(uncounted.training)
        settings = TrialSettings(
            method=uncounted.method,
            training=training,
            rungs=self._rungs(space, training),
            keep=not is_exclusive(space.kind),
        )
        return self._ask(setting_name(method, len(trials)), method, "search", len(trials), values, settings)

    def _next_final(self, methods: Sequence[str]) -> TrialRecord | None:
        for method in methods:
            if not self.searched(method):
                continue
            if method not in self.state.finalists:
                self._choose_finalists(method)
            there = {(t.number, t.seed) for t in self.state.of(method, "final")}
            for number, seed in itertools.product(self.state.finalists[method], final_seeds(self.config)):
                if (number, seed) not in there:
                    found = self.state.setting(method, number)
                    training = found.settings.training.model_copy(update={"seed": seed, "data_seed": seed})
                    settings = TrialSettings(
                        method=found.settings.method, training=self._counted(training), measure_start=False
                    )
                    name = f"{setting_name(method, number)}-seed-{seed}"
                    return self._ask(name, method, "final", number, found.values, settings)
        return None

    def searched(self, method: str) -> bool:
        """True where the search of a method is over."""
        trials = self.state.of(method, "search")
        return self._to_come(method) <= 0 and all(
            t.status != "running" for t in (*trials, *self.state.of(method, "range_test"))
        )

    def _choose_finalists(self, method: str) -> None:
        best = best_first(self.state.of(method, "search"))[: self.config.finals.best]
        self._add({"event": "finalists", "method": method, "numbers": [t.number for t in best]})

    def _counted(self, training: TrainingConfig) -> TrainingConfig:
        """Returns the same with the steps that the budget allows."""
        return training.model_copy(update={"steps": self._steps(training)})

    def _ask(
        self, name: str, method: str, kind: str, number: int, values: Mapping[str, Any], settings: TrialSettings
    ) -> TrialRecord:
        event = {"event": "asked", "name": name, "method": method, "kind": kind, "number": number}
        self._add({**event, "values": dict(values), "settings": settings.model_dump(mode="json")})
        return self.state.trials[name]

    # -- what stops, and how it ends --------------------------------------------------------------------------------

    def _rungs(self, space: MethodSpace, training: TrainingConfig) -> tuple[int, ...]:
        if self.config.search.pruner == "none":
            return ()
        warmup = space.dimensions().get("warmup_ratio")
        if warmup is None:
            longest = training.warmup_ratio
        else:
            longest = max(warmup.choices) if isinstance(warmup, Choices) else warmup.high
        assert training.steps is not None
        return rungs(training.steps, self.config.search.reduction, int(longest * training.steps))

    def _judge(self, trial: TrialRecord, event: Evaluated) -> str | None:
        """Returns why a trial should stop at this rung; a random share runs on as a control."""
        if trial.audited or event.step not in trial.settings.rungs:
            return None
        if trial.method not in self.methods:  # the study file no longer has it: it runs to its end
            return None
        # a trial that diverged later must not stop others: it would leave none
        others = [
            t
            for t in self.state.of(trial.method, "search")
            if t.name != trial.name and t.status not in ("diverged", "failed")
        ]
        found = self._pruner.judge(trial, others, event.step, self._counts_N)
        if found is None:
            return None
        reason = f"at step {event.step} {found}"
        draw = np.random.default_rng(key(self.config.search.seed, "audit", trial.method, trial.number)).random()
        if draw < self.config.search.audit:
            self._add({"event": "audited", "name": trial.name, "reason": reason})
            return None
        return reason

    def _model(self, method: str) -> Surrogate:
        return self.samplers[method].bayesian.surrogate(self.state.of(method, "search"))

    def _end(self, trial: TrialRecord, event: Ended) -> None:
        outcome = event.outcome
        facts = {
            "steps": outcome.steps,
            "tokens": outcome.tokens,
            "virtual_tokens": outcome.virtual_tokens,
            "seconds": outcome.seconds,
            "trainable": None if outcome.trainable is None else outcome.trainable.trainable,
        }
        ended = {"event": "ended", "name": trial.name, "status": outcome.status, "reason": outcome.reason}
        self._add({**ended, "facts": facts})
        if trial.kind == "range_test":
            self._close_range_test(trial.method)

    def _modelled(self, method: str) -> bool:
        search = self.config.search
        return self.config.sampler(method) == "bayesian" or search.pruner == "probability" or search.stop is not None

    def _recommend(self, method: str) -> None:
        trials, bounds = self.state.of(method, "search"), self.state.bounds.get(method, {})
        found = self.samplers[method].bayesian.recommended(trials, bounds)
        if found is not None:
            event = {"event": "recommended", "method": method, "values": found.values}
            self._add({**event, "rates": found.rates, "within": found.within})

    def _close_range_test(self, method: str) -> None:
        rates = self.range_rates(method)
        if not rates or method in self.state.tested:  # no rates: the study file no longer has the method
            return
        trials = list(self._range_trials(method).values())
        if len(trials) == len(rates) and all(t.status != "running" for t in trials):
            bounds, note = lr_range_test.verdict(rates, trials, self._counts_N)
            self._add({"event": "tested", "method": method, "bounds": bounds, "note": note})

    def _conclude(self) -> None:
        """Chooses the winner: the finalist with the least mean dev loss among methods with as many trials."""
        means = self._ranked()
        winner = min(means, key=lambda s: means[s], default=None)
        self._add({"event": "concluded", "winner": winner})

    def _ranked(self) -> dict[tuple[str, int], float]:
        """Returns the mean dev loss of each setting that may win."""
        return {
            setting: mean
            for method in self.methods
            if not self.state.untuned(method, self.config)
            for setting, mean in self._finalist_means(method).items()
        }

    def _finalist_means(self, method: str) -> dict[tuple[str, int], float]:
        found = {}
        for number in self.state.finalists.get(method, ()):
            finals = self.state.finals_of(method, number)
            values = [value_of(t) for t in finals if t.last is not None]
            seeds = self.config.finals.seeds
            # a setting of which a seed failed, or did not begin, cannot win
            if values and len(values) == len(finals) >= seeds:
                found[method, number] = sum(values) / len(values)
        return found

    # -- the journal -------------------------------------------------------------------------------------------------

    def _add(self, event: Event) -> None:
        self._journal.append([event])
        self.state.apply(event)
