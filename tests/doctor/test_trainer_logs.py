"""Logs of Hugging Face's Trainer and of TensorBoard, and what lies beside them."""

from __future__ import annotations

import gzip
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from peft_study.doctor.observations import (
    DataCounts,
    LossCurve,
    Observations,
    ParameterCounts,
    UsedSettings,
    to_json,
)
from peft_study.doctor.readers.logs import read_log
from peft_study.doctor.readers.training_args import settings_of
from peft_study.errors import UserError


def state(folder: Path, *, steps: int = 100, every: int = 10, ended: bool = True, **more: Any) -> Path:
    """Writes a trainer_state.json as TRL's trainer does."""
    folder.mkdir(parents=True, exist_ok=True)
    history: list[dict[str, Any]] = []
    for step in range(every, steps + 1, every):
        history.append(
            {"loss": 3 - step / 100, "grad_norm": 1.5, "learning_rate": 1e-4 * (1 - step / 200), "epoch": step / 50,
             "entropy": 1.0, "mean_token_accuracy": 0.5, "num_tokens": 99.0, "step": step}
        )  # fmt: skip
        if step % 50 == 0:
            history.append({"eval_loss": 2.9, "eval_runtime": 1.0, "eval_mean_token_accuracy": 0.6, "step": step})
    if ended:
        history.append({"train_loss": 9.0, "train_runtime": 7.0, "total_flos": 1.0, "step": steps})
    values = {"epoch": 2.0, "global_step": steps, "log_history": history, "logging_steps": every, "max_steps": 100,
              "num_input_tokens_seen": 0, "train_batch_size": 4, **more}  # fmt: skip
    path = folder / "trainer_state.json"
    path.write_text(json.dumps(values, indent=2))
    return path


def test_the_state_of_a_trainer(tmp_path: Path) -> None:
    seen = read_log(state(tmp_path))
    curve = seen.curve
    assert curve is not None
    assert (seen.stage, seen.steps_done, seen.settings.total_steps) == ("after", 100, 100)
    assert curve.steps.tolist() == list(range(10, 101, 10))
    assert curve.loss == pytest.approx(3 - curve.steps / 100)  # and not the summary's 9
    assert curve.window == 10
    assert curve.gradient_norm is not None
    assert curve.epoch is not None
    assert curve.held_out_steps is not None
    assert curve.epoch[-1] == 2
    assert curve.held_out_steps.tolist() == [50, 100]
    assert curve.accuracy is None
    assert curve.notes == ()
    assert "--training-args" in seen.reasons["settings.clip_norm"][0]


def test_columns_of_a_state_that_are_given(tmp_path: Path) -> None:
    curve = read_log(state(tmp_path), columns={"loss": "entropy"}).curve
    assert curve is not None
    assert set(curve.loss) == {1.0}


def test_losses_of_several_data_sets(tmp_path: Path) -> None:
    path = state(tmp_path)
    values = json.loads(path.read_text())
    values["log_history"] = [line for line in values["log_history"] if "eval_loss" not in line]
    for step in (50, 100):
        for name, loss in (("code", 1.0), ("chat_new", step / 50)):
            values["log_history"].append({f"eval_{name}_loss": loss, f"eval_{name}_runtime": 1.0, "step": step})
    path.write_text(json.dumps(values))
    curve = read_log(path).curve
    assert curve is not None
    assert curve.source_loss is not None
    assert curve.held_out_loss is not None
    assert {name: losses.tolist() for name, losses in curve.source_loss.items()} == {"code": [1, 1], "chat_new": [1, 2]}
    assert curve.held_out_loss.tolist() == [1.0, 1.5]
    assert curve.notes == ("the held-out loss is the mean of its data sets' losses, each counted alike",)


def test_a_run_that_still_runs_and_its_checkpoints(tmp_path: Path) -> None:
    for steps in (20, 80, 40):
        state(tmp_path / f"checkpoint-{steps}", steps=steps, ended=False)
    (tmp_path / "checkpoint-90").mkdir()
    seen = read_log(tmp_path)
    assert (seen.stage, seen.steps_done) == ("during", 80)
    state(tmp_path)
    assert read_log(tmp_path).steps_done == 100
    assert read_log(tmp_path / "checkpoint-40").steps_done == 40
    state(tmp_path / "checkpoint-120", steps=120, ended=False)
    assert read_log(tmp_path).steps_done == 120, "it went on after its end"


def test_logging_steps_as_a_share_and_a_log_in_one_line(tmp_path: Path) -> None:
    path = state(tmp_path, logging_steps=0.1)
    path.write_text(json.dumps(json.loads(path.read_text())))
    curve = read_log(path).curve
    assert curve is not None
    assert (curve.window, len(curve.steps)) == (10, 10)
    path.with_suffix(".json.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert read_log(path.with_suffix(".json.gz")).steps_done == 100


def test_broken_states(tmp_path: Path) -> None:
    path = state(tmp_path)
    whole = path.read_text()
    path.write_text(whole[: whole.index('"eval_loss"')])
    seen = read_log(path)
    assert seen.curve is not None
    assert seen.curve.steps.tolist() == [10, 20, 30, 40, 50]
    assert any("cut off" in note for note in seen.curve.notes)
    values = json.loads(whole)
    values["log_history"] = [7, {"loss": 1.0}, {"step": "3", "loss": "1.5"}, {"step": 4, "loss": None},
                             {"step": 5, "loss": math.nan}]  # fmt: skip
    path.write_text(json.dumps(values))
    seen = read_log(path)
    assert seen.curve is not None
    assert seen.curve.steps.tolist() == [3, 5]
    assert "2 lines of log_history have no step: they are left out" in seen.curve.notes
    values["log_history"] = []
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="holds no loss yet"):
        read_log(path)
    (tmp_path / "training_args.json").write_text('{"learning_rate": 1e-4}')
    seen = read_log(path)
    assert seen.curve is None
    assert "nothing is logged yet" in seen.reasons["curve"][0]
    path.write_text('{"log_history": null}')
    with pytest.raises(UserError, match="has no list log_history"):
        read_log(path)


def test_what_lies_beside_a_log(tmp_path: Path) -> None:
    state(tmp_path)
    (tmp_path / "training_args.bin").write_bytes(b"\x80\x04never loaded")
    seen = read_log(tmp_path)
    assert "training_args.bin is a pickle and is not loaded" in seen.reasons["settings.warmup_steps"][0]
    assert "不会加载" in seen.reasons["settings"][1]
    assert seen.settings.learning_rate == pytest.approx(0.95e-4)  # the highest of the log
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 8, "lora_alpha": 16}')
    (tmp_path / "training_args.yaml").write_text(
        "learning_rate: 1e-4\nwarmup_ratio: 0.05\nlr_scheduler_type: linear\nper_device_train_batch_size: 4\n"
        "gradient_accumulation_steps: 2\nworld_size: 2\nmax_grad_norm: 0\noptim: adamw_torch\nbf16: true\n"
    )
    settings = read_log(tmp_path).settings
    assert settings == UsedSettings(
        method="lora", rank=8, alpha=16, learning_rate=1e-4, warmup_steps=5, total_steps=100, schedule="linear",
        batch_size=16, accumulation=2, clip_norm=math.inf, optimizer="adamw_torch", compute_dtype="bfloat16",
    )  # fmt: skip
    other = tmp_path / "other.json"
    other.write_text('{"learning_rate": 0.5}')
    assert read_log(tmp_path, training_args=other).settings.learning_rate == 0.5
    other.write_text("learning_rate")
    with pytest.raises(UserError, match="neither JSON nor YAML"):
        read_log(tmp_path, training_args=other)
    with pytest.raises(UserError, match="cannot be read"):
        read_log(tmp_path, training_args=tmp_path / "none.json")
    with pytest.raises(UserError, match="is no file of training arguments"):
        read_log(tmp_path, training_args=tmp_path / "training_args.bin")


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        ({"use_lora": True, "lora_rank": 64, "lora_alpha": 16, "reduce_loss": "mean", "gradient_accumulation_steps": 4,
          "clip_grad_norm": -1, "learning_rate": "1e-4"},
         {"method": "lora", "rank": 64, "alpha": 16, "mean_of_means": True, "accumulation": 4, "clip_norm": math.inf,
          "learning_rate": 1e-4}),
        ({"adapter": "qlora", "lora_r": 32, "micro_batch_size": 2, "num_processes": 1, "optimizer": "adamw_bnb_8bit"},
         {"method": "lora", "rank": 32, "accumulation": 1, "batch_size": 2, "optimizer": "adamw_bnb_8bit"}),
        ({"peft_config": {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 20, "prompt_tuning_init": "RANDOM"},
          "fp16": True, "warmup_steps": 0.1, "max_steps": 50, "lr_scheduler_type": "SchedulerType.COSINE"},
         {"method": "prompt_tuning", "tokens": 20, "init": "random", "compute_dtype": "float16", "warmup_steps": 5,
          "total_steps": 50, "schedule": "cosine"}),
        ({"max_steps": -1, "warmup_ratio": 0.1, "max_grad_norm": 1.0, "learning_rate": None}, {"clip_norm": 1.0}),
        ({"learning_rate": True, "weight_decay": "x", "seed": 3}, {}),
    ],
)  # fmt: skip
def test_names_of_other_tools(arguments: dict[str, Any], settings: dict[str, Any]) -> None:
    assert settings_of(arguments)[0] == settings


def test_what_our_callback_saw(tmp_path: Path) -> None:
    live = Observations(
        stage="after",
        steps_done=90,
        settings=UsedSettings(method="lora", learning_rate=2e-4, parameter_dtype="float32"),
        parameters=ParameterCounts(base=100, base_trainable=0, adapter=8, adapter_trainable=8),
        data=DataCounts(rows=7),
        curve=LossCurve(steps=np.array([1.0]), loss=np.array([9.0]), start_loss=3.5, unigram_loss=2.75),
        reasons={"adapter": ("why", "为何")},
    )
    (tmp_path / "doctor.json").write_text(json.dumps({"observations": to_json(live), "problems": []}))
    alone = read_log(tmp_path)
    assert (alone.steps_done, alone.parameters, alone.data) == (90, live.parameters, live.data)
    state(tmp_path)
    (tmp_path / "training_args.json").write_text('{"learning_rate": 1e-4}')
    seen = read_log(tmp_path)
    assert seen.curve is not None
    assert (len(seen.curve.steps), seen.curve.start_loss, seen.curve.unigram_loss) == (10, 3.5, 2.75)
    assert (seen.settings.learning_rate, seen.settings.parameter_dtype, seen.steps_done) == (1e-4, "float32", 100)
    assert (seen.parameters, seen.data, seen.reasons["adapter"]) == (live.parameters, live.data, ("why", "为何"))
    (tmp_path / "doctor.json").write_text("{")
    broken = read_log(tmp_path).curve
    assert broken is not None
    assert any("doctor.json cannot be read" in note for note in broken.notes)


def test_folders_without_a_log(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no log; looked for trainer_state\.json, checkpoint"):
        read_log(tmp_path)
    for name in ("a.jsonl", "b.csv"):
        (tmp_path / name).write_text("step,loss\n1,2\n")
    with pytest.raises(UserError, match=r"holds 2 logs; give one of them: a\.jsonl, b\.csv"):
        read_log(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"messages": []}\n')  # data beside the log
    assert read_log(tmp_path).steps_done == 1
    with pytest.raises(UserError, match=re.escape(f"is not there; did you mean {tmp_path / 'b.csv'}?")):
        read_log(tmp_path / "bb.csv")


def events(folder: Path, values: dict[str, list[tuple[int, float]]]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder)) as writer:
        for tag, series in values.items():
            for step, value in series:
                writer.add_scalar(tag, value, step)
        writer.add_text("args", "{}")
        writer.add_histogram("weights", np.arange(5.0))


def test_event_files(tmp_path: Path) -> None:
    loss = [(step, 2.0**-step) for step in range(1, 9)]
    values = {"train/loss": loss, "train/learning_rate": [(step, 0.25) for step, _ in loss], "eval/loss": [(4, 0.5)],
              "train/grad_norm": [(step, 1.0) for step, _ in loss], "train/train_loss": [(8, 9.0)]}  # fmt: skip
    events(tmp_path / "runs" / "first", values)
    (tmp_path / "runs" / "first" / "1700.5").mkdir()
    events(tmp_path / "runs" / "first" / "1700.5", {"hparam": [(0, 1.0)]})
    seen = read_log(tmp_path)
    assert seen.curve is not None
    assert seen.curve.rate is not None
    assert seen.curve.held_out_loss is not None
    assert seen.curve.loss.tolist() == [2.0**-step for step in range(1, 9)]
    assert set(seen.curve.rate) == {0.25}
    assert seen.curve.held_out_loss.tolist() == [0.5]
    assert seen.curve.resumed == ()
    assert seen.settings.learning_rate == 0.25
    path = next(path for path in (tmp_path / "runs" / "first").glob("*tfevents*"))
    assert read_log(path).steps_done == 8
    path.write_bytes(path.read_bytes()[:400])  # a run that still writes
    cut = read_log(path).curve
    assert cut is not None
    assert 1 <= len(cut.steps) < 8
    path.write_bytes(b"")
    with pytest.raises(UserError, match="holds no loss"):
        read_log(path)
    events(tmp_path / "runs" / "second", values)
    with pytest.raises(UserError, match="holds 2 runs; give the folder of one: runs/first, runs/second"):
        read_log(tmp_path)


def test_event_files_of_keras_and_ours(tmp_path: Path) -> None:
    events(tmp_path / "keras" / "train", {"epoch_loss": [(0, 2.0), (1, 1.0)]})
    events(tmp_path / "keras" / "validation", {"epoch_loss": [(0, 2.5), (1, 1.5)]})
    keras = read_log(tmp_path / "keras").curve
    assert keras is not None
    assert keras.held_out_loss is not None
    assert (keras.loss.tolist(), keras.held_out_loss.tolist()) == ([2, 1], [2.5, 1.5])
    values = {"held_out/loss": [(0, 2.0), (3, 1.0)], "held_out/minus_base": [(0, 0.0), (3, -1.0)],
              "train/loss": [(1, 2.0), (2, 1.5), (3, 1.0)], "train/loss_minus_base": [(1, 0.0), (3, -1.0)]}  # fmt: skip
    events(tmp_path / "ours", values)
    ours = read_log(tmp_path / "ours").curve
    assert ours is not None
    assert ours.minus_base is not None
    assert np.isnan(ours.minus_base).tolist() == [False, True, False]
    assert (ours.base_loss, ours.start_loss) == (2.0, 2.0)


def test_the_loss_of_grpo_is_not_judged(tmp_path: Path) -> None:
    history = [{"step": n, "loss": n / 1000, "reward": 0.1, "kl": 0.01} for n in range(1, 40)]
    seen = read_log(state(tmp_path, log_history=history))
    assert seen.curve is None
    assert "rewards" in seen.reasons["curve"][0]


def test_llama_factorys_arguments_and_values_that_are_no_numbers() -> None:
    found, notes = settings_of({"finetuning_type": "lora", "lora_rank": 8, "learning_rate": "fast", "max_steps": 10})
    assert (found["method"], found["rank"], found["total_steps"]) == ("lora", 8, 10)
    assert "learning_rate" not in found
    assert notes == ["learning_rate is 'fast', which is no number: it is left out"]
