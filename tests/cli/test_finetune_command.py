"""`peft-study finetune` on a tiny model: what it prints, writes, refuses and goes on with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from command_line import CommandLine, Ran, listing
from peft_study.engine.engine import Engine
from peft_study.storage.metrics import read
from peft_study.storage.run_dir import RunFolder

METHODS = {
    "--use_lora": ("lora", ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]),
    "--use_prefix_tuning": ("prefix_tuning", ["table"]),
    "--use_prompt_tuning": ("prompt_tuning", ["embeddings"]),
}


@pytest.fixture
def flags(tiny_model_folder: Path, tiny_data: Path) -> tuple[Any, ...]:
    """Returns a short run without its method and output folder."""
    return (
        *("finetune", "--model_name_or_path", tiny_model_folder, "--train_file", tiny_data, "--max_train_steps", 3),
        *("--per_device_train_batch_size", 4, "--dtype", "float32"),
    )


@pytest.mark.parametrize("flag", METHODS)
def test_one_run(cli: CommandLine, flags: tuple[Any, ...], tmp_path: Path, flag: str) -> None:
    method, modules = METHODS[flag]
    out = tmp_path / "out"
    ran = cli(*flags, flag, "--output_dir", out, "--with_tracking", "--report_to", "tensorboard").ok()
    assert "parameters train" in ran.out
    assert "step 0: held-out loss" in ran.out
    assert "against the untouched base" in ran.out
    assert f"peft-study chat {out / 'adapter'}" in ran.out
    assert ran.err == ""

    config = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == method.upper()
    assert set(listing(out / "adapter")) == {
        *("adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "peft_study.json")
    }
    assert not any("embed_tokens" in name for name in load_file(out / "adapter" / "adapter_model.safetensors"))

    records = read(out / "metrics.jsonl")
    assert [r["step"] for r in records if r["event"] == "train"] == [1, 2, 3]
    held_out = {r["step"]: r for r in records if r["event"] == "held_out"}
    assert sorted(held_out) == [0, 1, 2, 3]
    assert held_out[0]["examples"] == 6
    assert held_out[0]["loss_low"] < held_out[0]["loss"] < held_out[0]["loss_high"]
    for record in records:
        if record["event"] == "train":
            assert record["supervised_tokens"] < record["tokens"]
            assert record["gradient_norm"] > 0
            assert record["tokens_per_second"] > 0
            assert record["peak_memory_bytes"] > 0
    assert list((out / "tensorboard").glob("events.out.tfevents.*"))

    parameters = json.loads((out / "parameters.json").read_text())
    assert list(parameters["by_module"]) == modules
    assert sum(parameters["by_module"].values()) == parameters["trainable"] < parameters["total"]
    record = json.loads((out / "record.json").read_text())
    assert record["data"]["held_out_rows"] == 6
    assert record["data"]["train_rows"] == 54
    assert record["packages"]["peft"]
    given = json.loads((out / "config.given.json").read_text())
    assert given["max_train_steps"] == 3
    assert "num_train_epochs" not in given
    assert RunFolder(out).status() == ("finished", None)


def test_tensorboard_holds_what_the_lines_hold(cli: CommandLine, flags: tuple[Any, ...], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "out"
    cli(*flags, "--use_lora", "--output_dir", out, "--with_tracking", "--report_to", "tensorboard").ok()
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    losses = [(e.step, e.value) for e in events.Scalars("train/loss")]
    lines = [(r["step"], r["loss"]) for r in read(out / "metrics.jsonl") if r["event"] == "train"]
    assert losses == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in lines]
    assert [e.step for e in events.Scalars("held_out/minus_base")] == [0, 1, 2, 3]


@pytest.mark.parametrize("report_to", [(), ("--with_tracking", "--report_to", "none")], ids=["off", "none"])
def test_no_event_files_unless_asked(cli: CommandLine, flags: tuple[Any, ...], tmp_path: Path, report_to: Any) -> None:
    cli(*flags, "--use_lora", "--output_dir", tmp_path / "out", *report_to).ok()
    assert not (tmp_path / "out" / "tensorboard").exists()
    assert read(tmp_path / "out" / "metrics.jsonl")


def test_full_fine_tuning(cli: CommandLine, flags: tuple[Any, ...], tmp_path: Path, tiny_model_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    ran = cli(*flags, "--output_dir", tmp_path / "out", "--learning_rate", "1e-4").ok()
    assert "WARNING: no method flag is given: ALL weights of the model are trained" in ran.out
    parameters = json.loads((tmp_path / "out" / "parameters.json").read_text())
    assert parameters["trainable"] == parameters["total"]
    before = AutoModelForCausalLM.from_pretrained(tiny_model_folder).state_dict()
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "adapter").state_dict()
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) > 10


def _stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """Makes the process get SIGINT in its n-th step, as from Ctrl-C."""
    import os
    import signal

    whole, count = Engine.step, [0]

    def step(self: Engine) -> Any:
        count[0] += 1
        if count[0] == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return whole(self)

    monkeypatch.setattr(Engine, "step", step)


@pytest.mark.parametrize("flag", [*METHODS, "--full"])
def test_stopped_and_started_again_is_the_same_run(
    cli: CommandLine, flags: tuple[Any, ...], tmp_path: Path, flag: str
) -> None:
    method = () if flag == "--full" else (flag,)
    words = (*flags, *method, "--max_train_steps", 6, "--checkpointing_steps", 2, "--lora_dropout", "0.1")
    name = "model.safetensors" if flag == "--full" else "adapter_model.safetensors"
    cli(*words, "--output_dir", tmp_path / "whole").ok()
    with pytest.MonkeyPatch.context() as patched:
        _stop_after(patched, 4)
        stopped = cli(*words, "--output_dir", tmp_path / "cut")
    assert stopped.code == 130
    assert stopped.err.strip().startswith("stopped at step ")
    assert "Traceback" not in stopped.err
    status = RunFolder(tmp_path / "cut").status()
    assert status is not None
    assert status[0] == "interrupted"
    assert not (tmp_path / "cut" / "adapter").exists()

    again = cli(*words, "--output_dir", tmp_path / "cut").ok()
    assert "resumes at step " in again.out
    whole, cut = (load_file(tmp_path / run / "adapter" / name) for run in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    for key, tensor in whole.items():
        assert torch.equal(tensor, cut[key]), key
    assert _numbers(tmp_path / "whole") == _numbers(tmp_path / "cut")


def _numbers(run: Path) -> list[tuple[Any, ...]]:
    """Returns what a run measured, without its times."""
    return [(r["event"], r["step"], r["loss"], r.get("gradient_norm")) for r in read(run / "metrics.jsonl")]


def test_resume_from_checkpoint(cli: CommandLine, flags: tuple[Any, ...], tmp_path: Path) -> None:
    words = (*flags, "--use_lora", "--max_train_steps", 6, "--checkpointing_steps", 2)
    first = tmp_path / "first"
    cli(*words, "--output_dir", first).ok()
    checkpoint = first / "checkpoints" / "step_4"
    ran = cli(*words, "--output_dir", tmp_path / "second", "--resume_from_checkpoint", checkpoint).ok()
    assert "resumes at step 4 of 6" in ran.out
    one, two = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (first, tmp_path / "second"))
    assert all(torch.equal(tensor, two[key]) for key, tensor in one.items())

    third = tmp_path / "third"
    line = cli(*words, "--lora_rank", 8, "--output_dir", third, "--resume_from_checkpoint", checkpoint).error()
    assert "other settings" in line
    assert not third.exists()
    manifest = checkpoint / "slot-0.safetensors"
    manifest.write_bytes(manifest.read_bytes()[:-1] + b"x")
    line = cli(*words, "--output_dir", third, "--resume_from_checkpoint", checkpoint).error()
    assert "the checkpoint is damaged; resume from an earlier one" in line


@pytest.mark.parametrize(("keep", "left"), [(1, ["step_6"]), (2, ["step_4", "step_6"]), (-1, None)])
def test_keep_last_n_checkpoints(
    cli: CommandLine, flags: tuple[Any, ...], tmp_path: Path, keep: int, left: list[str] | None
) -> None:
    words = ("--max_train_steps", 6, "--checkpointing_steps", 2, "--keep_last_n_checkpoints", keep)
    cli(*flags, "--use_prompt_tuning", *words, "--output_dir", tmp_path / "out").ok()
    found = sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir())
    assert found == (["step_2", "step_4", "step_6"] if left is None else left)


def test_keeping_no_checkpoint_is_refused(cli: CommandLine, flags: tuple[Any, ...], tmp_path: Path) -> None:
    words = ("--keep_last_n_checkpoints", 0, "--output_dir", tmp_path / "out")
    line = cli(*flags, "--use_prompt_tuning", *words).error()
    assert "--keep_last_n_checkpoints: 0 is not at least 1, or -1 for all" in line


def test_checkpoints_of_epochs(cli: CommandLine, flags: tuple[Any, ...], tmp_path: Path) -> None:
    # 54 rows in batches of 27: two steps an epoch
    words = ("--max_train_steps", 4, "--per_device_train_batch_size", 27, "--checkpointing_steps", "epoch")
    cli(*flags, "--use_prompt_tuning", *words, "--output_dir", tmp_path / "out").ok()
    assert sorted(path.name for path in (tmp_path / "out" / "checkpoints").iterdir()) == ["step_2", "step_4"]


def test_folder_of_another_run(cli: CommandLine, flags: tuple[Any, ...], tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = (*flags, "--use_prompt_tuning", "--output_dir", out)
    cli(*words).ok()
    before = listing(tmp_path)

    line = cli(*words).error()
    assert f"{out}: holds a finished run of these settings; " in line
    assert "--overwrite_output_dir" in line
    line = cli(*words, "--learning_rate", "0.2").error()
    assert f"{out}: holds another run, with other settings; " in line
    assert "--overwrite_output_dir" in line
    assert listing(tmp_path) == before

    cli(*words, "--learning_rate", "0.2", "--overwrite_output_dir").ok()
    resolved = json.loads((out / "config.resolved.json").read_text())
    assert resolved["training"]["learning_rate"] == 0.2

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")
    for more in ((), ("--overwrite_output_dir",)):
        line = cli(*flags, "--use_prompt_tuning", "--output_dir", mine, *more).error()
        assert f"{mine}: holds files that are no run; give an empty folder" in line
    assert list(listing(mine)) == ["thesis.txt"]


def test_yaml_with_overrides(cli: CommandLine, tmp_path: Path, tiny_model_folder: Path, tiny_data: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model_name_or_path: {tiny_model_folder}\ntrain_file: {tiny_data}\nuse_prompt_tuning: true\n"
        "learning_rate: 5e-2\nmax_train_steps: 2\nnum_virtual_tokens: 4\nseed: 3\n"
    )
    cli("finetune", path, f"--output_dir={tmp_path / 'out'}", "--num_virtual_tokens=6").ok()
    resolved = json.loads((tmp_path / "out" / "config.resolved.json").read_text())
    assert resolved["method"]["tokens"] == 6
    assert resolved["training"]["learning_rate"] == 5e-2
    assert resolved["training"]["seed"] == 3


def _lines(ran: Ran, text: str) -> int:
    return sum(text in line for line in ran.out.splitlines())


def test_notes_are_said_once(cli: CommandLine, flags: tuple[Any, ...], tmp_path: Path) -> None:
    launch = ("--use_deepspeed", "--num_processes", 2, "--mixed_precision", "bf16")
    ran = cli(*flags, *launch, "--use_lora", "--output_dir", tmp_path / "a").ok()
    assert _lines(ran, "mean over the supervised tokens of the whole batch") == 1
    assert _lines(ran, "gradients are clipped at 1") == 1
    assert _lines(ran, "4 x 1 x 2 = 8 examples a step") == 1
    summed = ("--reduce_loss", "sum", "--gradient_accumulation_steps", 2, "--hf_entity", "me", "--push_to_hub")
    ran = cli(*flags, "--use_prompt_tuning", *summed, "--output_dir", tmp_path / "b").ok()
    assert _lines(ran, "the sum over the batch / 2 accumulation steps, logged per token") == 1
    assert _lines(ran, "--push_to_hub, --hf_entity (hub upload)") == 1
    for record in read(tmp_path / "b" / "metrics.jsonl"):
        if record["event"] == "train":
            assert record["reduced_loss"] == pytest.approx(record["loss"] * record["supervised_tokens"] / 2, rel=1e-5)


def test_rates_out_of_range_are_warned_of(cli: CommandLine, flags: tuple[Any, ...], tmp_path: Path) -> None:
    ran = cli(*flags, "--use_prompt_tuning", "--learning_rate", "1e-4", "--output_dir", tmp_path / "a").ok()
    text = (
        "WARNING: the learning rate is too low for prompt tuning: 0.0001, and prompt tuning is known to learn between"
    )
    assert _lines(ran, f"{text} 0.001 and 3") == 1
    ran = cli(*flags, "--use_prompt_tuning", "--output_dir", tmp_path / "b", "--max_train_steps", 20).ok()
    assert _lines(ran, "WARNING") == 0
    resolved = json.loads((tmp_path / "b" / "config.resolved.json").read_text())
    assert resolved["training"]["learning_rate"] == 0.05


def test_divergence_is_named(cli: CommandLine, flags: tuple[Any, ...], tmp_path: Path) -> None:
    words = ("--use_lora", "--learning_rate", "1e30", "--max_train_steps", 10, "--warmup_ratio", 0)
    ran = cli(*flags, *words, "--output_dir", tmp_path / "out")
    assert ran.code == 1
    status = RunFolder(tmp_path / "out").status()
    assert status is not None
    assert status[0] == "diverged"
    assert status[1]
    assert status[1] in ran.out
    assert not (tmp_path / "out" / "adapter").exists()


def test_gradient_checkpointing_changes_no_number(cli: CommandLine, flags: tuple[Any, ...], tmp_path: Path) -> None:
    for flag in METHODS:
        plain, less = tmp_path / f"{flag}-plain", tmp_path / f"{flag}-less"
        cli(*flags, flag, "--output_dir", plain).ok()
        cli(*flags, flag, "--gradient_checkpointing", "--output_dir", less).ok()
        for (_, step, one, _), (_, _, two, _) in zip(_numbers(plain), _numbers(less), strict=True):
            assert two == pytest.approx(one, rel=1e-5), (flag, step)


def test_held_out_file_and_row_tokens(
    cli: CommandLine, flags: tuple[Any, ...], tmp_path: Path, tiny_data: Path
) -> None:
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text("".join(tiny_data.read_text().splitlines(keepends=True)[:5]))
    ran = cli(*flags, "--use_lora", "--held_out", held_out, "--row_tokens", 64, "--output_dir", tmp_path / "out").ok()
    assert _lines(ran, "5 training rows equal a held-out row and were left out") == 1
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert record["data"]["held_out_rows"] == 5
    assert record["data"]["train_rows"] == 55
    assert record["engine"]["row_tokens"] == 64
