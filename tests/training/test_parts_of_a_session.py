"""Training, held-out and test rows of files, as a session divides them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chat_cases import encoder
from command_line import CommandLine, conversation, listing
from peft_study.config import DataConfig, ModelConfig, TrainingConfig
from peft_study.data.split import make_split
from peft_study.errors import OutputError, UserError
from peft_study.methods.reference import NoAdapter
from peft_study.storage.run_dir import RunFolder
from peft_study.training.session import Session, describe, open_session, refuse_other_inputs, unheard


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def asked(i: int, question: str) -> dict[str, Any]:
    return {**conversation(i), "messages": [{"role": "user", "content": question}, conversation(i)["messages"][1]]}


def test_real_tokens_of_rows_that_say_the_same(tmp_path: Path) -> None:
    held = write(tmp_path / "held.jsonl", [asked(i, f"{i}  +  {i}") for i in range(3)])
    train = write(tmp_path / "train.jsonl", [asked(i, f"{i} + {i}") for i in range(8)])  # white space does not count
    made = make_split(DataConfig(train=str(train), held_out=str(held), test=2), encoder("chatml"), 0, test=True)
    assert made.test is not None
    assert (len(made.train), len(made.held_out), len(made.test)) == (3, 3, 2)
    assert made.notes == ("3 training rows equal a held-out or test row and were left out",)


@pytest.fixture
def opened(tiny_model_folder: Path, tiny_data: Path) -> Callable[..., Session]:
    """Returns a function that opens a session of the tiny model and data."""

    def open_it(*, with_test: bool = True, **data: Any) -> Session:
        return open_session(
            ModelConfig(name=str(tiny_model_folder), dtype="float32"),
            DataConfig(**{"train": str(tiny_data), "workers": 1, **data}),
            TrainingConfig(row_tokens=128),
            unheard,
            test=with_test,
        )

    return open_it


def test_a_session_has_test_rows_when_asked(opened: Callable[..., Session]) -> None:
    plain, study = opened(with_test=False, held_out=5), opened(held_out=5)
    assert plain.test is plain.base_test is None
    assert plain.held_out.fingerprint() == study.held_out.fingerprint()
    assert len(plain.train) == 55
    assert (len(study.train), len(study.test or ())) == (50, 5)
    assert study.base_test is not None
    losses = study.base_test.of(range(5))
    assert np.isfinite(losses).all()
    assert losses.tolist() == pytest.approx(study.engine.losses([NoAdapter()], study.test, range(5))[0].tolist())
    before, now = describe(plain)["data"], describe(study)["data"]
    assert [before[name] for name in ("test_rows", "test_digest", "test_supervised_tokens")] == [None] * 3
    assert study.test is not None
    assert now["test_rows"] == 5
    assert now["test_digest"] == study.test.digest() != now["held_out_digest"]
    assert now["test_supervised_tokens"] == study.test.counts().sum()


def test_another_version_that_reads_the_same_rows_may_go_on(
    opened: Callable[..., Session], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tokens are cached anew; what the rows say is what a run was begun with."""
    before = opened(held_out=5)
    monkeypatch.setattr("peft_study.data.tokens.code_digest", lambda *_: "of another version")
    now = opened(held_out=5)
    assert now.train.fingerprint() != before.train.fingerprint()
    assert describe(now)["data"]["train_digest"] == describe(before)["data"]["train_digest"]
    assert describe(now)["data"]["held_out_digest"] == describe(before)["data"]["held_out_digest"]
    assert describe(now)["data"]["test_digest"] == describe(before)["data"]["test_digest"]


def test_other_test_rows_are_refused(opened: Callable[..., Session], tmp_path: Path) -> None:
    path = tmp_path / "test.jsonl"
    folder = RunFolder(tmp_path / "out")
    folder.path.mkdir()
    write(path, [conversation(i) for i in range(100, 104)])
    folder.write_record(describe(opened(held_out=5, test=str(path))))
    refuse_other_inputs(describe(opened(held_out=5, test=str(path))), folder)
    write(path, [conversation(i) for i in range(101, 105)])
    with pytest.raises(OutputError, match="since this run began, the test rows changed"):
        refuse_other_inputs(describe(opened(held_out=5, test=str(path))), folder)


def test_sources_keep_their_proportions_in_a_session(opened: Callable[..., Session], tmp_path: Path) -> None:
    rows = [{**conversation(i), "source": "rare" if i % 5 == 0 else "common"} for i in range(50)]
    session = opened(train=str(write(tmp_path / "two.jsonl", rows)), held_out=10, test=5)
    for part, count in ((session.held_out, 2), (session.test, 1), (session.train, 7)):
        assert part is not None
        assert sum(data.sources[row] == "rare" for data, row in part.places) == count


@pytest.mark.parametrize("field", ["held_out", "test"])
def test_files_that_cannot_be_used(opened: Callable[..., Session], tmp_path: Path, field: str) -> None:
    empty = write(tmp_path / "empty.jsonl", [])
    broken = write(tmp_path / "broken.jsonl", [conversation(0), {"messages": []}])
    for path, words in (
        (empty, ("empty.jsonl: ", "; ")),
        (broken, ("broken.jsonl row 2: ", "messages")),
        (tmp_path / "no.jsonl", ("no.jsonl: no such file",)),
    ):
        with pytest.raises(UserError) as raised:
            opened(**{field: str(path)})
        line = str(raised.value)
        assert line.startswith(f"data.{field}, "), line
        assert line.count(path.name) == 1, line
        for word in words:
            assert word in line, line


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], ("held_out, ", "held.jsonl", "; ")),
        ([conversation(i) for i in range(60)], ("held_out: every row of ", "sums.jsonl", "held.jsonl", "other rows")),
    ],
    ids=["empty", "all-of-train"],
)
def test_finetune_with_a_bad_held_out_file(
    cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path, rows: list[Any], words: tuple[str, ...]
) -> None:
    held = write(tmp_path / "held.jsonl", rows)
    before = listing(tmp_path)
    line = cli(
        *("finetune", "--model_name_or_path", tiny_model_folder, "--train_file", tiny_data, "--use_lora"),
        *("--held_out", held, "--output_dir", tmp_path / "out", "--preprocessing_num_workers", 1),
    ).error()
    for word in words:
        assert word in line, line
    assert listing(tmp_path) == before
