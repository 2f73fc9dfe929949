"""A live model: what trains, counted against peft; configurations that were never attached; precision by hand."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers import TrainingArguments

from peft_study.doctor.live import adapter_state, fingerprint, observe_model, unmoved_share, unwrapped
from peft_study.doctor.rule import examine
from peft_study.errors import ConfigError
from tiny_world import model

BASE = sum(p.numel() for p in model().parameters())
CAUSAL = {"task_type": "CAUSAL_LM"}

# made in the tests, so that no configuration of this file waits for a model
CONFIGS: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(**CAUSAL),
    "lora with a head": lambda: peft.LoraConfig(**CAUSAL, modules_to_save=["lm_head"]),
    "lora with biases": lambda: peft.LoraConfig(**CAUSAL, bias="all", target_modules=["q_proj", "embed_tokens"]),
    "lora with tokens": lambda: peft.LoraConfig(**CAUSAL, trainable_token_indices=[4, 5]),
    "adalora": lambda: peft.AdaLoraConfig(**CAUSAL, total_step=10),
    "ia3": lambda: peft.IA3Config(**CAUSAL),
    "ln_tuning": lambda: peft.LNTuningConfig(**CAUSAL, target_modules=["input_layernorm"]),
    "vera": lambda: peft.VeraConfig(**CAUSAL),
    "oft": lambda: peft.OFTConfig(**CAUSAL, oft_block_size=0, r=4),
    "loha": lambda: peft.LoHaConfig(**CAUSAL, target_modules=["q_proj"]),
    "trainable_tokens": lambda: peft.TrainableTokensConfig(**CAUSAL, token_indices=[3, 4]),
    "adaption_prompt": lambda: peft.AdaptionPromptConfig(**CAUSAL, adapter_len=3, adapter_layers=2),
    "prompt_tuning": lambda: peft.PromptTuningConfig(**CAUSAL, num_virtual_tokens=4),
    "p_tuning": lambda: peft.PromptEncoderConfig(**CAUSAL, num_virtual_tokens=4),
    "prefix_tuning": lambda: peft.PrefixTuningConfig(**CAUSAL, num_virtual_tokens=4),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_is_counted_as_peft_counts_it(name: str) -> None:
    attached = peft.get_peft_model(model(), CONFIGS[name]())
    seen = observe_model(attached)
    counts = seen.parameters
    assert counts is not None
    trainable, _ = attached.get_nb_trainable_parameters()
    assert (counts.base, counts.base_trainable, counts.adapter_trainable) == (BASE, 0, trainable)
    assert seen.settings.method == name.split(" with")[0]
    assert not examine(seen).wrong


def test_a_model_without_an_adapter_is_full_fine_tuning() -> None:
    seen = observe_model(model())
    assert seen.parameters is not None
    assert (seen.parameters.base, seen.parameters.base_trainable, seen.parameters.adapter) == (BASE, BASE, 0)
    assert seen.settings.method == "full"


def test_one_weight_of_the_base_that_trains_is_named() -> None:
    attached = peft.get_peft_model(model(), CONFIGS["lora"]())
    attached.base_model.model.model.norm.weight.requires_grad_(True)
    (problem, *_) = examine(observe_model(attached)).problems
    assert problem.check == "base_trains"
    assert problem.values["first"].endswith("model.norm.weight")


def test_a_configuration_that_was_never_attached_is_found() -> None:
    for thing in gc.get_objects():  # other tests of this process have left some
        if isinstance(thing, peft.PeftConfig):
            thing.base_model_name_or_path = thing.base_model_name_or_path or ""
    config = CONFIGS["prompt_tuning"]()
    problem = examine(observe_model(model())).problems[0]
    assert (problem.check, problem.values["wanted"]) == ("not_attached", "PromptTuningConfig")
    attached = peft.get_peft_model(model(), config)
    # a copy that a trainer made before it attached another
    config.base_model_name_or_path = None
    copy = CONFIGS["prompt_tuning"]()
    assert observe_model(model()).parameters.unattached is None  # type: ignore[union-attr]
    del copy, attached
    # the model is gone, and with it what the configuration was attached to
    assert observe_model(model()).parameters.unattached == "PromptTuningConfig"  # type: ignore[union-attr]


def test_a_frozen_model_trains_nothing_and_a_loaded_adapter_is_frozen(tmp_path: Any) -> None:
    frozen = model()
    frozen.requires_grad_(False)
    assert [p.check for p in examine(observe_model(frozen)).problems] == ["nothing_trains"]
    peft.get_peft_model(model(), CONFIGS["lora"]()).save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(model(), tmp_path)
    assert examine(observe_model(loaded)).problems[0].check == "adapter_frozen"
    loaded = peft.PeftModel.from_pretrained(model(), tmp_path, is_trainable=True)
    assert not examine(observe_model(loaded)).wrong


def test_wrappers_are_looked_through() -> None:
    class DistributedDataParallel(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    inner = peft.get_peft_model(model(), CONFIGS["lora"]())
    compiled = torch.compile(inner)
    for wrapped in (DistributedDataParallel(inner), compiled, DistributedDataParallel(compiled)):
        assert unwrapped(wrapped) is inner
        assert observe_model(wrapped).settings.rank == 8
    with pytest.raises(ConfigError, match="model is a dict"):
        observe_model({})


def test_an_adapter_of_transformers_itself_is_counted() -> None:
    plain = model()
    plain.add_adapter(CONFIGS["lora"]())
    counts = observe_model(plain).parameters
    assert counts is not None
    assert (counts.base, counts.base_trainable) == (BASE, 0)
    assert counts.adapter == counts.adapter_trainable > 0


def test_arguments_tell_the_settings(tmp_path: Any) -> None:
    arguments = TrainingArguments(
        str(tmp_path),
        learning_rate=3e-4,
        max_steps=50,
        warmup_steps=5,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        max_grad_norm=0,
        lr_scheduler_type="cosine",
        optim="adamw_torch",
    )
    seen = observe_model(peft.get_peft_model(model(), CONFIGS["lora"]()), arguments=arguments).settings
    found = (seen.learning_rate, seen.total_steps, seen.warmup_steps, seen.batch_size, seen.accumulation)
    assert found == (3e-4, 50, 5, 6, 3)
    assert (seen.schedule, seen.optimizer, seen.clip_norm, seen.rank) == ("cosine", "adamw_torch", float("inf"), 8)
    # transformers gives a model the number of tokens of a whole step
    assert seen.mean_of_means is False


def test_the_share_of_numbers_that_a_step_does_not_move_is_the_share_that_rounding_gives_back() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        layer = nn.Linear(200, 300, bias=False).to(dtype)
        with torch.no_grad():
            layer.weight.copy_(torch.randn(300, 200, generator=generator) * 0.02)
        for rate in (1e-6, 1e-5, 1e-4):
            moved = (layer.weight.double() + rate).to(dtype) != layer.weight
            unmoved = 1 - float(moved.double().mean())
            share = unmoved_share(layer, rate)
            assert share == pytest.approx(unmoved, abs=0.01), (dtype, rate)
    assert unmoved_share(nn.Linear(3, 3), 1e-30) == 0.0


def test_a_bfloat16_model_at_a_small_rate_stands_still(tmp_path: Any) -> None:
    for rate, found in ((1e-6, ["updates_below_precision"]), (1e-2, [])):
        arguments = TrainingArguments(str(tmp_path), learning_rate=rate, optim="adamw_torch")
        seen = observe_model(model(dtype=torch.bfloat16), arguments=arguments)
        assert [p.check for p in examine(seen, checks=["updates_below_precision"]).problems] == found
    # an adapter that peft keeps in float32 is no trouble
    attached = peft.get_peft_model(model(dtype=torch.bfloat16), CONFIGS["lora"]())
    arguments = TrainingArguments(str(tmp_path), learning_rate=1e-6, optim="adamw_torch")
    assert observe_model(attached, arguments=arguments).parameters.unmoved == 0  # type: ignore[union-attr]


def test_weights_are_compared_with_their_start() -> None:
    attached = peft.get_peft_model(model(), CONFIGS["lora"]())
    start = fingerprint(attached)
    assert adapter_state(attached, start).untouched is True
    assert adapter_state(attached).untouched is None
    name, parameter = next((n, p) for n, p in attached.named_parameters() if "lora_B" in n)
    with torch.no_grad():
        parameter[0, 0] = 1e-9
    state = adapter_state(attached, start)
    assert (state.untouched, state.bad) == (False, ())
    with torch.no_grad():
        parameter[0, 1] = float("nan")
    assert adapter_state(attached, start).bad == (name,)


def test_weights_that_are_no_numbers_are_found_before_training() -> None:
    attached = peft.get_peft_model(model(), CONFIGS["lora"]())
    assert "bad_weights" in examine(observe_model(attached)).checked
    with torch.no_grad():
        next(p for p in attached.parameters() if p.requires_grad).view(-1)[0] = float("nan")
    (problem, *_) = examine(observe_model(attached)).problems
    assert problem.check == "bad_weights"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"arguments": 5}, "arguments is a int"),
        ({"arguments": "args.yaml"}, "arguments is a str"),
        ({"batches": 3}, "batches is a int"),
    ],
)
def test_arguments_of_another_kind_are_refused(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        observe_model(model(), **values)


def test_batches_may_be_one_and_may_hold_lists() -> None:
    batch = {"input_ids": [[5, 6, 7, 2]] * 4, "labels": [[-100, 6, 7, 2]] * 4}
    for batches in (batch, [batch]):
        seen = observe_model(model(), batches=batches)
        assert seen.data is not None
        assert seen.data.rows == 4
        assert seen.curve is not None
        assert seen.curve.start_loss is not None
