"""What the doctor says of the cases with planted faults and of the healthy ones: hits, misses, false alarms.

    python benchmarks/doctor/score.py [--half a|b] [--json FILE] [--quiet]

The cases lie in tests/doctor/cases_a.* and cases_b.*: half b is by somebody who did not know the rules. A case is right
where the first problem told is the fault that was planted (the root, where there are two) or a name that tells the same
cause; a healthy run is silent where no error and no warning is told.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft_study.evaluation.accuracies import accuracy

FOLDER = Path(__file__).resolve().parents[2] / "tests" / "doctor"
HALVES = ("a", "b")


@dataclass(frozen=True)
class Answer:
    """What was said of one case.

    Attributes:
        case, half: which.
        faults: planted; empty: healthy.
        said: names of errors and warnings, the first told first; effects: told with them.
        right: the first is the fault, or a healthy run is silent.
        named: how many of the planted faults are told, as a cause or as an effect.
        failed: the diagnosis itself failed, with this.
    """

    case: str
    half: str
    faults: tuple[str, ...]
    said: tuple[str, ...]
    effects: tuple[str, ...]
    right: bool
    named: int
    failed: str | None = None


def examined(kind: str, folder: Path) -> Any:
    """Returns the diagnosis of a case's folder, by the way that a user has: a log alone is named by its file."""
    import peft_study

    logs = sorted(path for path in folder.iterdir() if path.suffix == f".{kind}")
    return peft_study.diagnose(logs[0] if logs else folder)


def answer(case: dict[str, Any], half: str, folder: Path) -> Answer:
    """Returns what is said of one case."""
    faults, failed = tuple(case["faults"]), None
    said: tuple[str, ...] = ()
    effects: tuple[str, ...] = ()
    try:
        problems = [
            problem for problem in examined(case["kind"], folder / case["id"]).problems if problem.level != "note"
        ]
        said = tuple(problem.check for problem in problems)
        effects = tuple(effect for problem in problems for effect in problem.effects)
    except Exception as error:  # noqa: BLE001 - a case that cannot be read is a miss, and the others go on
        failed = f"{type(error).__name__}: {error}"
    wanted = {*faults[:1], *case["accept"]}
    right = failed is None and (bool(said) and said[0] in wanted if faults else not said)
    named = sum(fault in said or fault in effects for fault in faults)
    return Answer(case["id"], half, faults, said, effects, right, named, failed)


def answers(half: str) -> list[Answer]:
    """Returns what is said of each case of a half; none where it has no cases."""
    path = FOLDER / f"cases_{half}.json"
    if not path.is_file() or not path.with_suffix(".zip").is_file():
        return []
    with tempfile.TemporaryDirectory() as scratch:
        with zipfile.ZipFile(path.with_suffix(".zip")) as archive:
            archive.extractall(scratch)
        there = [case for case in json.loads(path.read_text()) if (Path(scratch) / case["id"]).is_dir()]
        return [answer(case, half, Path(scratch)) for case in there]


def totals(given: Iterable[Answer]) -> dict[str, Any]:
    """Returns the figures of some cases: right and silent, with exact 95 % intervals, and what went wrong."""
    given = list(given)
    faulty, healthy = [one for one in given if one.faults], [one for one in given if not one.faults]
    return {
        "right_cause_first": _share(faulty),
        "silent_healthy": _share(healthy),
        "both_named": [sum(one.named == 2 for one in faulty), sum(len(one.faults) == 2 for one in faulty)],
        "misses": dict(Counter(one.faults[0] for one in faulty if not one.right)),
        "false_alarms": dict(Counter(check for one in healthy for check in one.said)),
        "failed": [one.case for one in given if one.failed],
    }


def _share(given: list[Answer]) -> dict[str, Any]:
    right = sum(one.right for one in given)
    if not given:
        return {"right": 0, "of": 0}
    share = accuracy(right, len(given))
    return {"right": right, "of": len(given), "low": round(share.low, 3), "high": round(share.high, 3)}


def lines(name: str, found: dict[str, Any]) -> list[str]:
    """Returns the figures of a half as text."""
    rows = [name]
    for key, words in (("right_cause_first", "right cause first"), ("silent_healthy", "healthy and silent")):
        if (share := found[key])["of"]:
            rows.append(f"  {words}: {share['right']} of {share['of']} [{share['low']:.1%}, {share['high']:.1%}]")
    both, pairs = found["both_named"]
    rows.append(f"  both named where there are two: {both} of {pairs}")
    for key, words in (("misses", "missed"), ("false_alarms", "false alarms")):
        told = ", ".join(f"{check} {count}" for check, count in sorted(found[key].items()))
        rows.append(f"  {words}: {told or 'none'}")
    if found["failed"]:
        rows.append(f"  could not be read: {', '.join(found['failed'])}")
    return rows


def main(given: list[str] | None = None) -> None:
    """Prints the table of cases and the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half", choices=HALVES, help="one half alone")
    parser.add_argument("--json", type=Path, help="write everything there, too")
    parser.add_argument("--quiet", action="store_true", help="print what went wrong, and the figures")
    options = parser.parse_args(given)
    halves = {half: answers(half) for half in HALVES if options.half in (None, half)}
    halves = {half: found for half, found in halves.items() if found}
    for one in (one for found in halves.values() for one in found):
        if not (options.quiet and one.right):
            planted, said = "+".join(one.faults) or "healthy", ", ".join(one.said) or one.failed or "silent"
            print(f"{'right' if one.right else 'WRONG'}  {one.case}  {planted:36}  {said}")
    figures = {half: totals(found) for half, found in halves.items()}
    if len(halves) > 1:
        figures["together"] = totals(one for found in halves.values() for one in found)
    for name, found in figures.items():
        print("\n".join(lines(name if name == "together" else f"half {name}", found)))
    if options.json:
        everything = {"figures": figures, "cases": [asdict(one) for found in halves.values() for one in found]}
        options.json.write_text(json.dumps(everything, indent=2))


if __name__ == "__main__":
    main()
