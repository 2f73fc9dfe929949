"""What is checked at load: a model in which positions of a row meet is run one example a row."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, OPTConfig, OPTForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

import peft_reference as pr
import tiny_world as tw
from peft_study.config import TrainingConfig
from peft_study.engine.engine import Engine
from peft_study.engine.heldout import example_losses
from peft_study.engine.row import Item, RowPlan, RowResult, RowRunner
from peft_study.engine.trial import Trial
from peft_study.methods import create
from peft_study.methods.reference import NoAdapter
from peft_study.model.load import Base, wrap
from peft_study.model.precision import Placement
from peft_study.model.proof import rope_looks_at_the_row


def mixing_model() -> Any:
    """A Llama whose first MLP also adds a part of the token before, as a short convolution does."""
    model = tw.model("llama")

    def mix(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        before = torch.cat([torch.zeros_like(output[:, :1]), output[:, :-1]], dim=1)
        return output + 0.5 * before

    model.get_decoder().layers[0].mlp.register_forward_hook(mix)
    return model


def mixing_base() -> Base:
    return wrap(mixing_model(), None, Placement(torch.device("cpu"), torch.float32), path="tiny")


def spy(runner: RowRunner, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Returns a list that grows by the number of items of every row."""
    counts: list[int] = []
    original = runner.row

    def row(items: Sequence[Item], *plan: RowPlan) -> AbstractContextManager[RowResult]:
        counts.append(len(items))
        return original(items, *plan)

    monkeypatch.setattr(runner, "row", row)
    return counts


@pytest.mark.parametrize("family", tw.FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ordinary_families_pass(family: str, dtype: torch.dtype) -> None:
    proof = tw.base(family, dtype=dtype).proof
    assert proof.packs
    assert proof.chunked_head
    if dtype == torch.float32:
        assert max(proof.packing_error, proof.head_error) < 1e-5


def test_a_model_that_mixes_neighbours_is_found() -> None:
    proof = mixing_base().proof
    assert not proof.packs
    assert proof.packing_error > 1e-3
    assert proof.chunked_head


@pytest.mark.parametrize("method", ["lora", "prefix, random", "prompt, random"])
def test_such_a_model_takes_one_example_a_row_and_has_pefts_numbers(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, config, examples = mixing_base(), pr.METHODS[method], tw.examples([9, 14, 11, 8])
    adapter = create(config, base, None, seed=0)
    reference = pr.Reference(mixing_model(), config, adapter)
    expected = [loss.item() for loss in reference.losses(examples)]

    engine = Engine(base, row_tokens=4096)
    counts = spy(engine.runner, monkeypatch)
    trial = Trial("t", adapter, TrainingConfig(learning_rate=1e-3, steps=1, batch_size=4), examples)
    engine.admit(trial)
    events = []
    while not events:
        events = engine.step()
    report = events[0].report
    assert counts == [1, 1, 1, 1]
    found = dict(zip(report.examples, report.example_losses, strict=True))
    assert [found[i] for i in range(4)] == pytest.approx(expected, rel=1e-5)


def test_held_out_losses_of_such_a_model_are_taken_one_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    base, examples = mixing_base(), tw.examples([9, 14, 11, 8])
    runner = RowRunner(base)
    counts = spy(runner, monkeypatch)
    (losses,) = example_losses(runner, [NoAdapter()], examples, [2, 0, 3], row_tokens=4096)
    assert counts == [1, 1, 1]
    model = mixing_model()
    for index, loss in zip([2, 0, 3], losses, strict=True):
        with torch.no_grad():
            own = model(**pr.tensors([examples[index]], 0)).loss.item() * pr.supervised([examples[index]])
        assert loss == pytest.approx(own, rel=1e-5)


@pytest.mark.parametrize(
    ("rope", "looks"),
    [
        ({"rope_type": "default", "rope_theta": 1e4}, False),
        ({"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}, False),
        ({"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}, False),
        ({"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, True),
        (
            {
                "rope_type": "longrope",
                "factor": 2.0,
                "rope_theta": 1e4,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
            },
            True,
        ),
    ],
    ids=lambda value: value["rope_type"] if isinstance(value, dict) else "",
)
def test_rotations_that_depend_on_the_rows_longest_position_are_known(rope: dict[str, Any], looks: bool) -> None:
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=4, head_dim=8, max_position_embeddings=256, rope_parameters=rope
    )
    assert rope_looks_at_the_row(config) is looks


def test_such_rotations_are_also_found_where_layer_kinds_have_their_own() -> None:
    config = tw.config("gemma3")
    assert not rope_looks_at_the_row(config)
    config.rope_parameters["full_attention"]["rope_type"] = "dynamic"
    assert rope_looks_at_the_row(config)


def test_a_model_with_dynamic_rope_is_not_packed_though_short_rows_agree() -> None:
    config = tw.config("llama")
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = type(tw.model("llama"))(config).eval()
    proof = wrap(model, None, Placement(torch.device("cpu"), torch.float32), path="tiny").proof
    assert proof.packing_error < 1e-5
    assert not proof.packs


def test_a_window_that_only_the_mask_has_keeps_the_models_own_attention() -> None:
    """Qwen2-MoE's layers are not told of their window; the texts that are tried at load are shorter than it."""
    config = Qwen2MoeConfig(
        vocab_size=tw.VOCABULARY, hidden_size=32, num_hidden_layers=2, intermediate_size=64, moe_intermediate_size=32,
        shared_expert_intermediate_size=32, num_attention_heads=4, num_key_value_heads=2, num_experts=4,
        num_experts_per_tok=2, use_sliding_window=True, sliding_window=80, max_window_layers=0,
    )  # fmt: skip
    base = wrap(Qwen2MoeForCausalLM(config), None, Placement(torch.device("cpu"), torch.float32), path="tiny")
    assert not base.proof.segmented
    assert not base.proof.packs


def test_a_base_has_no_dropout_of_its_own_in_training_mode() -> None:
    """OPT hands its share to a function; gradient checkpointing puts the base into training mode."""
    config = OPTConfig(
        vocab_size=tw.VOCABULARY, hidden_size=32, num_hidden_layers=2, ffn_dim=64, num_attention_heads=4,
        max_position_embeddings=256, word_embed_proj_dim=32, dropout=0.5,
    )  # fmt: skip
    base = wrap(OPTForCausalLM(config), None, Placement(torch.device("cpu"), torch.float32), path="tiny")
    plain, again = Engine(base), Engine(base, gradient_checkpointing=True)
    expected = plain.losses([NoAdapter()], tw.examples([60]), [0])[0]
    for _ in range(2):
        assert again.losses([NoAdapter()], tw.examples([60]), [0])[0] == pytest.approx(expected, rel=1e-6)
