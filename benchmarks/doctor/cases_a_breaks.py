"""The ways in which the doctor's cases are broken: each does to a training script what its users did to theirs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

Rows = list[dict[str, list[int]]]


def _shifted(rows: Rows, _: dict[str, Any]) -> Rows:
    """Labels moved by hand, though the model moves them too."""
    return [{**row, "labels": [*row["labels"][1:], -100]} for row in rows]


def _other_rows(rows: Rows, settings: dict[str, Any]) -> Rows:
    """Answers of other rows: two files that were shuffled apart."""
    order = np.random.default_rng(settings["seed"]).permutation(len(rows))
    made = []
    for row, other in zip(rows, order, strict=True):
        start = sum(label == -100 for label in row["labels"])
        answer = [label for label in rows[other]["labels"] if label != -100]
        made.append({"input_ids": row["input_ids"][:start] + answer, "labels": [-100] * start + answer})
    return made


def _no_end(rows: Rows, _: dict[str, Any]) -> Rows:
    """Answers without the end token."""
    return [{name: values[:-1] for name, values in row.items()} for row in rows]


def _double_bos(rows: Rows, settings: dict[str, Any]) -> Rows:
    """A BOS by the template and one by the tokenizer."""
    bos = settings["bos"]
    return [{"input_ids": [bos, *row["input_ids"]], "labels": [-100, *row["labels"]]} for row in rows]


def _cut(rows: Rows, settings: dict[str, Any]) -> Rows:
    """A maximal length that ends before most answers begin."""
    return [{name: values[: settings["max_length"]] for name, values in row.items()} for row in rows]


def _sorted(rows: Rows, _: dict[str, Any]) -> Rows:
    """Rows by their text; with the shuffle off, every epoch begins with one task and ends with another."""
    return sorted(rows, key=lambda row: row["input_ids"])


ROWS: dict[str, Callable[[Rows, dict[str, Any]], Rows]] = {
    "labels_shifted": _shifted,
    "answers_of_other_rows": _other_rows,
    "no_end_token": _no_end,
    "double_bos": _double_bos,
    "cut": _cut,
    "sorted": _sorted,
}
"""What a script does to its rows, those for training and the held-out ones."""


def break_model(model: Any, names: list[str]) -> Any:
    """Does what goes wrong between `get_peft_model` and the optimizer; returns the model."""
    if "base_unfrozen" in names:
        for parameter in model.parameters():
            parameter.requires_grad_(True)
    if "mean_of_means" in names:
        _count_blind(model.get_base_model())
    if "frozen" in names:
        # as after PeftModel.from_pretrained without is_trainable, with gradient checkpointing's input gradients
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model.enable_input_require_grads()
    return model


def _count_blind(base: Any) -> None:
    """Gives a base the forward of many models of one's own: no number of tokens reaches the loss."""
    kind = type(base)

    class OwnModel(kind):  # type: ignore[misc, valid-type]
        def forward(
            self,
            input_ids: Any = None,
            attention_mask: Any = None,
            inputs_embeds: Any = None,
            labels: Any = None,
            output_attentions: Any = None,
            output_hidden_states: Any = None,
            return_dict: Any = None,
        ) -> Any:
            return kind.forward(self, input_ids, attention_mask, inputs_embeds=inputs_embeds, labels=labels)

    base.__class__ = OwnModel


def stale_optimizer(model: Any, rate: float) -> torch.optim.Optimizer:
    """Returns an optimizer of parameters that the model no longer has: it was made before the adapter."""
    old = [p.detach().clone().requires_grad_() for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(old, lr=rate)


def lose_optimizer(folder: Path) -> None:
    """Deletes the optimizer's state from the checkpoints of a folder."""
    for name in ("optimizer.pt", "scheduler.pt"):
        for path in folder.glob(f"checkpoint-*/{name}"):
            path.unlink()


def break_saved(folder: Path, names: list[str], fresh: Callable[[], Any]) -> None:
    """Does what goes wrong when an adapter is saved.

    Args:
        folder: of the saved adapter.
        names: of the breaks.
        fresh: makes a new, untrained model with the adapter attached.
    """
    from safetensors.torch import load_file, save_file

    weights = folder / "adapter_model.safetensors"
    if "saved_another" in names:
        fresh().save_pretrained(folder)
    if "not_a_number" in names:
        tensors = load_file(weights)
        name = sorted(tensors)[len(tensors) // 2]
        tensors[name][0, :3] = float("nan")
        save_file(tensors, weights, metadata={"format": "pt"})
    if "rank_edited" in names:
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, "r": 2 * config["r"]}, indent=2))
