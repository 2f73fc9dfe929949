"""Ends the search of a study with a time limit while there is time left for the finals, by the speed it runs at.

elapsed + (tokens left of running trials + tokens of the finals) x seconds a token + the report's measurements  >  limit
"""

from __future__ import annotations

import time

from peft_study.config import StudyConfig
from peft_study.search.trials import StudyState
from peft_study.study.plan import SHARE
from peft_study.training.loop import Evaluated
from peft_study.training.session import Say
from peft_study.workers.worker import Pace, Report

RESERVED = 0.5
"""Share of the limit that is kept for the finals at most: a short limit still leaves time for a search."""


CLOSING = 15.0
"""Seconds a method at the end, for what it costs and its answers (study/closing.py); the quickstart on 2 cores."""


class StudyClock:
    """Measures the speed of a study, and tells when its search must end.

    Args:
        config: filled; its budget has minutes.
        limit: of the whole study, in seconds.
        before: seconds that earlier starts took.
        tokens: of a training row, on average.
        say: receives a line with the plan, once the first rung shows the speed.
    """

    def __init__(self, config: StudyConfig, limit: float, before: float, tokens: float, say: Say) -> None:
        self._config, self._limit, self._before, self._say = config, limit, before, say
        self._step_tokens = tokens * config.training.batch_size
        self._started = time.monotonic()
        self._trained = 0
        self._paces: dict[str, Pace] = {}
        self._told = before > 0

    def search_is_over(self, report: Report, state: StudyState) -> bool:
        """True where the time left is what running trials and finals need.

        Args:
            report: of a worker.
            state: of the study, which has seen the report.
        """
        self._trained += sum(pace.tokens for pace in report.paces.values())
        self._paces |= report.paces
        if state.deadline or not self._trained:
            return False
        here = time.monotonic() - self._started
        a_token = here / self._trained
        running = [self._paces[trial.name] for trial in state.running() if trial.name in self._paces]
        left = sum(pace.total - pace.step for pace in running) * self._step_tokens
        finals = self._finals(state)
        closing = CLOSING * len(self._config.searched)
        reserve = min((left + finals) * a_token + closing, RESERVED * self._limit)
        if not self._told and any(isinstance(event, Evaluated) and event.step > 0 for event in report.events):
            self._told = True
            self._plan(state, a_token, finals * a_token)
        return self._before + here + reserve > self._limit

    def _finals(self, state: StudyState) -> float:
        """Returns the tokens of the finals that have not begun."""
        total = 0
        for method in self._config.searched:
            begun, planned = state.finals(method, self._config)
            total += max(0, planned - len(begun)) * _steps(state, method)
        return total * self._step_tokens

    def _plan(self, state: StudyState, a_token: float, finals: float) -> None:
        """Says when the search will end at this speed, and with how many settings."""
        closing = CLOSING * len(self._config.searched)
        end = max(self._limit - finals - closing, (1 - RESERVED) * self._limit)
        steps = sum(_steps(state, method) for method in self._config.searched)
        settings = end / max(SHARE * steps * self._step_tokens * a_token, 1e-9)
        self._say(
            f"at the measured {1 / a_token:,.0f} tokens/s: search until minute {end / 60:.1f} of {self._limit / 60:g}, "
            f"about {settings:.0f} settings a method; then the finals, {finals / 60:.1f} minutes"
        )


def _steps(state: StudyState, method: str) -> int:
    """Returns the steps of a method's trials; 0 before the first has begun."""
    first = next(iter(state.of(method, "search")), None)
    return 0 if first is None else first.settings.training.steps or 0
