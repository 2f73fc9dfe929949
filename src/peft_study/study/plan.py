"""How many settings of how many steps fit into some minutes, from a few measured steps of each method.

A study of n settings a method, s steps each, takes for each method about

    n x (SHARE x s steps + PASSES held-out passes)  +  seeds x (s steps + a held-out and a test pass)

The search ends in time for the finals (`budget.minutes`), by what it then measures: the plan decides what cannot be
changed later, which is the steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from peft_study.config import StudyConfig
from peft_study.errors import ConfigError
from peft_study.model.in_memory import ModelInMemory
from peft_study.study.dry_run import StudyEstimate, estimate
from peft_study.training.session import Say

SHARE, PASSES = 0.65, 2.5
"""Of a trial's steps, and held-out passes a trial, that are left on average where the pruner stops trials; measured on
the quickstart: 7 of 12 trials were stopped, after 3 or 8 of 24 steps."""
FORWARD = 1 / 3
"""Time of a token that is only evaluated, as a share of a trained one's; measured on the quickstart."""
_FILLED = 0.9
"""Of the minutes that are planned for: loading and measuring take some, and a plan that is too long cannot shrink."""
_TRIALS, _LEAST_TRIALS, MOST_TRIALS = 12, 4, 30
_HELD_OUT = (64, 32)
"""Rows that the dev and the test part are cut down to, before there are fewer settings."""
MOST_PASSES = 10
"""Over the data in a trial, at most."""
_STEPS, _LEAST_STEPS = 40, 10
"""Steps below which a plan rather has fewer trials, and below which there is none."""


def check_minutes(minutes: float, given: Sequence[str], *, option: str = "") -> None:
    """Refuses what is no time, and a time beside what it plans.

    Args:
        minutes: of the whole study.
        given: what was asked for beside it of what it plans: trials, steps, tokens.
        option: what stands before the names of options, for the error: ``--`` on the command line.

    Raises:
        ConfigError: naming the value.
    """
    where = f"{option}minutes"
    if given:
        what = f"plans trials and steps, but {option}{given[0]} is given"
        remedy = "give the minutes, or trials and steps"
        raise ConfigError(what, where=where, remedy=remedy)
    if not isinstance(minutes, (int, float)):
        raise ConfigError(f"{minutes!r} is no number", where=where, remedy="give e.g. 60")
    if not 0 < minutes < math.inf:
        raise ConfigError(
            f"{minutes:g} is not {'finite' if minutes > 0 else 'above 0'}", where=where, remedy="give e.g. 60"
        )


def plan(
    config: StudyConfig, minutes: float, say: Say, *, in_memory: ModelInMemory | None = None
) -> dict[str, dict[str, Any]]:
    """Returns the settings of ``budget``, ``finals`` and ``data`` for so many minutes, and says what they mean.

    ``data`` is among them where fewer held-out rows are needed.

    Args:
        config: model, data, methods; its own budget is not looked at.
        minutes: of the whole study: search, finals, test.
        say: receives each step that takes time, and the plan.
        in_memory: a base in memory, instead of the one that the configuration names.

    Raises:
        UserError: as the study itself would.
        ConfigError: when the minutes do not reach.
    """
    measured = estimate(config, say, in_memory=in_memory)
    wanted, a_pass = minutes * 60 * _FILLED, math.ceil(measured.train_rows / measured.batch_size)
    seeds = config.finals.seeds
    for trials, best, rows in _shapes(config, measured):
        costs = replace(measured, dev_rows=rows or measured.dev_rows, test_rows=rows or measured.test_rows)
        steps = min(_steps(costs, trials, best * seeds, wanted), a_pass)
        if steps >= min(_STEPS, a_pass):
            break
    measured = costs
    if steps < min(_LEAST_STEPS, a_pass):
        least = seconds_of(measured, _LEAST_TRIALS, _LEAST_STEPS, seeds) / _FILLED / 60
        raise ConfigError(
            f"{minutes:g} min do not reach for {_LEAST_TRIALS} settings a method of {_LEAST_STEPS} steps",
            where="minutes",
            remedy=f"give at least {least:.2g}, fewer methods, fewer held-out rows, or a smaller batch",
        )
    while trials < MOST_TRIALS and seconds_of(measured, trials + 1, steps, best * seeds) <= wanted:
        trials += 1
    if trials == MOST_TRIALS:  # of little data, the time that is left goes into further passes
        steps = max(steps, min(_steps(measured, trials, best * seeds, wanted), MOST_PASSES * a_pass))
    finals = best * seeds * len(measured.methods)
    most = seconds_of(measured, 2 * trials, steps, best * seeds)
    end = "the search ends in time for them"
    if most < wanted:
        end = f"about {max(most / 60, 0.1):.1f} min in all, as no more than {2 * trials} settings a method are tried"
    say(
        f"plan for {minutes:g} min: about {trials} settings a method of {steps} steps (one pass over the data: "
        f"{a_pass:,}), {measured.dev_rows} held-out rows, then {finals} finals; {end}"
    )
    # the search goes on for as long as there is time, so the number of settings is only bounded
    held_out = {} if rows is None else {"data": {"held_out": rows, "test": rows}}
    return {"budget": {"trials": 2 * trials, "steps": steps, "minutes": minutes}, "finals": {"best": best}, **held_out}


def _shapes(config: StudyConfig, measured: StudyEstimate) -> list[tuple[int, int, int | None]]:
    """Returns settings and finalists a method, and held-out rows (None: as configured), from the largest study down.

    Held-out rows that are a file, or were asked for by the test part's own setting, stay.
    """
    drawn = not isinstance(config.data.held_out, str) and config.data.test is None
    fewer = [rows for rows in _HELD_OUT if drawn and rows < measured.dev_rows]
    least = fewer[-1] if fewer else None
    return [
        *((_TRIALS, best, None) for best in (2, 1)),
        *((_TRIALS, 1, rows) for rows in fewer),
        (_LEAST_TRIALS, 1, least),
    ]


def _steps(measured: StudyEstimate, trials: int, finals: int, seconds: float) -> int:
    """Returns the steps a trial for which so many trials and finals a method take these seconds; 0: none."""
    none, one = (seconds_of(measured, trials, steps, finals) for steps in (0, 1))
    if one == none:
        raise ConfigError("no method trains anything", where="minutes", remedy="name a method that does, or no minutes")
    return max(0, int((seconds - none) / (one - none)))


def seconds_of(measured: StudyEstimate, trials: int, steps: int, finals: int) -> float:
    """Returns what a study takes.

    Args:
        measured: a few steps of each method.
        trials, steps: settings a method, and optimizer steps of each.
        finals: retrained a method, over all seeds.
    """
    total = 0.0
    for method in measured.methods:
        dev, test = (
            method.step_seconds / measured.batch_size * rows * FORWARD
            for rows in (measured.dev_rows, measured.test_rows)
        )
        a_trial = SHARE * steps * method.step_seconds + PASSES * dev
        total += trials * a_trial + finals * (steps * method.step_seconds + dev + test)
    return total
