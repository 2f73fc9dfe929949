"""Makes the doctor's cases of half A: real training runs, a third of them broken in a known way.

    python benchmarks/doctor/cases_a.py --out DIR                     # tiny models: 15 minutes on two cores
    python benchmarks/doctor/cases_a.py --out DIR --only smollm2 --model FOLDER --data FOLDER
    python benchmarks/doctor/cases_a.py --out DIR --only a-017,a-031  # these alone
    python benchmarks/doctor/cases_a.py --out DIR --pack              # packs DIR as tests/doctor/cases_a.zip

tests/doctor/cases_a.json names each case, its fault and how it is made; it was written before the rules were looked at.
No label was changed afterwards. How five cases are made was: the fault of a-014, a-021, a-022 was not in the run (our
program takes held-out rows out of the training), and the healthy a-077 and a-078 ended above the untouched base.
Each case becomes a folder as its user has it after the run. The three cases of SmolLM2 need its folder and, in the
data's folder, llm-adapters/mawps_train.jsonl.gz.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import json
import shutil
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from cases_a_training import train_case, train_ours
from cases_a_world import Row, pretrained, word_rows

ROOT = Path(__file__).resolve().parents[2]
CASES = ROOT / "tests" / "doctor" / "cases_a.json"
MAWPS = "llm-adapters/mawps_train.jsonl.gz"
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"
HELD_OUT = 96
LONGEST = 160
"""Tokens of a row of SmolLM2's; longer chats are left out."""


def read_cases(path: Path = CASES) -> list[dict[str, Any]]:
    """Returns the cases of a file."""
    return list(json.loads(path.read_text()))


def tiny_sources(case: dict[str, Any]) -> dict[str, list[Row]]:
    """Returns the rows of a case of the tiny world."""
    settings, seed, task = case["settings"], case["seed"], case["data"]
    words = tuple(settings.get("words", (3, 7)))
    held_out = settings.get("held", HELD_OUT)
    first = "new" if task == "two" else task
    sources = {
        "rows": word_rows(first, settings["rows"], seed, words=words),
        "held_out": word_rows(first, held_out, seed + 500, words=words),
    }
    if shared := settings.get("held_from_rows"):
        sources["held_out"] = sources["rows"][:shared]
    if task == "two":
        sources["second"] = word_rows("style", held_out, seed)
    if settings.get("warm"):
        sources["warm"] = word_rows(task, 4000, seed + 900, words=words)
    return sources


def real_sources(case: dict[str, Any], folder: Path) -> dict[str, list[Row]]:
    """Returns chats of a file of the data's folder, short ones, in an order of the case's seed."""
    with gzip.open(folder / MAWPS, "rt") as file:
        chats = [json.loads(line) for line in file]
    rows = []
    for chat in chats:
        turns = [turn for turn in chat["messages"] if turn["role"] != "system"][:2]
        if [turn["role"] for turn in turns] == ["user", "assistant"] and sum(len(t["content"]) for t in turns) < 400:
            rows.append({turn["role"]: turn["content"] for turn in turns} | {"source": chat["source"]})
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(case["seed"])).tolist()
    wanted = case["settings"]["rows"]
    drawn = [rows[place] for place in order[: wanted + HELD_OUT]]
    return {"rows": drawn[:-HELD_OUT], "held_out": drawn[-HELD_OUT:]}


def make(case: dict[str, Any], options: argparse.Namespace) -> None:
    """Trains one case and leaves its folder in the folder of all."""
    # the doctor's callback looks for configurations that belong to no model: none of an earlier case may be left
    gc.collect()
    out = options.out / case["id"]
    shutil.rmtree(out, ignore_errors=True)
    if case["model"].startswith("tiny-"):
        base = pretrained(case["model"].removeprefix("tiny-"), options.out / "base")
        sources = tiny_sources(case)
    else:
        base, sources = options.model, real_sources(case, options.data)
        case = {**case, "hub": HUB, "settings": {**case["settings"], "longest": LONGEST}}
    if case["kind"] == "ours":
        train_ours(case, base, sources, out)
    else:
        train_case(case, base, sources, out, options.device)


def pack(folder: Path, cases: list[dict[str, Any]], path: Path) -> None:
    """Packs the cases' folders; the same folders make the same bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for case in cases:
            for file in sorted((folder / case["id"]).rglob("*")):
                if file.is_file():
                    entry = zipfile.ZipInfo(str(file.relative_to(folder)), (2026, 1, 1, 0, 0, 0))
                    entry.compress_type = zipfile.ZIP_DEFLATED
                    archive.writestr(entry, file.read_bytes())


def chosen(cases: list[dict[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Returns the cases that are to be made now."""
    names = options.only.split(",") if options.only else []
    if names in (["smollm2"], ["tiny"]):
        return [case for case in cases if case["model"].startswith(names[0])]
    if names:
        return [case for case in cases if case["id"] in names]
    return [case for case in cases if case["model"].startswith("tiny-")]


def main(given: list[str] | None = None) -> None:
    """Makes what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="smollm2, tiny, or ids with commas; default: tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", type=Path, help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, help="folder that holds llm-adapters/")
    parser.add_argument("--out", type=Path, default=Path("doctor-cases"), help="folder of all cases' folders")
    parser.add_argument("--pack", action="store_true", help="make nothing; pack what lies in --out")
    options = parser.parse_args(given)
    options.out.mkdir(parents=True, exist_ok=True)
    cases = read_cases()
    if options.pack:
        pack(options.out, cases, CASES.with_suffix(".zip"))
        return
    torch.set_num_threads(4 if options.device == "cuda" else torch.get_num_threads())
    failed = []
    for case in chosen(cases, options):
        start = time.perf_counter()
        try:
            make(case, options)
        except Exception as error:  # noqa: BLE001 - the other cases are made all the same
            failed.append(case["id"])
            print(json.dumps({"case": case["id"], "failed": f"{type(error).__name__}: {error}"}), flush=True)
            continue
        print(json.dumps({"case": case["id"], "seconds": round(time.perf_counter() - start, 1)}), flush=True)
    if failed:
        raise SystemExit(f"{len(failed)} cases could not be made: {', '.join(failed)}")


if __name__ == "__main__":
    main()
