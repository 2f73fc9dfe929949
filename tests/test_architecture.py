"""The house: what may import what, what is public, and that public things are documented."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

import peft_study

SOURCE = Path(peft_study.__file__).parent
FLOORS = (
    "errors",
    "places",
    "config",
    "data",
    "model",
    "methods",
    "engine",
    "evaluate",
    "study",
    "compat",
    "cli",
    "__main__",
)
"""Data flows in this order: a floor knows those before it, and none behind it."""
MODULES = sorted(SOURCE.rglob("*.py"))
INSIDE = [path for path in MODULES if path != SOURCE / "__init__.py"]
"""All but the package's own list of public names, which reaches everywhere."""


def _floor(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "peft_study" and len(parts) > 1 else None


def _imports(path: Path) -> list[str]:
    tree = ast.parse(path.read_text())
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.append(node.module)
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return found


@pytest.mark.parametrize("path", INSIDE, ids=lambda p: str(p.relative_to(SOURCE)))
def test_nothing_is_imported_against_the_flow_of_data(path: Path) -> None:
    relative = path.relative_to(SOURCE)
    own = FLOORS.index(relative.parts[0].removesuffix(".py"))
    for module in _imports(path):
        floor = _floor(module)
        assert floor is None or FLOORS.index(floor) <= own, f"{relative} imports {module}, which lies behind it"


def test_every_public_name_is_there_and_documented() -> None:
    assert sorted(peft_study.__all__) == list(peft_study.__all__) == sorted(peft_study._HOME)
    for name in peft_study.__all__:
        assert getattr(peft_study, name).__doc__


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_files_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 70, f"{node.name} is long"


def test_every_module_can_be_imported_alone() -> None:
    for path in MODULES:
        name = ".".join(("peft_study", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")
        assert importlib.import_module(name).__doc__, f"{name} does not say what it is"
