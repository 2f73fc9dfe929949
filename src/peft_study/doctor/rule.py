"""Rules: the checks by name, and how they are applied to what is known of a run."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, Literal

from peft_study.doctor.diagnosis import LEVELS, SURENESS, Diagnosis, Problem, Said
from peft_study.doctor.observations import Observations

Kind = Literal["weights", "data", "settings", "run"]
"""What a rule is about. Of equally bad problems that of the first kind is told first: a cause before its effect."""
KINDS: dict[Kind, str] = {
    "weights": "What trains, and what was saved",
    "data": "Examples and labels",
    "settings": "Settings",
    "run": "The run",
}


Find = Callable[[Observations], Problem | Said | None]


@dataclass(frozen=True, slots=True)
class Rule:
    """One check.

    Attributes:
        name: of the check.
        kind: what it is about.
        looks_at, threshold, source, false_alarms: a line each, for docs/doctor.md; source: where the threshold is from.
        needs: dotted names of the observations without which it cannot be checked.
        explains: names of checks whose problems are effects of this one; they are told with it, not beside it.
        find: the check itself: a problem; None: there is none; or why it cannot be told.
    """

    name: str
    kind: Kind
    looks_at: str
    threshold: str
    source: str
    false_alarms: str
    needs: tuple[str, ...]
    explains: tuple[str, ...]
    find: Find


RULES: dict[str, Rule] = {}
"""All rules by name, in the order of their files and lines."""


def rule(
    kind: Kind,
    *,
    looks_at: str,
    threshold: str,
    source: str,
    false_alarms: str,
    needs: Iterable[str],
    explains: Iterable[str] = (),
) -> Callable[[Find], Find]:
    """Makes a function a rule, under its own name; arguments as the attributes of `Rule`."""

    def register(find: Find) -> Find:
        name = find.__name__
        assert name not in RULES, name
        RULES[name] = Rule(name, kind, looks_at, threshold, source, false_alarms, tuple(needs), tuple(explains), find)
        return find

    return register


def examine(
    seen: Observations,
    *,
    about: str = "",
    checks: Iterable[str] | None = None,
    kinds: Iterable[Kind] = KINDS,
) -> Diagnosis:
    """Applies the rules.

    Args:
        seen: all that is known of the run.
        about: what was looked at, for the text.
        checks: names of rules; None: all of these `kinds`.
    """
    import peft_study.doctor.rules  # noqa: F401 - its modules register their rules

    wanted = set(kinds)
    chosen = (
        [one for one in RULES.values() if one.kind in wanted] if checks is None else [RULES[name] for name in checks]
    )
    found: list[Problem] = []
    unchecked: dict[str, Said] = {}
    checked: list[str] = []
    for one in chosen:
        missing = next((need for need in one.needs if _value(seen, need) is None), None)
        if missing is not None:
            if seen.settings.method not in _HAVE_NONE.get(missing, ()):
                unchecked[one.name] = _reason(seen, missing)
            continue
        problem = one.find(seen)
        if isinstance(problem, Said):
            unchecked[one.name] = problem
            continue
        checked.append(one.name)
        if problem is not None:
            found.append(dataclasses.replace(problem, check=one.name))
    notes = seen.curve.notes if seen.curve else ()
    return Diagnosis(about, _ordered(found), unchecked, tuple(checked), notes)


def table_of_checks() -> str:
    """Returns all checks as tables in Markdown, one a kind."""
    import peft_study.doctor.rules  # noqa: F401

    lines = []
    for kind, title in KINDS.items():
        lines += [f"### {title}", "", "| check | looks at | threshold | its source | known false alarms |"]
        lines += ["|---|---|---|---|---|"]
        for one in RULES.values():
            if one.kind == kind:
                cells = (f"`{one.name}`", one.looks_at, one.threshold, one.source, one.false_alarms)
                lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
        lines.append("")
    return "\n".join(lines)


def together(diagnoses: Mapping[str, Diagnosis], *, about: str) -> Diagnosis:
    """Returns one diagnosis of several runs: a problem that several have is told once, with their names.

    Args:
        diagnoses: by the run's name.
        about: what they are together.
    """
    found: dict[str, list[Problem]] = defaultdict(list)
    for place, diagnosis in diagnoses.items():
        for problem in diagnosis.problems:
            found[problem.check].append(dataclasses.replace(problem, places=(place,)))
    one_each = []
    for problems in found.values():
        worst = min(problems, key=lambda problem: (LEVELS.index(problem.level), SURENESS.index(problem.sure)))
        one_each.append(dataclasses.replace(worst, places=tuple(p for problem in problems for p in problem.places)))
    every = list(diagnoses.values())
    checked = dict.fromkeys(name for diagnosis in every for name in diagnosis.checked)
    unchecked = {name: why for one in every for name, why in one.unchecked.items() if name not in checked}
    notes = tuple(dict.fromkeys(note for one in every for note in one.notes))
    return Diagnosis(about, _ordered(one_each), unchecked, tuple(checked), notes)


def _ordered(found: list[Problem]) -> tuple[Problem, ...]:
    """Returns problems, the worst first, without those that another one explains."""
    names = {problem.check for problem in found}
    explained = {
        effect: problem.check
        for problem in found
        if problem.level != "note"
        for effect in RULES[problem.check].explains
        if effect in names and effect != problem.check
    }
    kept = [
        dataclasses.replace(
            problem, effects=tuple(effect for effect in RULES[problem.check].explains if effect in explained)
        )
        for problem in found
        if problem.check not in explained
    ]
    order = list(RULES)

    def place(problem: Problem) -> tuple[int, int, int, int]:
        kind = list(KINDS).index(RULES[problem.check].kind)
        return LEVELS.index(problem.level), kind, SURENESS.index(problem.sure), order.index(problem.check)

    return tuple(sorted(kept, key=place))


def _value(seen: Observations, name: str) -> Any:
    """Returns an observation by its dotted name; None where it, or what holds it, is not known."""
    value: Any = seen
    for part in name.split("."):
        if value is None:
            return None
        value = attrgetter(part)(value)
    return value


_PARTS = {
    "parameters": Said("the model itself was not at hand", "没有模型本身可以检查"),
    "data": Said("the data was not at hand", "没有数据可以检查"),
    "curve": Said("there is no log of the run", "没有训练日志"),
    "adapter": Said("there are no adapter weights to look at", "没有适配器权重可以检查"),
    "settings": Said("the settings of the run are not known", "不知道训练设置"),
}


_HAVE_NONE = {
    "settings.tokens": ("lora", "full"),
    "settings.rank": ("prompt_tuning", "prefix_tuning", "p_tuning", "full"),
}
"""Methods that do not have a setting, so that its checks are not about them."""


def _reason(seen: Observations, need: str) -> Said:
    """Returns why something is not known."""
    part, _, name = need.partition(".")
    for known in (need, part):
        if known in seen.reasons:
            return Said(*seen.reasons[known])
    if not name or (part != "settings" and getattr(seen, part) is None):
        return _PARTS[part]
    what = name.replace("_", " ")
    return Said(f"not known: {what}", f"未知：{what}")
