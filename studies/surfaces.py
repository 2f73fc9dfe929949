"""Response surfaces of the designed experiment: the held-out loss against the base as a function of all settings.

A method's trials on a data set become a Gaussian process (scikit-learn) over a score that keeps the loss between the
best and the worst seen, with some room: without it a surface dips below what any trial has reached. What is best at
some setting is read from draws of the process without its noise: a rate is the median over draws of where each is
least, and its interval holds 80 % of them. Shares of variance are Sobol indices of the median surface (scipy).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pandas as pd
from experiment import BATCHES, HERE, INITS, RANKS, RATES, SETS, STEPS, TOKENS, WARMUP, WEIGHT_DECAY
from numpy.typing import NDArray
from scipy.stats import norm, qmc, sobol_indices, uniform
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

Floats = NDArray[np.float64]
WORST = 0.2
"""Nats above the base at which a loss is cut: how bad a broken run is says nothing of the best rate."""
ROOM = 0.1
"""How far beyond the least and the most gain seen a surface may go, as a share of what lies between them."""
GRID = 61
"""Rates of a surface's cut: ten a decade."""
DRAWS = 400
INTERVAL = 0.1, 0.5, 0.9
CANDIDATES = 8192
"""Settings among which the best of all is looked for."""
UNSEARCHED = {("prefix_tuning", "random")}
"""What learns nothing in so few steps, and has no best rate."""


@dataclass(frozen=True, slots=True)
class At:
    """A setting of a surface but its rate. `init` is None for LoRA."""

    size: float
    init: str | None
    warmup_ratio: float = 0.05
    weight_decay: float = 0.0
    batch_size: int = 8
    steps: float = 120


@dataclass(frozen=True, slots=True)
class RateRule:
    """The best rate at the reference, and how it moves: intervals of the draws.

    Attributes:
        rate: at `REFERENCE`.
        size: exponent of tokens or rank.
        steps: exponent of the steps.
        inits: decades by which another initialisation moves it.
        spread: decades by which single best rates lie off the rule, standard deviation.
    """

    rate: list[float]
    size: list[float]
    steps: list[float]
    inits: dict[str, list[float]]
    spread: float


REFERENCE = {
    "prompt_tuning": At(50, "text"),
    "prefix_tuning": At(30, "text"),
    "lora": At(16, None),
}
"""Around which one setting at a time is changed: the defaults, and the longest runs."""
SIZES = {"prompt_tuning": (2, 8, 20, 50, 100), "prefix_tuning": (2, 8, 30, 100), "lora": (4, 16, 64)}
"""Of `levels`: virtual tokens or ranks, the default among them."""


def levels(method: str) -> dict[str, tuple[Any, ...]]:
    """Returns the levels of each setting that are looked at, one setting at a time."""
    return {
        "size": SIZES[method],
        "init": INITS.get(method, ()),
        "warmup_ratio": (0.0, 0.05, 0.2),
        "weight_decay": (0.0, 0.01, 0.1),
        "batch_size": BATCHES,
        "steps": STEPS,
    }


def rows() -> pd.DataFrame:
    """Returns a row a trial of all blocks that are there, with its method, `size` (tokens or rank) and `gain`.

    `gain` is the held-out loss minus the base's, in nats a supervised token, at most `WORST`.
    """
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


def rates() -> Floats:
    """Returns the rates of a cut."""
    return np.geomspace(*RATES, GRID)


class Surface:
    """The gain of a method on a data set as a function of its settings.

    Args:
        method: whose rows they are.
        table: of `rows`, of one method and data set.
    """

    def __init__(self, method: str, table: pd.DataFrame) -> None:
        self.method = method
        self.inits = INITS.get(method, ())
        self.names = ["learning_rate", *(field.name for field in fields(At) if field.name != "init")]
        columns = {field.name: table[field.name].to_numpy() for field in fields(At)}
        inputs, gains = self._inputs(table["learning_rate"].to_numpy(), columns), table["gain"].to_numpy()
        room = ROOM * (gains.max() - gains.min())
        self._low, self._high = gains.min() - room, gains.max() + room
        lengths = [0.3] + [1.0] * (inputs.shape[1] - 1)
        kernel = ConstantKernel(0.1) * Matern(lengths, (0.05, 20.0), nu=2.5) + WhiteKernel(1e-2, (1e-3, 0.3))
        fitted = GaussianProcessRegressor(kernel, normalize_y=True, n_restarts_optimizer=2, random_state=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            fitted.fit(inputs, self._scores(gains))
        # draws of a kernel with noise would have it at every point: what is least would be the noise's choice
        self._noise = fitted.kernel_.k2.noise_level
        self._process = GaussianProcessRegressor(fitted.kernel_.k1, alpha=self._noise, optimizer=None, normalize_y=True)
        self._process.fit(inputs, self._scores(gains))
        self.left_out, self.covered = self._checked(inputs, gains)

    def _scores(self, gains: Floats) -> Floats:
        """Returns gains as the process models them: without bounds, so that a surface never leaves them."""
        return np.log((gains - self._low) / (self._high - gains))

    def _gains(self, scores: Floats) -> Floats:
        return self._low + (self._high - self._low) / (1 + np.exp(-scores))

    def _middle(self, inputs: Floats) -> Floats:
        """Returns the median gain."""
        return self._gains(self._process.predict(inputs))

    def _inputs(self, rate: Any, at: Mapping[str, Any]) -> Floats:
        """Returns points as inputs of the process: N rows of numbers between 0 and 1."""
        sizes = RANKS if self.method == "lora" else TOKENS
        columns = [
            _part(np.log(np.asarray(rate, float)), *np.log(RATES)),
            _part(np.log(np.asarray(at["size"], float)), *np.log(sizes)),
            np.asarray(at["warmup_ratio"], float) / WARMUP,
            np.asarray(at["weight_decay"], float) / WEIGHT_DECAY,
            _part(np.log(np.asarray(at["batch_size"], float)), *np.log((BATCHES[0], BATCHES[-1]))),
            _part(np.log(np.asarray(at["steps"], float)), *np.log((STEPS[0], STEPS[-1]))),
        ]
        columns += [(np.asarray(at["init"]) == name).astype(float) for name in self.inits]
        return np.column_stack(np.broadcast_arrays(*columns))

    def cut(self, at: At) -> Floats:
        """Returns the inputs along all rates at a setting."""
        return self._inputs(rates(), {field.name: getattr(at, field.name) for field in fields(At)})

    def along(self, at: At) -> tuple[Floats, Floats, Floats]:
        """Returns the gain along all rates at a setting: 10 %, median and 90 % of the draws."""
        draws = self._draws(self.cut(at))
        low, middle, high = np.quantile(draws, INTERVAL, axis=1)
        return low, middle, high

    def over(self, sizes: Floats, at: At) -> Floats:
        """Returns the median gain: rows of sizes, columns of rates."""
        return np.array([self._middle(self.cut(replace(at, size=size))) for size in sizes])

    def effects(self) -> Iterator[dict[str, Any]]:
        """Yields each level of each setting with its best rate, the gain there, and the difference from another level.

        The gain is that at the best rate over all draws: the least of each draw would be below it by chance.
        `minus_first` is it minus that of the setting's first level, in the same draws.
        """
        reference = REFERENCE[self.method]
        places = [(name, level) for name, found in levels(self.method).items() for level in found]
        cuts = [self.cut(replace(reference, **{name: level})) for name, level in places]
        draws = self._draws(np.concatenate(cuts)).reshape(len(places), GRID, DRAWS)
        first: dict[str, Floats] = {}
        for (name, level), part in zip(places, draws, strict=True):
            gain = part[part.mean(axis=1).argmin()]
            first.setdefault(name, gain)
            yield {
                "setting": name,
                "level": level,
                "rate": interval(rates()[part.argmin(axis=0)]),
                "gain": interval(gain),
                "minus_first": interval(gain - first[name]),
            }

    def rate_rule(self) -> RateRule:
        """Returns the best rate as a linear function of the logarithms of size and steps, and of the initialisation."""
        reference, found = REFERENCE[self.method], levels(self.method)
        inits = [name for name in found["init"] if (self.method, name) not in UNSEARCHED] or [None]
        places = [replace(reference, size=s, init=i, steps=n) for s in found["size"] for i in inits for n in STEPS]
        draws = self._draws(np.concatenate([self.cut(at) for at in places])).reshape(len(places), GRID, DRAWS)
        best = np.log10(rates()[draws.argmin(axis=1)])
        others = [name for name in inits if name != reference.init]
        terms = np.array(
            [
                [1.0, np.log10(at.size / reference.size), np.log10(at.steps / reference.steps)]
                + [float(at.init == name) for name in others]
                for at in places
            ]
        )
        fitted = np.linalg.lstsq(terms, best, rcond=None)[0]
        return RateRule(
            rate=interval(10 ** fitted[0]),
            size=interval(fitted[1]),
            steps=interval(fitted[2]),
            inits={name: interval(fitted[3 + number]) for number, name in enumerate(others)},
            spread=float(np.sqrt(np.mean((best - terms @ fitted) ** 2) + fitted[0].var())),
        )

    def window(self, at: At) -> dict[str, float | None]:
        """Returns from which rate to which the gain is within 5 % of the best, and from where on above the base's."""
        middle = self._middle(self.cut(at))
        best = int(middle.argmin())
        near = rates()[middle <= middle[best] + 0.05 * abs(middle[best])]
        worse = rates()[(middle > 0) & (rates() > rates()[best])]
        return {"from": near[0], "to": near[-1], "breaks": worse[0] if len(worse) else None}

    def best_of_all(self, *, steps: float, batch_size: int) -> dict[str, Any]:
        """Returns the best setting at so many steps of a batch, and the gain there with its interval."""
        unit = qmc.Sobol(5, seed=0).random(CANDIDATES)
        inits = np.array(self.inits or (None,))
        sizes = RANKS if self.method == "lora" else TOKENS
        at = {
            "size": sizes[0] * (sizes[1] / sizes[0]) ** unit[:, 1],
            "warmup_ratio": unit[:, 2] * WARMUP,
            "weight_decay": unit[:, 3] * WEIGHT_DECAY,
            "init": inits[(unit[:, 4] * len(inits)).astype(int)],
            "batch_size": batch_size,
            "steps": steps,
        }
        rate = RATES[0] * (RATES[1] / RATES[0]) ** unit[:, 0]
        inputs = self._inputs(rate, at)
        best = int(self._middle(inputs).argmin())
        return {
            "learning_rate": rate[best],
            "size": at["size"][best],
            "init": at["init"][best],
            "gain": interval(self._draws(inputs[[best]])),
        }

    def shares(self) -> dict[str, dict[str, float]]:
        """Returns the share of the surface's variance that each setting has alone, and with others."""
        count = len(self.names)

        def value(points: Floats) -> Floats:
            inputs = points[:count].T
            if self.inits:
                place = (points[-1] * len(self.inits)).astype(int).clip(max=len(self.inits) - 1)
                inputs = np.column_stack([inputs, np.eye(len(self.inits))[place]])
            return self._middle(inputs)

        names = [*self.names, "init"] if self.inits else self.names
        found = sobol_indices(func=value, n=1024, dists=[uniform()] * len(names), rng=0)
        return {
            name: {"alone": float(alone), "with_others": float(whole)}
            for name, alone, whole in zip(names, found.first_order, found.total_order, strict=True)
        }

    def _checked(self, inputs: Floats, gains: Floats) -> tuple[float, float]:
        """Returns how far off the surface is at a trial that it has not seen, and how often within its 80 % interval.

        Root of the mean square, nats; from the inverse covariance (Rasmussen and Williams 2006, section 5.4.2).
        """
        scores = self._scores(gains)
        inverse = np.linalg.inv(self._process.kernel_(inputs) + self._noise * np.eye(len(inputs)))
        spread = scores.std()
        errors = spread * inverse @ ((scores - scores.mean()) / spread) / np.diag(inverse)
        within = np.abs(errors) < norm.ppf(INTERVAL[-1]) * spread / np.sqrt(np.diag(inverse))
        return float(np.sqrt(np.mean((self._gains(scores - errors) - gains) ** 2))), float(within.mean())

    def _draws(self, inputs: Floats) -> Floats:
        """Returns draws of the gain without noise: N inputs, `DRAWS` columns."""
        mean, covariance = self._process.predict(inputs, return_cov=True)
        draw = np.random.default_rng(0)
        return self._gains(draw.multivariate_normal(mean, covariance, DRAWS, method="eigh", check_valid="ignore").T)


def interval(values: Floats) -> list[float]:
    """Returns 10 %, median and 90 % of values."""
    return [float(value) for value in np.quantile(values, INTERVAL)]


def _part(values: Floats, low: float, high: float) -> Floats:
    return (values - low) / (high - low)
