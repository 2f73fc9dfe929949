"""Nothing trains that does not belong to the method, and what trains is counted."""

from __future__ import annotations

import pytest
import torch

import tiny_world as tw
from peft_study.config import FullConfig, LoraConfig, NoneConfig, PrefixTuningConfig, PromptTuningConfig, TrainingConfig
from peft_study.engine.engine import Engine
from peft_study.engine.guards import count_trainable, refuse_unexpected
from peft_study.engine.trial import Trial
from peft_study.errors import ModelError
from peft_study.methods import create

SETTINGS = TrainingConfig(learning_rate=1e-3, steps=2, batch_size=2)
CONFIGS = [LoraConfig(rank=2), PrefixTuningConfig(tokens=3, init="random"), PromptTuningConfig(tokens=3, init="random")]


@pytest.mark.parametrize("config", [*CONFIGS, NoneConfig()], ids=lambda c: c.method)
def test_a_base_parameter_left_trainable_is_refused_by_name(config: LoraConfig) -> None:
    base = tw.base("llama")
    trial = Trial("t", create(config, base, None, 0), SETTINGS, tw.examples([9, 9]))
    stranger = "model.layers.1.mlp.up_proj.weight"
    base.model.get_parameter(stranger).requires_grad_(True)
    engine = Engine(base)
    with pytest.raises(ModelError, match=rf"{stranger}.*{config.method}"):
        engine.admit(trial)
    assert not engine.trials
    base.model.get_parameter(stranger).requires_grad_(False)
    assert engine.admit(trial) == 0


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.method)
def test_a_frozen_parameter_of_the_method_is_refused_by_name(config: LoraConfig) -> None:
    base = tw.base("llama")
    adapter = create(config, base, None, 0)
    name, parameter = list(adapter.parameters().items())[-1]
    parameter.requires_grad_(False)
    with pytest.raises(ModelError, match=f"{name} belongs to {config.method} but is frozen"):
        refuse_unexpected(base, adapter)


def test_training_leaves_the_base_without_gradients_and_as_it_was() -> None:
    base = tw.base("llama")
    before = {name: p.clone() for name, p in base.model.named_parameters()}
    engine = Engine(base, row_tokens=64)
    for config in CONFIGS:
        engine.admit(Trial(config.method, create(config, base, None, 0), SETTINGS, tw.examples([9, 12, 8, 11])))
    while engine.trials:
        for event in engine.step():
            if event.trial.finished:
                engine.evict(event.trial)
    for name, parameter in base.model.named_parameters():
        assert parameter.grad is None, name
        assert torch.equal(parameter, before[name]), name


def test_counts_are_by_module_and_say_the_share() -> None:
    base = tw.base("llama")
    total = base.parameter_count()
    lora = count_trainable(base, create(LoraConfig(rank=2, target_modules=("q_proj", "down_proj")), base, None, 0))
    # two layers; q_proj is 32 -> 32, down_proj 48 -> 32
    assert lora.by_module == {"q_proj": 2 * 2 * (32 + 32), "down_proj": 2 * 2 * (48 + 32)}
    assert lora.trainable == 256 + 320
    assert lora.total == total + 576
    prefix = count_trainable(base, create(CONFIGS[1], base, None, 0))
    assert prefix.by_module == {"table": 3 * 2 * 2 * 2 * 8}
    prompt = count_trainable(base, create(CONFIGS[2], base, None, 0))
    assert prompt.by_module == {"embeddings": 3 * 32}
    share = f"{100 * 96 / (total + 96):.3g}"
    assert prompt.sentence("prompt_tuning") == (
        f"prompt_tuning: 96 of {total + 96:,} parameters train, {share} % (embeddings 96)"
    )


def test_counts_of_the_reference_rows() -> None:
    base = tw.base("llama")
    none = count_trainable(base, create(NoneConfig(), base, None, 0))
    assert (none.trainable, none.total) == (0, base.parameter_count())
    full = count_trainable(base, create(FullConfig(), base, None, 0))
    assert full.trainable == full.total == base.parameter_count()


def test_a_projection_counts_what_trains_not_the_table_it_makes() -> None:
    base = tw.base("llama")
    config = PrefixTuningConfig(tokens=3, init="random", projection=True, projection_hidden=5)
    found = count_trainable(base, create(config, base, None, 0))
    assert found.by_module == {"embedding": 3 * 16, "enter": 16 * 5 + 5, "leave": 5 * 64 + 64}


def test_the_untouched_base_has_losses_and_no_steps_to_take() -> None:
    base, examples = tw.base("llama"), tw.examples([9, 12])
    engine = Engine(base)
    trial = Trial("none", create(NoneConfig(), base, None, 0), TrainingConfig(learning_rate=1.0, steps=2), examples)
    engine.admit(trial)
    reports = [event.report for _ in range(2) for event in engine.step()]
    assert trial.finished
    assert reports[0].loss == pytest.approx(reports[1].loss)
    assert (reports[0].gradient_norm, reports[0].learning_rate) == (0.0, 0.0)
