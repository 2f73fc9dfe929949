"""Half B of the doctor's cases: 30 runs with planted faults and 60 healthy ones, all trained for real.

    python benchmarks/doctor/cases_b.py --data DATA --out OUT                  # all but smollm2
    python benchmarks/doctor/cases_b.py --only smollm2 --device cuda --model FOLDER --data DATA --out OUT
    python benchmarks/doctor/cases_b.py --out OUT --pack                       # tests/doctor/cases_b.zip and .json

DATA is a folder with the data sets' folders. A case's folder has the case's id. OUT/measured.json holds the held-out
losses by which a label was judged. `--only` takes ids, kinds, models or `faulty`, more than one apart by commas.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import shutil
import time
import traceback
import zipfile
from pathlib import Path
from typing import Any

from cases_b_table import cases, label

TESTS = Path(__file__).parents[2] / "tests" / "doctor"
_MOST_BYTES = 1_200_000
_DATE = (2026, 11, 27, 12, 0, 0)


def chosen(only: str | None) -> list[dict[str, Any]]:
    """Returns the cases that the command names; without names all that need no large model."""
    if not only:
        return [case for case in cases() if case["model"] != "smollm2"]
    words = set(only.split(","))
    return [c for c in cases() if words & ({c["id"], c["kind"], c["model"]} | ({"faulty"} if c["faults"] else set()))]


def train(case: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Trains one case into its folder and returns what was measured."""
    folder = options.out / case["id"]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    places = {"model": options.model, "data": options.data, "work": options.work, "device": options.device}
    if case["kind"] in ("jsonl", "csv"):
        from cases_b_loop import plain

        return plain(case, folder, **places)
    from cases_b_trainers import with_library

    if case["kind"] == "trl":
        importlib.import_module("trl")
    # a process of its own, as a user's run has: the callback looks for configurations that belong to no model
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(with_library, (case, folder), places)


def pack(out: Path) -> None:
    """Writes the archive and the labels; names cases without files; refuses a file that tells of this machine."""
    known = cases()
    private = [word.encode() for word in (str(out.anchor) + "tmp/", f"{Path.home()}/", f"{TESTS.parents[2]}/")]
    with zipfile.ZipFile(TESTS / "cases_b.zip", "w") as archive:
        for case in known:
            files = sorted(path for path in (out / case["id"]).rglob("*") if path.is_file())
            if not files:
                print(f"{case['id']}: no files in {out}")
            for path in files:
                content = path.read_bytes()
                found = [word for word in private if word in content]
                if found:
                    raise SystemExit(f"{path}: holds {found}")
                entry = zipfile.ZipInfo(str(path.relative_to(out)), _DATE)
                archive.writestr(entry, content, zipfile.ZIP_DEFLATED, compresslevel=9)
    if (size := (TESTS / "cases_b.zip").stat().st_size) > _MOST_BYTES:
        raise SystemExit(f"cases_b.zip has {size} bytes")
    write_labels(known)


def write_labels(known: list[dict[str, Any]]) -> None:
    """Writes the labels, one a line."""
    lines = ",\n".join(json.dumps(label(case)) for case in known)
    (TESTS / "cases_b.json").write_text(f"[\n{lines}\n]\n")


def main() -> None:
    """Reads the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", type=Path, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="where the tiny bases are kept (OUT/bases)")
    parser.add_argument("--pack", action="store_true")
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.work = (options.work or options.out / "bases").resolve()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.pack:
        return pack(options.out)
    for case in chosen(options.only):
        start = time.perf_counter()
        try:
            found = train(case, options)
        except Exception:  # noqa: BLE001 - the other cases go on
            traceback.print_exc()
            found = {"failed": True}
        path = options.out / "measured.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        known[case["id"]] = found
        path.write_text(json.dumps(known, indent=0))
        print(case["id"], case["faults"], f"{time.perf_counter() - start:.0f} s", json.dumps(found), flush=True)
    return None


if __name__ == "__main__":
    main()
