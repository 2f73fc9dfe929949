"""`merge`, `generate` and `chat` against PEFT itself."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from command_line import CommandLine
from peft_study.methods.peft_files import encoding


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, tiny_data: Path) -> dict[str, Path]:
    """Trains one adapter a method for a few steps at a high rate, so that each answers otherwise than the base."""
    import sys
    from unittest.mock import patch

    from peft_study.cli import main

    folder = tmp_path_factory.mktemp("adapters")
    for method, rate in (("lora", 0.05), ("prefix_tuning", 0.5), ("prompt_tuning", 0.5)):
        words = ["peft-study", "finetune", f"--use_{method}", "--model_name_or_path", str(tiny_model_folder)]
        words += ["--train_file", str(tiny_data), "--max_train_steps", "3", "--learning_rate", str(rate)]
        words += ["--dtype", "float32", "--held_out", "4", "--output_dir", str(folder / method), "--lora_rank", "4"]
        with patch.object(sys, "argv", words), pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
    return {method: folder / method / "adapter" for method in ("lora", "prefix_tuning", "prompt_tuning")}


def expected_answer(folder: Path, base: Path, question: str) -> str:
    """Answers with PEFT alone: its model, the tokenizer's template rendering, greedy generation."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = Path(str(encoding(folder)["template"])).read_text()
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
    )
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(plain, folder).eval()
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    return str(tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True))


@pytest.mark.parametrize("method", ["lora", "prefix_tuning", "prompt_tuning"])
def test_generate_gives_pefts_answers(
    method: str,
    adapters: dict[str, Path],
    tiny_model_folder: Path,
    cli: CommandLine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from peft_study.evaluation import generation
    from peft_study.model.precision import Placement

    monkeypatch.setattr(generation, "choose", lambda _d: Placement(torch.device("cpu"), torch.float32))
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("1+2\n\n3+4\n")
    out = tmp_path / "generation.jsonl"
    cli("generate", adapters[method], "--prompts", prompts, "-o", out, "--max-new-tokens", 8).ok()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"][0]["content"] for row in rows] == ["1+2", "3+4"]
    for row in rows:
        question = row["prompt"][0]["content"]
        assert row["answer"] == expected_answer(adapters[method], tiny_model_folder, question)


def test_chat_answers_until_an_empty_line(adapters: dict[str, Path], cli: CommandLine) -> None:
    ran = cli("chat", adapters["lora"], "--max-new-tokens", 4, stdin="1+1\n2+2\n\nnever read\n").ok()
    assert ran.out.count("adapter: ") == 2


def test_merged_lora_gives_the_adapters_logits(
    adapters: dict[str, Path], tiny_model_folder: Path, cli: CommandLine, tmp_path: Path
) -> None:
    cli("merge", adapters["lora"], "-o", tmp_path / "merged").ok()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    untouched = plain(torch.arange(3, 20)[None]).logits
    adapted = peft.PeftModel.from_pretrained(plain, adapters["lora"])(torch.arange(3, 20)[None]).logits
    ours = merged(torch.arange(3, 20)[None]).logits
    assert (adapted - untouched).abs().max() > 1e-2
    assert torch.allclose(ours, adapted, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template
    assert "is not an empty folder" in cli("merge", adapters["lora"], "-o", tmp_path / "merged").error()


@pytest.mark.parametrize("method", ["prefix_tuning", "prompt_tuning"])
def test_soft_prompts_cannot_be_merged(
    method: str, adapters: dict[str, Path], cli: CommandLine, tmp_path: Path
) -> None:
    line = cli("merge", adapters[method], "-o", tmp_path / "merged").error()
    assert "cannot be merged: it changes no weights" in line
    assert "peft-study chat" in line
    assert not (tmp_path / "merged").exists()


def test_another_base_is_warned_of(adapters: dict[str, Path], cli: CommandLine, tmp_path: Path) -> None:
    import tiny_world
    from tiny_tokenizer import tiny_tokenizer

    other = tiny_world.model("llama")
    with torch.no_grad():
        next(other.parameters()).add_(1.0)
    other.save_pretrained(tmp_path / "other")
    tiny_tokenizer(tiny_world.VOCABULARY).save_pretrained(tmp_path / "other")
    ran = cli("chat", adapters["lora"], "--base", tmp_path / "other", "--max-new-tokens", 2, stdin="1+1\n\n").ok()
    assert "expect other answers" in ran.err


@pytest.mark.parametrize("command", ["chat", "merge", "generate"])
def test_folders_without_adapter(command: str, cli: CommandLine, tmp_path: Path) -> None:
    extra = {"merge": ["-o", tmp_path / "m"], "generate": ["--prompts", tmp_path / "p.txt"], "chat": []}[command]
    (tmp_path / "p.txt").write_text("hello\n")
    assert "holds no adapter_config.json" in cli(command, tmp_path, *extra).error()
