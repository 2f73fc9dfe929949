"""What the rows of the studies say: studies/summary.json, and the tables and pictures of docs/findings.md.

    make findings          # reads studies/*/*.parquet; nothing is trained

Every number of the page stands in summary.json; the tables of the page, in both languages, are written from it. What
has no rows yet is left out.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pictures
import tables
import yaml
from experiment import HERE, POINTS, SAMPLED, SAMPLES, SETS, STEPS
from surfaces import REFERENCE, Surface, rows

RECORDED = HERE.parents[1] / "shared" / "references" / "recorded"
SUMMARY = HERE / "summary.json"
LEARNED = -0.05
"""Nats against the base, and against its own start, from which a run has learned: a prompt may start below the base."""
FEWEST = 20
"""Trials that a surface takes."""
DIVERGED = 2.0
"""Test losses of the recorded sweep above which a run is left out (its README)."""


def designed(table: pd.DataFrame, surfaces: dict[tuple[str, str], Surface]) -> dict[str, Any]:
    """Returns the key figures of the designed experiment, by data set and method."""
    found: dict[str, Any] = {}
    for (data, method), surface in surfaces.items():
        part = of(table, data, method)
        found.setdefault(data, {})[method] = {
            "trials": len(part),
            "learned": int(((part["gain"] < LEARNED) & (part["dev"] - part["start"] < LEARNED)).sum()),
            "worse_than_base": int((part["gain"] > 0).sum()),
            "best_seen": float(part["gain"].min()),
            "left_out": surface.left_out,
            "covered": surface.covered,
            "window": surface.window(REFERENCE[method]),
            "effects": list(surface.effects()),
            "shares": surface.shares(),
            "rule": asdict(surface.rate_rule()),
            "best": {steps: surface.best_of_all(steps=steps, batch_size=8) for steps in STEPS},
        }
    return found


def of(table: pd.DataFrame, data: str, method: str) -> pd.DataFrame:
    """Returns the rows of a method on a data set."""
    return table[(table["data"] == data) & (table["method"] == method)]


def prior(found: dict[str, Any], between_models: float) -> dict[str, Any]:
    """Returns where the best rate of each method lies, over both data sets, and how far off that may be, in decades.

    The spread has three parts: the surfaces' own, that between the data sets, and that between models, which the
    studies cannot know.
    """
    rules = {
        method: [found[data][method]["rule"] for data in SETS if method in found.get(data, {})] for method in POINTS
    }
    return {method: _prior(each, between_models) for method, each in rules.items() if each}


def _prior(rules: list[dict[str, Any]], between_models: float) -> dict[str, Any]:
    logs = [math.log10(rule["rate"][1]) for rule in rules]
    within, between_data = float(np.mean([rule["spread"] for rule in rules])), float(np.std(logs))
    return {
        "rate": 10 ** float(np.mean(logs)),
        "steps": STEPS[-1],
        "size_exponent": float(np.mean([rule["size"][1] for rule in rules])),
        "steps_exponent": float(np.mean([rule["steps"][1] for rule in rules])),
        "inits": {name: float(np.mean([rule["inits"][name][1] for rule in rules])) for name in rules[0]["inits"]},
        "spread": {"within": within, "between_data": between_data, "between_models": between_models},
        "decades": math.hypot(within, between_data, between_models),
    }


def recorded() -> dict[str, Any]:
    """Returns what recorded runs of others say (their README has the sources); where they are not here, what is known.

    `accuracies`: test accuracies of our methods among Hugging Face's runs on MetaMathQA (Llama-3.2-3B), in order.
    `between_models`: standard deviation of the logarithm of LoRA's best rate over 35 models on Tulu-3.
    """
    if not RECORDED.exists():
        known: dict[str, Any] = json.loads(SUMMARY.read_text())["recorded"]
        return known
    best: dict[str, tuple[float, float]] = {}
    with (RECORDED / "tinker-tulu3-lora-sweep.csv").open() as file:
        for row in csv.DictReader(file):
            loss, rate = float(row["test_nll"]), float(row["learning_rate"])
            if loss < DIVERGED:
                best[row["model"]] = min(best.get(row["model"], (math.inf, 0.0)), (loss, rate))
    kinds = {"LORA": "lora", "PREFIX_TUNING": "prefix_tuning", "PROMPT_TUNING": "prompt_tuning"}
    accuracies: dict[str, list[float]] = {method: [] for method in kinds.values()}
    with gzip.open(RECORDED / "peft-method-comparison-runs.jsonl.gz", "rt") as file:
        for run in map(json.loads, file):
            kind = (run["peft_config"] or {}).get("peft_type")
            accuracy = run["metrics"][-1].get("test accuracy") if run["metrics"] else None
            if kind in kinds and accuracy is not None:
                accuracies[kinds[kind]].append(accuracy)
    return {
        "accuracies": {method: sorted(values) for method, values in accuracies.items()},
        "between_models": float(np.std([math.log10(rate) for _, rate in best.values()])),
    }


def ranking(table: pd.DataFrame, surfaces: dict[tuple[str, str], Surface]) -> dict[str, Any]:
    """Returns the gain of each method's best setting at equal tokens and at equal seconds, by data set.

    Seconds are those that a step of the method takes alone, against LoRA's in the same block: the fastest method takes
    all steps, the others as many as they have time for.
    """
    found: dict[str, Any] = {}
    for data in SETS:
        methods = [method for method in POINTS if (data, method) in surfaces]
        if len(methods) < len(POINTS):
            continue
        slower = slowness(table[table["data"] == data])
        fastest = min(slower.values())
        found[data] = {
            method: {
                "slower_than_lora": slower[method],
                "equal_tokens": {
                    steps: surfaces[data, method].best_of_all(steps=steps, batch_size=8) for steps in STEPS
                },
                "equal_seconds": {
                    steps: surfaces[data, method].best_of_all(
                        steps=max(STEPS[0], steps * fastest / slower[method]), batch_size=8
                    )
                    for steps in STEPS[1:]
                },
            }
            for method in methods
        }
    return found


def slowness(table: pd.DataFrame) -> dict[str, float]:
    """Returns how many times as long as LoRA's a data token of each method takes: the median over blocks."""
    speeds = table.groupby(["block", "method"])["tokens_per_second_alone"].median().unstack()
    return {method: float((speeds["lora"] / speeds[method]).median()) for method in POINTS}


def sample() -> dict[str, Any]:
    """Returns whether the best rate on the small sample is the best on the large one, and what it costs where not."""
    paths = sorted((HERE / "sample").glob("block-*.parquet"))
    if not paths:
        return {}
    table = pd.concat(map(pd.read_parquet, paths))
    table = table[table["kind"] == "search"]
    table["of"] = table["method"].str.rsplit("-", n=1).str[0]
    few, many = SAMPLES
    found: dict[str, Any] = {}
    for method in SAMPLED:
        part = table[table["of"] == method].pivot_table("dev_minus_base", ["rows", "seed"], "learning_rate")
        if not {few, many} <= set(part.index.get_level_values("rows")):
            continue
        small, large = part.loc[few], part.loc[many]
        pairs = list(product(small.index, large.index))
        chosen = [large.loc[b, small.loc[a].idxmin()] - large.loc[b].min() for a, b in pairs]
        found[method] = {
            "mean_gain": {rows: part.loc[rows].mean().to_dict() for rows in (few, many)},
            "best": {
                rows: {int(s): float(r) for s, r in part.loc[rows].idxmin(axis=1).items()} for rows in (few, many)
            },
            "regret_mean": float(np.mean(chosen)),
            "regret_most": float(np.max(chosen)),
        }
    return found


def rising() -> pd.DataFrame | None:
    """Returns the curves of `rising` with their seeds; None where there are none."""
    paths = sorted((HERE / "rising").glob("block-*-curves.parquet"))
    if not paths:
        return None
    each = [pd.read_parquet(path).assign(seed=number) for number, path in enumerate(paths)]
    return pd.concat(each, ignore_index=True)


def rise(curves: pd.DataFrame | None) -> dict[str, Any]:
    """Returns held-out losses against the base at the end and at their highest, by trial: a value a seed."""
    if curves is None:
        return {}
    held_out = curves[(curves["event"] == "held_out") & (curves["trial"] != "none")]
    found: dict[str, Any] = {}
    for (trial, _), part in held_out.groupby(["trial", "seed"]):
        each = found.setdefault(trial.rsplit("-", 1)[0], {"end": [], "highest": []})
        each["end"].append(float(part.sort_values("step")["minus_base"].iloc[-1]))
        each["highest"].append(float(part["minus_base"].max()))
    return found


def transfer() -> list[dict[str, Any]]:
    """Returns the test loss of a method's defaults beside that of its search, a block each: means of three seeds.

    `difference` is the defaults' loss minus the search's, paired by example and over seeds, with its 95 % interval;
    `changed` are the settings of the search that are not the defaults, beside the rate; `defaults_size` is the number
    of virtual tokens, or the rank, of the defaults.
    """
    found: list[dict[str, Any]] = []
    for path in sorted((HERE / "transfer").glob("block-*-finalists.json")):
        block = yaml.safe_load(path.with_name(path.name.replace("-finalists.json", ".yaml")).read_text())
        finalists = {final["method"]: final for final in json.loads(path.read_text())}
        method = next(name for name in finalists if not name.endswith("-defaults"))
        searched, defaults = finalists[method], finalists[f"{method}-defaults"]
        chosen, usual = searched["settings"], defaults["settings"]
        difference = _minus(defaults["test_minus_winner"], searched["test_minus_winner"])
        found.append(
            {
                "data": Path(block["data"]["train"]).stem,
                "method": method,
                "changed": {k: v for k, v in chosen.items() if v != usual[k] and k != "learning_rate"},
                "searched": searched["test"]["value"],
                "searched_rate": chosen["learning_rate"],
                "defaults": defaults["test"]["value"],
                "defaults_rate": usual["learning_rate"],
                "defaults_size": usual.get("tokens") or usual["rank"],
                "difference": difference,
            }
        )
    return found


def _minus(first: Mapping[str, float] | None, second: Mapping[str, float] | None) -> dict[str, float]:
    """Returns the first minus the second, one of which is the winner, from which nothing is subtracted."""
    if first is not None:
        return dict(first)
    assert second is not None
    return {"value": -second["value"], "low": -second["high"], "high": -second["low"]}


def main() -> None:
    """Writes summary, tables and pictures."""
    table = rows()
    kinds = [(data, method) for data in SETS for method in POINTS if len(of(table, data, method)) >= FEWEST]
    surfaces = {kind: Surface(kind[1], of(table, *kind)) for kind in kinds}
    found = designed(table, surfaces)
    curves, of_others = rising(), recorded()
    summary = {
        "blocks": sorted({f"{data}/{block}" for data, block in zip(table["data"], table["block"], strict=True)}),
        "designed": found,
        "prior": prior(found, of_others["between_models"]),
        "ranking": ranking(table, surfaces),
        "recorded": of_others,
        "sample": sample(),
        "rising": rise(curves),
        "transfer": transfer(),
    }
    SUMMARY.write_text(json.dumps(summary, indent=1, default=_plain, allow_nan=False) + "\n")
    summary = json.loads(SUMMARY.read_text())
    tables.write(summary)
    pictures.draw(summary, table, surfaces, curves)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(type(value))


if __name__ == "__main__":
    main()
