"""What the rows of the studies say: every number of docs/findings.md, in studies/summary.json, and its pictures.

    make findings          # reads studies/*/*.parquet; nothing is trained

A method's rows become a Gaussian process (scikit-learn) over its settings, for each data set. The best rate at some
tokens, steps and batch is where a draw of the process is least; its interval holds 80 % of the draws. Shares of
variance are Sobol indices of the mean surface (scipy): `alone` is the main effect, `with others` adds interactions.
"""

from __future__ import annotations

import json
import warnings
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
from experiment import BATCHES, HERE, INITS, POINTS, RANKS, RATES, SETS, STEPS, TOKENS, WARMUP, WEIGHT_DECAY
from numpy.typing import NDArray
from scipy.stats import sobol_indices, uniform
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

from peft_study.report.chart_style import PALETTE
from peft_study.storage.picture import write_picture

Floats = NDArray[np.float64]
DOCS = HERE.parent / "docs"
SUMMARY = HERE / "summary.json"
WORST = 0.5
"""Nats above the base at which a loss is cut: how bad a broken run is says nothing of the best rate."""
LEARNED, BROKEN = -0.05, 0.05
"""Nats against the base from which a run has learned, or is worse than no training."""
FEWEST = 16
"""Rows of a method that a surface takes."""
GRID = 121
DRAWS = 400


def rows() -> pd.DataFrame:
    """Returns a row a trial of all blocks that are there."""
    found = []
    for name in SETS:
        for path in sorted((HERE / name).glob("block-*.parquet")):
            frame = pd.read_parquet(path)
            frame["data"], frame["block"] = name, path.stem
            found.append(frame[frame["kind"] == "search"])
    table = pd.concat(found, ignore_index=True)
    table["steps"] = table["planned_steps"]
    table["method"] = table["method"].str.rsplit("-", n=1).str[0]
    table["size"] = table["tokens"].fillna(table["rank"])
    table["gain"] = table["dev_minus_base"].astype(float)
    table["broke"] = (table["status"] != "finished") | ~np.isfinite(table["gain"])
    table.loc[table["broke"], "gain"] = WORST
    table["gain"] = table["gain"].clip(upper=WORST)
    return table


class Surface:
    """The held-out loss against the base as a function of the settings of a method; all inputs lie between 0 and 1.

    Args:
        method: whose rows they are.
        table: of `rows`, of one method and data set.
    """

    def __init__(self, method: str, table: pd.DataFrame) -> None:
        self.method = method
        self.names = ["learning_rate", "rank" if method == "lora" else "tokens"]
        self.names += ["warmup_ratio", "weight_decay", "batch_size", "steps"]
        self.inits = INITS.get(method, ())
        inputs = self.inputs(
            table["learning_rate"], table["size"], table["warmup_ratio"], table["weight_decay"], table["batch_size"],
            table["steps"], table["init"],
        )  # fmt: skip
        lengths = [0.3] + [1.0] * (inputs.shape[1] - 1)
        kernel = ConstantKernel(0.1) * RBF(lengths, (0.05, 20.0)) + WhiteKernel(1e-3, (1e-5, 0.1))
        self.process = GaussianProcessRegressor(kernel, normalize_y=True, n_restarts_optimizer=2, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            self.process.fit(inputs, table["gain"])

    def inputs(self, rate: Any, size: Any, warmup: Any, decay: Any, batch: Any, steps: Any, init: Any = None) -> Floats:
        """Returns points as inputs of the process: N rows."""
        sizes = RANKS if self.method == "lora" else TOKENS
        columns = [
            _part(np.log(np.asarray(rate, float)), *np.log(RATES)),
            _part(np.log(np.asarray(size, float)), *np.log(sizes)),
            np.asarray(warmup, float) / WARMUP,
            np.asarray(decay, float) / WEIGHT_DECAY,
            _part(np.log(np.asarray(batch, float)), *np.log((BATCHES[0], BATCHES[-1]))),
            _part(np.log(np.asarray(steps, float)), *np.log((STEPS[0], STEPS[-1]))),
        ]
        columns += [(np.asarray(init) == name).astype(float) for name in self.inits]
        return np.column_stack(np.broadcast_arrays(*columns))

    def over_rates(self, *, size: float, batch: int, steps: int, init: str | None) -> Floats:
        """Returns the inputs along all rates at one setting, with warm-up 0.05 and no decay."""
        return self.inputs(rates(), size, 0.05, 0.0, batch, steps, init)

    def best_rate(self, **at: Any) -> dict[str, float]:
        """Returns the best rate at one setting with its interval, the gain there, and where a run would break."""
        inputs = self.over_rates(**at)
        draws = self.process.sample_y(inputs, DRAWS, random_state=0)
        low, middle, high = np.quantile(rates()[draws.argmin(axis=0)], [0.1, 0.5, 0.9])
        mean = self.process.predict(inputs)
        best = int(mean.argmin())
        near = rates()[mean <= mean[best] + 0.02 * abs(mean[best])]
        return {"best": middle, "low": low, "high": high, "gain": float(mean[best]), "from": near[0], "to": near[-1]}

    def shares(self) -> dict[str, dict[str, float]]:
        """Returns the share of the surface's variance that each setting has alone, and with others."""
        groups = len(self.names) + bool(self.inits)

        def value(points: Floats) -> Floats:
            inputs = points[: len(self.names)].T
            if self.inits:
                place = np.minimum((points[-1] * len(self.inits)).astype(int), len(self.inits) - 1)
                inputs = np.column_stack([inputs, np.eye(len(self.inits))[place]])
            return np.asarray(self.process.predict(inputs))

        found = sobol_indices(func=value, n=1024, dists=[uniform()] * groups, rng=0)
        names = [*self.names, "init"][:groups]
        return {
            name: {"alone": float(alone), "with others": float(whole)}
            for name, alone, whole in zip(names, found.first_order, found.total_order, strict=True)
        }


def _part(values: Floats, low: float, high: float) -> Floats:
    return (values - low) / (high - low)


def rates() -> Floats:
    """Returns the rates of a picture's axis."""
    return np.geomspace(*RATES, GRID)


def of_method(method: str, table: pd.DataFrame) -> dict[str, Any]:
    """Returns the key figures of a method on a data set."""
    best = table.loc[table["gain"].idxmin()]
    found: dict[str, Any] = {
        "trials": len(table),
        "learned": int((table["gain"] < LEARNED).sum()),
        "broken": int((table["broke"] | (table["gain"] > BROKEN)).sum()),
        "best": {name: _known(best[name]) for name in ("learning_rate", "size", "init", "batch_size", "steps", "gain")},
    }
    if len(table) < FEWEST:
        return found
    surface = Surface(method, table)
    sizes = (4, 16, 64) if method == "lora" else (2, 8, 30, 100)
    found["rates"] = [
        {"size": size, "init": init, "steps": steps, "batch_size": 8, **surface.best_rate(
            size=size, init=init, steps=steps, batch=8)}
        for size in sizes for init in (INITS.get(method) or (None,)) for steps in (STEPS[0], STEPS[-1])
    ]  # fmt: skip
    found["shares"] = surface.shares()
    return found


def _known(value: Any) -> Any:
    """Returns a cell of the table; None where it is empty."""
    return None if pd.isna(value) else value


def summary(table: pd.DataFrame) -> dict[str, Any]:
    """Returns the key figures."""
    found: dict[str, Any] = {"blocks": sorted({f"{d}/{b}" for d, b in zip(table["data"], table["block"], strict=True)})}
    for name in SETS:
        part = table[table["data"] == name]
        found[name] = {
            method: of_method(method, part[part["method"] == method])
            for method in POINTS
            if (part["method"] == method).any()
        }
    return found


def draw(table: pd.DataFrame) -> None:
    """Draws the gain of every trial against its rate: a column a method, a row a data set."""
    shown = table[["data", "method", "learning_rate", "gain", "steps", "broke"]].to_dict("records")
    base = alt.Chart(alt.InlineData(values=shown), width=230, height=180)
    chart = base.mark_point(filled=True, size=40, opacity=0.8).encode(
        x=alt.X("learning_rate:Q", title="learning rate", scale=alt.Scale(type="log", domain=list(RATES))),
        y=alt.Y("gain:Q", title="held-out loss against the base (nats a token)"),
        color=alt.Color(
            "steps:O", title="steps", scale=alt.Scale(domain=list(STEPS), range=list(PALETTE[: len(STEPS)]))
        ),
        shape=alt.Shape("broke:N", title="broke", scale=alt.Scale(domain=[False, True], range=["circle", "cross"])),
        column=alt.Column("method:N", title=None, sort=list(POINTS)),
        row=alt.Row("data:N", title=None, sort=list(SETS)),
    )
    write_picture(chart.properties(background="white", padding=12).to_dict(), DOCS / "findings-rates.svg")


def main() -> None:
    """Writes summary and pictures."""
    table = rows()
    SUMMARY.write_text(json.dumps(summary(table), indent=1, default=_plain, allow_nan=False) + "\n")
    draw(table)


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(type(value))


if __name__ == "__main__":
    main()
