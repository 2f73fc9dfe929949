"""The plain training loop of half B, with what may be broken in it, and the logs that people write of such loops.

Keys of a recipe: rate, batch, accumulation, schedule, warmup (steps), optimizer, clip, rows (training rows), val (steps
between evaluations), epoch (logged), rate_logged, resume (step at which the run is taken up again), bump (step of a
strange batch), fp16, sources (each evaluated apart), arguments (json or yaml beside the log), broken (what is wrong).
"""

from __future__ import annotations

import copy
import csv
import json
import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from cases_b_worlds import attach, base, collate, encode, held_out_loss, split

Case = dict[str, Any]
LENGTH = {"smollm2": 64}


@dataclass
class Task:
    """Rows to train on, and rows held out by source."""

    train: list[Any]
    held: dict[str, list[Any]]

    @property
    def all_held(self) -> list[Any]:
        """All held-out rows."""
        return [row for rows in self.held.values() for row in rows]


@dataclass
class Scaler:
    """Loss scaling for fp16, as DeepSpeed's: a number of overflows (hysteresis) before the scale is halved."""

    scale: float
    hysteresis: int = 1
    overflows: int = 0
    good: int = 0

    def update(self, finite: bool) -> None:
        """Halves the scale after overflows, and doubles it after 100 good steps."""
        self.overflows, self.good = (0, self.good + 1) if finite else (self.overflows + 1, 0)
        if self.overflows >= self.hysteresis:
            self.scale, self.overflows = self.scale / 2, 0
        if self.good == 100:
            self.scale, self.good = self.scale * 2, 0


@dataclass
class Log:
    """Records of a run: one a step, and one an evaluation."""

    records: list[dict[str, Any]] = field(default_factory=list)

    def add(self, step: int, **values: Any) -> None:
        """Adds a record."""
        self.records.append({"step": step, **values})


def task_of(case: Case, tokenizer: Any, data: Path) -> Task:
    """Returns the encoded rows of a case."""
    length = LENGTH.get(case["model"], 96)
    train, held = split(case["data"], data, case["seed"], case.get("rows"))
    parts = {"": held}
    if case.get("sources"):
        found = {name: split(name, data, case["seed"]) for name in case["sources"]}
        parts = {name: each[1] for name, each in found.items()}
        if case["broken"] != "one_source":
            train = [pair for each in found.values() for pair in each[0][:1000]]
    if case["model"] == "smollm2":
        parts = {"": held[:16]}
    return Task(
        [encode(pair, tokenizer, length) for pair in train],
        {name: [encode(pair, tokenizer, length) for pair in rows] for name, rows in parts.items()},
    )


def batches(case: Case, rows: list[Any]) -> Any:
    """Yields micro-batches with the epoch, endlessly; `sorted`: never shuffled."""
    draw, epoch, size = random.Random(case["seed"]), 0, case["batch"]
    order, seen = list(range(len(rows))), 0
    while True:
        if case["broken"] != "sorted":
            draw.shuffle(order)
        for start in range(0, len(order) - size + 1, size):
            seen += size
            yield [rows[index] for index in order[start : start + size]], seen / len(rows)
        epoch += 1


def strange(rows: list[Any], seed: int) -> list[Any]:
    """Returns the rows with random tokens in their answers."""
    draw = random.Random(seed)
    return [{**row, "labels": [draw.randrange(3, 500) if label != -100 else -100 for label in row["labels"]]}
            for row in rows]  # fmt: skip


def optimizer_of(case: Case, model: Any) -> tuple[Any, Any]:
    """Returns optimizer and scheduler."""
    from transformers import get_scheduler

    owner = copy.deepcopy(model) if case["broken"] == "optimizer_of_a_copy" else model
    trained = [p for p in owner.parameters() if p.requires_grad]
    if case.get("optimizer") == "sgd":
        optimizer: Any = torch.optim.SGD(trained, lr=case["rate"])
    else:
        optimizer = torch.optim.AdamW(trained, lr=case["rate"], weight_decay=0.0)
    return optimizer, get_scheduler(case["schedule"], optimizer, case["warmup"], case["steps"])


class Run:
    """One training of a case."""

    def __init__(self, case: Case, model: Any, task: Task, device: str) -> None:
        self.case, self.model, self.task, self.device = case, model, task, device
        self.log, self.measured = Log(), []
        self.optimizer, self.scheduler = optimizer_of(case, model)
        self.stream = batches(case, task.train)
        hysteresis = 8 if case["broken"] == "hysteresis" else 1
        self.scaler = Scaler(2.0**40 if hysteresis > 1 else 2.0**20, hysteresis)
        self.fp16 = bool(case.get("fp16")) or hysteresis > 1

    def whole(self) -> None:
        """Trains to the end, over a break where there is one."""
        self.evaluate(0)
        first = self.trained()
        resume = self.case.get("resume", 0)
        for step in range(1, (resume or self.case["steps"]) + 1):
            self.step(step)
        if resume:
            saved = self.trained(), self.optimizer.state_dict(), self.scheduler.state_dict()
            saved = copy.deepcopy(saved)
            for step in range(resume + 1, resume + 7):
                self.step(step)
            self.optimizer, self.scheduler = optimizer_of(self.case, self.model)
            self.scheduler.load_state_dict(saved[2])
            if self.case["broken"] != "fresh_after_resume":
                self.optimizer.load_state_dict(saved[1])
            for group in self.optimizer.param_groups:
                group["lr"] = saved[2]["_last_lr"][0]
            self.restore(first if self.case["broken"] == "fresh_after_resume" else saved[0])
            for step in range(resume + 1, self.case["steps"] + 1):
                self.step(step)

    def trained(self) -> dict[str, Any]:
        """Returns a copy of what trains."""
        return {name: p.detach().clone() for name, p in self.model.named_parameters() if p.requires_grad}

    def restore(self, saved: dict[str, Any]) -> None:
        """Puts back what `trained` returned."""
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if name in saved:
                    p.copy_(saved[name])

    def step(self, step: int) -> None:
        """One optimizer step, and its record."""
        case, count = self.case, self.case.get("accumulation", 1)
        rate, loss, epoch = self.optimizer.param_groups[0]["lr"], 0.0, 0.0
        self.model.train()
        for _ in range(count):
            rows, epoch = next(self.stream)
            if case.get("bump") and case["bump"] <= step <= case["bump"] + (case["batch"] > 4):
                rows = strange(rows, step)
            with torch.autocast(self.device, torch.float16, enabled=self.fp16):
                out = self.model(**collate(rows, self.device)).loss / count
            (out * (self.scaler.scale if self.fp16 else 1.0)).backward()
            loss += float(out.detach())
            if case["broken"] == "scheduler_per_microbatch":
                self.scheduler.step()
        norm = self.update()
        if case["broken"] != "scheduler_per_microbatch":
            self.scheduler.step()
        values = {"loss": loss, "rate": rate, "norm": norm, "epoch": epoch}
        if self.fp16:
            values["scale"] = self.scaler.scale
        self.log.add(step, **values)
        if step % (case.get("val") or max(case["steps"] // 5, 1)) == 0 or step == case["steps"]:
            self.evaluate(step)

    def update(self) -> float:
        """Clips, steps and clears; returns the gradient's norm before clipping."""
        trained = [p for p in self.model.parameters() if p.requires_grad and p.grad is not None]
        if self.fp16:
            for p in trained:
                p.grad.div_(self.scaler.scale)
        clip = self.case.get("clip", 1.0)
        norm = float(torch.nn.utils.clip_grad_norm_(trained, math.inf if clip is None else clip))
        if not self.fp16 or math.isfinite(norm):
            self.optimizer.step()
        if self.fp16:
            self.scaler.update(math.isfinite(norm))
        self.model.zero_grad()
        return norm

    def evaluate(self, step: int) -> None:
        """Measures the held-out loss; it reaches the log where the recipe has `val`."""
        found = {name: held_out_loss(self.model, rows, self.device) for name, rows in self.task.held.items()}
        one = len(found) == 1
        value = found[""] if one else held_out_loss(self.model, self.task.all_held, self.device)
        self.measured.append((step, value))
        if self.case.get("val"):
            self.log.add(step, held=found)


def plain(case: Case, out: Path, *, model: Path | None, data: Path, work: Path, device: str) -> dict[str, Any]:
    """Trains a case, writes its folder, and returns what was measured."""
    built, tokenizer = base(case, model, data, work, device)
    task = task_of(case, tokenizer, data)
    untouched = held_out_loss(built, task.all_held, device)
    wrapped = attach(case, built, tokenizer)
    run = Run(case, wrapped, task, device)
    run.whole()
    write_log(case, run.log.records, out)
    write_arguments(case, out)
    if case["method"] != "full" and case["adapter_config"]:
        config = copy.deepcopy(wrapped.peft_config["default"])
        config.inference_mode = True
        config.save_pretrained(str(out))
    return measured(untouched, run.measured, run.log.records)


def measured(untouched: float, found: list[tuple[int, float]], records: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the numbers by which a case's label is judged; they are not in the case's folder."""
    losses = [r["loss"] for r in records if "loss" in r]
    return {
        "base": round(untouched, 4),
        "held_out": [[step, round(value, 4)] for step, value in found],
        "first": [round(x, 3) for x in losses[:3]],
        "last": [round(x, 3) for x in losses[-3:]],
    }


_NAMES: dict[str, list[dict[str, str]]] = {
    "jsonl": [
        {"step": "step", "loss": "train_loss", "rate": "lr", "norm": "grad_norm", "val": "val_loss"},
        {"step": "global_step", "loss": "loss", "rate": "learning_rate", "norm": "grad_norm", "val": "eval_loss"},
        {"step": "global_step", "loss": "train/loss", "rate": "train/lr", "val": "val/loss"},
    ],
    "csv": [
        {"step": "global_step", "loss": "train_loss", "rate": "lr", "norm": "grad_norm", "val": "val_loss"},
        {"step": "step", "loss": "loss", "rate": "learning_rate", "val": "eval_loss"},
        {"step": "iter", "loss": "train_loss", "rate": "lr", "norm": "gnorm", "val": "val_loss"},
    ],
}


def write_log(case: Case, records: list[dict[str, Any]], out: Path) -> None:
    """Writes a log as one of six people would: other column names, every step or the mean of five."""
    style = case["seed"] % 3
    names = {**_NAMES[case["kind"]][style], "scale": "loss_scale"}
    if case.get("epoch") or style == 1:
        names["epoch"] = "epoch"
    if case.get("rate_logged", True) is False:
        names.pop("rate")
    every = 5 if style == 1 and case["batch"] > 1 and case["steps"] > 60 and not case.get("fp16") else 1
    rows = named(records, names, every)
    if case["kind"] == "jsonl":
        (out / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with (out / ("metrics.csv" if style else "train_log.csv")).open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def named(records: list[dict[str, Any]], names: dict[str, str], every: int) -> list[dict[str, Any]]:
    """Returns the records under a person's column names; evaluations join the row of their step where there is one."""
    rows: list[dict[str, Any]] = []
    window: list[float] = []
    for record in records:
        step = {names["step"]: record["step"]}
        if "held" in record:
            values = {f"{names['val']}{'_' if key else ''}{key}": short(v) for key, v in record["held"].items()}
            if rows and rows[-1][names["step"]] == record["step"]:
                rows[-1].update(values)
            elif record["step"] or "norm" in names:
                rows.append({**step, **values})
            continue
        window.append(record["loss"])
        if record["step"] % every == 0:
            shown = {**record, "loss": sum(window) / len(window)}
            rows.append({**step, **{names[key]: short(shown[key]) for key in record if key in names and key != "step"}})
            window = []
    return rows


def short(value: float) -> float:
    """Returns a number as a log has it: five digits."""
    return float(f"{value:.5g}")


def write_arguments(case: Case, out: Path) -> None:
    """Writes the training arguments where such a user would have them."""
    if not case["arguments"]:
        return
    clip = case.get("clip", 1.0)
    values = {
        "output_dir": "out",
        "learning_rate": case["rate"],
        "lr_scheduler_type": case["schedule"],
        "warmup_steps": case["warmup"],
        "max_steps": case["steps"],
        "per_device_train_batch_size": case["batch"],
        "gradient_accumulation_steps": case.get("accumulation", 1),
        "max_grad_norm": 0.0 if clip is None else clip,
        "weight_decay": 0.0,
        "optim": case.get("optimizer") or "adamw_torch",
        "fp16": bool(case.get("fp16")) or case["broken"] == "hysteresis",
        "bf16": False,
        "seed": case["seed"],
    }
    if case["arguments"] == "json":
        (out / "training_args.json").write_text(json.dumps(values, indent=2) + "\n")
        return
    lines = [f"{key}: {json.dumps(value)}" for key, value in values.items()]
    (out / "training_args.yaml").write_text("\n".join(lines) + "\n")
