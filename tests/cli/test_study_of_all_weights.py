"""A study with a trial of all weights: it takes the base, and puts it back for the trials after it."""

from __future__ import annotations

import json
from pathlib import Path

import yaml

from command_line import CommandLine


def test_the_base_is_put_back(cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path) -> None:
    def run(name: str, methods: dict[str, object]) -> dict[str, list[float]]:
        settings = {
            "model": {"name": str(tiny_model_folder), "dtype": "float32"},
            "data": {"train": str(tiny_data), "held_out": 8},
            "training": {"steps": 2, "batch_size": 4},
            "methods": methods,
            "output": str(tmp_path / name),
        }
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings))
        cli("run", path).ok()
        found = (tmp_path / name / "trials").glob("*/result.json")
        return {path.parent.name: json.loads(path.read_text())["sums"] for path in found}

    alone = run("alone", {"lora": {"rank": 2}, "none": {}})
    after = run("after", {"full": {"learning_rate": "1e-2"}, "lora": {"rank": 2}, "none": {}})
    # rates that are left out are the methods' own
    assert sorted(after) == ["full-0.01", "lora-0.0003", "none"]
    assert {name: after[name] for name in alone} == alone
    assert after["full-0.01"] != after["none"]
