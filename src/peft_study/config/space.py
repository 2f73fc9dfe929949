"""The search space of a method: each setting is one value, some choices, or a range.

    lora: {}                                  the default space of LoRA
    lora: {rank: [8, 64]}                     these ranks; the rate over its default range, everything else fixed
    lora: {space: default, rank: 16}          the default space with the rank fixed
    lora: {learning_rate: {low: 1e-5, high: 1e-2, log: true}}

A rate left out is searched all the same: a comparison at one method's rate says nothing about another's.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    create_model,
    model_validator,
)

from peft_study.config.common import SettingError, Strict, complaint, validate
from peft_study.config.methods import METHODS
from peft_study.config.run import TRAINING_DIMENSIONS, TrainingConfig, TrialSettings


class Range(Strict):
    """All values from low to high; whole numbers where the setting takes whole numbers."""

    low: float = Field(description="least value")
    high: float = Field(description="greatest value")
    log: bool = Field(False, description="search the logarithm: factors count, not differences")

    @classmethod
    def valid_keys(cls) -> Iterable[str]:
        """Returns those of choices too: who mistypes that key means no range."""
        return (*cls.model_fields, *Choices.model_fields)

    @model_validator(mode="after")
    def _not_empty(self) -> Range:
        if not self.low < self.high:
            raise SettingError(f"low {self.low:g} is not below high {self.high:g}")
        if self.log and self.low <= 0:
            remedy = "give a value above 0, or log: false"
            raise SettingError(f"low {self.low:g} has no logarithm", inside=("low",), remedy=remedy)
        return self


class Choices(Strict):
    """Some values."""

    choices: tuple[Any, ...] = Field(min_length=1, description="the values to try")

    @property
    def sorted_numbers(self) -> list[float]:
        """Returns the choices in order where all of them are numbers, else nothing."""
        numbers = all(isinstance(c, (int, float)) and not isinstance(c, bool) for c in self.choices)
        return sorted(self.choices) if numbers else []


Dimension = Range | Choices


def _optimizer(*decays: float) -> dict[str, Dimension]:
    return {"warmup_ratio": Choices(choices=(0.0, 0.03, 0.1)), "weight_decay": Choices(choices=decays)}


DEFAULT_SPACES: dict[str, dict[str, Dimension]] = {
    # alpha stays: at a fixed one the best rate moves less than twofold over ranks of 4 to 512 (LoRA Without Regret)
    "lora": {
        "rank": Choices(choices=(8, 16, 32, 64)),
        "dropout": Choices(choices=(0.0, 0.05, 0.1)),
        **_optimizer(0.0, 0.1, 1.0),
    },
    # random tables are left out: they start far above the base's loss (docs/findings.md)
    "prefix_tuning": {
        "tokens": Choices(choices=(10, 30, 100)),
        "init": Choices(choices=("text", "zero")),
        **_optimizer(0.0, 0.01, 0.1),
    },
    "prompt_tuning": {
        "tokens": Choices(choices=(8, 20, 50, 100)),
        "init": Choices(choices=("text", "vocab")),
        **_optimizer(0.0, 0.001, 0.01),
    },
    "none": {},
    "full": _optimizer(0.0, 0.01, 0.1),
}
"""What is searched beside the learning rate, whose range is the method's own (config/methods.py).

AdamW shrinks what trains by rate times decay a step, and the methods' rates lie far apart: the decays are those with
which a step at the usual rate takes away nothing, some 1/10,000 and some 1/1,000. Full fine-tuning, whose decay pulls
at the base's own weights, has the usual ones.
"""


def _default_rate(method: str) -> Dimension | None:
    rates = METHODS[method].learning_rates
    return None if rates is None else Range(low=rates.low, high=rates.high, log=True)


class MethodSpace(Strict):
    """What the spaces of all methods have in common; `SPACES` holds one class a method."""

    space: Literal["default"] | None = Field(
        None, description="default: what is not given is searched as the method's default space says"
    )

    @property
    def kind(self) -> str:
        """Returns the method's name."""
        method: str = getattr(self, "method")  # noqa: B009  (declared by the classes that are made)
        return method

    def filled(self, training: TrainingConfig) -> MethodSpace:
        """Returns the space with every setting given, none left to a rule.

        Args:
            training: what it fixes is not searched, unless the method sets it itself.
        """
        given = self.model_fields_set - {"method", "space"}
        if getattr(self, "learning_rate") is None:  # noqa: B009  (declared by the classes that are made)
            given = given - {"learning_rate"}
        whole = self.space == "default" or not given
        defaults: dict[str, Any] = dict(DEFAULT_SPACES[self.kind]) if whole else {}
        for name in TRAINING_DIMENSIONS:
            if name in training.model_fields_set or name not in defaults:
                defaults[name] = getattr(training, name)
        warmup = defaults.get("warmup_ratio")
        if training.schedule == "constant_with_warmup" and isinstance(warmup, Choices):
            defaults["warmup_ratio"] = Choices(choices=tuple(ratio for ratio in warmup.choices if ratio > 0))
        if "learning_rate" not in given:
            defaults["learning_rate"] = _default_rate(self.kind)
        fields = {n: getattr(self, n) for n in type(self).model_fields if n not in ("method", "space")}
        filled = {**fields, **{n: v for n, v in defaults.items() if n not in given}}
        return self.model_copy(update={"space": None, **filled})

    def dimensions(self) -> dict[str, Dimension]:
        """Returns what is searched (of a filled space); a single choice is no dimension."""
        found = {n: getattr(self, n) for n in type(self).model_fields if n not in ("method", "space")}
        return {
            name: value
            for name, value in found.items()
            if isinstance(value, Range) or (isinstance(value, Choices) and len(value.choices) > 1)
        }

    def at(self, values: Mapping[str, Any], training: TrainingConfig) -> TrialSettings:
        """Returns the settings of a trial with these values for the dimensions.

        Args:
            values: by dimension.
            training: what all trials of the study share.
        """
        fields = self._at(values)
        own = {name: value for name, value in fields.items() if name not in TRAINING_DIMENSIONS}
        optimizer = {name: fields[name] for name in TRAINING_DIMENSIONS}
        return TrialSettings(method=METHODS[self.kind](**own), training=training.model_copy(update=optimizer))

    def flat(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what `TrialSettings.flat` of a trial with these values is."""
        return self.at(values, TrainingConfig()).flat

    def _at(self, values: Mapping[str, Any]) -> dict[str, Any]:
        fixed = {n: getattr(self, n) for n in type(self).model_fields if n not in ("method", "space")}
        single = {n: v.choices[0] for n, v in fixed.items() if isinstance(v, Choices) and len(v.choices) == 1}
        return {**fixed, **single, **values}

    def whole(self, name: str) -> bool:
        """True where the setting takes whole numbers."""
        field = METHODS[self.kind].model_fields.get(name)
        return field is not None and int in _kinds(field.annotation)


def _kinds(annotation: Any) -> tuple[Any, ...]:
    """Returns the types that a setting may have."""
    return (annotation, *get_args(annotation))


def _dimension(value: Any, *, one: TypeAdapter[Any], member: TypeAdapter[Any], number: bool) -> Any:
    """Returns a setting as a value, choices or a range, whichever was written.

    Args:
        value: what was written.
        one: checks a value that is not searched,
        member: one of several.
        number: the setting is one, and may have a range.
    """
    try:
        if isinstance(value, (Range, Choices)):
            return value
        if isinstance(value, dict) and "choices" in value:
            return _checked(Choices.model_validate(value), ("choices",), member)
        if isinstance(value, dict):
            return _range(Range.model_validate(value), member, number=number)
        try:
            return one.validate_python(value)
        except ValidationError:
            if not isinstance(value, (list, tuple)):
                raise
        return _checked(Choices(choices=tuple(value)), (), member)
    except ValidationError as error:
        raise complaint(error, value) from None


def _range(found: Range, adapter: TypeAdapter[Any], *, number: bool) -> Range:
    """Returns the range, both ends of which the setting could have."""
    if not number:
        raise SettingError("is no number, so it has no range", remedy="give a list of values")
    for name, end in (("low", found.low), ("high", found.high)):
        _valid(int(end) if end == int(end) else end, (name,), adapter)
    return found


def _checked(found: Choices, inside: tuple[str, ...], adapter: TypeAdapter[Any]) -> Choices:
    """Returns the choices with each one validated, without repetitions."""
    checked = [_valid(choice, (*inside, number), adapter) for number, choice in enumerate(found.choices)]
    unique = {json.dumps(choice, default=str): choice for choice in checked}
    return Choices(choices=tuple(unique.values()))


def _valid(value: Any, inside: tuple[str | int, ...], adapter: TypeAdapter[Any]) -> Any:
    """Returns one value as the setting takes it; a complaint tells where in the dimension it stands."""
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        found = complaint(error, value)
        raise SettingError(found.what, inside=(*inside, *found.inside), remedy=found.remedy) from None


@dataclass(frozen=True, slots=True)
class _JsonSchema:
    """The JSON schema of a setting, made when it is asked for: few commands do, and it takes a tenth of a second.

    Attributes:
        one, member, number: as of `_dimension`.
    """

    one: TypeAdapter[Any]
    member: TypeAdapter[Any]
    number: bool

    def __get_pydantic_json_schema__(self, _core: Any, _handler: Any) -> dict[str, Any]:
        """Returns the schema; pydantic calls this."""
        several = {"type": "array", "items": self.member.json_schema(), "minItems": 1}
        choices = Choices.model_json_schema()
        choices["properties"]["choices"]["items"] = self.member.json_schema()
        ranges = [Range.model_json_schema()] if self.number else []
        return {"anyOf": [self.one.json_schema(), several, choices, *ranges]}


def _searchable(name: str, config: type[Strict]) -> tuple[Any, Any]:
    """Returns annotation and default of a setting in a space."""
    field = config.model_fields[name]

    def adapter(annotation: Any) -> TypeAdapter[Any]:
        return TypeAdapter(Annotated[annotation, None, *field.metadata], config=ConfigDict(allow_inf_nan=False))

    one = adapter(field.annotation)
    # no rate is one that is left out, not one to try
    member = adapter(float) if name == "learning_rate" else one
    number = not {int, float}.isdisjoint(_kinds(field.annotation))
    parse = functools.partial(_dimension, one=one, member=member, number=number)
    return (
        Annotated[Any, BeforeValidator(parse), _JsonSchema(one, member, number)],
        Field(field.default, description=field.description),
    )


def _space(method: str) -> type[MethodSpace]:
    config = METHODS[method]
    fields: dict[str, Any] = {"method": (Literal[method], method)}
    fields |= {name: _searchable(name, config) for name in config.model_fields if name != "method"}
    fields |= {name: _searchable(name, TrainingConfig) for name in TRAINING_DIMENSIONS}
    made: type[MethodSpace] = create_model(
        config.__name__.replace("Config", "Space"),
        __base__=MethodSpace,
        __doc__=config.__doc__,
        __module__=__name__,
        **fields,
    )
    return made


SPACES: dict[str, type[MethodSpace]] = {method: _space(method) for method in METHODS}
"""The class of each method's space: the settings of its configuration, each of which may be searched."""


def _maker(name: str, method: str) -> Callable[..., MethodSpace]:
    """Returns the function that makes a method's space from Python, with its settings in signature and docstring."""
    fields = {n: field for n, field in SPACES[method].model_fields.items() if n not in ("method", "space")}

    def make(**settings: Any) -> MethodSpace:
        return validate(SPACES[method], {"method": method, **settings}, where=name)

    make.__name__ = make.__qualname__ = name
    make.__doc__ = "\n".join(
        [
            METHODS[method].__doc__ or "",
            "",
            "Each setting is one value, a list of values to try, or a `Range`; a learning rate left out is searched.",
            "",
            "Args:",
            *(f"    {n}: {field.description}." for n, field in fields.items()),
            "",
            "Raises:",
            "    ConfigError: naming the setting, its value and the remedy.",
        ]
    )
    parameters = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=f.default) for n, f in fields.items()]
    make.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return make


LoRA = _maker("LoRA", "lora")
PrefixTuning = _maker("PrefixTuning", "prefix_tuning")
PromptTuning = _maker("PromptTuning", "prompt_tuning")

if TYPE_CHECKING:
    AnySpace = MethodSpace
else:
    AnySpace = Annotated[Union[tuple(SPACES.values())], Field(discriminator="method")]  # noqa: UP007  (made at run time)
