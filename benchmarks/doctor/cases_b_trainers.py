"""Cases of half B that a library trains (Trainer, TRL, our finetune), and folders of saved adapters."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from cases_b_loop import Run, measured, task_of, write_arguments
from cases_b_worlds import BOS, EOS, Pair, attach, base, collate, encode, fitting, held_out_loss, split

Case = dict[str, Any]


def with_library(case: Case, out: Path, *, model: Path | None, data: Path, work: Path, device: str) -> dict[str, Any]:
    """Trains a case in a fresh working folder, keeps what its user would show, and returns what was measured."""
    kind = {"ours": _ours, "adapter": _adapter}.get(case["kind"], _trained)
    place = work / "run"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    before = Path.cwd()
    os.chdir(place)
    try:
        return kind(case, out, base(case, model, data, work, device), data, device)
    finally:
        os.chdir(before)


def _trained(case: Case, out: Path, world: tuple[Any, Any], data: Path, device: str) -> dict[str, Any]:
    """Trains with Trainer or SFTTrainer."""
    built, tokenizer = world
    held = task_of({**case, "broken": None}, tokenizer, data).all_held
    untouched = held_out_loss(built, held, device)
    unattached = attach_as_broken(case, built, tokenizer)
    train, evaluation = (fitting(part[:1200], tokenizer, _fits(case)) for part in broken_pairs(case, data))
    os.environ["TENSORBOARD_LOGGING_DIR"] = "out/runs"
    make = _sft if case["kind"] == "trl" else _plain_trainer
    trainer = make(case, unattached[0], tokenizer, train, evaluation[:32])
    if case.get("callback"):
        from peft_study.doctor.callback import DoctorCallback

        trainer.add_callback(DoctorCallback(stop=False))
    start = held_out_loss(trainer.model, held, device)
    trainer.train()
    trainer.save_state()
    found = [(0, start), (case["steps"], held_out_loss(trainer.model, held, device))]
    _keep(case, trainer, out)
    history = trainer.state.log_history
    result = measured(untouched, found, history)
    result["eval"] = [[h["step"], round(h["eval_loss"], 4)] for h in history if "eval_loss" in h]
    return result


def _fits(case: Case) -> int:
    """Returns the tokens that a pair may have: the scripts leave out what does not fit, but for the one that cuts."""
    return 10_000 if case["broken"] == "truncate" else {"toolformer": 160, "codegen": 144}.get(case["data"], 112)


def attach_as_broken(case: Case, built: Any, tokenizer: Any) -> tuple[Any, Any]:
    """Returns the model that trains, and a configuration that was made and belongs to nothing."""
    from peft import PromptTuningConfig

    if case["broken"] == "not_attached":
        return built, PromptTuningConfig(num_virtual_tokens=8, task_type="CAUSAL_LM")
    wrapped = attach(case, built, tokenizer)
    if case["broken"] == "base_trains":
        for parameter in wrapped.parameters():
            parameter.requires_grad_(True)
    if case["broken"] == "adapter_frozen":
        for name, parameter in wrapped.named_parameters():
            parameter.requires_grad_("ln_f" in name)
    return wrapped, None


def broken_pairs(case: Case, data: Path) -> tuple[list[Pair], list[Pair]]:
    """Returns training and evaluation pairs as the user's script makes them."""
    train, held = split(case["data"], data, case["seed"], case.get("rows"))
    if case["broken"] != "shuffled_answers":
        return train, held
    answers = [answer for _, answer in train + held]
    random.Random(case["seed"]).shuffle(answers)
    wrong = [(question, answer) for (question, _), answer in zip(train + held, answers, strict=True)]
    return wrong[: len(train)], wrong[len(train) :]


def _arguments(case: Case) -> dict[str, Any]:
    """Returns what Trainer and SFTTrainer are both told."""
    return {
        "output_dir": "out",
        "max_steps": case["steps"],
        "learning_rate": case["rate"],
        "lr_scheduler_type": case["schedule"],
        "warmup_steps": case["warmup"],
        "per_device_train_batch_size": case["batch"],
        "max_grad_norm": case.get("clip", 1.0),
        "weight_decay": 0.0,
        "seed": case["seed"],
        "logging_steps": 1 if case["steps"] < 60 or case["seed"] % 2 else 5,
        "eval_strategy": "steps",
        "eval_steps": max(case["steps"] // 4, 1),
        "save_strategy": "no",
        "report_to": "tensorboard" if case["kind"] == "tensorboard" else "none",
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "bf16": False,
    }


def _plain_trainer(case: Case, model: Any, tokenizer: Any, train: list[Pair], held: list[Pair]) -> Any:
    from transformers import Trainer, TrainingArguments

    return Trainer(
        model=model,
        args=TrainingArguments(**_arguments(case), remove_unused_columns=False),
        train_dataset=[_encoded(case, pair, tokenizer) for pair in train],
        eval_dataset=[_encoded(case, pair, tokenizer) for pair in held],
        data_collator=lambda rows: _collated(case, rows),
        processing_class=tokenizer,
    )


def _encoded(case: Case, pair: Pair, tokenizer: Any) -> dict[str, list[int]]:
    if case["broken"] != "truncate":
        return encode(pair, tokenizer, 300)
    asked = tokenizer(f"Q: {pair[0]}\nA: ")["input_ids"]
    answered = tokenizer(pair[1], add_special_tokens=False)["input_ids"]
    labels = [-100] * len(asked) + answered
    return {"input_ids": (asked + answered)[: case["max_length"]], "labels": labels[: case["max_length"]]}


def _collated(case: Case, rows: list[Any]) -> dict[str, torch.Tensor]:
    batch = collate(rows, "cpu")
    if case["broken"] == "pad_supervised":
        batch["labels"] = batch["input_ids"].clone()
    if case["broken"] == "shift_labels":
        end = torch.full_like(batch["labels"][:, :1], -100)
        batch["labels"] = torch.cat([batch["labels"][:, 1:], end], 1)
    return batch


def _sft(case: Case, model: Any, tokenizer: Any, train: list[Pair], held: list[Pair]) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    def rows(pairs: list[Pair]) -> Any:
        first = "<s>" if case["broken"] == "double_bos" else ""
        if case.get("text_only"):
            return Dataset.from_list([{"text": f"{question}\n{answer}"} for question, answer in pairs])
        return Dataset.from_list([{"prompt": f"{first}Q: {q}\nA: ", "completion": a} for q, a in pairs])

    return SFTTrainer(
        model=model,
        args=SFTConfig(**_arguments(case), max_length=256),
        train_dataset=rows(train),
        eval_dataset=rows(held),
        processing_class=tokenizer,
    )


def _keep(case: Case, trainer: Any, out: Path) -> None:
    """Copies the log, the callback's file, arguments and configuration."""
    if case["kind"] == "tensorboard":
        for number, path in enumerate(sorted(Path("out/runs").rglob("events.*"))):
            shutil.copy(path, out / f"events.out.tfevents.17642{number:05d}.node.1.0")
    else:
        shutil.copy("out/trainer_state.json", out)
    if Path("out/doctor.json").exists():  # what was seen; what was said of it is made anew by who reads it
        seen = json.loads(Path("out/doctor.json").read_text())["observations"]
        (out / "doctor.json").write_text(json.dumps({"observations": seen}, indent=1) + "\n")
    write_arguments(case, out)
    if hasattr(trainer.model, "peft_config") and case["adapter_config"]:
        trainer.model.peft_config["default"].inference_mode = True
        trainer.model.peft_config["default"].save_pretrained(str(out))


def _adapter(case: Case, out: Path, world: tuple[Any, Any], data: Path, device: str) -> dict[str, Any]:
    """Trains a little, saves the adapter as peft does, and breaks what the case breaks."""
    built, tokenizer = world
    task = task_of(case, tokenizer, data)
    untouched = held_out_loss(built, task.all_held, device)
    wrapped = attach(case, built, tokenizer)
    run = Run(case, wrapped, task, device)
    run.whole()
    if case["broken"] == "nan":
        wrapped.peft_config["default"].base_model_name_or_path = "/mnt/models/llama-3layer-v2"
    wrapped.save_pretrained(str(out), save_embedding_layers=case["broken"] == "embeddings")
    (out / "README.md").unlink(missing_ok=True)
    if case["broken"] == "edited":
        path = out / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "r": 16}, indent=2) + "\n")
    return measured(untouched, run.measured, run.log.records)


_METHODS = {"lora": "--use_lora", "prompt_tuning": "--use_prompt_tuning", "prefix_tuning": "--use_prefix_tuning"}


def _ours(case: Case, out: Path, world: tuple[Any, Any], data: Path, device: str) -> dict[str, Any]:
    """Runs our own finetune and keeps the run's folder without weights and checkpoints."""
    built, tokenizer = world
    built.generation_config.eos_token_id, built.generation_config.bos_token_id = EOS, BOS
    built.save_pretrained("tiny-llama")
    tokenizer.save_pretrained("tiny-llama")
    train = fitting(split(case["data"], data, case["seed"], 1200)[0], tokenizer, 200)[:400]
    lines = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}], "id": str(number)}
        for number, (q, a) in enumerate(train)
    ]
    Path("train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [sys.executable, "-m", "peft_study", "finetune", "--model_name_or_path", "tiny-llama"]
    command += ["--train_file", "train.jsonl", "--output_dir", "out", "--held_out", "40", "--device", device]
    command += ["--max_train_steps", str(case["steps"]), "--learning_rate", str(case["rate"])]
    command += ["--per_device_train_batch_size", str(case["batch"]), "--lr_scheduler_type", case["schedule"]]
    command += [
        "--max_seq_length",
        "320",
        "--seed",
        str(case["seed"]),
        "--eval_steps",
        "20",
        "--logging_steps",
        "1",
        "--add_bos",
    ]
    command += [_METHODS[case["method"]], *_ours_method(case)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout[-1500:] + done.stderr[-1500:])
    _keep_ours(Path("out"), out)
    return {"said": [line for line in done.stdout.splitlines() if ": step " not in line]}


def _keep_ours(run: Path, out: Path) -> None:
    for path in sorted(run.rglob("*")):
        if path.is_file() and path.stat().st_size < 200_000 and "checkpoint" not in str(path):
            target = out / path.relative_to(run)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes().replace(str(Path.cwd()).encode(), b"/mnt/user"))


def _ours_method(case: Case) -> list[str]:
    name = {"prompt_tuning": "--prompt_init", "prefix_tuning": "--prefix_init"}.get(case["method"])
    if name is None:
        return ["--lora_rank", "8", "--warmup_ratio", "0.1"]
    text = ["--init_text", "Answer the question in few words."] if case["init"] == "text" else []
    return ["--num_virtual_tokens", str(case["tokens"]), name, case["init"], *text]
