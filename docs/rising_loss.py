"""Trains examples/rising_loss.py without the doctor in each of its states; made docs/rising-loss.json and its picture.

    python docs/rising_loss.py docs/rising-loss.json [STEPS]     # 8 minutes on two cores

Each curve has the loss of every step, on the same batches in the same order; `base` is the untouched base on them. The
picture shows means of ten steps. Where the file is there with as many steps, only the picture is drawn again. The
picture of the second case is drawn from its recorded losses, where they lie beside the project.
"""

from __future__ import annotations

import csv
import json
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import altair as alt
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from rising_loss import train

from peft_study.model.load import resolve_model
from peft_study.report.chart_style import PALETTE
from peft_study.storage.picture import write_picture

RUNS: dict[str, dict[str, Any]] = {
    "never attached, 1e-4": {},
    "attached, 1e-4": {"attach": True},
    "attached, 0.1": {"attach": True, "rate": 0.1},
}

RECORDED = Path(__file__).resolve().parents[2] / "shared/references/recorded/soft-prompt-curves-2026-11-25.csv"
MEAN_OF = 10
"""Steps that a point of the picture averages: single batches of four differ too much from each other."""


def main(target: Path, steps: int = 60) -> None:
    """Writes the curves where they are not there, and the pictures beside them."""
    if not target.exists() or json.loads(target.read_text())["steps"] != steps:
        measure(target, steps)
    points = [
        {"run": "untouched base" if name == "base" else name, "step": end, "loss": fmean(losses[end - MEAN_OF : end])}
        for name, losses in json.loads(target.read_text())["curves"].items()
        for end in range(MEAN_OF, len(losses) + 1, MEAN_OF)
    ]
    picture(
        points,
        title="Prompt tuning, 8 tokens, SmolLM2-135M: never attached, and attached at two rates",
        loss=f"training loss, mean of {MEAN_OF} steps (nats a token)",
        colours=["#696978", *PALETTE[:3]],
        path=target.with_suffix(".svg"),
    )
    if RECORDED.exists():
        picture(
            recorded(),
            title="Prompt tuning, 8 tokens, SmolLM2-135M, MAWPS: the same batches at three rates (recorded)",
            loss="training loss of a batch of 4 (nats a token)",
            colours=[PALETTE[0], PALETTE[2], PALETTE[1]],
            path=target.with_name("rising-loss-attached.svg"),
        )


def recorded() -> list[dict[str, Any]]:
    """Returns the losses of the second case, and of the rates on either side of it."""
    with RECORDED.open() as file:
        rows = [row for row in csv.DictReader(file) if row["event"] == "train" and row["tokens"] == "8"]
    return [
        {"run": f"rate {float(row['learning_rate']):g}", "step": int(row["step"]), "loss": float(row["loss"])}
        for row in sorted(rows, key=lambda row: float(row["learning_rate"]))
        if row["method"] == "prompt_tuning" and float(row["learning_rate"]) in (0.03, 0.1, 0.3)
    ]


def picture(points: list[dict[str, Any]], *, title: str, loss: str, colours: list[str], path: Path) -> None:
    """Draws a curve for each run of the points."""
    names = list(dict.fromkeys(point["run"] for point in points))
    base = alt.Chart(alt.InlineData(values=points), width=520, height=260)
    encoded = base.encode(
        x=alt.X("step:Q", title="optimizer step", scale=alt.Scale(domain=[0, max(p["step"] for p in points)])),
        y=alt.Y("loss:Q", title=loss, scale=alt.Scale(zero=False)),
        color=alt.Color("run:N", title=None, sort=names, scale=alt.Scale(domain=names, range=colours)),
        shape=alt.Shape("run:N", title=None, sort=names, scale=alt.Scale(domain=names)),
    )
    chart = encoded.mark_line(strokeWidth=2) + encoded.mark_point(filled=True, size=50)
    chart = chart.properties(title=alt.Title(title, anchor="start"), background="white", padding=12)
    write_picture(chart.configure_legend(orient="right", labelLimit=240).to_dict(), path)


def measure(target: Path, steps: int) -> None:
    """Trains, and writes the curves."""
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
