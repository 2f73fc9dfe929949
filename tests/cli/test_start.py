"""The program itself: its help is quick, and it runs as a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import CommandLine

HEAVY = ("torch", "transformers", "peft", "datasets", "pyarrow", "scipy", "altair", "vl_convert")
MAIN = "from peft_study.cli import main; main()"


def process(*words: object, code: str = MAIN, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "words", [("--help",), ("run", "--help"), ("data", "convert", "--help"), ("init", "--help"), ("merge", "--help")]
)
def test_help_loads_nothing_heavy(words: tuple[str, ...]) -> None:
    code = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print('LOADED', [name for name in {HEAVY!r} if name in sys.modules]))\n{MAIN}"
    )
    ran = process(*words, code=code)
    assert ran.returncode == 0, ran.stderr
    assert "Usage" in ran.stdout
    assert ran.stdout.splitlines()[-1] == "LOADED []"


def test_the_package_loads_nothing_heavy() -> None:
    ran = process(code=f"import sys, peft_study; print([name for name in {HEAVY!r} if name in sys.modules])")
    assert ran.stdout == "[]\n"


@pytest.mark.parametrize(
    "words",
    [
        *(("run",), ("init",), ("schema",), ("finetune",), ("merge",), ("generate",), ("chat",), ("data",)),
        *(("data", "convert"), ("data", "sample"), ("data", "stats"), ("data", "skills")),
    ],
    ids=" ".join,
)
def test_every_command_has_help(cli: CommandLine, words: tuple[str, ...]) -> None:
    ran = cli(*words, "--help").ok()
    assert "sage: " in ran.out
    assert "--help" in ran.out or words == ("finetune",)
    assert ran.err == ""


def test_a_mistake_in_a_process_of_its_own(tmp_path: Path) -> None:
    ran = process("data", "convert", tmp_path / "no.jsonl", "-o", tmp_path / "out.jsonl")
    assert ran.returncode == 2
    assert ran.stdout == ""
    (line,) = ran.stderr.splitlines()
    assert line.startswith("error: ")
    assert "no.jsonl" in line


def test_a_run_in_a_process_of_its_own(tmp_path: Path, tiny_model_folder: Path, tiny_data: Path) -> None:
    """Nothing but the program's own lines: no bars, warnings or notices of libraries."""
    ran = process(
        *("finetune", "--model_name_or_path", tiny_model_folder, "--train_file", tiny_data, "--use_lora"),
        *("--max_train_steps", 2, "--output_dir", tmp_path / "out"),
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    assert "step 0: held-out loss" in ran.stdout
    assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()
