"""A study: one model, one data set, every method searched under one budget."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from peft_study.config.common import SettingError, Strict
from peft_study.config.evaluation import EvaluationConfig
from peft_study.config.methods import METHODS
from peft_study.config.run import DataConfig, LoggingConfig, ModelConfig, TrainingConfig
from peft_study.config.space import AnySpace, Choices, MethodSpace, Range
from peft_study.errors import ConfigError, nearest

Sampler = Literal["auto", "bayesian", "tpe", "random", "grid", "quasi_random", "gp"]
Pruner = Literal["auto", "probability", "successive_halving", "median", "none"]

TRIALS = 12
"""Trials a method where nothing is said."""
MODELLED = 100
"""Trials a method that a Gaussian process bears: its time grows with their third power."""


class BudgetConfig(Strict):
    """What may be spent; the same for every method."""

    trials: int | None = Field(None, ge=1, description="trials a method; None: 12, or the grid if only lists are given")
    steps: int | None = Field(None, ge=1, description="optimizer steps a trial; None: training.steps or epochs")
    tokens: int | None = Field(None, ge=1, description="data tokens a trial, instead of steps")
    minutes: float | None = Field(None, gt=0, description="of the whole study: the search ends in time for the finals")

    @model_validator(mode="after")
    def _one_unit(self) -> BudgetConfig:
        if self.steps is not None and self.tokens is not None:
            raise SettingError("give steps or tokens, not both", inside=("tokens",))
        return self


class SearchConfig(Strict):
    """How settings are chosen and hopeless ones stopped."""

    sampler: Sampler = Field("auto", description="auto: bayesian up to 100 trials a method, else tpe")
    pruner: Pruner = Field(
        "auto", description="which trials are stopped early; auto: probability beside bayesian, else successive_halving"
    )
    reduction: int = Field(3, ge=2, description="successive halving keeps one in so many at each rung")
    audit: float = Field(0.1, ge=0, le=1, description="share of the pruned trials that is run to the end all the same")
    range_test: bool | Literal["auto"] = Field(
        "auto", description="try many learning rates briefly first; auto: where that costs under a tenth of the search"
    )
    range_steps: int = Field(32, ge=4, description="optimizer steps of each rate in that test")
    widen: bool = Field(True, description="move the end of a log range outwards when the best value is there")
    stop: float | None = Field(
        None, gt=0, description="end a method's search once it is within so many nats a token of its best, with 90 %"
    )
    prior: bool = Field(True, description="bayesian: begin at a method's default rate; false: in the middle")
    seed: int = Field(0, ge=0, description="of the sampler")


class FinalsConfig(Strict):
    """The retraining of each method's best settings with new seeds."""

    best: int = Field(2, ge=0, description="settings of each method that are retrained; 0: no finals, no winner")
    seeds: int = Field(3, ge=1, description="new seeds (initialisation, dropout, order of the data) of each")
    task: str | None = Field(
        None, description="choose the winner by this task (NAME=FILE of a dev part, or a task file), not by dev loss"
    )
    answers: int = Field(
        4, ge=0, description="test prompts that the base and each method's best final answer, for the report; 0: none"
    )


class StudyConfig(Strict):
    """A comparison of methods, each over its own search space, on one model and one data set."""

    model: ModelConfig
    data: DataConfig
    methods: dict[str, AnySpace] = Field(
        min_length=1, description="a space each; another name with `method:` inside gives a method a second space"
    )
    training: TrainingConfig = TrainingConfig()
    budget: BudgetConfig = BudgetConfig()
    search: SearchConfig = SearchConfig()
    finals: FinalsConfig = FinalsConfig()
    logging: LoggingConfig = LoggingConfig()
    evaluation: EvaluationConfig | None = Field(None, description="tasks that base and finals are asked at the end")
    slots: int | Literal["auto"] = Field(
        "auto", description="trials side by side in the engine; auto: what keeps rows full and fits into the memory"
    )
    workers: int = Field(1, ge=1, description="processes on this machine, each with an engine of its own")
    ray: str | None = Field(
        None, description="address of a Ray cluster whose devices run the trials, or auto for the one that runs here"
    )
    output: Path = Field(description="folder of the study")

    @field_validator("methods", mode="before")
    @classmethod
    def _methods(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {str(name): _with_method(str(name), body) for name, body in value.items()}

    @field_validator("slots", mode="before")
    @classmethod
    def _slots(cls, value: Any) -> Any:
        number = int(value) if str(value).isdecimal() and not isinstance(value, bool) else 0
        if value != "auto" and number < 1:
            raise ValueError("is neither auto nor a whole number above 0")
        return value if value == "auto" else number

    @model_validator(mode="after")
    def _consistent(self) -> StudyConfig:
        if self.training.learning_rate is not None:
            what = "a rate for all methods would be wrong for most: their scales differ"
            remedy = "give learning_rate under each method"
            raise SettingError(what, inside=("training", "learning_rate"), remedy=remedy)
        if self.training.schedule == "constant_with_warmup":
            for name, space in self.methods.items():
                warmup = getattr(space, "warmup_ratio", None)
                least = min(warmup.choices) if isinstance(warmup, Choices) else getattr(warmup, "low", warmup)
                if least == 0:
                    inside = ("methods", name, "warmup_ratio")
                    raise SettingError("constant_with_warmup needs a warm-up", inside=inside, remedy="leave out 0")
        if self.ray is not None and self.workers > 1:
            what = f"{self.workers} processes on this machine, and a Ray cluster at {self.ray}"
            remedy = "leave --workers out: the cluster has a worker a device"
            raise SettingError(what, inside=("workers",), remedy=remedy)
        steps = {self.budget.steps, self.training.steps} - {None}
        if len(steps) > 1:
            what = f"{self.budget.steps} steps, but training.steps is {self.training.steps}"
            raise SettingError(what, inside=("budget", "steps"), remedy="give one of them")
        if self.budget.tokens is not None and self.training.steps is not None:
            what = "training.steps is a budget as well"
            raise SettingError(what, inside=("budget", "tokens"), remedy="give one of them")
        return self

    def filled(self) -> StudyConfig:
        """Returns the study with every rule applied: what is searched where, with how many trials, by which sampler."""
        spaces = {name: space.filled(self.training) for name, space in self.methods.items()}
        trials, sampler, pruner = self.budget.trials, self.search.sampler, self.search.pruner
        if sampler == "grid":
            _refuse_ranges(spaces)
        grids = [grid_size(space) for space in spaces.values()]
        lists_only = all(size is not None for size in grids)
        if trials is None:
            whole = lists_only and sampler in ("auto", "grid", "bayesian")
            trials = max(size or 1 for size in grids) if whole else TRIALS
        if sampler == "auto":
            sampler = "bayesian" if trials <= MODELLED else "grid" if lists_only else "tpe"
        if pruner == "auto":
            pruner = "probability" if sampler == "bayesian" else "successive_halving"
        training = self.training.model_copy(update={"steps": self.budget.steps or self.training.steps})
        return self.model_copy(
            update={
                "methods": spaces,
                "training": training,
                "budget": self.budget.model_copy(update={"trials": trials, "steps": training.steps}),
                "search": self.search.model_copy(update={"sampler": sampler, "pruner": pruner}),
            }
        )

    @property
    def searched(self) -> tuple[str, ...]:
        """Returns the methods that train something, in the order of the file."""
        return tuple(name for name, space in self.methods.items() if space.kind != "none")

    def trials(self, name: str) -> int:
        """Returns how many trials a method of a filled study gets: its budget, or all settings if they are fewer."""
        assert self.budget.trials is not None
        size = grid_size(self.methods[name])
        return self.budget.trials if size is None else min(self.budget.trials, size)

    def sampler(self, name: str) -> Sampler:
        """Returns the sampler of a method of a filled study: where all its settings are tried, each is tried once."""
        size, sampler = grid_size(self.methods[name]), self.search.sampler
        return "grid" if size is not None and size == self.trials(name) and sampler != "bayesian" else sampler

    def tries_cells(self, name: str) -> bool:
        """Returns whether a method of a filled study has lists alone, of which no setting is tried twice."""
        return grid_size(self.methods[name]) is not None and self.sampler(name) in ("grid", "bayesian")


def _refuse_ranges(spaces: Mapping[str, MethodSpace]) -> None:
    for name, space in spaces.items():
        for dimension, values in space.dimensions().items():
            if isinstance(values, Range):
                raise ConfigError(
                    "a grid needs a list of values, not a range",
                    where=f"methods.{name}.{dimension}",
                    remedy="give a list, or another search.sampler",
                )


def grid_size(space: MethodSpace) -> int | None:
    """Returns how many settings a filled space of lists has; None where there is a range."""
    dimensions = space.dimensions().values()
    sizes = [len(dimension.choices) for dimension in dimensions if isinstance(dimension, Choices)]
    return math.prod(sizes) if len(sizes) == len(dimensions) else None


def cells(space: MethodSpace) -> list[dict[str, Any]]:
    """Returns the values of every setting of a filled space of lists."""
    dimensions = space.dimensions()
    choices = [dimension.choices for dimension in dimensions.values() if isinstance(dimension, Choices)]
    return [dict(zip(dimensions, values, strict=True)) for values in itertools.product(*choices)]


def _with_method(name: str, body: Any) -> Any:
    """Returns what stands under a name, with the method it is about."""
    if isinstance(body, MethodSpace):
        return body
    if not name.replace("_", "").replace("-", "").isalnum():
        raise SettingError("a name has letters, digits, - and _ only", inside=(name,), remedy="give another name")
    if body is not None and not isinstance(body, dict):
        raise SettingError(f"{body!r} is not a mapping of settings", inside=(name,), remedy=f"write `{name}: {{}}`")
    settings = {"method": name, **(body or {})}
    method = settings["method"]
    if not isinstance(method, str) or method not in METHODS:
        inside = (name, "method") if "method" in (body or {}) else (name,)
        raise SettingError(f"unknown method {method!r}", inside=inside, remedy=nearest(str(method), METHODS))
    if name in METHODS and method != name:
        what = f"the name of one method for a space of another, {method}"
        raise SettingError(what, inside=(name, "method"), remedy="give the space another name")
    return settings
