"""What a study did not test, and what cannot be said from it."""

from __future__ import annotations

from typing import Any

from peft_study.config import METHODS, Choices, Range, StudyConfig
from peft_study.report.evidence import Finding, names
from peft_study.report.results import Results
from peft_study.report.wording import Text, joined, listed, same, say, setting, title
from peft_study.search.trials import StudyState
from peft_study.statistics import FEW_EXAMPLES, LEAST_SOURCES
from peft_study.storage.held_out import HeldOut

_TRAINING = ("schedule", "batch_size", "clip_norm")
"""Settings of the training that no method's space has."""


def untested(config: StudyConfig, method: str | None) -> list[Finding]:
    """Returns which settings of a method were held at one value; None: what the whole study has but one of."""
    if method is None:
        return [_of_the_study(config)]
    space = config.methods[method]
    fixed: dict[str, Any] = {}
    for name in (n for n in type(space).model_fields if n not in ("method", "space")):
        value = getattr(space, name)
        if isinstance(value, Choices) and len(value.choices) == 1:
            value = value.choices[0]
        if value is not None and not isinstance(value, (Range, Choices)):
            fixed[name] = ", ".join(value) if isinstance(value, tuple) else value
    if not fixed:
        return []
    settings = joined(setting(name, value) for name, value in fixed.items())
    return [Finding("untested", method, say("fixed", method=title(method), settings=settings), (), {"fixed": fixed})]


def _of_the_study(config: StudyConfig) -> Finding:
    fixed: dict[str, Any] = {name: getattr(config.training, name) for name in _TRAINING}
    fixed |= {"max_length": config.data.max_length}
    sources = [source.path for source in config.data.train]
    kinds = {space.kind for space in config.methods.values()}
    others = [name for name in METHODS if name not in kinds and name != "none"]
    text = say(
        "fixed_for_all",
        settings=joined([*(setting(n, v) for n, v in fixed.items() if v is not None), _length(config)]),
        model=config.model.name,
        data=listed([same(source) for source in sources[:3]]),
        methods=say("other_methods", methods=listed([title(name) for name in others])) if others else say("nothing"),
    )
    values = {"fixed": fixed, "model": config.model.name, "data": sources, "other_methods": others}
    return Finding("untested", None, text, (), values)


def _length(config: StudyConfig) -> Text:
    """Returns how long a trial trained."""
    if config.training.steps is not None:
        return say("steps", n=config.training.steps)
    if config.budget.tokens is not None:
        return say("budget_tokens", n=config.budget.tokens)
    return say("epochs", n=config.training.epochs)


def few_examples(rows: int) -> Text | None:
    """Returns what to know about intervals over so few held-out examples; None where they are enough.

    The figures are those of tests/test_coverage.py: losses of a gamma distribution of shape 1 to 4.
    """
    return say("few_examples", n=rows) if rows < FEW_EXAMPLES else None


def about_sources(rows: int, sources: int | None) -> Text | None:
    """Returns what to know where held-out rows share sources: whether rows or whole sources are resampled.

    None where sources are not known, or there is one, or one a row.
    """
    if sources is None or sources in (1, rows):
        return None
    if sources >= LEAST_SOURCES:
        return say("sources_resampled", sources=sources, rows=rows)
    return say("few_sources", sources=sources, rows=rows, least=LEAST_SOURCES)


def limits(config: StudyConfig, state: StudyState, examples: HeldOut, results: Results) -> list[Finding]:
    """Returns what the study cannot say, and what happened to its plan."""
    said: list[tuple[str, Text, dict[str, Any]]] = []
    parts = (examples.counts_N, examples.test_counts_N)[: 1 if results.base_test is None else 2]
    rows = min(len(part) for part in parts)
    if (note := few_examples(rows)) is not None:
        said.append(("few_examples", note, {"examples": rows}))
    for number, sources in dict.fromkeys((len(part), part.sources) for part in parts):
        if (note := about_sources(number, sources)) is not None:
            said.append(("sources", note, {"examples": number, "sources": sources}))
    if not results.finalists and any(trial.kind == "search" for trial in state.trials.values()):
        said.append(("one_seed", say("one_seed"), {}))
    length = {"steps": config.training.steps, "tokens": config.budget.tokens}
    said.append(("scope", say("scope", length=_length(config)), length))
    if results.deadline:
        said.append(("deadline", say("deadline"), {}))
    if results.stopped:
        said.append(("stopped", say("stopped", reason=results.stopped), {"reason": results.stopped}))
    if results.continued:
        said.append(("continued", say("continued"), {"times": results.continued}))
    trials = names(state.trials.values())
    return [Finding("limits", None, text, trials, {"limit": limit, **values}) for limit, text, values in said]
