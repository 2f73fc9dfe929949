"""Trains the runs of the doctor's cases with transformers' own Trainer, or with our program, on any model."""

from __future__ import annotations

import csv
import functools
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from cases_a_breaks import ROWS, break_model, break_saved, lose_optimizer, stale_optimizer
from cases_a_world import NAMES, encoded, messages, padded

KEPT_ARGUMENTS = """
    learning_rate lr_scheduler_type warmup_steps warmup_ratio max_steps num_train_epochs per_device_train_batch_size
    gradient_accumulation_steps max_grad_norm weight_decay optim adam_beta1 adam_beta2 bf16 fp16 seed logging_steps
    eval_strategy eval_steps label_smoothing_factor gradient_checkpointing
"""
COLUMNS = {
    "plain": {"step": "step", "loss": "loss", "rate": "lr"},
    "train": {"step": "global_step", "loss": "train_loss", "rate": "learning_rate", "norm": "grad_norm"},
    "bare": {"step": "iteration", "loss": "loss"},
}
"""Column names of the CSV and JSONL logs."""
WRONG_BASE = "/scratch/run17/merged-base"


def peft_config(case: dict[str, Any], base: Path) -> Any:
    """Returns the configuration of peft for a case; None for full fine-tuning."""
    import peft

    settings, kind = case["settings"], case["method"]
    tokens, common = settings.get("tokens", 8), {"task_type": "CAUSAL_LM"}
    if kind == "lora":
        rank = settings.get("rank", 8)
        return peft.LoraConfig(
            r=rank,
            lora_alpha=settings.get("alpha", 2 * rank),
            lora_dropout=settings.get("dropout", 0.0),
            target_modules=settings.get("targets", "all-linear"),
            **common,
        )
    if kind == "prompt_tuning":
        init = settings.get("init", "SAMPLE_VOCAB")
        text = {"prompt_tuning_init_text": settings.get("text"), "tokenizer_name_or_path": str(base)}
        return peft.PromptTuningConfig(
            num_virtual_tokens=tokens, prompt_tuning_init=init, **(text if init == "TEXT" else {}), **common
        )
    if kind == "prefix_tuning":
        return peft.PrefixTuningConfig(num_virtual_tokens=tokens, init_weights=settings.get("init", "zero"), **common)
    if kind == "ia3":
        return peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **common
        )
    return None


def load_model(case: dict[str, Any], base: Path, name: str) -> Any:
    """Returns the model of a case, with its adapter attached as the case's script does it, and the configuration."""
    import peft
    from transformers import AutoModelForCausalLM, set_seed

    settings, breaks = case["settings"], case["settings"].get("break", [])
    set_seed(case["seed"])
    dtype = getattr(torch, settings.get("dtype", "float32"))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    # what a user's files would name, and not this machine's folder
    model.config._name_or_path = model.name_or_path = name
    config = peft_config(case, base)
    if config is not None and "not_attached" not in breaks:
        model = peft.get_peft_model(model, config)
        config.base_model_name_or_path = name
        if hasattr(config, "tokenizer_name_or_path"):
            config.tokenizer_name_or_path = name
    if start := settings.get("warm_start"):
        _warm(model, start, encoder=None)
    return break_model(model, breaks), config


def _warm(model: Any, rows: list[dict[str, list[int]]], encoder: Any) -> None:
    """Trains an adapter beforehand, as one that somebody goes on with."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for step in range(200):
        loss = model(**padded(rows[16 * step % (len(rows) - 16) :][:16])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def arguments(case: dict[str, Any], folder: Path, device: str) -> Any:
    """Returns the TrainingArguments of a case."""
    from transformers import TrainingArguments

    settings, breaks = case["settings"], case["settings"].get("break", [])
    resumed, evaluate = settings.get("resume"), settings.get("eval")
    return TrainingArguments(
        output_dir=str(folder),
        learning_rate=settings["rate"],
        lr_scheduler_type=settings.get("schedule", "linear"),
        warmup_steps=settings.get("warmup", 0),
        max_steps=case["steps"],
        per_device_train_batch_size=settings.get("batch", 8),
        gradient_accumulation_steps=settings.get("accumulation", 1),
        max_grad_norm=settings.get("clip", 1.0),
        weight_decay=settings.get("decay", 0.0),
        optim=settings.get("optimizer", "adamw_torch"),
        logging_steps=settings.get("log", 10),
        logging_nan_inf_filter=settings.get("nan_filter", True),
        eval_strategy="steps" if evaluate else "no",
        eval_steps=evaluate,
        eval_on_start=bool(settings.get("eval_on_start")),
        per_device_eval_batch_size=32,
        save_strategy="steps" if resumed else "no",
        save_steps=resumed or 500,
        seed=case["seed"],
        train_sampling_strategy="sequential" if "sorted" in breaks else "random",
        use_cpu=device == "cpu",
        report_to=[],
        disable_tqdm=True,
    )


def make_trainer(case: dict[str, Any], parts: dict[str, Any], folder: Path, device: str) -> Any:
    """Returns the Trainer of a case."""
    from transformers import Trainer

    breaks, rate = case["settings"].get("break", []), case["settings"]["rate"]
    model, args = parts["model"], arguments(case, folder, device)
    optimizers: tuple[Any, Any] = (None, None)
    if "stale_optimizer" in breaks:
        optimizers = (stale_optimizer(model, rate), None)
    if "short_schedule" in breaks:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
        # the number of steps was counted before the accumulation
        end = case["steps"] / 8
        optimizers = (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / end)))
    return Trainer(
        model=model,
        args=args,
        train_dataset=parts["rows"],
        eval_dataset=_held_out(parts) if case["settings"].get("eval") else None,
        data_collator=functools.partial(padded, pad=parts["tokenizer"].pad_token_id),
        processing_class=parts["tokenizer"],
        optimizers=optimizers,
        callbacks=_callbacks(case),
    )


def _held_out(parts: dict[str, Any]) -> Any:
    """Returns the held-out rows; by source, where there is a second one."""
    return {"new": parts["held_out"], "style": parts["second"]} if "second" in parts else parts["held_out"]


def _callbacks(case: dict[str, Any]) -> list[Any]:
    """Returns the doctor's callback where the case has it and this version does."""
    if case["kind"] != "trainer":
        return []
    try:
        from peft_study.doctor.callback import DoctorCallback
    except ImportError:
        return []
    return [DoctorCallback(stop=False)]


def train_case(case: dict[str, Any], base: Path, sources: dict[str, Any], out: Path, device: str) -> None:
    """Trains one case with transformers' Trainer and leaves the files of a user in `out`.

    Args:
        case: a line of the cases' file.
        base: folder of the model.
        sources: rows, held_out (chats) and, for a warm start, warm.
        out: folder of the case.
        device: cpu or cuda.
    """
    from transformers import AutoTokenizer

    case = json.loads(json.dumps(case))
    settings, name = case["settings"], case.get("hub", NAMES.get(case["model"].removeprefix("tiny-"), ""))
    tokenizer = AutoTokenizer.from_pretrained(base)
    settings |= {"seed": case["seed"], "bos": tokenizer.bos_token_id}
    breaks, longest = settings.get("break", []), settings.get("longest")
    parts: dict[str, Any] = {"tokenizer": tokenizer}
    for part in sources:
        rows = encoded(sources[part], tokenizer)
        parts[part] = [{key: values[:longest] for key, values in row.items()} for row in rows] if longest else rows
    for one in breaks:
        for part in sources if one in ROWS else ():
            parts[part] = ROWS[one](parts[part], settings)
    settings["warm_start"] = parts.get("warm")
    parts["model"], config = load_model(case, base, name)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        trainer = make_trainer(case, parts, folder, device)
        if settings.get("resume"):
            trainer = _resumed(case, parts, trainer, folder, device, base, name)
        else:
            trainer.train()
        _leave(case, trainer, config, folder, out, lambda: load_model(case, base, name)[0])


def _resumed(case: dict[str, Any], parts: dict[str, Any], first: Any, folder: Path, device: str, *where: Any) -> Any:
    """Trains until a checkpoint, then goes on from it in a new Trainer, as after a crash; returns that one."""
    from transformers import TrainerCallback

    class Crash(TrainerCallback):  # type: ignore[misc]
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = True

    first.add_callback(Crash())
    first.train()
    if "optimizer_lost" in case["settings"].get("break", []):
        lose_optimizer(folder)
    parts["model"], _ = load_model(case, *where)
    again = make_trainer(case, parts, folder, device)
    again.args.save_strategy = "no"
    again.train(resume_from_checkpoint=str(folder / f"checkpoint-{case['settings']['resume']}"))
    return again


def _leave(case: dict[str, Any], trainer: Any, config: Any, folder: Path, out: Path, fresh: Any) -> None:
    """Writes what a user has after the run."""
    settings, breaks = case["settings"], case["settings"].get("break", [])
    out.mkdir(parents=True, exist_ok=True)
    if case["kind"] in ("csv", "jsonl"):
        _write_log(case["kind"], COLUMNS[settings.get("columns", "plain")], trainer.state.log_history, out)
        return
    trainer.state.save_to_json(str(out / "trainer_state.json"))
    said = json.loads(trainer.args.to_json_string())
    kept = {name: said[name] for name in KEPT_ARGUMENTS.split() if name in said}
    (out / "training_args.json").write_text(json.dumps(kept, indent=2))
    if (folder / "doctor.json").is_file():
        shutil.copy(folder / "doctor.json", out / "doctor.json")
    if config is not None and "not_attached" not in breaks:
        trainer.model.save_pretrained(folder / "adapter")
        break_saved(folder / "adapter", breaks, fresh)
        for name in ("adapter_config.json", *(["adapter_model.safetensors"] if settings.get("weights") else [])):
            shutil.copy(folder / "adapter" / name, out / name)


def _write_log(kind: str, columns: dict[str, str], history: list[dict[str, float]], out: Path) -> None:
    """Writes the losses as a training loop of one's own does."""
    names = {"step": "step", "loss": "loss", "rate": "learning_rate", "norm": "grad_norm"}
    rows = [{columns[key]: line.get(names[key]) for key in columns} for line in history if "loss" in line]
    if any("eval_loss" in line for line in history):
        held_out = {line["step"]: line["eval_loss"] for line in history if "eval_loss" in line}
        rows = [{**row, "val_loss": held_out.get(row[columns["step"]])} for row in rows]
    if kind == "jsonl":
        (out / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return
    with (out / "log.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def train_ours(case: dict[str, Any], base: Path, sources: dict[str, Any], out: Path) -> None:
    """Trains one case with our program, in a folder of its own, and leaves its run folder in `out`."""
    import peft_study

    settings, here = case["settings"], Path.cwd()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        name = NAMES[case["model"].removeprefix("tiny-")]
        shutil.copytree(base, place / name)
        for part, rows in sources.items():
            lines = [
                json.dumps({"id": f"{part}-{number}", "messages": messages(row), "source": row["source"]})
                for number, row in enumerate(rows)
            ]
            (place / f"{part}.jsonl").write_text("\n".join(lines) + "\n")
        # relative paths: the run folder names no place of this machine
        os.chdir(place)
        try:
            peft_study.finetune(
                name,
                {"train": [{"path": "rows.jsonl"}], "held_out": "held_out.jsonl", **settings.get("data", {})},
                {"method": case["method"], **settings["adapter"]},
                steps=case["steps"],
                output="run",
                verbose=False,
                training=settings.get("training", {}),
                logging={"tensorboard": False, "log_every": settings.get("log", 1), **settings.get("logging", {})},
            )
        finally:
            os.chdir(here)
        shutil.copytree(place / "run", out, ignore=shutil.ignore_patterns("checkpoints", "*.html", "*.png", "*.npz"))
        for path in out.rglob("*"):
            if path.suffix == ".safetensors" or path.name == "lock":
                path.unlink()
            elif path.is_file():
                path.write_text(path.read_text().replace(f"{place.resolve()}/", ""))
