"""Experiment trackers through their own packages: what they hold after a study, a kill, and a fault of theirs."""

from __future__ import annotations

import os
import signal
import time
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

import peft_study
from command_line import CommandLine
from peft_study import Callback, LiveTrial, LoRA, Study
from peft_study.errors import ConfigError, Interrupted
from peft_study.storage.metrics import read
from peft_study.training import trackers
from peft_study.training.trackers import Trackers, check_trackers
from tracker_readers import CURVES, READERS, in_trackio

STEPS = 4


@pytest.fixture(autouse=True)
def _places(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps all tools off the network and in a folder of the test."""
    with pytest.MonkeyPatch.context() as patched:
        folder = tmp_path_factory.mktemp("tools")
        patched.setenv("TRACKIO_DIR", str(folder / "trackio"))
        patched.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        patched.setenv("WANDB_MODE", "offline")
        for name in ("WANDB_DIR", "WANDB_PROJECT", "TRACKIO_PROJECT", "MLFLOW_EXPERIMENT_NAME", "TRACKIO_SPACE_ID"):
            patched.delenv(name, raising=False)
        yield


@pytest.fixture(params=list(READERS))
def tool(request: pytest.FixtureRequest) -> str:
    if find_spec(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    return str(request.param)


@pytest.fixture
def values(tiny_model_folder: Path, tiny_data: Path, tmp_path: Path) -> dict[str, Any]:
    """Returns a study file of two settings of LoRA, the best of them with two seeds."""
    return {
        "model": {"name": str(tiny_model_folder), "dtype": "float32"},
        "data": {"train": str(tiny_data), "held_out": 10, "test": 10},
        "methods": {"lora": {"rank": 2}},
        "training": {"batch_size": 4, "row_tokens": 130},
        "budget": {"trials": 2, "steps": STEPS},
        "search": {"pruner": "none"},
        "finals": {"best": 1, "seeds": 2},
        "logging": {"tensorboard": False, "checkpoint_every": 1},
        "slots": 2,
        "output": str(tmp_path / "mine"),
    }


def study(values: dict[str, Any], tool: str | list[str]) -> Study:
    path = Path(values["output"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump({**values, "logging": {**values["logging"], "trackers": tool}}))
    return Study.from_yaml(path)


def expected(folder: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Returns the curves of every trial, from its own metrics.jsonl."""
    found: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for path in folder.glob("trials/*/metrics.jsonl"):
        own = found[path.parent.name] = defaultdict(list)
        tokens = 0
        for record in read(path):
            step = record["step"]
            if record["event"] == "train":
                tokens += record["tokens"]
                own["train/loss"].append((step, record["loss"]))
                own["train/tokens"].append((step, tokens))
            else:
                own["dev/loss"].append((step, record["loss"]))
                own["dev/minus_base"].append((step, record["minus_base"]))
    return found


def approx(curve: list[tuple[int, float]]) -> Any:
    return pytest.approx(dict(curve))


def test_a_tool_holds_every_trial_with_settings_curves_and_result(values: dict[str, Any], tool: str) -> None:
    result = study(values, tool).run(verbose=False)
    found, truth = READERS[tool](result.folder), expected(result.folder)
    rows = {row["name"]: row for row in result.trials_dataframe().to_dict("records")}
    assert set(found) == set(truth) == set(rows) == {"none", "lora-000", "lora-001", *seeds(result)}
    assert result.best is not None
    for name, (logged, *others) in found.items():
        assert others == [], f"{name} is one run"
        assert logged.group == "mine"
        for key in CURVES:
            assert [step for step, _ in logged.curves[key]] == [step for step, _ in truth[name][key]], (name, key)
            assert dict(logged.curves[key]) == approx(truth[name][key])
        assert logged.result["status"] == rows[name]["status"] == "finished"
        assert logged.result["dev"] == pytest.approx(rows[name]["dev"])
        assert logged.result["dev_minus_base"] == pytest.approx(rows[name]["dev_minus_base"])
        assert logged.config["kind"] == rows[name]["kind"]
        if name != "none":
            assert int(logged.config["rank"]) == 2
            assert float(logged.config["learning_rate"]) == rows[name]["learning_rate"]
        assert ("test" in logged.result) == (name in seeds(result))
        won = str(logged.result.get("winner")) == "True"
        assert won == (name in (result.best.name, *seeds(result)))
        if name in seeds(result):
            assert logged.result["test"] == pytest.approx(rows[name]["test"])
        assert logged.state in {"trackio": (None,), "wandb": ("0",), "mlflow": ("FINISHED",)}[tool]


def seeds(result: peft_study.StudyResult) -> set[str]:
    assert result.best is not None
    return {f"{result.best.name}-seed-1", f"{result.best.name}-seed-2"}


@pytest.mark.parametrize("kind", ["interrupted", "killed"])
def test_a_study_that_stops_continues_its_runs_and_logs_no_step_twice(
    values: dict[str, Any], tool: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trackers, "CLOSING", 120.0)
    values["budget"]["steps"], values["finals"]["best"] = 12, 0
    values["logging"]["checkpoint_every"] = 5  # so that steps after the checkpoint are repeated
    made = study(values, tool)
    if kind == "interrupted":
        with pytest.raises(Interrupted):
            made.run(callbacks=[AtStep(8, lambda: signal.raise_signal(signal.SIGINT))], verbose=False)
        logged = READERS[tool](Path(values["output"]))["lora-000"][0]
        assert logged.result["status"] == "interrupted"
        assert logged.state in {"trackio": (None,), "wandb": ("1",), "mlflow": ("KILLED",)}[tool]
    else:
        killed_at(made, 8)
    result = made.run(verbose=False)
    found, truth = READERS[tool](result.folder), expected(result.folder)
    assert set(found) == {"none", "lora-000", "lora-001"}
    for name, runs in found.items():
        assert len(runs) == 1, "the run was continued, not begun again"
        for key in CURVES:
            steps = [step for step, _ in runs[0].curves[key]]
            if tool == "wandb" and kind == "killed":  # offline, wandb cannot know what its earlier file holds
                steps = sorted(set(steps))
            assert steps == [step for step, _ in truth[name][key]], (name, key)
        assert runs[0].result["status"] == "finished"


class AtStep(Callback):
    """Does something when the first trial is at a step."""

    def __init__(self, step: int, act: Any) -> None:
        self._step, self._act = step, act

    def on_step(self, trial: LiveTrial) -> None:
        if trial.name == "lora-000" and trial.step == self._step:
            self._act()


def killed_at(made: Study, step: int) -> None:
    """Runs a study in a child that kills itself at a step; the processes of its trackers may still be loading then."""
    child = os.fork()
    if child == 0:
        try:
            made.run(callbacks=[AtStep(step, lambda: os.kill(os.getpid(), signal.SIGKILL))], verbose=False)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL


def test_a_study_that_is_replaced_makes_new_runs(values: dict[str, Any]) -> None:
    values["finals"]["best"] = 0
    study(values, "trackio").run(verbose=False)
    study(values, "trackio").run(verbose=False, overwrite=True)
    assert {name: len(runs) for name, runs in in_trackio(Path()).items()} == {"none": 2, "lora-000": 2, "lora-001": 2}


def test_a_single_run_is_a_run_without_a_group(values: dict[str, Any], tool: str, tmp_path: Path) -> None:
    logging = {"trackers": tool}
    ended = peft_study.finetune(
        values["model"], values["data"], LoRA(rank=2), steps=STEPS, output=tmp_path / "single", logging=logging,
        verbose=False,
    )  # fmt: skip
    ((logged,),) = READERS[tool](tmp_path / "single").values()
    assert not logged.group
    assert [step for step, _ in logged.curves["train/loss"]] == [1, 2, 3, 4]
    assert [step for step, _ in logged.curves["dev/loss"]] == [0, 1, 2, 3, 4]
    assert ended.dev is not None
    assert ended.minus_base is not None
    assert logged.curves["dev/loss"][-1][1] == pytest.approx(ended.dev.value)
    assert logged.result["dev_minus_base"] == pytest.approx(ended.minus_base.value)
    assert logged.result["status"] == "finished"
    assert int(logged.config["rank"]) == 2


FAULTS = {
    "trackio": ("TRACKIO_DIR", "{file}/below"),
    "wandb": ("WANDB_MODE", "online"),  # without a key
    "mlflow": ("MLFLOW_TRACKING_URI", "sqlite:///{file}/below/mlflow.db"),
}


def test_a_tool_that_fails_is_told_once_and_changes_nothing(
    values: dict[str, Any],
    tool: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "file"))
    name, value = FAULTS[tool]
    monkeypatch.setenv(name, value.format(file=tmp_path / "file"))
    values["output"] = str(tmp_path / "with")
    with_fault = study(values, tool).run()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning:")]
    assert len(said) == 1, said
    assert said[0].startswith(f"warning: {tool}: ")
    values["output"] = str(tmp_path / "without")
    without = study(values, []).run(verbose=False)
    devs = [result.trials_dataframe().set_index("name").dev.to_dict() for result in (with_fault, without)]
    assert devs[0] == devs[1]
    assert with_fault.state == "finished"


def test_a_tool_that_hangs_holds_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wandb.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(trackers, "CLOSING", 1.0)
    said: list[str] = []
    tracked = Trackers(["wandb"], tmp_path, lambda line, _share=None: said.append(line))
    started = time.monotonic()
    tracked.begin("run", {})
    for step in range(20_000):  # far more than a pipe holds
        tracked.log("run", step, {"train/loss": 1.0})
    assert time.monotonic() - started < 10
    tracked.close()
    assert time.monotonic() - started < 20
    assert len(said) == 1
    assert said[0].startswith("warning: wandb: has not taken everything after 1 s, and was stopped")


def test_a_package_that_is_absent_is_told_before_anything_is_loaded(
    cli: CommandLine, values: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    real = find_spec
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None if name == "wandb" else real(name))
    values["model"]["name"] = str(tmp_path / "no-model")
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**values, "logging": {"trackers": ["trackio", "wandb"]}}))
    words = "logging.trackers: wandb is not installed; pip install wandb"
    for more in ((), ("--dry-run",)):
        assert words in cli("run", path, *more).error()
    flags = ("--model_name_or_path", tmp_path / "no-model", "--train_file", values["data"]["train"], "--use_lora")
    ran = cli("finetune", *flags, "--with_tracking", "--report_to", "wandb", "--output_dir", tmp_path / "out")
    assert ran.error() == "error: --report_to: wandb is not installed; pip install wandb"
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "mine").exists()


def test_a_folder_of_a_tools_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mlflow_of_nobody").mkdir()
    with pytest.raises(ConfigError, match="pip install mlflow_of_nobody"):
        check_trackers(["mlflow_of_nobody"])


def test_an_unknown_tracker_names_those_there_are(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"trackers.*'wandb', 'trackio' or 'mlflow'.*\(value: 'aim'\)"):
        study(values, ["aim"])


def test_tensorboard_and_optuna_open_a_study(values: dict[str, Any]) -> None:
    import optuna
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values["logging"]["tensorboard"] = True
    result = study(values, []).run(verbose=False)
    for name, curves in expected(result.folder).items():
        events = EventAccumulator(str(result.folder / "trials" / name / "tensorboard"))
        events.Reload()
        for tag, key in (("train/loss", "train/loss"), ("held_out/loss", "dev/loss")):
            shown = [] if tag not in events.Tags()["scalars"] else events.Scalars(tag)
            assert [event.step for event in shown] == [step for step, _ in curves[key]]
            assert [event.value for event in shown] == pytest.approx([value for _, value in curves[key]])
    opened = optuna.load_study(study_name="lora", storage=f"sqlite:///{result.folder / 'optuna.db'}")
    devs = result.trials_dataframe().set_index("name").dev
    assert {t.user_attrs["name"]: t.value for t in opened.trials} == pytest.approx(
        {name: devs[name] for name in ("lora-000", "lora-001")}
    )
