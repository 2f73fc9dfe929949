"""docs/python.md: its examples run, from top to bottom."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from command_line import conversation
from peft_study.model import embedded, load

PAGE = Path(__file__).resolve().parents[2] / "docs/python.md"


def test_the_examples_run(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for module in (load, embedded):  # the tiny model stands for the embedded one
        monkeypatch.setattr(module, "embedded_folder", lambda: tiny_model_folder)
    Path("train.jsonl").write_text("".join(json.dumps(conversation(i)) + "\n" for i in range(120)))
    Path("study.yaml").write_text(
        "model: {name: smollm2-135m-instruct}\ndata: {train: train.jsonl}\nmethods: {lora: {}}\noutput: runs/file\n"
    )
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) == PAGE.read_text(encoding="utf-8").count("```python") > 8
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert {path.name for path in Path("runs").iterdir()} == {"study", "first", "one", "memory", "callbacks"}
    assert "winner by mean dev loss" in capsys.readouterr().out
