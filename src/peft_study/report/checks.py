"""The checks of a run or study for its page: what was found before it began, and what its curves tell."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from peft_study.doctor.diagnosis import LEVEL_WORDS, LEVELS, Diagnosis, from_json
from peft_study.doctor.observations import FILE
from peft_study.doctor.rule import examine
from peft_study.errors import UserError
from peft_study.report.observed import diagnose_study, observe_run
from peft_study.report.page_words import Words
from peft_study.storage.run_dir import RunFolder


@dataclass(frozen=True, slots=True)
class CheckLine:
    """A problem on the page; `level` is its name, and `word` that name in the page's language."""

    level: str
    word: str
    cause: str
    evidence: str
    consequence: str
    change: str
    paste: str | None
    places: str


@dataclass(frozen=True, slots=True)
class Checks:
    """The section: its problems, and the sentence above them."""

    verdict: str
    lines: tuple[CheckLine, ...]


def checks(folder: Path, t: Words, *, study: bool) -> Checks | None:
    """Returns the section of a run or study; None where its files cannot be read.

    Args:
        folder: of it.
        t: the words of the page.
        study: whether it is a study.
    """
    try:
        found = diagnose_folder(folder, study=study)
    except UserError:
        return None
    lines = tuple(
        CheckLine(
            problem.level,
            LEVEL_WORDS[problem.level].to(t.lang),
            problem.cause.to(t.lang),
            problem.evidence.to(t.lang),
            problem.consequence.to(t.lang),
            problem.change.to(t.lang),
            problem.paste,
            ", ".join(problem.places[:8]) + (f" (+{len(problem.places) - 8})" if len(problem.places) > 8 else ""),
        )
        for problem in found.problems
    )
    wrong = sum(problem.level != "note" for problem in found.problems)
    key = "checks_healthy" if not wrong else "checks_wrong_one" if wrong == 1 else "checks_wrong"
    return Checks(t(key, wrong=wrong, n=len(found.checked)), lines)


def diagnose_folder(folder: Path, *, study: bool, weights: bool = False) -> Diagnosis:
    """Returns what is wrong with a run or study of ours: what was kept at its start, and what its curves tell.

    Args:
        folder: of it.
        study: whether it is a study.
        weights: the adapter of a run is read too, which loads torch.

    Raises:
        UserError: its files cannot be read.
    """
    after = diagnose_study(folder) if study else examine(observe_run(folder, weights=weights), about=str(folder))
    kept = RunFolder(folder).read_if_there(FILE)
    if kept is None:
        return after
    before = from_json(kept)
    told = {problem.check for problem in after.problems}
    told |= {effect for problem in after.problems for effect in problem.effects}
    # a check that was made again with more at hand is believed, except of a study's ranges, which no trial shows
    again = set() if study else set(after.checked)
    old = [problem for problem in before.problems if problem.check not in told | again]
    problems = sorted((*after.problems, *old), key=lambda problem: LEVELS.index(problem.level))
    checked = tuple(dict.fromkeys((*before.checked, *after.checked)))
    unchecked = {name: why for name, why in after.unchecked.items() if name not in checked}
    return replace(after, problems=tuple(problems), checked=checked, unchecked=unchecked)
