"""The wheel: it holds the package, and works in an environment of its own outside the repository.

The environment is empty but for what the wheel asks for, so a dependency that only the tests' environment has is found.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "peft_study"
GENERATED = shutil.ignore_patterns("__pycache__", "*.egg-info")


def run(*words: object, cwd: Path | None = None) -> str:
    """Runs a program as a user would, who has no path of the repository; returns its output."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run([*map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr}"
    return ran.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the wheel, built from a copy: setuptools would take files of an earlier build folder along."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "src", folder / "src", ignore=GENERATED)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture
def programs(tmp_path: Path) -> Iterator[Path]:
    """Makes an empty environment, and yields the folder of its programs."""
    folder = tmp_path / "venv"
    run(sys.executable, "-m", "venv", folder)
    yield folder / "bin"
    shutil.rmtree(folder)  # 2 GB, which pytest would keep


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    there = {name for name in ZipFile(wheel).namelist() if name.startswith("peft_study/")}
    files = {path.relative_to(PACKAGE.parent).as_posix() for path in PACKAGE.rglob("*") if path.is_file()}
    assert there == {name for name in files if "__pycache__" not in name}


def test_a_study_runs_from_the_wheel_in_an_empty_environment(
    wheel: Path, programs: Path, tiny_model_folder: Path, tiny_data: Path, tmp_path: Path
) -> None:
    run(programs / "python", "-m", "pip", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel)
    place = run(programs / "python", "-c", "import peft_study; print(peft_study.__file__)", cwd=tmp_path)
    assert Path(place.strip()).is_relative_to(tmp_path / "venv")
    assert "Usage: peft-study" in run(programs / "peft-study", "--help", cwd=tmp_path)
    values = {
        "model": {"name": str(tiny_model_folder)},
        "data": {"train": str(tiny_data), "held_out": 8, "test": 8, "max_length": 64},
        "training": {"steps": 2, "batch_size": 2},
        "methods": {"lora": {"learning_rate": [1e-3, 1e-2]}, "prompt_tuning": {"learning_rate": [1e-2, 0.1]}},
        "output": "out",
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(values))
    assert "winner by mean dev loss" in run(programs / "peft-study", "run", "study.yaml", cwd=tmp_path)
    assert (tmp_path / "out" / "results.csv").exists()


def test_installing_it_keeps_a_torch_of_another_build(wheel: Path, programs: Path, tmp_path: Path) -> None:
    (packages,) = programs.parent.glob("lib/python*/site-packages")
    # pip knows an installed package by this folder
    info = packages / "torch-2.11.0+cu128.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.11.0+cu128\n")
    (info / "INSTALLER").write_text("pip\n")
    report = tmp_path / "report.json"
    run(programs / "python", "-m", "pip", "install", "--quiet", "--dry-run", "--report", report, wheel)
    chosen = {item["metadata"]["name"].lower() for item in json.loads(report.read_text())["install"]}
    assert {"peft-study", "peft", "transformers"} <= chosen
    assert "torch" not in chosen
