"""What PyPI's `trainspotter` says of the doctor's cases, in the doctor's words.

    pip install --target SITE --no-deps trainspotter
    python benchmarks/doctor/rival.py CASES LABELS.json --site SITE [--out rival.json]

CASES is a folder with a folder a case, or a zip archive of one; LABELS a list of {"id", "faults", "accept"}. A case is
read where it has a log that trainspotter reads: trainer_state.json, JSON lines or CSV. It is silent where it finds
neither an error nor a warning. Its detectors name symptoms; `MEANS` says of which of our checks each could be the
symptom, so that any of them counts as right: this is in the rival's favour.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import binomtest

MEANS: dict[str, tuple[str, ...]] = {
    "Loss spike": ("too_hot", "warmup_too_short", "resume_jump", "epoch_jumps", "rate_too_high", "diverged"),
    "Diverged (non-finite values)": ("diverged", "fp16_overflow", "rate_too_high", "too_hot", "past_positions"),
    "Diverged (sustained growth)": (
        "diverged", "rising", "too_hot", "rate_too_high", "not_attached", "base_trains", "overfitting", "source_rising",
    ),
    "Plateau": (
        "never_learned", "too_cold", "rate_zero", "rate_too_low", "wrong_labels", "untouched", "adapter_frozen",
        "nothing_trains", "updates_below_precision",
    ),
    "Overfitting onset": ("overfitting", "memorising", "source_rising", "one_source"),
    "No LR warmup detected": ("warmup_too_short", "warmup_unusual"),
    "LR increased after its peak": ("warmup_unusual", "resume_jump"),
    "LR discontinuity": ("rate_zero", "resume_jump", "warmup_unusual"),
    "Gradient-norm explosion": ("too_hot", "diverged", "rate_too_high", "warmup_too_short", "fp16_overflow"),
    "Gradient clipping likely saturated": ("always_clipped",),
    "Eval metric too noisy to rank checkpoints": ("noisy",),
    "Suspiciously low loss early (heuristic)": (
        "memorising", "overlap", "duplicates", "labels_shifted", "nothing_masked", "nothing_supervised",
    ),
    "Throughput regression": ("time", "memory"),
}  # fmt: skip
"""Checks of which a finding could be the symptom, by its title."""


class Verdict(NamedTuple):
    """What the rival says of a case.

    Attributes:
        read: whether it could read it; error: why not.
        said: titles of its errors and warnings, the worst first; notes: of the rest.
    """

    read: bool
    error: str
    said: tuple[str, ...]
    notes: tuple[str, ...]

    def right(self, faults: list[str], *, first: bool) -> bool:
        """Returns whether a finding could mean one of the faults: the first alarm, or any finding."""
        titles = self.said[:1] if first else (*self.said, *self.notes)
        return any(fault in MEANS.get(title, ()) for title in titles for fault in faults)


def judge(folder: Path) -> Verdict:
    """Returns what trainspotter, which must be importable, says of a case."""
    from trainspotter import load_run, run_all

    names = ("trainer_state.json", "*.jsonl", "*.csv")
    log = next((path for name in names for path in sorted(folder.rglob(name))), None)
    if log is None:
        return Verdict(False, "no log", (), ())
    try:
        run = load_run(log)
        findings = run_all(run)
    except Exception as error:  # noqa: BLE001 - whatever it raises, it did not judge
        return Verdict(False, f"{type(error).__name__}: {error}", (), ())
    if not any("loss" in name for name in run.metric_names()):
        return Verdict(False, "no loss in what it read", (), ())
    alarms = tuple(finding.title for finding in findings if finding.severity != "info")
    return Verdict(True, "", alarms, tuple(finding.title for finding in findings if finding.severity == "info"))


def share(hits: int, of: int) -> str:
    """Returns a share with its 95 % interval (Wilson)."""
    if not of:
        return "-"
    interval = binomtest(hits, of).proportion_ci(method="wilson")
    return f"{hits} of {of} ({interval.low:.0%} to {interval.high:.0%})"


def table(rows: list[dict[str, Any]]) -> str:
    """Returns the counts over all cases."""
    faulty, healthy = [r for r in rows if r["faults"]], [r for r in rows if not r["faults"]]
    read = [r for r in faulty if r["read"]]
    lines = [
        f"faulty runs that it reads: {len(read)} of {len(faulty)}",
        f"  an error or a warning: {share(sum(bool(r['said']) for r in read), len(read))}",
        f"  the first one could mean a planted fault: {share(sum(r['right_first'] for r in read), len(read))}",
        f"  any finding could, notes too: {share(sum(r['right_any'] for r in read), len(read))}",
    ]
    read = [r for r in healthy if r["read"]]
    lines += [
        f"healthy runs that it reads: {len(read)} of {len(healthy)}",
        f"  silent: {share(sum(not r['said'] for r in read), len(read))}",
    ]
    return "\n".join(lines)


def main() -> None:
    """Judges all cases and prints a line each, and the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Path)
    parser.add_argument("labels", type=Path)
    parser.add_argument("--site", type=Path, help="folder that trainspotter was installed to")
    parser.add_argument("--out", type=Path, help="file for the verdicts")
    options = parser.parse_args()
    if options.site:
        sys.path.insert(0, str(options.site))
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.cases
        if folder.is_file():
            with zipfile.ZipFile(folder) as archive:
                archive.extractall(scratch)
            folder = Path(scratch)
        for case in json.loads(options.labels.read_text()):
            if not (folder / case["id"]).is_dir():
                continue
            verdict, meant = judge(folder / case["id"]), [*case["faults"], *case.get("accept", [])]
            rows.append(
                {"id": case["id"], "faults": case["faults"], **verdict._asdict(),
                 "right_first": verdict.right(meant, first=True), "right_any": verdict.right(meant, first=False)}
            )  # fmt: skip
            said = verdict.error or "; ".join(verdict.said) or "silent"
            print(f"{case['id']:8} {', '.join(case['faults']) or 'healthy':32} {said}")
    print(table(rows))
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
