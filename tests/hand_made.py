"""A study written by hand: its events in order, so that tests know every loss in it."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from peft_study.config import NoneConfig, StudyConfig, TrialSettings, validate
from peft_study.report.findings import TOPICS, Finding, find
from peft_study.report.results import Results, collect
from peft_study.search.trials import StudyState, best_first
from peft_study.statistics import TokenCounts
from peft_study.storage import held_out
from peft_study.storage.held_out import HeldOut
from peft_study.storage.journal import Event, Journal
from peft_study.storage.run_dir import SCHEMA_VERSION, identity
from peft_study.storage.study_dir import StudyFolder

N = 64
COUNTS = np.full(N, 10, dtype=np.int64)
_SPREAD = 0.3 * np.random.default_rng(0).standard_normal(N)
BASE = 10 * (2.0 + _SPREAD - _SPREAD.mean())
TEST_BASE = BASE[::-1].copy()
RATE = {"learning_rate": {"low": 1e-6, "high": 1e3, "log": True}}
"""A space in which the rate alone is searched, with its edges far away."""
NAN = "the loss became nan at step 3"


def losses(name: str, gain: float, noise: float = 0.02, base: npt.NDArray[np.float64] = BASE) -> list[float]:
    """Returns summed losses of the examples that lie `gain` nats a token below the base's on average, exactly."""
    wobble = noise * np.random.default_rng(zlib.crc32(name.encode())).standard_normal(N)
    return (base - 10 * (gain + wobble - wobble.mean())).tolist()


class HandMade:
    """A study of 100 steps a trial.

    Args:
        folder: of the study; need not exist.
        methods: as in a study file.
        sections: further ones of it.
    """

    def __init__(self, folder: Path, methods: Mapping[str, Any], **sections: Any) -> None:
        values = {
            "model": {"name": "m"},
            "data": {"train": "d.jsonl"},
            "methods": methods,
            "training": {"steps": 100},
            "output": str(folder),
            **sections,
        }
        self.config = validate(StudyConfig, values, where="study.yaml").filled()
        self.folder = StudyFolder(folder)
        self.examples = HeldOut(TokenCounts(COUNTS), BASE, TokenCounts(COUNTS))
        self.events: list[Event] = []
        self.asked("none", "none", "reference", 0, None, {})
        self.measured("none", 0, BASE.tolist())
        self.ended("none", "finished")

    def asked(
        self, name: str, method: str, kind: str, number: int, seed: int | None, values: Mapping[str, Any]
    ) -> None:
        event = {"event": "asked", "name": name, "method": method, "kind": kind, "number": number}
        training = self.config.training.model_copy(update={} if seed is None else {"seed": seed, "data_seed": seed})
        if kind == "reference":
            settings = TrialSettings(method=NoneConfig(), training=training)
        else:
            settings = self.config.methods[method].at(values, training)
        self.events.append({**event, "values": dict(values), "settings": settings.model_dump(mode="json")})

    def measured(self, name: str, step: int, sums: Sequence[float]) -> None:
        self.events.append({"event": "measured", "name": name, "step": step, "sums": list(sums)})

    def ended(self, name: str, status: str, reason: str | None = None, **facts: Any) -> None:
        state = {"steps": 100, "tokens": 5000, "virtual_tokens": 80, "seconds": 2.5, "trainable": 7, **facts}
        self.events.append({"event": "ended", "name": name, "status": status, "reason": reason, "facts": state})

    def trial(
        self,
        method: str,
        rate: float,
        gain: float | None,
        *,
        status: str | None = None,
        reason: str | None = None,
        noise: float = 0.02,
        **values: Any,
    ) -> str:
        """Adds a searched setting; `gain` None: it diverged."""
        number = sum(e["event"] == "asked" and e["method"] == method and e["kind"] == "search" for e in self.events)
        name = f"{method}-{number:03d}"
        self.asked(name, method, "search", number, None, {"learning_rate": rate, **values})
        self.measured(name, 0, BASE.tolist())
        if gain is not None:
            self.measured(name, 100 if status is None else 11, losses(name, gain, noise))
        status = status or ("diverged" if gain is None else "finished")
        self.ended(name, status, reason or (NAN if gain is None else None))
        return name

    def finals(self, method: str, number: int, gains: Sequence[float | None]) -> list[str]:
        """Adds a setting's new seeds, from 1; None: that seed diverged."""
        values = next(e["values"] for e in self.events if e.get("name") == f"{method}-{number:03d}")
        names = []
        for seed, gain in enumerate(gains, start=1):
            name = f"{method}-{number:03d}-seed-{seed}"
            self.asked(name, method, "final", number, seed, values)
            if gain is not None:
                self.measured(name, 100, losses(name, gain))
            self.ended(name, "diverged" if gain is None else "finished", NAN if gain is None else None)
            names.append(name)
        return names

    def numbers(self, method: str) -> list[int]:
        """Returns the numbers of a method's finished settings of the search, best first."""
        state = self.state
        return [trial.number for trial in best_first(state.of(method, "search"))]

    def chosen(self, **finalists: Sequence[int]) -> None:
        for method, numbers in finalists.items():
            self.events.append({"event": "finalists", "method": method, "numbers": list(numbers)})

    def concluded(self, method: str | None, number: int = 0) -> None:
        self.events.append({"event": "concluded", "winner": None if method is None else [method, number]})

    def opened(self, noise: float = 0.02, **gains: float) -> None:
        """Opens the test part; names are given with ``_`` for ``-``."""
        sums = {"none": TEST_BASE.tolist()}
        for name, gain in gains.items():
            sums[name] = losses(f"test {name}", gain, noise, TEST_BASE)
        self.events.append({"event": "opened", "sums": sums})

    @property
    def state(self) -> StudyState:
        state = StudyState()
        for event in self.events:
            state.apply(event)
        return state

    def results(self) -> Results:
        return collect(self.config, self.state, self.examples, self.folder)

    def findings(self, **costs: Any) -> tuple[Finding, ...]:
        return find(self.config, self.state, self.examples, self.results(), costs)

    def said(self, *topics: str) -> list[str]:
        """Returns the English sentences on some topics, else on all."""
        return [finding.text["en"] for finding in self.findings() if finding.topic in (topics or TOPICS)]

    def about(self, method: str) -> str:
        """Returns what is said of a method's search."""
        return next(line for line in self.said() if line.startswith(f"{method}: "))

    def written(self, status: str = "finished", reason: str | None = None) -> Path:
        """Writes the study's folder as it would lie there, but for its trials' own folders."""
        run = self.folder.run
        self.folder.path.mkdir(parents=True)
        run.write("config.given.json", {})
        run.write("config.resolved.json", self.config.model_dump(mode="json"))
        own = identity(self.config.model_dump(mode="json"))
        run.write("status.json", {"status": status, "reason": reason, "identity": own, "version": SCHEMA_VERSION})
        held_out.keep(run, self.examples)
        Journal(self.folder.journal).append(self.events)
        return self.folder.path
