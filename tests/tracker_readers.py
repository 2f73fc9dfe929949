"""What experiment trackers hold of a study, read from their own files without their packages."""

from __future__ import annotations

import json
import os
import sqlite3
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CURVES = ("train/loss", "train/tokens", "dev/loss", "dev/minus_base")


@dataclass
class Logged:
    """What a tool holds of one run: its curves as (step, value) in the order of logging, settings, result."""

    group: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=lambda: defaultdict(list))
    result: dict[str, Any] = field(default_factory=dict)
    state: str | None = None


def in_trackio(_folder: Path) -> dict[str, list[Logged]]:
    """Returns the runs by the names of their trials, from trackio's database."""
    found: dict[str, Logged] = defaultdict(Logged)
    with sqlite3.connect(Path(os.environ["TRACKIO_DIR"]) / "peft-study.db") as database:
        for run, text in database.execute("select run_id, config from configs"):
            values = json.loads(text)
            found[run].group = values["_Group"]
            found[run].config = {key: value for key, value in values.items() if not key.startswith(("_", "result/"))}
            found[run].result = {k.removeprefix("result/"): v for k, v in values.items() if k.startswith("result/")}
        for run, step, text in database.execute("select run_id, step, metrics from metrics order by id"):
            for key, value in json.loads(text).items():
                found[run].curves[key].append((step, value))
        names = dict(database.execute("select run_id, run_name from metrics"))
    return by_trial({run: (names[run].rpartition("-")[0], logged) for run, logged in found.items()})


def in_mlflow(_folder: Path) -> dict[str, list[Logged]]:
    """Returns the runs by the names of their trials, from mlflow's database; the study is the parent of its trials."""
    found: dict[str, tuple[str, Logged]] = {}
    with sqlite3.connect(os.environ["MLFLOW_TRACKING_URI"].removeprefix("sqlite:///")) as database:
        for run, name, status in database.execute("select run_uuid, name, status from runs"):
            found[run] = name, Logged(state=status)
        for run, key, value in database.execute("select run_uuid, key, value from params"):
            found[run][1].config[key] = value
        for run, key, value in database.execute("select run_uuid, key, value from tags"):
            if key == "mlflow.parentRunId":
                found[run][1].group = found[value][0]
            elif key.startswith("result/"):
                found[run][1].result[key.removeprefix("result/")] = value
        for run, key, value, step in database.execute(
            "select run_uuid, key, value, step from metrics order by timestamp"
        ):
            if key.startswith("result/"):
                found[run][1].result[key.removeprefix("result/")] = value
            else:
                found[run][1].curves[key].append((step, value))
    return by_trial({run: entry for run, entry in found.items() if entry[1].config})


def in_wandb(folder: Path) -> dict[str, list[Logged]]:
    """Returns the runs by the names of their trials, from wandb's offline files, oldest first; one id is one run."""
    found: dict[str, tuple[str, Logged]] = {}
    for path in sorted(folder.rglob("*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        run = ""
        for record in wandb_records(path):
            if record.HasField("run"):
                run = record.run.run_id
                _, logged = found.setdefault(run, (record.run.display_name, Logged(record.run.run_group)))
                logged.config |= {i.key: json.loads(i.value_json) for i in record.run.config.update if i.key[0] != "_"}
            elif record.HasField("history"):
                items = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in record.history.item}
                for key in set(items) & set(CURVES):
                    found[run][1].curves[key].append((items["_step"], items[key]))
            elif record.HasField("summary"):
                for item in record.summary.update:
                    key = "/".join(item.nested_key) or item.key
                    if key.startswith("result/"):
                        found[run][1].result[key.removeprefix("result/")] = json.loads(item.value_json)
            elif record.HasField("exit"):
                found[run][1].state = str(record.exit.exit_code)
    return by_trial(found)


def wandb_records(path: Path) -> Iterator[Any]:
    """Yields the records of an offline file: a header of 7 bytes, then LevelDB's log, blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, body = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block is too short for a header
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        body, at = body + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(body)
            body = b""


def by_trial(found: dict[str, tuple[str, Logged]]) -> dict[str, list[Logged]]:
    names: dict[str, list[Logged]] = defaultdict(list)
    for name, logged in found.values():
        names[name].append(logged)
    return dict(names)


READERS = {"trackio": in_trackio, "wandb": in_wandb, "mlflow": in_mlflow}
