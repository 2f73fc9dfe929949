"""What trials share: what initialisations draw on, and the untouched base's losses in the cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tiny_world
from command_line import conversation
from peft_study.config import DataConfig, ModelConfig, TrainingConfig
from peft_study.methods import Material
from peft_study.storage.cache_dir import cache_root
from peft_study.training.session import Session, open_session, unheard
from tiny_tokenizer import CHAT_TEMPLATE, tiny_tokenizer, with_bos

BOS = 1
Open = Callable[..., Session]


@pytest.fixture
def opened(tmp_path: Path, tiny_model_folder: Path, tiny_data: Path) -> Open:
    """Returns a function that opens a session of the tiny model, with a tokenizer that puts BOS first by itself."""
    model = tmp_path / "model"
    shutil.copytree(tiny_model_folder, model)
    with_bos(tiny_tokenizer(tiny_world.VOCABULARY)).save_pretrained(model)

    def open_it(*, seed: int = 0, **data: Any) -> Session:
        return open_session(
            ModelConfig(name=str(model), device="cpu", dtype="float32"),
            DataConfig(**{"train": str(tiny_data), "held_out": 5, "workers": 1, **data}),
            TrainingConfig(data_seed=seed, row_tokens=128),
            unheard,
        )

    return open_it


def test_texts_begin_with_bos_where_the_examples_do(opened: Open, tmp_path: Path) -> None:
    without = opened()
    assert BOS not in without.material.text_tokens(None, 20)
    assert without.material.text_tokens("Follow me", 20)[:2] == without.material.encode("Follow me")[:2]
    template = tmp_path / "own.jinja"
    template.write_text("{{ bos_token }}" + CHAT_TEMPLATE)
    for behind in (opened(add_bos=True), opened(chat_template=str(template))):
        for text in (None, "Follow me"):
            ids = behind.material.text_tokens(text, 20)
            assert (ids[0], ids[1:].count(BOS)) == (BOS, 0)
            assert ids[1:] != without.material.text_tokens(text, 20)[1:]
        assert behind.train[0].tokens_L[0] == BOS
        assert behind.material.text_tokens("Follow me", 20)[1:] == without.material.text_tokens("Follow me", 19)


def sorted_by_source(path: Path) -> Path:
    """Writes 2,600 rows, of which the last 500 are the only ones that say Z."""
    rows = [conversation(i) for i in range(2600)]
    for row in rows[2100:]:
        row["messages"][0]["content"] = "ZZZZ " + row["messages"][0]["content"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_initialisations_draw_on_rows_from_everywhere(opened: Open, tmp_path: Path) -> None:
    data = sorted_by_source(tmp_path / "sorted.jsonl")
    material = opened(train=str(data)).material
    letter = material.encode("Z")[-1]
    counted = int(material.counts_V[letter])
    assert 4 * 300 < counted < 4 * 500  # of 2,000 of 2,595 rows
    assert letter in list(material.opening)


def test_the_seed_of_the_data_decides_which(opened: Open, tmp_path: Path) -> None:
    data = sorted_by_source(tmp_path / "sorted.jsonl")

    def said(material: Material) -> tuple[list[int], list[int]]:
        return list(material.opening), material.counts_V.tolist()

    first, again, other = (opened(train=str(data), held_out=1, seed=seed).material for seed in (3, 3, 4))
    assert said(first) == said(again)
    assert first.opening != other.opening
    assert first.counts_V.tolist() != other.counts_V.tolist()


def test_losses_of_the_base_are_kept_by_device(opened: Open) -> None:
    session = opened()
    session.base_held_out.of(range(5))
    session.base_held_out.save()
    digest = session.held_out.fingerprint()[:24]
    assert [path.name.rsplit("-", 2)[1:] for path in (cache_root() / "base-losses").glob(f"{digest}-*.npy")] == [
        ["cpu", "float32.npy"]
    ]
