"""An adapter that was trained on a 4-bit base is used on a 4-bit base, and every place says so."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from command_line import CommandLine, Ran

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")


@pytest.fixture
def ran(cli: CommandLine, wide_model_folder: Path, tiny_data: Path, tmp_path: Path) -> Ran:
    """Trains an adapter on the 4-bit base into OUT."""
    return cli(
        *(
            "finetune",
            "--model_name_or_path",
            wide_model_folder,
            "--train_file",
            tiny_data,
            "--use_lora",
            "--use_qlora",
        ),
        *("--max_train_steps", 4, "--learning_rate", 1e-3, "--dtype", "float32", "--held_out", 20),
        *("--output_dir", tmp_path / "out"),
    ).ok()


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Returns a list that says of each model that is loaded from now on whether it is 4-bit."""
    found: list[bool] = []
    original = AutoModelForCausalLM.from_pretrained

    def noting(*words: object, **named: object) -> object:
        result = original(*words, **named)
        found.append(bool(getattr(result[0] if isinstance(result, tuple) else result, "is_loaded_in_4bit", False)))
        return result

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", noting)
    return found


def test_terminal_and_record_name_the_quantisation(ran: Ran, tmp_path: Path) -> None:
    (line,) = [line for line in ran.out.splitlines() if line.startswith("loading ")]
    assert "nf4" in line
    note = json.loads((tmp_path / "out" / "adapter" / "peft_study.json").read_text())
    assert note["base_quantization"] == "nf4"


@pytest.mark.usefixtures("ran")
def test_it_is_used_on_the_4_bit_base(cli: CommandLine, tmp_path: Path, loaded: list[bool]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("1+2\n")
    adapter = tmp_path / "out" / "adapter"
    cli("chat", adapter, "--max-new-tokens", 2, stdin="1+1\n").ok()
    cli("generate", adapter, "--prompts", prompts, "--max-new-tokens", 2).ok()
    assert loaded == [True, True]


@pytest.mark.usefixtures("ran")
@pytest.mark.parametrize("command", ["chat", "merge"])
def test_without_bitsandbytes_the_install_is_named(
    command: str, cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    more = ("-o", tmp_path / "merged") if command == "merge" else ()
    line = cli(command, tmp_path / "out" / "adapter", *more).error()
    assert "pip install 'peft-study[quantized]'" in line
    assert not (tmp_path / "merged").exists()


@pytest.mark.usefixtures("ran")
def test_merging_takes_the_4_bit_weights(cli: CommandLine, tmp_path: Path, wide_model_folder: Path) -> None:
    """The merged model is what was trained: the update on the numbers that the codes stand for."""
    merging = cli("merge", tmp_path / "out" / "adapter", "-o", tmp_path / "merged").ok()
    assert "nf4" in merging.out
    assert "dequantised" in merging.out
    assert "held-out loss: base" in merging.out
    assert merging.err == ""
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    from peft import PeftModel

    tokens = torch.arange(3, 30)[None]
    plain = AutoModelForCausalLM.from_pretrained(
        wide_model_folder, dtype=torch.float32, quantization_config=quantization
    )
    # in train mode: where the CPU has AVX-512 BF16, bitsandbytes computes in bfloat16 in eval mode
    model = PeftModel.from_pretrained(plain, tmp_path / "out" / "adapter").train()
    for layer in model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.eval()
    trained = model(tokens).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")(tokens).logits
    assert torch.allclose(merged, trained, rtol=1e-4, atol=1e-4)
