"""What the doctor says of a run: problems, the worst first, in English and Chinese."""

from __future__ import annotations

import re
import textwrap
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from peft_study.doctor.observations import to_json
from peft_study.errors import UserError

Level = Literal["error", "warning", "note"]
Sureness = Literal["certain", "likely", "possible"]

LEVELS: tuple[Level, ...] = ("error", "warning", "note")
SURENESS: tuple[Sureness, ...] = ("certain", "likely", "possible")


class Said(NamedTuple):
    """The same in English and Chinese."""

    en: str
    zh: str

    def to(self, language: str) -> str:
        """Returns the text in a language: zh, or en for any other."""
        return self.zh if language == "zh" else self.en


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Something that a rule found.

    Attributes:
        level: error: the run cannot do what it is for; warning: it is worse or less sure than it could be; note: good
            to know, nothing is wrong.
        sure: how sure the cause is.
        cause: one sentence.
        evidence: numbers, places, steps.
        consequence: what comes of it.
        change: what to do, and
        paste: the line for it, where there is one.
        values: the numbers of the evidence.
        step: where it begins.
        check: name of the rule (set by `examine`), and
        effects: names of further checks that this one explains.
        places: trials of a study where it was found.
    """

    level: Level
    sure: Sureness
    cause: Said
    evidence: Said
    consequence: Said
    change: Said
    paste: str | None = None
    values: dict[str, Any] = field(default_factory=dict)
    step: int | None = None
    check: str = ""
    effects: tuple[str, ...] = ()
    places: tuple[str, ...] = ()


LEVEL_WORDS: dict[Level, Said] = {
    "error": Said("ERROR", "错误"),
    "warning": Said("WARNING", "警告"),
    "note": Said("note", "提示"),
}
SURENESS_WORDS: dict[Sureness, Said] = {
    "certain": Said("certain", "确定"),
    "likely": Said("likely", "很可能"),
    "possible": Said("possible", "有可能"),
}
_HEALTHY = Said("nothing wrong was found", "没有发现问题")
_UNCHECKED = Said("not checked: {names} ({why})", "未检查：{names}（{why}）")
_CHECKED = Said("{n} checks were made", "共做了 {n} 项检查")
_LINES = {
    "evidence": Said("seen", "证据"),
    "consequence": Said("effect", "后果"),
    "change": Said("change", "改法"),
    "effects": Said("explains", "可解释"),
    "places": Said("where", "位置"),
}


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What is wrong with a run.

    Attributes:
        about: what was looked at.
        problems: the worst first.
        unchecked: name of each check that could not be made, with the reason.
        checked: names of the checks that were made.
        notes: what the reader had to put right, a line each.
    """

    about: str
    problems: tuple[Problem, ...]
    unchecked: dict[str, Said]
    checked: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def wrong(self) -> bool:
        """True where there is an error or a warning."""
        return any(problem.level != "note" for problem in self.problems)

    def __str__(self) -> str:
        return self.text()

    def text(self, language: str = "en", *, width: int = 80) -> str:
        """Returns everything: problems, the worst first, and what was not checked.

        Args:
            language: en or zh.
            width: columns there are.
        """
        lines = [self.about] if self.about else []
        lines += [f"  {note}" for note in self.notes]
        for problem in self.problems:
            lines += ["", *_problem(problem, language, width)]
        if not self.wrong:
            lines += ["", _HEALTHY.to(language)]
        lines += ["", _CHECKED.to(language).format(n=len(self.checked))]
        by_reason: dict[str, list[str]] = defaultdict(list)
        for name, why in self.unchecked.items():
            by_reason[why.to(language)].append(name)
        for reason, names in by_reason.items():
            lines += _wrapped(_UNCHECKED.to(language).format(names=", ".join(names), why=reason), width, "  ")
        return "\n".join(lines).strip()

    def short(self, language: str = "en") -> list[str]:
        """Returns a line for each error and warning; they begin with ``WARNING:``, so that they show in quiet too."""
        lines = []
        for problem in self.problems:
            if problem.level != "note":
                said = [part.to(language) for part in (problem.cause, problem.evidence, problem.change)]
                paste = f" ({problem.paste})" if problem.paste and "\n" not in problem.paste else ""
                lines.append(f"WARNING: {said[0]}: {said[1]}; {said[2]}{paste}")
        return lines

    def refuse(self, kind: type[UserError], *, where: str | None = None, remedy: str | None = None) -> None:
        """Raises the first error, where there is one.

        Args:
            kind: of the exception.
            where: as of `UserError`.
            remedy: where the caller knows a better one than the rule.
        """
        for problem in self.problems:
            if problem.level == "error":
                raise kind(
                    f"{problem.cause.en}: {problem.evidence.en}", where=where, remedy=remedy or problem.change.en
                )

    def json(self) -> dict[str, Any]:
        """Returns plain JSON values; texts in both languages."""
        return {
            "about": self.about,
            "wrong": self.wrong,
            "problems": [_problem_json(problem) for problem in self.problems],
            "checked": list(self.checked),
            "unchecked": {name: why._asdict() for name, why in self.unchecked.items()},
            "notes": list(self.notes),
        }


def from_json(values: dict[str, Any]) -> Diagnosis:
    """Returns what `Diagnosis.json` gave."""
    problems = []
    for value in values["problems"]:
        again: dict[str, Any] = {name: value[name] for name in ("level", "sure", "paste", "values", "step", "check")}
        again |= {name: Said(**value[name]) for name in _TEXTS}
        again |= {name: tuple(value[name]) for name in ("effects", "places")}
        problems.append(Problem(**again))
    unchecked = {name: Said(**why) for name, why in values["unchecked"].items()}
    return Diagnosis(values["about"], tuple(problems), unchecked, tuple(values["checked"]), tuple(values["notes"]))


_TEXTS = ("cause", "evidence", "consequence", "change")


def _problem(problem: Problem, language: str, width: int) -> list[str]:
    level, sure = LEVEL_WORDS[problem.level].to(language), SURENESS_WORDS[problem.sure].to(language)
    lines = _wrapped(f"{level}: {problem.cause.to(language)} [{problem.check}, {sure}]", width, "  ")
    for name in ("evidence", "consequence", "change"):
        text = getattr(problem, name).to(language)
        if text:
            lines += _wrapped(f"  {_LINES[name].to(language)}: {text}", width, "    ")
    if problem.paste:
        lines += [f"    {line}" for line in problem.paste.splitlines()]
    for name, names in (("effects", problem.effects), ("places", problem.places)):
        if names:
            shown = ", ".join(names[:8]) + (f" (+{len(names) - 8})" if len(names) > 8 else "")
            lines += _wrapped(f"  {_LINES[name].to(language)}: {shown}", width, "    ")
    return lines


def _wrapped(text: str, width: int, indent: str) -> list[str]:
    first = text[: len(text) - len(text.lstrip())]
    # Chinese has no spaces and its letters are two columns wide
    if any("\u4e00" <= letter <= "\u9fff" for letter in text):
        rows = _chinese_rows(text.strip(), max(width - len(indent), 20))
        return [(first if place == 0 else indent) + row for place, row in enumerate(rows)]
    return textwrap.wrap(text.strip(), width, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False)


def _chinese_rows(text: str, width: int) -> list[str]:
    """Returns lines of so many columns; a name in Latin letters is not cut in two."""
    from rich.cells import cell_len

    rows = [""]
    for piece in re.findall(r"[\x21-\x7e]+|.", text):
        if cell_len(rows[-1] + piece) > width and rows[-1]:
            rows.append("")
        rows[-1] += piece if rows[-1] or piece != " " else ""
    return [row.rstrip() for row in rows]


def _problem_json(problem: Problem) -> dict[str, Any]:
    texts = {name: getattr(problem, name)._asdict() for name in _TEXTS}
    return {
        "check": problem.check,
        "level": problem.level,
        "sure": problem.sure,
        **texts,
        "paste": problem.paste,
        "step": problem.step,
        "values": to_json(problem.values),
        "effects": list(problem.effects),
        "places": list(problem.places),
    }
