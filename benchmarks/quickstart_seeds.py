"""What the quickstart finds, on several data seeds: are winner, order of methods and edges the same?

    python benchmarks/quickstart_seeds.py
    python benchmarks/quickstart_seeds.py --set training.steps=24 --set data.held_out=48 --set data.test=48

A data seed draws other dev and test rows, and another order of the training rows in the search. Appends to
quickstart_seeds.jsonl, and prints the newest row of each study as a table; `--seeds` without a number runs nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import ROOT, Rows, arguments, read_rows

STUDY = ROOT / "examples" / "quickstart.yaml"
KEY = ("steps", "held_out", "test", "data_seed")


def found(folder: Path) -> dict[str, Any]:
    """Returns what a finished study says: steps and rows, and its finalists, best first by dev loss."""
    config = json.loads((folder / "config.resolved.json").read_text())
    results = json.loads((folder / "results.json").read_text())
    return {
        "steps": config["training"]["steps"],
        "held_out": config["data"]["held_out"],
        "test": config["data"]["test"],
        "data_seed": config["training"]["data_seed"],
        "finals": [
            {
                "method": finalist["method"],
                "rate": finalist["settings"]["learning_rate"],
                "edge": finalist["edges"].get("learning_rate"),
                "winner": finalist["winner"],
                "dev": round(finalist["dev"]["value"], 4),
                "test": round(finalist["test"]["value"], 4),
                "above_winner": _interval(finalist["test_minus_winner"]),
            }
            for finalist in results["finalists"]
        ],
        "base": round(results["base"]["test"]["value"], 4),
    }


def _interval(estimate: dict[str, float] | None) -> list[float] | None:
    return None if estimate is None else [round(estimate[name], 4) for name in ("value", "low", "high")]


def run(seed: int, assignments: list[str], device: str) -> dict[str, Any]:
    """Runs the study with this data seed in a folder of its own, and returns what it found."""
    with tempfile.TemporaryDirectory() as folder:
        words = [word for a in (*assignments, f"training.data_seed={seed}") for word in ("--set", a)]
        program = [sys.executable, "-m", "peft_study", "run", str(STUDY), "--device", device, "-o", f"{folder}/study"]
        subprocess.run([*program, *words], stdout=sys.stderr, check=True)
        return found(Path(folder) / "study")


def table(rows: list[dict[str, Any]]) -> str:
    """Returns a line a study, its methods best first by dev loss."""
    finals = "finals, best first: rate, test loss, how far above the first (95 %, paired)"
    heads = ("steps", "dev, test rows", "data seed", finals, "untouched base")
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        finals = "; ".join(
            f"{f['method'].replace('_', ' ')} {f['rate']:g}{' (edge)' if f['edge'] else ''}: {f['test']:.2f}"
            + (f", +{above[0]:.2f} ({above[1]:.2f} to {above[2]:.2f})" if (above := f["above_winner"]) else "")
            for f in row["finals"]
        )
        lines.append(
            f"| {row['steps']} | {row['held_out']:g}, {row['test']:g} | {row['data_seed']} | {finals} "
            f"| {row['base']:.2f} |"
        )
    return "\n".join(lines)


def main(words: list[str] | None = None) -> None:
    """Runs the studies, and prints the table."""
    parser = arguments(__doc__, "quickstart_seeds")
    parser.add_argument("--seeds", type=int, nargs="*", default=list(range(5)))
    parser.add_argument("--set", action="append", default=[], dest="assignments", metavar="KEY=VALUE")
    options = parser.parse_args(words)
    rows = Rows(options)
    for seed in options.seeds:
        rows.add(**run(seed, options.assignments, options.device))
    newest = {tuple(row[name] for name in KEY): row for row in read_rows(rows.path)}
    print(table([newest[key] for key in sorted(newest)]))


if __name__ == "__main__":
    main()
