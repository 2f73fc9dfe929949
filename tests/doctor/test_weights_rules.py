"""The rules on what trains: each of their sides."""

from __future__ import annotations

from typing import Any

import pytest

from peft_study.doctor.observations import AdapterState, Observations, ParameterCounts, UsedSettings
from peft_study.doctor.rule import RULES, examine

HEALTHY = {"base": 1000, "base_trainable": 0, "adapter": 20, "adapter_trainable": 20}


def counts(**values: Any) -> Observations:
    settings = {name: values.pop(name) for name in ("method", "learning_rate", "parameter_dtype") if name in values}
    return Observations(
        stage="before", settings=UsedSettings(**settings), parameters=ParameterCounts(**(HEALTHY | values))
    )


def weights(stage: str = "after", **values: Any) -> Observations:
    return Observations(
        stage=stage, steps_done=30, settings=UsedSettings(method="lora"), adapter=AdapterState(**values)
    )


FULL = {"base_trainable": 1000, "adapter": 0, "adapter_trainable": 0, "own_base": True}

CASES = {
    "not_attached": (
        counts(**FULL, unattached="PromptTuningConfig"),
        counts(**FULL, method="full"),
    ),
    "base_trains": (counts(base_trainable=1, first_unexpected="model.norm.weight"), counts()),
    "adapter_frozen": (counts(adapter_trainable=0), counts(adapter_trainable=1)),
    "nothing_trains": (counts(adapter=0, adapter_trainable=0), counts(**FULL)),
    "untouched": (weights(untouched=True), weights(untouched=False)),
    "bad_weights": (weights(bad=("a.lora_B",)), weights(bad=())),
    "embeddings_saved": (weights(embeddings=1, bytes=9), weights(embeddings=0, bytes=9)),
    "base_not_found": (weights(base="/gone", base_found=False), weights(base="/here", base_found=True)),
    "config_differs": (weights(differences=("config: r=8; weights: rank 4 of q",)), weights(differences=())),
    "updates_below_precision": (
        counts(unmoved=0.9, parameter_dtype="bfloat16", learning_rate=1e-5),
        counts(unmoved=0.899, parameter_dtype="bfloat16", learning_rate=1e-5),
    ),
}


def test_every_rule_on_weights_has_both_sides_here() -> None:
    examine(Observations())
    assert set(CASES) == {name for name, rule in RULES.items() if rule.kind == "weights"}


@pytest.mark.parametrize("name", CASES)
def test_a_rule_on_weights_fires_and_just_does_not(name: str) -> None:
    ill, well = CASES[name]
    (problem,) = examine(ill, checks=[name]).problems
    assert problem.check == name
    assert problem.level in ("error", "warning")
    for said in (problem.cause, problem.evidence, problem.consequence, problem.change):
        assert said.en
        assert any("\u4e00" <= letter <= "\u9fff" for letter in said.zh), said
    diagnosis = examine(well, checks=[name])
    assert diagnosis.problems == ()
    assert diagnosis.checked == (name,)


@pytest.mark.parametrize("name", CASES)
def test_a_rule_on_weights_says_what_it_lacks(name: str) -> None:
    diagnosis = examine(Observations(), checks=[name])
    assert diagnosis.problems == ()
    assert list(diagnosis.unchecked) == [name]


def test_a_frozen_adapter_explains_that_nothing_trains() -> None:
    diagnosis = examine(counts(adapter_trainable=0), checks=["adapter_frozen", "nothing_trains", "base_trains"])
    assert [(p.check, p.effects) for p in diagnosis.problems] == [("adapter_frozen", ("nothing_trains",))]
    diagnosis = examine(counts(adapter_trainable=0, base_trainable=7), checks=["adapter_frozen", "base_trains"])
    assert [(p.check, p.effects) for p in diagnosis.problems] == [("adapter_frozen", ("base_trains",))]
    assert "7 numbers of the base" in diagnosis.problems[0].evidence.en


def test_layers_of_the_base_that_a_method_trains_itself_are_expected() -> None:
    assert examine(counts(base_trainable=5, own_base=True), checks=["base_trains"]).problems == ()


def test_weights_at_their_initialisation_are_right_before_the_first_step() -> None:
    assert examine(weights("before", untouched=True), checks=["untouched"]).problems == ()


def test_a_full_fine_tuning_that_was_meant_is_no_mistake() -> None:
    names = ["not_attached", "base_trains", "adapter_frozen", "nothing_trains"]
    assert examine(counts(**FULL, method="full"), checks=names).problems == ()
