"""Trains examples/rising_loss.py without the doctor in each of its states; made docs/rising-loss.json.

    python docs/rising_loss.py docs/rising-loss.json [STEPS]

Each curve has the loss of every step, on the same batches in the same order; `base` is the untouched base on them.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from rising_loss import train

from peft_study.model.load import resolve_model

RUNS: dict[str, dict[str, Any]] = {
    "never attached, 1e-4": {},
    "attached, 1e-4": {"attach": True},
    "attached, 0.1": {"attach": True, "rate": 0.1},
}


def main(target: Path, steps: int = 60) -> None:
    """Writes the curves."""
    base = str(resolve_model("smollm2-135m-instruct"))
    found: dict[str, Any] = {
        "command": "python docs/rising_loss.py docs/rising-loss.json",
        "steps": steps,
        "curves": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, values in RUNS.items():
            trainer = train(base, steps=steps, output=folder, **values)
            lines = [line for line in trainer.state.log_history if "loss" in line]
            found["curves"][name] = [round(float(line["loss"]), 4) for line in lines]
            if "base" not in found["curves"] and values:
                found["curves"] = {"base": base_losses(trainer), **found["curves"]}
            target.write_text(json.dumps(found) + "\n")


@torch.no_grad()
def base_losses(trainer: Any) -> list[float]:
    """Returns the losses of the model under a prompt that is switched off, on the batches of a run."""
    model = trainer.model.eval()
    with model.disable_adapter():
        return [round(float(model(**batch.to(model.device)).loss), 4) for batch in trainer.get_train_dataloader()]


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
