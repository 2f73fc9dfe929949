"""`peft-study doctor` and `peft_study.diagnose`: on files, folders, models and words that are none of these."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import peft_study
import tiny_world
from command_line import CommandLine
from peft_study.doctor import live
from peft_study.doctor.rule import RULES, table_of_checks


def log(folder: Path, losses: Any, **more: Any) -> Path:
    """Writes a log of transformers' Trainer, a line a step; `more`: a value, or one a step."""
    lines = []
    for number, loss in enumerate(losses):
        values = {name: value[number] if np.ndim(value) else value for name, value in more.items()}
        lines.append({"step": number + 1, "loss": float(loss), **{name: float(v) for name, v in values.items()}})
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "trainer_state.json"
    state = {"log_history": lines, "global_step": len(lines), "max_steps": len(lines), "logging_steps": 1}
    path.write_text(json.dumps(state))
    return path


def falling(steps: int = 60) -> Any:
    """Returns the losses of a healthy run."""
    return 1 + 1.5 * np.exp(-np.arange(steps) / 15) + np.random.default_rng(0).normal(0, 0.05, steps)


def test_a_healthy_log_is_told_healthy(cli: CommandLine, tmp_path: Path) -> None:
    path = log(tmp_path, falling(), learning_rate=1e-4, grad_norm=0.7)
    ran = cli("doctor", path).ok()
    assert "nothing wrong was found" in ran.out
    assert "not checked: " in ran.out
    assert max(map(len, ran.out.splitlines()[1:])) <= 80  # the first is the path
    assert "没有发现问题" in cli("doctor", path, "--lang", "zh").ok().out


def test_something_wrong_ends_with_1(cli: CommandLine, tmp_path: Path) -> None:
    losses = np.concatenate([falling(30), np.full(30, np.nan)])
    path = log(tmp_path, losses, learning_rate=1e-4)
    ran = cli("doctor", path)
    assert ran.code == 1
    assert re.search(r"^ERROR: .*\n?.*\[diverged,\s+certain\]", ran.out, re.M)
    values = json.loads(cli("doctor", path, "--json").out)
    assert values["wrong"]
    assert (values["problems"][0]["check"], values["problems"][0]["step"]) == ("diverged", 31)
    assert set(values["problems"][0]["cause"]) == {"en", "zh"}
    assert set(values["checked"]) | set(values["unchecked"]) == set(RULES)


def test_settings_beside_a_log_are_used(cli: CommandLine, tmp_path: Path) -> None:
    path = log(tmp_path / "a", falling() * 0 + 2)
    settings = tmp_path / "settings.yaml"
    settings.write_text("learning_rate: 1.0e-4\n")
    (tmp_path / "a/adapter_config.json").write_text(json.dumps({"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 8}))
    said = cli("doctor", path, "--training-args", settings)
    assert said.code == 1
    assert "ERROR: the learning rate is too low for prompt tuning" in said.out


def test_a_column_may_be_named(cli: CommandLine, tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    rows = [f"{step},{loss},{2 + 0 * loss}" for step, loss in enumerate(falling())]
    path.write_text("\n".join(["it,mine,loss", *rows]))
    assert "nothing wrong was found" in cli("doctor", path, "--map", "loss=mine", "--map", "step=it").ok().out
    assert "mine" in cli("doctor", path, "--map", "loss=min").error()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "WHAT: is not given"),
        (["nowhere"], "nowhere: is not there"),
        (["nowhere", "--jsn"], "--jsn: is no option of doctor; did you mean '--json'?"),
        (["nowhere", "--lang", "de"], "--lang: unknown 'de'"),
        (["nowhere", "--map", "loss"], "--map: 'loss' is not NAME=COLUMN"),
    ],
)
def test_bad_words_are_one_line(cli: CommandLine, words: list[str], said: str) -> None:
    assert said in cli("doctor", *words).error()


def test_what_is_no_log_is_one_line(cli: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    (tmp_path / "empty").mkdir()
    for name in ("picture.png", "empty"):
        assert name in cli("doctor", tmp_path / name).error()


def test_the_list_of_checks(cli: CommandLine) -> None:
    said = cli("doctor", "--checks").ok().out
    assert said == table_of_checks()
    assert all(f"| `{name}` |" in said for name in RULES)


def test_a_model_before_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    # other tests of this process have made configurations of peft, too
    monkeypatch.setattr(live, "_unattached", lambda: None)
    model = tiny_world.model()
    found = peft_study.diagnose(model, arguments={"learning_rate": 1e-4})
    assert found.about == "LlamaForCausalLM"
    assert not found.wrong
    assert "rate_too_high" in found.checked
    model.requires_grad_(False)
    assert [problem.check for problem in peft_study.diagnose(model).problems] == ["nothing_trains"]


def test_a_run_and_a_study_of_ours(cli: CommandLine, trained: Path) -> None:
    said = cli("doctor", trained)
    assert said.code in (0, 1)
    assert str(trained) in said.out
