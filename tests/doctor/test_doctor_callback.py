"""The callback in runs of transformers and TRL: it stops what is wrong, and leaves what is right as it is."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from peft_study.doctor.callback import DoctorCallback, curve_of, rows_that_train, some_batches
from peft_study.doctor.observations import from_json
from peft_study.doctor.rule import RULES
from peft_study.errors import UserError
from tiny_tokenizer import tiny_tokenizer
from tiny_world import model


def tokenizer() -> Any:
    made = tiny_tokenizer(320)
    made.pad_token = "<unk>"
    return made


def examples(count: int = 24) -> list[dict[str, list[int]]]:
    draw = np.random.default_rng(0)
    lines = [[*draw.integers(5, 320, size=int(draw.integers(6, 20))).tolist(), 2] for _ in range(count)]
    return [{"input_ids": line, "labels": [-100, -100, *line[2:]]} for line in lines]


def run(trained: Any, folder: Path, *callbacks: Any, rows: Any = None, **arguments: Any) -> Trainer:
    """Trains for 12 steps, each logged."""
    given = {"max_steps": 12, "learning_rate": 3e-4, "logging_steps": 1, "per_device_train_batch_size": 2} | arguments
    made = TrainingArguments(str(folder), report_to="none", save_strategy="no", disable_tqdm=True, **given)
    collator = DataCollatorForSeq2Seq(tokenizer())
    trainer = Trainer(trained, made, collator, rows or examples(), callbacks=list(callbacks))
    trainer.train()
    return trainer


def lora(**values: Any) -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(model(), peft.LoraConfig(task_type="CAUSAL_LM", **values))


def losses(trainer: Trainer) -> list[float]:
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


def weight_problems(doctor: DoctorCallback) -> list[str]:
    """Returns the problems on what trains: a run of a few steps on noise may have others."""
    assert doctor.diagnosis is not None
    return [problem.check for problem in doctor.diagnosis.problems if RULES[problem.check].kind == "weights"]


def test_a_run_that_trains_what_it_should_leaves_its_record(tmp_path: Path) -> None:
    doctor = DoctorCallback()
    trainer = run(lora(), tmp_path, doctor)
    assert weight_problems(doctor) == []
    kept = json.loads((tmp_path / "doctor.json").read_text())
    seen = from_json(kept["observations"])
    assert (seen.stage, seen.steps_done, seen.settings.method, seen.settings.total_steps) == ("after", 12, "lora", 12)
    assert seen.curve.loss.tolist() == losses(trainer)
    assert seen.curve.start_loss == seen.curve.base_loss > 0
    assert (seen.adapter.untouched, seen.adapter.bad) == (False, ())
    assert set(kept) > {"observations", "problems", "checked", "unchecked"}
    assert seen.data.rows == 24
    assert [path.name for path in tmp_path.iterdir()] == ["doctor.json"]


def with_dropout() -> Any:
    return lora(lora_dropout=0.3)


def prompt() -> Any:
    torch.manual_seed(0)
    return peft.get_peft_model(model(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))


class Noisy(DataCollatorForSeq2Seq):
    """Draws from every generator for each batch."""

    def __call__(self, features: Any, return_tensors: Any = None) -> Any:
        draws = (random.random(), np.random.rand(), float(torch.rand(())))
        batch = super().__call__(features, return_tensors)
        batch["input_ids"][:, 1] = 5 + int(sum(draws) * 100)
        return batch


@pytest.mark.parametrize("make", [with_dropout, prompt])
def test_a_run_with_the_callback_has_the_losses_of_one_without(make: Callable[[], Any], tmp_path: Path) -> None:
    def train(name: str, *callbacks: Any) -> list[float]:
        arguments = TrainingArguments(
            str(tmp_path / name),
            report_to="none",
            max_steps=20,
            logging_steps=1,
            per_device_train_batch_size=2,
            save_steps=7,
            learning_rate=1e-3,
            eval_strategy="steps",
            eval_steps=5,
            gradient_accumulation_steps=2,
            disable_tqdm=True,
        )
        rows = examples()
        trainer = Trainer(make(), arguments, Noisy(tokenizer()), rows[:20], rows[20:], callbacks=list(callbacks))
        trainer.train()
        return losses(trainer)

    alone = train("alone")
    assert train("seen", DoctorCallback(stop=False)) == alone
    assert len(set(alone)) > 10


def test_an_adapter_that_was_never_attached_stops_the_run_before_step_1(tmp_path: Path, capsys: Any) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    trained = model()
    before = {name: p.clone() for name, p in trained.named_parameters()}
    with pytest.raises(UserError, match="never attached") as told:
        run(trained, tmp_path, DoctorCallback())
    assert "PromptTuningConfig" in str(told.value)
    assert "get_peft_model(model, peft_config)" in str(told.value)
    assert all(torch.equal(p, before[name]) for name, p in trained.named_parameters())
    kept = json.loads((tmp_path / "doctor.json").read_text())
    assert kept["problems"][0]["check"] == "not_attached"
    with pytest.raises(UserError, match="适配器没有挂到模型上"):
        run(model(), tmp_path, DoctorCallback(language="zh"))
    # told once, and trained all the same
    trainer = run(model(), tmp_path, DoctorCallback(stop=False))
    assert capsys.readouterr().err.count("never attached") == 1
    assert len(losses(trainer)) == 12
    run(peft.get_peft_model(model(), config), tmp_path, DoctorCallback())


def test_weights_that_turn_to_nan_are_said_once(tmp_path: Path, capsys: Any) -> None:
    trained = lora()

    said_at: dict[int, int] = {}

    class Breaks(DoctorCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 8:
                with torch.no_grad():
                    next(p for n, p in trained.named_parameters() if "lora_B" in n)[0, 0] = float("nan")
            said_at[state.global_step] = len(self._said)

    doctor = Breaks(stop=False)
    run(trained, tmp_path, doctor, max_steps=40)
    assert said_at[35] > said_at[8]  # not only at the end
    assert capsys.readouterr().err.count("weights hold NaN") == 1
    assert doctor.diagnosis is not None
    assert "bad_weights" in {name for p in doctor.diagnosis.problems for name in (p.check, *p.effects)}


def test_an_adapter_that_stays_as_it_began_is_said(tmp_path: Path) -> None:
    doctor = DoctorCallback(stop=False)
    run(lora(), tmp_path, doctor, learning_rate=0.0)
    assert doctor.diagnosis is not None
    assert "untouched" in {name for p in doctor.diagnosis.problems for name in (p.check, *p.effects)}


def test_a_run_that_is_taken_up_again_knows_its_past(tmp_path: Path) -> None:
    arguments = {"save_strategy": "steps", "save_steps": 6, "max_steps": 12}

    def train(**more: Any) -> None:
        made = TrainingArguments(
            str(tmp_path),
            report_to="none",
            logging_steps=1,
            disable_tqdm=True,
            **arguments,  # type: ignore[arg-type]
        )
        collator = DataCollatorForSeq2Seq(tokenizer())
        Trainer(lora(), made, collator, examples(), callbacks=[DoctorCallback()]).train(**more)

    train()
    train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    seen = from_json(json.loads((tmp_path / "doctor.json").read_text())["observations"])
    assert seen.curve.resumed == (6,)
    assert seen.curve.steps.tolist() == list(range(1, 13))


def test_trl_runs_as_it_is(tmp_path: Path) -> None:
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": f"How many is {i}?", "completion": f" There are {i} apples."} for i in range(20)]
    made = SFTConfig(str(tmp_path), report_to="none", max_steps=4, logging_steps=1, disable_tqdm=True, bf16=False)
    doctor = DoctorCallback()
    SFTTrainer(
        model(),
        args=made,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
        peft_config=peft.LoraConfig(task_type="CAUSAL_LM"),
        callbacks=[doctor],
    ).train()
    assert weight_problems(doctor) == []
    seen = from_json(json.loads((tmp_path / "doctor.json").read_text())["observations"])
    assert (seen.data.rows, seen.data.no_end, seen.data.shifted, seen.data.unsupervised) == (20, 0, False, 0)
    assert 0 < seen.data.supervised < seen.data.tokens
    assert seen.data.max_length == made.max_length
    assert (seen.settings.method, seen.parameters.base_trainable) == ("lora", 0)


def test_batches_are_spread_over_the_data_and_a_stream_is_left_alone() -> None:
    loader: Any = DataLoader(list(range(1000)), batch_size=4, shuffle=True, collate_fn=list)  # type: ignore[arg-type]
    batches = some_batches(loader, 4)
    flat = [row for batch in batches for row in batch]
    assert len(batches) == 16
    assert (flat[0], flat[-1]) == (0, 999)
    assert np.diff(flat).min() > 10
    stream = IterableDataset.from_generator(lambda: iter([{"a": 1}]))
    assert some_batches(DataLoader(stream), 4) == []
    assert some_batches(None, 4) == []

    class Named(dict):  # type: ignore[type-arg]
        """A data set whose rows have names."""

    assert some_batches(DataLoader(Named(a=1), collate_fn=list), 4) == []  # type: ignore[arg-type]


def test_a_log_becomes_a_curve() -> None:
    history = [
        {"step": 10, "loss": 2.0, "grad_norm": 1.0, "learning_rate": 1e-3, "epoch": 0.1},
        {"step": 10, "eval_loss": 2.5, "epoch": 0.1},
        {"step": 20, "loss": 1.5, "learning_rate": 5e-4, "epoch": 0.2},
        {"step": 20, "train_runtime": 3.0, "train_loss": 1.75},
    ]
    curve = curve_of(history, None)
    assert (curve.steps.tolist(), curve.loss.tolist(), curve.window) == ([10, 20], [2.0, 1.5], 10)
    assert curve.rate is not None
    assert curve.rate.tolist() == [1e-3, 5e-4]
    assert curve.gradient_norm is not None
    assert np.isnan(curve.gradient_norm[1])
    assert curve.held_out_steps is not None
    assert curve.held_out_loss is not None
    assert (curve.held_out_steps.tolist(), curve.held_out_loss.tolist()) == ([10], [2.5])
    empty = curve_of([], None)
    assert (empty.steps.size, empty.rate, empty.held_out_loss) == (0, None, None)


def test_held_out_rows_that_train_are_found_at_the_first_evaluation(tmp_path: Path) -> None:
    rows, other = examples(24), [{**row, "input_ids": row["input_ids"][::-1]} for row in examples(8)]
    for held_out, told in ((rows[:8], True), (other, False)):
        doctor = DoctorCallback(stop=False)
        arguments = TrainingArguments(
            str(tmp_path), report_to="none", save_strategy="no", max_steps=6, eval_strategy="steps", eval_steps=3
        )
        collator = DataCollatorForSeq2Seq(tokenizer())
        Trainer(lora(), arguments, collator, rows, eval_dataset=held_out, callbacks=[doctor]).train()
        assert doctor.diagnosis is not None
        assert ("overlap" in {problem.check for problem in doctor.diagnosis.problems}) == told
        assert "overlap" in doctor.diagnosis.checked
    assert rows_that_train(DataLoader(rows), DataLoader([*rows[:2], *other[:2]])) == (2, 4)  # type: ignore[arg-type]
    assert rows_that_train(None, None) is None
