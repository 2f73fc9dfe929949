"""The source as a whole: what may import what, what is public, and that everything is documented and short."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import peft_study

SOURCE = Path(peft_study.__file__).parent
LAYERS = (
    "errors",
    "seeds",
    "statistics",
    "config",
    "storage",
    "doctor",
    "model",
    "methods",
    "data",
    "engine",
    "compat",
    "evaluation",
    "training",
    "search",
    "workers",
    "report",
    "study",
    "display",
    "api",
    "cli",
    "__main__",
)
"""From the bottom to the top: a layer imports those before it, and none after it."""
MODULES = sorted(SOURCE.rglob("*.py"))
INSIDE = [path for path in MODULES if path != SOURCE / "__init__.py"]
"""All but the list of public names, which reaches everywhere."""


def name_of(path: Path) -> str:
    """Returns a module's dotted name without the package's own."""
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")


NAMES = {name_of(path) for path in MODULES}


def imports(path: Path) -> set[str]:
    """Returns the modules of this package that a module imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "peft_study":
            package = (node.module or "").partition(".")[2]
            for alias in node.names:
                inner = f"{package}.{alias.name}".lstrip(".")
                found.add(inner if inner in NAMES else package)
        elif isinstance(node, ast.Import):
            found |= {a.name.partition(".")[2] for a in node.names if a.name.split(".")[0] == "peft_study"}
    return found - {"", name_of(path)}


IMPORTS = {name_of(path): imports(path) for path in INSIDE}


def layer(module: str) -> int:
    """Returns a module's place from the bottom."""
    return LAYERS.index(module.split(".")[0])


@pytest.mark.parametrize("module", sorted(IMPORTS))
def test_no_module_imports_a_layer_above_its_own(module: str) -> None:
    above = {other for other in IMPORTS[module] if layer(other) > layer(module)}
    assert not above, f"{module} imports {sorted(above)}"


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Returns the circles that a walk through a graph of imports meets."""
    found: list[list[str]] = []
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> None:
        if module in trail:
            found.append([*trail[trail.index(module) :], module])
        elif module not in done:
            for other in sorted(graph.get(module, ())):
                visit(other, [*trail, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])
    return found


def test_no_imports_go_round_in_a_circle() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set()}) == [["a", "b", "c", "a"]]
    assert circles(IMPORTS) == []


def test_a_class_name_means_one_thing() -> None:
    homes = defaultdict(list)
    for path in INSIDE:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                homes[node.name].append(name_of(path))
    assert {name: where for name, where in homes.items() if len(where) > 1} == {}


def test_reports_are_read_without_torch() -> None:
    modules = sorted(f"peft_study.{name}" for name in IMPORTS if name.split(".")[0] == "report")
    assert modules
    program = f"import sys\nfor name in {modules}: __import__(name)\nsys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


_EACH_ALONE = """
import importlib, os, sys, traceback
# what takes long, once for all children
import accelerate, datasets, optuna, peft, pydantic, pyarrow.parquet, scipy.stats, torch, transformers, typer
for name in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        try:
            importlib.import_module(name)
        except BaseException:
            traceback.print_exc()
            print(name, file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        sys.exit(1)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_every_module_can_be_imported_first() -> None:
    names = [f"peft_study.{name}".removesuffix(".") for name in sorted(NAMES - {"__init__", "__main__"})]
    ran = subprocess.run([sys.executable, "-c", _EACH_ALONE, *names], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


def test_every_public_name_is_there_and_documented() -> None:
    assert sorted(peft_study.__all__) == list(peft_study.__all__) == sorted(peft_study._HOME)
    for name in peft_study.__all__:
        assert getattr(peft_study, name).__doc__


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_files_and_functions_are_short_and_modules_documented(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400
    assert ast.get_docstring(ast.parse(text)), "the module does not say what it is"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, f"{node.name} is long"


@pytest.mark.parametrize("path", sorted(Path(__file__).parent.rglob("*.py")), ids=lambda path: path.stem)
def test_test_files_are_short(path: Path) -> None:
    assert path.read_text().count("\n") <= 400
