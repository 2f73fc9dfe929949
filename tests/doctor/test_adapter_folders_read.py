"""An adapter's folder: healthy ones of peft and of ours, and each fault that its files show."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import peft_reference
from peft_study.doctor.readers.adapter_files import read_adapter
from peft_study.doctor.rule import examine
from peft_study.errors import ModelError
from peft_study.model.load import wrap
from peft_study.model.precision import Placement
from tiny_world import model

CAUSAL = {"task_type": "CAUSAL_LM"}
FRESH: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(**CAUSAL, target_modules=["q_proj", "embed_tokens"], r=4),
    "adalora": lambda: peft.AdaLoraConfig(**CAUSAL, total_step=10, init_r=4),
    "ia3": lambda: peft.IA3Config(**CAUSAL),
    "vera": lambda: peft.VeraConfig(**CAUSAL),
    "oft": lambda: peft.OFTConfig(**CAUSAL, oft_block_size=0, r=4),
    "boft": lambda: peft.BOFTConfig(**CAUSAL, boft_block_size=4),
    "miss": lambda: peft.MissConfig(**CAUSAL, r=4),
    "prefix_tuning": lambda: peft.PrefixTuningConfig(**CAUSAL, num_virtual_tokens=3, init_weights="zero"),
    "prompt_tuning": lambda: peft.PromptTuningConfig(**CAUSAL, num_virtual_tokens=3, prompt_tuning_init="SAMPLE_VOCAB"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: Any) -> str:
    folder = tmp_path_factory.mktemp("base")
    model(dtype=torch.bfloat16).save_pretrained(folder)
    return str(folder)


def saved(config: Any, base: str, folder: Path, *, trained: bool = True, **options: Any) -> Path:
    """Saves an adapter of peft with a base that lies on the disk; trained: by noise."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    attached = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16), config)
    if trained:
        with torch.no_grad():
            for parameter in attached.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.01)
    attached.save_pretrained(folder, **options)
    return folder


def changed(folder: Path, **values: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def with_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return folder


def checks(folder: Path, **values: Any) -> list[str]:
    return [problem.check for problem in examine(read_adapter(folder, **values)).problems]


@pytest.mark.parametrize("name", FRESH)
def test_an_adapter_at_its_initialisation_is_told_from_a_trained_one(name: str, base: str, tmp_path: Path) -> None:
    options = {"save_embedding_layers": False} if name == "lora" else {}
    fresh = saved(FRESH[name](), base, tmp_path / "fresh", trained=False, **options)
    assert read_adapter(fresh).adapter.untouched is True  # type: ignore[union-attr]
    assert checks(fresh) == ["untouched"]
    trained = saved(FRESH[name](), base, tmp_path / "trained", **options)
    seen = read_adapter(trained)
    assert seen.adapter is not None
    assert (seen.adapter.untouched, seen.adapter.bad, seen.adapter.embeddings) == (False, (), 0)
    assert (seen.settings.method, seen.adapter.base_found) == (name, True)
    assert checks(trained) == []


def test_a_prompt_from_text_is_found_untouched_with_the_base_alone(tiny_model_folder: Path, tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(
        **CAUSAL,
        num_virtual_tokens=6,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="Sort these words",
        tokenizer_name_or_path=str(tiny_model_folder),
    )
    fresh = saved(config, str(tiny_model_folder), tmp_path / "a", trained=False)
    assert checks(fresh) == ["untouched"]
    elsewhere = changed(fresh, base_model_name_or_path="somebody/model")
    seen = read_adapter(elsewhere)
    assert seen.adapter is not None
    assert seen.adapter.untouched is None
    assert "--base" in seen.reasons["adapter.untouched"][0]
    assert "hub" in seen.reasons["adapter.base_found"][0]
    assert checks(elsewhere, base=str(tiny_model_folder)) == ["untouched"]
    one_number = with_tensors(fresh, lambda tensors: tensors["prompt_embeddings"][2].add_(1e-3))
    assert checks(one_number, base=str(tiny_model_folder)) == []


def test_a_random_start_cannot_be_known(base: str, tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(**CAUSAL, num_virtual_tokens=3)
    seen = read_adapter(saved(config, base, tmp_path / "p", trained=False))
    assert seen.adapter is not None
    assert seen.adapter.untouched is None
    assert "random start" in seen.reasons["adapter.untouched"][0]


def test_nan_is_found_by_name(base: str, tmp_path: Path) -> None:
    folder = saved(peft.LoraConfig(**CAUSAL), base, tmp_path / "a")
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"
    with_tensors(folder, lambda tensors: tensors[name][0].fill_(float("inf")))
    assert read_adapter(folder).adapter.bad == (name,)  # type: ignore[union-attr]
    assert checks(folder) == ["bad_weights"]


def test_embeddings_saved_along_are_weighed(base: str, tmp_path: Path) -> None:
    along = saved(peft.LoraConfig(**CAUSAL), base, tmp_path / "a", save_embedding_layers=True)
    assert checks(along) == ["embeddings_saved"]
    # 320 x 32 in bfloat16, tied to the head or saved once more
    assert read_adapter(along).adapter.embeddings in (320 * 32 * 2, 2 * 320 * 32 * 2)  # type: ignore[union-attr]
    asked = saved(peft.LoraConfig(**CAUSAL, modules_to_save=["lm_head", "embed_tokens"]), base, tmp_path / "b")
    assert checks(asked) == []


def test_a_base_that_is_gone(base: str, tmp_path: Path) -> None:
    folder = changed(saved(peft.LoraConfig(**CAUSAL), base, tmp_path / "a"), base_model_name_or_path="/no/such/base")
    assert checks(folder) == ["base_not_found"]
    assert checks(folder, base=base) == []
    with pytest.raises(ModelError, match="no model folder"):
        read_adapter(folder, base=str(tmp_path))
    assert read_adapter(changed(folder, base_model_name_or_path=None)).adapter.base_found is None  # type: ignore[union-attr]


def test_a_configuration_that_no_longer_says_what_was_trained(base: str, tmp_path: Path) -> None:
    def lora(name: str, **values: Any) -> list[str]:
        folder = saved(peft.LoraConfig(**CAUSAL, target_modules=["q_proj", "up_proj"]), base, tmp_path / name)
        found = read_adapter(changed(folder, **values)).adapter
        assert found is not None
        return list(found.differences or ())

    assert lora("same") == []
    assert lora("rank", r=16)[0].startswith("config: r=16; weights: rank 8 of model.layers.0.")
    assert len(lora("rank of one", r=16, rank_pattern={"q_proj": 8})) == 2
    assert (
        "target_modules=q_proj; weights: model.layers.0.mlp.up_proj (+1)" in lora("fewer", target_modules=["q_proj"])[0]
    )
    assert "v_proj" in lora("more", target_modules=["q_proj", "v_proj", "up_proj"])[0]
    # names of other architectures do no harm
    assert lora("names", target_modules=["q_proj", "up_proj", "c_attn"]) == []


@pytest.mark.parametrize("name", ["prompt_tuning", "prefix_tuning"])
def test_a_prompt_of_another_length_or_width(name: str, base: str, tmp_path: Path) -> None:
    folder = saved(FRESH[name](), base, tmp_path / "a")
    found = read_adapter(changed(folder, num_virtual_tokens=8)).adapter
    assert found is not None
    assert found.differences == ("config: num_virtual_tokens=8; weights: 3",)
    width = json.loads((folder / "adapter_config.json").read_text())["token_dim"]
    found = read_adapter(changed(folder, num_virtual_tokens=3, token_dim=2 * width)).adapter
    assert found is not None
    assert found.differences is not None
    assert len(found.differences) == 2  # against the weights, and against the base
    assert "base: " in found.differences[1]


def test_weights_of_another_base(base: str, tmp_path: Path) -> None:
    folder = saved(peft.LoraConfig(**CAUSAL), base, tmp_path / "a")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    with_tensors(folder, lambda tensors: tensors.update({name: torch.ones(8, 40)}))
    assert [p.check for p in examine(read_adapter(folder)).problems] == ["config_differs"]

    def renamed(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if ".layers.1." in key]:
            tensors[key.replace(".layers.1.", ".layers.9.")] = tensors.pop(key)

    deep = with_tensors(saved(peft.LoraConfig(**CAUSAL), base, tmp_path / "b"), renamed)
    assert "layers.9" in read_adapter(deep).adapter.differences[0]  # type: ignore[index, union-attr]


def test_a_pickle_is_not_read(base: str, tmp_path: Path) -> None:
    folder = saved(peft.LoraConfig(**CAUSAL), base, tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    seen = read_adapter(folder)
    assert "pickle" in seen.reasons["adapter.bad"][0]
    assert {"bad_weights", "untouched"} <= set(examine(seen).unchecked)


def test_what_is_no_adapter_is_said_in_a_line(base: str, tmp_path: Path) -> None:
    def refusal(path: Path) -> str:
        with pytest.raises(ModelError) as told:
            read_adapter(path)
        assert "\n" not in str(told.value)
        return str(told.value)

    folder = saved(peft.LoraConfig(**CAUSAL), base, tmp_path / "run" / "checkpoint-7")
    assert read_adapter(folder / "adapter_config.json").settings.rank == 8
    assert "did you mean" in refusal(tmp_path / "runn")
    assert "checkpoint-7" in refusal(tmp_path / "run")
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    whole, text = weights.read_bytes(), config.read_text()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "truncated or damaged" in refusal(folder)
    weights.write_bytes(b"")
    assert "is empty (0 bytes)" in refusal(folder)
    save_file({}, weights)
    assert "holds no tensor" in refusal(folder)
    weights.unlink()
    assert "holds no adapter_model.safetensors" in refusal(folder)
    for broken, said in ((text[:40], "no valid JSON"), ("", "is empty"), ("[]", "names no peft_type")):
        config.write_text(broken)
        assert said in refusal(folder)


@pytest.mark.parametrize("name", peft_reference.METHODS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_our_own_adapters_are_clean(name: str, family: str, tmp_path: Path) -> None:
    place = tmp_path / "base"
    model(family).save_pretrained(place)
    ours = wrap(model(family), None, Placement(torch.device("cpu"), torch.float32), path=str(place))
    peft_reference.adapter_of(peft_reference.METHODS[name], ours).save(tmp_path / "adapter", ours)
    seen = read_adapter(tmp_path / "adapter")
    assert seen.adapter is not None
    assert (seen.adapter.bad, seen.adapter.differences, seen.adapter.base_found) == ((), (), True)
    assert not examine(seen).wrong
