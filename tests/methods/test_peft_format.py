"""Adapters on disk: `peft` loads ours, we load `peft`'s, and what cannot be computed is refused in one line."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import peft_reference as pr
import tiny_world as tw
from peft_study.config import LoraConfig, PrefixTuningConfig, PromptTuningConfig
from peft_study.engine.row import Item, RowRunner
from peft_study.errors import ModelError, OutputError
from peft_study.methods import Adapter, peft_files
from peft_study.methods.peft_format import load_adapter
from peft_study.model.load import Base, wrap
from peft_study.model.precision import Placement

LENGTHS = [12, 20, 33]
SOFT = [name for name in pr.METHODS if name.startswith(("prefix", "prompt"))]


def saved_base(folder: Path, family: str = "llama") -> Base:
    """Returns the tiny base as loaded from a folder, which an adapter can name."""
    path = folder / "base"
    tw.model(family).save_pretrained(path)
    return wrap(tw.model(family), None, Placement(torch.device("cpu"), torch.float32), path=str(path))


def losses(base: Base, adapter: Adapter) -> list[float]:
    with torch.no_grad(), RowRunner(base).row([Item(0, adapter, e) for e in tw.examples(LENGTHS)]) as result:
        return result.item_losses


def pefts_losses(model: Any) -> list[float]:
    with torch.no_grad():
        return [(model(**pr.tensors([e], 0)).loss * pr.supervised([e])).item() for e in tw.examples(LENGTHS)]


@pytest.mark.parametrize("method", pr.METHODS)
@pytest.mark.parametrize("family", ["llama", "gemma3", "cohere"])
def test_peft_loads_what_is_saved_and_computes_the_same(family: str, method: str, tmp_path: Path) -> None:
    base = saved_base(tmp_path, family)
    adapter = pr.adapter_of(pr.METHODS[method], base)
    adapter.save(tmp_path / "adapter", base)
    model = peft.PeftModel.from_pretrained(tw.model(family), tmp_path / "adapter").eval()
    assert pefts_losses(model) == pytest.approx(losses(base, adapter), rel=1e-5)


@pytest.mark.parametrize("method", pr.METHODS)
def test_the_logits_in_peft_are_the_models_with_our_adapter(method: str, tmp_path: Path) -> None:
    base, (example,) = saved_base(tmp_path), tw.examples([14])
    adapter = pr.adapter_of(pr.METHODS[method], base)
    adapter.save(tmp_path / "adapter", base)
    model = peft.PeftModel.from_pretrained(tw.model("llama"), tmp_path / "adapter").eval()
    batch = pr.tensors([example], 0)
    batch.pop("labels")
    with torch.no_grad():
        theirs_LV = model(**batch).logits[0, -len(example) :]
        runner, item = RowRunner(base), Item(0, adapter, example)
        with runner.placed([item]) as (inputs, _, _):
            ours_TV = base.model(**inputs).logits[0]
    assert pr.relative(ours_TV[-len(example) :], theirs_LV) < 1e-5


@pytest.mark.parametrize("method", ["lora", "rslora, named layers"])
def test_peft_trains_what_is_saved(method: str, tmp_path: Path) -> None:
    base, config = saved_base(tmp_path), pr.METHODS[method]
    adapter = pr.adapter_of(config, base)
    adapter.save(tmp_path / "adapter", base)
    model = peft.PeftModel.from_pretrained(tw.model("llama"), tmp_path / "adapter", is_trainable=True)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    model(**pr.tensors(tw.examples([14]), 0)).loss.backward()
    assert trainable
    assert all(p.grad is not None and p.grad.any() for p in trainable.values())
    assert len(trainable) == len(adapter.parameters())


@pytest.mark.parametrize("method", SOFT)
def test_peft_goes_on_training_a_saved_soft_prompt(method: str, tmp_path: Path) -> None:
    """`is_trainable=True` is refused by PEFT for every prompt-learning adapter, its own included; this way it works."""
    base, config = saved_base(tmp_path), pr.METHODS[method]
    adapter, folder = pr.adapter_of(config, base), tmp_path / "adapter"
    adapter.save(folder, base)
    with pytest.raises(ValueError, match="Cannot set a prompt learning adapter to trainable"):
        peft.PeftModel.from_pretrained(tw.model("llama"), folder, is_trainable=True)
    settings = peft.PeftConfig.from_pretrained(folder)
    settings.inference_mode = False  # an initialisation from text would now ask for a tokenizer
    model = peft.get_peft_model(tw.model("llama"), settings)
    peft.set_peft_model_state_dict(model, peft.load_peft_weights(str(folder), device="cpu"))
    assert pefts_losses(model) == pytest.approx(losses(base, adapter), rel=1e-5)
    (parameter,) = [p for p in model.parameters() if p.requires_grad]
    model(**pr.tensors(tw.examples([14]), 0)).loss.backward()
    assert parameter.grad is not None
    assert parameter.grad.any()


@pytest.mark.parametrize("method", pr.METHODS)
def test_the_file_holds_the_adapter_and_nothing_else(method: str, tmp_path: Path) -> None:
    base = saved_base(tmp_path)
    adapter = pr.adapter_of(pr.METHODS[method], base)
    adapter.save(tmp_path / "adapter", base)
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "peft_study.json",
    }
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    if "lora" in method:
        assert all(".lora_A." in name or ".lora_B." in name for name in tensors)
        assert len(tensors) == len(adapter.parameters())
    else:
        assert list(tensors) == ["prompt_embeddings"]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert Path(config["base_model_name_or_path"]).is_dir()
    assert config["task_type"] == "CAUSAL_LM"
    assert not config.get("prefix_projection")
    assert config.get("tokenizer_name_or_path") is None


def test_a_projection_is_saved_as_the_table_it_makes(tmp_path: Path) -> None:
    base = saved_base(tmp_path)
    adapter = pr.adapter_of(PrefixTuningConfig(tokens=4, init="text", projection=True), base)
    # trained a little away from its text start
    adapter.save(tmp_path / "adapter", base)
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")["prompt_embeddings"]
    assert stored.shape == (4, base.layers * 2 * base.kv_heads * base.head_dim)
    assert torch.equal(stored, adapter.table().detach())  # type: ignore[attr-defined]
    assert losses(base, load_adapter(tmp_path / "adapter", base)) == pytest.approx(losses(base, adapter), rel=1e-6)


@pytest.mark.parametrize("method", pr.METHODS)
def test_what_is_saved_comes_back(method: str, tmp_path: Path) -> None:
    base = saved_base(tmp_path)
    adapter = pr.adapter_of(pr.METHODS[method], base)
    adapter.save(tmp_path / "adapter", base)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        back = load_adapter(tmp_path / "adapter", base)
    assert losses(base, back) == pytest.approx(losses(base, adapter), rel=1e-6)
    if "projected" not in method:
        mine, theirs = adapter.parameters(), back.parameters()
        assert set(mine) == set(theirs)
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    back.save(tmp_path / "again", base)
    assert load_adapter(tmp_path / "again", base).parameters().keys() == back.parameters().keys()


PEFTS = {
    "lora": peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules="all-linear"),
    "rslora, a regular expression": peft.LoraConfig(
        task_type="CAUSAL_LM", r=3, use_rslora=True, target_modules=r".*\.1\..*(q|v)_proj"
    ),
    "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
    "prefix, projected": peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=True, encoder_hidden_size=12
    ),
    "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5),
}


@pytest.mark.parametrize("name", PEFTS)
@pytest.mark.parametrize("family", ["llama", "granite"])
def test_what_peft_saved_is_loaded(family: str, name: str, tmp_path: Path) -> None:
    base = saved_base(tmp_path, family)
    model = peft.get_peft_model(tw.model(family), PEFTS[name])
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    model.eval()
    model.save_pretrained(tmp_path / "theirs")
    adapter = load_adapter(tmp_path / "theirs", base)
    assert losses(base, adapter) == pytest.approx(pefts_losses(model), rel=1e-5)


def lora_folder(tmp_path: Path, **changed: Any) -> tuple[Path, Base]:
    base = saved_base(tmp_path)
    pr.adapter_of(LoraConfig(rank=2, target_modules=("q_proj",)), base).save(tmp_path / "adapter", base)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    return tmp_path / "adapter", base


def test_another_bases_weights_are_a_warning_that_names_both(tmp_path: Path) -> None:
    folder, base = lora_folder(tmp_path)
    other = saved_base(tmp_path / "other", "llama")
    assert other.digest == base.digest, "the same weights in another folder are the same base"
    path = folder / "peft_study.json"
    note = json.loads(path.read_text())
    assert note["base_digest"] == base.digest
    path.write_text(json.dumps(note | {"base_digest": "f" * 64}))
    with pytest.warns(UserWarning, match=f"weights ffffffffffff.*{base.digest[:12]}: expect other answers"):
        load_adapter(folder, base)


def test_changed_weights_change_the_digest(tmp_path: Path) -> None:
    base = saved_base(tmp_path)
    model = tw.model("llama")
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    model.save_pretrained(tmp_path / "base")
    again = wrap(model, None, Placement(torch.device("cpu"), torch.float32), path=str(tmp_path / "base"))
    assert again.digest != base.digest


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"use_dora": True}, "LoRA with use_dora is not supported"),
        ({"bias": "all"}, "LoRA with bias is not supported"),
        ({"modules_to_save": ["lm_head"]}, "LoRA with modules_to_save is not supported"),
        ({"rank_pattern": {"q_proj": 3}}, "LoRA with rank_pattern is not supported"),
        ({"alpha_pattern": {"q_proj": 3}, "use_dora": True}, "LoRA with use_dora, alpha_pattern is not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, "LoRA with init_lora_weights=pissa_niter_4 is not supported"),
        ({"lora_bias": True}, "LoRA with lora_bias is not supported"),
        ({"peft_type": "IA3"}, "method IA3 is not one of LORA, PREFIX_TUNING, PROMPT_TUNING"),
        ({"r": 3}, "does not fit this base at"),
        ({"r": 0}, "adapter_config.json cannot be used"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_is_not_computed_here_is_refused_in_one_line(changed: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder, base = lora_folder(tmp_path, **changed)
    with pytest.raises(ModelError) as caught:
        load_adapter(folder, base)
    assert said in str(caught.value)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("prefix", PrefixTuningConfig(tokens=3, init="zero")),
        ("prompt", PromptTuningConfig(tokens=3, init="random")),
    ],
)
def test_an_adapter_of_another_shape_does_not_fit(kind: str, config: Any, tmp_path: Path) -> None:
    base = saved_base(tmp_path)
    pr.adapter_of(config, base).save(tmp_path / "adapter", base)
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_virtual_tokens": 4}))
    with pytest.raises(ModelError, match="does not fit this base at"):
        load_adapter(tmp_path / "adapter", base)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("adapter_config.json", None, "holds no adapter_config.json"),
        ("adapter_config.json", "{", "is not valid JSON"),
        ("adapter_config.json", "[]", "is not valid JSON"),
        ("adapter_model.safetensors", None, "cannot be read"),
        ("adapter_model.safetensors", "damaged", "cannot be read"),
    ],
)
@pytest.mark.parametrize("method", ["lora", "prefix, random", "prompt, random"])
def test_a_broken_folder_is_one_line(method: str, name: str, content: str | None, said: str, tmp_path: Path) -> None:
    base = saved_base(tmp_path)
    folder = tmp_path / "adapter"
    pr.adapter_of(pr.METHODS[method], base).save(folder, base)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(ModelError, match=said) as caught:
        load_adapter(folder, base)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize("method", ["prefix, random", "prompt, random"])
def test_a_soft_prompt_without_its_tensor_does_not_fit(method: str, tmp_path: Path) -> None:
    base = saved_base(tmp_path)
    pr.adapter_of(pr.METHODS[method], base).save(tmp_path / "adapter", base)
    save_file({"other": torch.zeros(2)}, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="does not fit this base at"):
        load_adapter(tmp_path / "adapter", base)


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device (os error 28)")],
    ids=lambda error: type(error).__name__,
)
def test_a_full_disk_is_one_error(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise error

    base = saved_base(tmp_path)
    monkeypatch.setattr(peft_files, "save_file", full)
    with pytest.raises(OutputError, match="No space left on device"):
        pr.adapter_of(pr.METHODS["lora"], base).save(tmp_path / "adapter", base)


def test_names_are_kept_short_only_where_they_mean_the_same_layers(tmp_path: Path) -> None:
    base = saved_base(tmp_path)

    def targets(*names: str) -> list[str]:
        pr.adapter_of(LoraConfig(rank=2, target_modules=names), base).save(tmp_path / "adapter", base)
        found: list[str] = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["target_modules"]
        return found

    assert sorted(targets("q_proj", "up_proj")) == ["q_proj", "up_proj"]
    assert targets("layers.1.self_attn.q_proj") == ["model.layers.1.self_attn.q_proj"]


def test_a_tensor_that_is_not_computed_is_never_dropped_in_silence(tmp_path: Path) -> None:
    folder, base = lora_folder(tmp_path)
    path = folder / "adapter_model.safetensors"
    bias = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias"
    save_file(load_file(path) | {bias: torch.ones(32)}, path)
    with pytest.raises(ModelError, match=bias):
        load_adapter(folder, base)


def test_a_configuration_without_a_needed_setting_names_it(tmp_path: Path) -> None:
    folder, base = lora_folder(tmp_path)
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text())
    del values["lora_alpha"]
    path.write_text(json.dumps(values))
    with pytest.raises(ModelError, match=r"adapter_config\.json cannot be used .*lora_alpha"):
        load_adapter(folder, base)
