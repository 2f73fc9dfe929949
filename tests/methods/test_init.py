"""Where each method starts: a text's keys and values act as the text would, and the rest is what it says."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import tiny_world as tw
from peft_study.config import LoraConfig, MethodConfig, PrefixTuningConfig, PromptTuningConfig
from peft_study.data.conversation import Example
from peft_study.engine.row import Item, RowRunner
from peft_study.errors import ConfigError, ModelError
from peft_study.methods import Adapter, Material, create
from peft_study.methods.lora import target_shapes
from peft_study.methods.prefix_tuning import PrefixAdapter
from peft_study.methods.prompt_tuning import frequent_tokens, table_rms
from peft_study.model.load import Base

LENGTHS = [12, 20, 9, 33]


def our_losses(base: Base, adapter: Adapter, examples: Sequence[Example]) -> list[float]:
    with torch.no_grad(), RowRunner(base).row([Item(0, adapter, example) for example in examples]) as result:
        return result.item_losses


def losses_behind(family: str, before: list[int], examples: Sequence[Example]) -> list[float]:
    """Plain forward passes of the untouched model over the text's ids and the example's, loss on the example alone."""
    model, sums = tw.model(family), []
    for example in examples:
        ids = torch.tensor([*before, *example.tokens_L.tolist()])
        with torch.no_grad():
            logits_LV = model(input_ids=ids[None]).logits[0].float()
        places = torch.from_numpy(np.flatnonzero(example.supervised_L)) + len(before)
        sums.append(F.cross_entropy(logits_LV[places - 1], ids[places], reduction="sum").item())
    return sums


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("family", tw.FAMILIES)
def test_a_text_prefix_starts_as_the_base_behind_that_text(family: str, projection: bool) -> None:
    base, examples, material = tw.base(family), tw.examples(LENGTHS), tw.material()
    config = PrefixTuningConfig(tokens=7, init="text", init_text="hello", projection=projection)
    found = our_losses(base, create(config, base, material, 0), examples)
    ids = material.text_tokens("hello", 7)
    assert ids[0] == 1
    assert found == pytest.approx(losses_behind(family, ids, examples), rel=1e-5)
    assert found != pytest.approx(losses_behind(family, [], examples), rel=1e-4)


@pytest.mark.parametrize("family", tw.FAMILIES)
def test_a_text_prompt_starts_as_the_base_behind_that_text(family: str) -> None:
    base, examples, material = tw.base(family), tw.examples(LENGTHS), tw.material(bos=None)
    config = PromptTuningConfig(tokens=8, init="text", init_text="Follow me")
    found = our_losses(base, create(config, base, material, 0), examples)
    assert found == pytest.approx(losses_behind(family, material.text_tokens("Follow me", 8), examples), rel=1e-5)


def test_a_vocabulary_prompt_starts_as_the_base_behind_those_tokens() -> None:
    base, examples, material = tw.base("gemma2"), tw.examples(LENGTHS), tw.material()
    found = our_losses(base, create(PromptTuningConfig(tokens=5, init="vocab"), base, material, 9), examples)
    assert found == pytest.approx(losses_behind("gemma2", frequent_tokens(material, 5, 9), examples), rel=1e-5)


@pytest.mark.parametrize("config", [LoraConfig(rank=4), LoraConfig(rank=4, rslora=True)], ids=["lora", "rslora"])
@pytest.mark.parametrize("family", tw.FAMILIES)
def test_lora_starts_as_the_base(family: str, config: LoraConfig) -> None:
    base, examples = tw.base(family), tw.examples(LENGTHS)
    assert our_losses(base, create(config, base, None, 0), examples) == pytest.approx(
        losses_behind(family, [], examples), rel=1e-5
    )


def test_a_zero_prefix_is_zero_and_not_the_base() -> None:
    base, examples = tw.base("llama"), tw.examples(LENGTHS)
    adapter = create(PrefixTuningConfig(tokens=4, init="zero"), base, None, 0)
    assert not adapter.parameters()["table"].any()
    assert our_losses(base, adapter, examples) != pytest.approx(losses_behind("llama", [], examples), rel=1e-3)


def test_random_inits_are_at_their_scale() -> None:
    base = tw.base("llama")
    prefix = create(PrefixTuningConfig(tokens=30, init="random"), base, None, 0).parameters()["table"]
    assert float(prefix.pow(2).mean().sqrt()) == pytest.approx(1.0, rel=0.1)  # PEFT's nn.Embedding: standard normal
    prompt = create(PromptTuningConfig(tokens=30, init="random"), base, None, 0).parameters()["embeddings"]
    weight = base.model.get_input_embeddings().weight
    assert float(prompt.pow(2).mean().sqrt()) == pytest.approx(float(weight.pow(2).mean().sqrt()), rel=0.2)


def test_the_tables_scale_is_that_of_the_embedding_module() -> None:
    """Gemma multiplies by sqrt(hidden) inside the module: the weight alone would be off by 5.7."""
    base = tw.base("gemma3")
    weight = base.model.get_input_embeddings().weight
    assert table_rms(base) == pytest.approx(float(weight.pow(2).mean().sqrt()) * 32**0.5, rel=0.01)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(rank=4),
        PrefixTuningConfig(tokens=4, init="random"),
        PrefixTuningConfig(tokens=4, init="random", projection=True),
        PromptTuningConfig(tokens=4, init="random"),
        PromptTuningConfig(tokens=4, init="vocab"),
    ],
    ids=lambda c: f"{c.method}-{getattr(c, 'init', '')}",
)
def test_the_seed_alone_decides(config: MethodConfig) -> None:
    base, material = tw.base("llama"), tw.material()
    torch.manual_seed(1)
    first = create(config, base, material, 5).parameters()
    torch.manual_seed(2)
    again, other = create(config, base, material, 5).parameters(), create(config, base, material, 6).parameters()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    assert all(p.dtype == torch.float32 and p.requires_grad for p in first.values())


def test_layers_of_one_lora_start_differently_and_within_pefts_bound() -> None:
    base = tw.base("llama")
    parameters = create(LoraConfig(rank=4), base, None, 0).parameters()
    first, second = (parameters[f"model.layers.{i}.self_attn.q_proj.lora_A"] for i in (0, 1))
    assert not torch.equal(first, second)
    # kaiming_uniform with a = sqrt(5) over 32 inputs is uniform within 1 / sqrt(32)
    assert 0.9 * 32**-0.5 < float(first.abs().max()) <= 32**-0.5
    assert not parameters["model.layers.0.self_attn.q_proj.lora_B"].any()


def test_adapters_stay_float32_on_a_half_precision_base() -> None:
    base, material = tw.base("llama", dtype=torch.bfloat16), tw.material()
    for config in (LoraConfig(), PrefixTuningConfig(tokens=4), PromptTuningConfig(tokens=4)):
        for name, parameter in create(config, base, material, 0).parameters().items():
            assert parameter.dtype == torch.float32, (config.method, name)


# Material: exactly P tokens, BOS once, continued from the data, nothing repeated


@given(
    text=st.one_of(st.none(), st.text("abc ", max_size=12)),
    count=st.integers(1, 40),
    bos=st.sampled_from([None, 1]),
)
def test_text_tokens_are_bos_once_then_the_text_then_the_data(text: str | None, count: int, bos: int | None) -> None:
    material = tw.material(bos=bos, opening=64)
    ids = material.text_tokens(text, count)
    data = [t for t in material.opening if t != 1]
    assert (
        ids
        == ([] if bos is None else [bos])[:count] + [*material.encode(text or ""), *data][: count - (bos is not None)]
    )
    assert len(ids) == count


def test_bos_is_not_doubled_where_the_text_or_the_data_has_it() -> None:
    material = tw.material(bos=1)
    assert list(material.opening[:1]) == [1]
    assert material.text_tokens(None, 10) == list(material.opening[:10])
    written = Material(lambda _: [1, 50, 51], material.opening, material.counts_V, 1, material.special)
    assert written.text_tokens("x", 5) == [1, 50, 51, *material.opening[1:3]]


def test_too_little_data_is_an_error_that_says_both_numbers() -> None:
    base, material = tw.base("llama"), tw.material(bos=None, opening=5)
    with pytest.raises(ConfigError, match=r"prefix_tuning: .*fewer than 30 tokens"):
        create(PrefixTuningConfig(tokens=30), base, material, 0)
    with pytest.raises(ConfigError, match=r"prompt_tuning: .*5 different tokens, fewer than 8"):
        create(PromptTuningConfig(tokens=8, init="vocab"), base, material, 0)


def test_vocabulary_tokens_are_distinct_frequent_and_no_specials() -> None:
    counts = np.zeros(20_000, dtype=np.int64)
    counts[:7000] = 10_000 - np.arange(7000)
    material = Material(lambda _: [], [], counts, None, frozenset({0, 3}))
    drawn = [frequent_tokens(material, 300, seed) for seed in range(20)]
    for ids in drawn:
        assert len(set(ids)) == 300
        assert not set(ids) & {0, 3}
        assert max(ids) < 5002, "beyond the 5,000 most common that are no specials"
    assert max(max(ids) for ids in drawn) > 4900, "drawn evenly, not the most frequent of all"
    assert counts[0] == 10_000, "the caller's counts were changed"


# target modules


def test_all_linear_is_every_linear_layer_but_the_head() -> None:
    shapes = target_shapes(tw.model("llama"), "all-linear")
    assert len(shapes) == 2 * 7
    assert not any("lm_head" in name for name in shapes)
    assert shapes["model.layers.0.self_attn.k_proj"] == (32, 16)
    assert shapes["model.layers.1.mlp.down_proj"] == (48, 32)


def test_names_match_by_their_last_parts_in_the_models_order() -> None:
    model = tw.model("llama")
    assert list(target_shapes(model, ("up_proj", "q_proj"))) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    ]
    assert list(target_shapes(model, ("layers.1.self_attn.q_proj",))) == ["model.layers.1.self_attn.q_proj"]
    assert list(target_shapes(model, ("mlp.up_proj",))) == ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]


@pytest.mark.parametrize(("name", "remedy"), [("q_porj", "did you mean 'q_proj'"), ("dense_h", "one of: down_proj")])
def test_an_unknown_layer_name_gets_the_nearest(name: str, remedy: str) -> None:
    with pytest.raises(ModelError, match=rf"target_modules: no linear layer.*{name}.*{remedy}"):
        target_shapes(tw.model("llama"), (name,))


def test_a_model_with_other_layers_than_attention_takes_no_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tw.base("qwen3")
    config = PrefixTuningConfig(tokens=3, init="zero")
    assert isinstance(create(config, base, None, 0), PrefixAdapter)
    monkeypatch.setattr(base.model.config, "layer_types", ["linear_attention", "full_attention"])
    with pytest.raises(ModelError, match=r"linear_attention.*use lora or prompt_tuning"):
        create(config, base, None, 0)
    monkeypatch.undo()
    monkeypatch.setattr(base.model.config, "num_kv_shared_layers", 1, raising=False)
    with pytest.raises(ModelError, match="share or compress"):
        create(config, base, None, 0)
