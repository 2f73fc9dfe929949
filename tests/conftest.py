"""What all tests share: a cache of their own, a tiny model folder, and the command line run in process."""

from __future__ import annotations

import io
import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest.mock import patch

import pytest
from hypothesis import settings

from command_line import CommandLine, Ran, conversation
from peft_study.storage.cache_dir import cache_root
from tiny_tokenizer import tiny_tokenizer

# a busy machine is no failure of a property
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps tokens and losses of the tests out of the user's cache; the converted embedded model is shared."""
    models = cache_root() / "models"
    base = tmp_path_factory.getbasetemp()
    if not models.is_dir():
        # under xdist each worker has its own folder beside its neighbours': one conversion serves all of them
        models = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "models"
        models.mkdir(exist_ok=True)
    cache = tmp_path_factory.mktemp("cache")
    (cache / "models").symlink_to(models, target_is_directory=True)
    with patch.dict(os.environ, {"PEFT_STUDY_CACHE": str(cache)}):
        yield


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with a random two-layer Llama and a byte-level tokenizer, as `--model_name_or_path` takes it."""
    import tiny_world

    folder = tmp_path_factory.mktemp("tiny-model")
    tiny_world.model("llama").save_pretrained(folder)
    tiny_tokenizer(tiny_world.VOCABULARY).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def wide_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns the same with layers wide enough for 4-bit blocks, which hold 64 numbers."""
    import tiny_world

    folder = tmp_path_factory.mktemp("wide-model")
    with pytest.MonkeyPatch.context() as patched:
        for name, width in (("hidden_size", 128), ("intermediate_size", 128), ("head_dim", 64)):
            patched.setitem(tiny_world._SHAPE, name, width)
        tiny_world.model("llama").save_pretrained(folder)
    tiny_tokenizer(tiny_world.VOCABULARY).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a file of 60 short conversations: two numbers and their sum."""
    path = tmp_path_factory.mktemp("tiny-data") / "sums.jsonl"
    path.write_text("".join(json.dumps(conversation(i)) + "\n" for i in range(60)))
    return path


@pytest.fixture
def cli() -> CommandLine:
    """Returns a function that runs `peft-study WORDS...` in this process."""

    def run(*words: object, stdin: str = "") -> Ran:
        from peft_study.cli import main

        out, err = io.StringIO(), io.StringIO()
        with (
            patch.object(sys, "argv", ["peft-study", *map(str, words)]),
            patch.object(sys, "stdin", io.StringIO(stdin)),
            # quiet_libraries changes both for the rest of the process
            patch.dict(os.environ),
            warnings.catch_warnings(),
            redirect_stdout(out),
            redirect_stderr(err),
            pytest.raises(SystemExit) as ended,
        ):
            main()
        return Ran(int(ended.value.code or 0), out.getvalue(), err.getvalue())

    return run
