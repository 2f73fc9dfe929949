"""From arguments to a run: values, combinations, notes, warnings, and the shipped examples."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from peft_study.compat.command_line import parse
from peft_study.compat.finetune import Run, to_run
from peft_study.config import (
    METHODS,
    FullConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
)
from peft_study.doctor.observations import Observations, configured
from peft_study.doctor.rule import examine
from peft_study.errors import ConfigError

EXAMPLES = Path(__file__).parents[2] / "examples" / "open-instruct"
BASE = ["--model_name_or_path", "m", "--train_file", "t.jsonl"]


def run(*words: str, base: list[str] = BASE) -> Run:
    return to_run(parse([*base, *words]))


def test_lora_takes_the_originals_values() -> None:
    made = run("--use_lora", "--lora_rank", "8", "--lora_alpha", "4", "--lora_dropout", "0.2", "--seed", "7")
    assert made.config.method == LoraConfig(rank=8, alpha=4, dropout=0.2)
    assert made.config.model.name == "m"
    assert made.config.data.train[0].path == "t.jsonl"
    assert made.config.data.chat_template == "tulu"
    assert made.config.data.max_length is None
    assert made.config.data.held_out is None
    assert made.config.training.seed == made.config.training.data_seed == 7
    assert made.config.training.batch_size == 8
    assert made.config.training.epochs == 2
    assert made.config.training.clip_norm is None
    assert made.config.logging.log_every == 1
    assert made.config.logging.keep_checkpoints == 3
    assert made.config.logging.tensorboard is False
    assert made.config.output == Path("output")
    assert made.warnings == ()
    assert made.resume_from is None
    assert made.overwrite is False


def test_lora_defaults_are_the_originals_not_ours() -> None:
    assert run("--use_lora").config.method == LoraConfig(rank=64, alpha=16, dropout=0.1)


def test_zero_virtual_tokens_mean_the_methods_default() -> None:
    assert run("--use_prefix_tuning").config.method == PrefixTuningConfig(tokens=30)
    assert run("--use_prompt_tuning", "--num_virtual_tokens", "0").config.method == PromptTuningConfig(tokens=50)
    assert run("--use_prompt_tuning", "--num_virtual_tokens", "5").config.method == PromptTuningConfig(tokens=5)


def test_inits() -> None:
    made = run("--use_prefix_tuning", "--prefix_init", "zero")
    assert made.config.method == PrefixTuningConfig(tokens=30, init="zero")
    made = run("--use_prompt_tuning", "--prompt_init", "text", "--init_text", "Do it")
    assert made.config.method == PromptTuningConfig(tokens=50, init="text", init_text="Do it")


def test_a_left_out_rate_is_the_methods_own_and_a_given_one_is_kept() -> None:
    assert run("--use_prompt_tuning").config.training.learning_rate is None
    assert run("--use_lora", "--learning_rate", "2e-5").config.training.learning_rate == 2e-5


@pytest.mark.parametrize("flag", ["lora", "prefix_tuning", "prompt_tuning"])
def test_the_doctor_sees_the_commands_rate(flag: str) -> None:
    rates = METHODS[flag].learning_rates
    assert rates is not None
    assert of_the_rate(run(f"--use_{flag}", "--learning_rate", str(rates.default))) == []
    for rate, word in ((rates.low / 10, "low"), (rates.high * 10, "high")):
        (line,) = of_the_rate(run(f"--use_{flag}", "--learning_rate", repr(rate)))
        assert f"is too {word} for {flag.replace('_', ' ')}" in line
        assert f"between {rates.low:g} and {rates.high:g}" in line


def of_the_rate(made: Run) -> list[str]:
    """Returns what the doctor says of a run's rate."""
    settings = configured(made.config.method, made.config.training, steps=None, dtype=None)
    return examine(Observations(settings=settings), checks=("rate_too_low", "rate_too_high")).short()


def test_without_a_method_all_weights_are_trained_and_it_is_said() -> None:
    made = run()
    assert made.config.method == FullConfig()
    assert "ALL weights" in made.warnings[0]


def test_the_batch_of_all_processes_is_kept() -> None:
    words = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "16", "--num_processes", "2"]
    made = run("--use_lora", *words)
    assert made.config.training.batch_size == 32
    (note,) = [note for note in made.notes if "1 x 16 x 2 = 32" in note]
    assert note.endswith("; to use 2 GPUs: torchrun --nproc_per_node 2 -m peft_study finetune ...")
    started = to_run(parse([*BASE, "--use_lora", *words], {"WORLD_SIZE": "2"}))
    assert not any("torchrun" in note for note in started.notes)
    assert not any(" x " in note for note in run("--use_lora").notes)


def test_sum_is_divided_by_all_accumulation_steps() -> None:
    words = ["--reduce_loss", "sum", "--gradient_accumulation_steps", "16", "--num_processes", "2"]
    made = run("--use_prompt_tuning", *words)
    assert made.config.training.reduce_loss == "sum"
    assert made.config.training.sum_divisor == 32
    assert any("/ 32 accumulation steps" in note for note in made.notes)
    assert sum("mean over the supervised tokens" in note for note in run("--use_lora").notes) == 1


def test_clipping_follows_the_flag_then_deepspeed() -> None:
    def clip(*words: str) -> float | None:
        return run("--use_lora", *words).config.training.clip_norm

    assert clip() is None
    assert clip("--clip_grad_norm", "0.5") == 0.5
    assert clip("--clip_grad_norm", "-1") is None
    assert clip("--use_deepspeed") == 1.0
    assert clip("--use_deepspeed", "--clip_grad_norm", "-1") is None
    assert clip("--use_deepspeed", "--clip_grad_norm", "2") == 2
    said = [note for note in run("--use_lora", "--use_deepspeed").notes if "clipped at 1" in note]
    assert len(said) == 1
    assert not any("clipped" in note for note in run("--use_lora", "--use_deepspeed", "--clip_grad_norm", "2").notes)


def test_device_and_precision() -> None:
    def model(*words: str) -> tuple[str, str]:
        made = run("--use_lora", *words).config.model
        return made.device, made.dtype

    assert model() == ("auto", "auto")
    assert model("--mixed_precision", "no") == ("auto", "auto")
    assert model("--mixed_precision", "fp16", "--dtype", "float32") == ("auto", "float32")
    assert model("--cpu") == ("cpu", "auto")
    assert model("--cpu", "--device", "cuda") == ("cuda", "auto")


def test_the_models_own_tokenizer_may_be_named() -> None:
    assert run("--use_lora", "--tokenizer_name", "m").config.model.tokenizer is None
    assert run("--use_lora", "--tokenizer_name", "other").config.model.tokenizer == "other"


def test_qlora_is_a_4_bit_base_under_lora() -> None:
    assert run("--use_lora", "--use_qlora").config.model.quantization == "nf4"
    assert run("--use_lora").config.model.quantization is None


def test_mixtures_of_shares_and_of_counts() -> None:
    def sources(*words: str) -> dict[str, float]:
        made = run("--use_lora", *words, base=["--model_name_or_path", "m"])
        return {source.path: source.take for source in made.config.data.train}

    assert sources("--dataset_mixer_list", "a", "1.0", "b", "0.5") == {"a": 1.0, "b": 0.5}
    assert sources("--dataset_mixer", '{"a": 500, "b": 20}') == {"a": 500, "b": 20}
    assert sources("--dataset_name", "skills") == {"skills": 1.0}


def test_data_settings(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    words = ["--map", "prompt=q, response=a", "--held_out", "0.05", "--chat_template", "own", "--max_seq_length", "512"]
    data = run("--use_lora", *words, "--max_train_samples", "100", "--add_bos").config.data
    assert data.mapping == {"prompt": "q", "response": "a"}
    assert (data.held_out, data.chat_template, data.max_length, data.limit) == (0.05, None, 512, 100)
    assert data.add_bos
    assert run("--use_lora", "--held_out", str(rows)).config.data.held_out == str(rows)
    assert run("--use_lora", "--held_out", "64").config.data.held_out == 64


def test_checkpoints_and_resume(tmp_path: Path) -> None:
    assert run("--use_lora", "--checkpointing_steps", "epoch").config.logging.checkpoint_every == "epoch"
    assert run("--use_lora", "--checkpointing_steps", "50").config.logging.checkpoint_every == 50
    assert run("--use_lora", "--keep_last_n_checkpoints", "-1").config.logging.keep_checkpoints == -1
    made = run("--use_lora", "--resume_from_checkpoint", str(tmp_path))
    assert made.resume_from == tmp_path
    assert run("--use_lora", "--overwrite_output_dir").overwrite


def test_tracking() -> None:
    assert run("--use_lora", "--with_tracking").config.logging.tensorboard
    assert not run("--use_lora", "--with_tracking", "--report_to", "none").config.logging.tensorboard
    made = run("--use_lora", "--with_tracking", "--report_to", "wandb")
    assert made.config.logging.tensorboard
    assert made.config.logging.trackers == ("wandb",)
    assert not any("--report_to" in note for note in made.notes)
    assert run("--use_lora", "--report_to", "wandb").config.logging.trackers == ()
    assert run("--use_lora", "--with_tracking").config.logging.trackers == (), "`all` is TensorBoard, as before"
    made = run("--use_lora", "--with_tracking", "--report_to", "mlflow,aim", "trackio")
    assert made.config.logging.trackers == ("mlflow", "trackio")
    assert any("--report_to aim: written" in note for note in made.notes)


def test_what_has_no_meaning_is_named_in_one_line_if_it_differs_from_the_default() -> None:
    words = ["--push_to_hub", "--hf_entity", "me", "--no_use_flash_attn", "--use_slow_tokenizer", "--timeout", "9",
             "--num_virtual_tokens", "4", "--hf_metadata_dataset", "x"]  # fmt: skip
    (line,) = [note for note in run("--use_lora", *words).notes if note.startswith("accepted without effect")]
    for name in ("push_to_hub", "hf_entity", "use_flash_attn", "timeout", "num_virtual_tokens"):
        assert f"--{name}" in line
    assert "use_slow_tokenizer" not in line, "it was given its default"
    assert not any(note.startswith("accepted") for note in run("--use_lora", "--use_flash_attn").notes)
    (line,) = [note for note in run("--use_prompt_tuning", "--lora_rank", "8").notes if "accepted" in note]
    assert "--lora_rank (not LoRA)" in line


WRONG = [
    ("--use_lora --learning_rate 0", "--learning_rate: 0.0 is not a finite number above 0"),
    ("--use_lora --learning_rate -1e-4", "--learning_rate: -0.0001 is not"),
    ("--use_lora --learning_rate nan", "--learning_rate: nan is not"),
    ("--use_lora --learning_rate inf", "--learning_rate: inf is not"),
    ("--use_lora --lora_rank 0", "--lora_rank: 0 is not at least 1"),
    ("--use_lora --lora_alpha 0", "--lora_alpha: 0.0 is not"),
    ("--use_lora --lora_dropout 1", "--lora_dropout: 1.0 is not"),
    ("--use_prompt_tuning --num_virtual_tokens -1", "--num_virtual_tokens: -1 is not at least 0"),
    ("--use_lora --num_train_epochs 0", "--num_train_epochs: 0 is not at least 1"),
    ("--use_lora --max_train_steps 0", "--max_train_steps: 0 is not at least 1"),
    ("--use_lora --max_train_samples 0", "--max_train_samples: 0 is not"),
    ("--use_lora --max_seq_length 0", "--max_seq_length: 0 is not"),
    ("--use_lora --per_device_train_batch_size 0", "--per_device_train_batch_size: 0 is not at least 1"),
    ("--use_lora --gradient_accumulation_steps 0", "--gradient_accumulation_steps: 0 is not at least 1"),
    ("--use_lora --logging_steps 0", "--logging_steps: 0 is not"),
    ("--use_lora --eval_steps 0", "--eval_steps: 0 is not"),
    ("--use_lora --warmup_ratio 1.5", "--warmup_ratio: 1.5 is not between 0 and 1"),
    ("--use_lora --warmup_ratio nan", "--warmup_ratio: nan is not"),
    ("--use_lora --lr_scheduler_type constant_with_warmup --warmup_ratio 0", "--warmup_ratio: 0 leaves"),
    ("--use_lora --weight_decay -0.1", "--weight_decay: -0.1 is not"),
    ("--use_lora --clip_grad_norm -5", "--clip_grad_norm: -5.0 is not above 0, or -1 for off"),
    ("--use_lora --clip_grad_norm nan", "--clip_grad_norm: nan is not"),
    ("--use_lora --seed -1", "--seed: -1 is not"),
    ("--use_lora --keep_last_n_checkpoints -2", "--keep_last_n_checkpoints: -2 is not"),
    ("--use_lora --checkpointing_steps 0", "--checkpointing_steps: 0 is not"),
    ("--use_lora --checkpointing_steps often", "--checkpointing_steps: often is not a number of steps"),
    ("--use_lora --lr_scheduler_type cosin", "--lr_scheduler_type: unknown value 'cosin'; did you mean 'cosine'?"),
    ("--use_lora --reduce_loss avg", "--reduce_loss: unknown value 'avg'; one of: mean, sum"),
    ("--use_lora --report_to wandbb", "--report_to: unknown tracker 'wandbb'; did you mean 'wandb'?"),
    ("--use_lora --device gpu", "--device: unknown value 'gpu'"),
    ("--use_lora --dtype bf16", "--dtype: unknown value 'bf16'"),
    ("--use_prompt_tuning --prompt_init zero", "--prompt_init: unknown value 'zero'"),
    ("--use_lora --prefix_init zero", "--prefix_init: goes with --use_prefix_tuning only"),
    ("--use_lora --init_text x", "--init_text: goes with"),
    ("--use_prefix_tuning --prefix_init zero --init_text x", "--init_text: has no effect with init 'zero'"),
    ("--use_prompt_tuning --init_text=", "--init_text: is empty"),
    ("--use_lora --use_prompt_tuning", "--use_lora and --use_prompt_tuning are given"),
    ("--use_qlora", "--use_qlora: a 4-bit base goes with --use_lora; add --use_lora"),
    ("--use_qlora --use_prefix_tuning", "goes with --use_lora, not with --use_prefix_tuning"),
    ("--use_lora --dataset_name x", "--train_file and --dataset_name are given, but one source is used"),
    ("--use_lora --config_name other", "--config_name: 'other' is not the model's own"),
    ("--use_lora --tokenizer_revision main", "--tokenizer_revision: 'main' is not the revision"),
    ("--use_lora --dataset_config_name en", "--dataset_config_name: configuration 'en'"),
    ("--use_lora --chat_template tulu --chat_template_name tulu", "--chat_template: goes without"),
    ("--use_lora --resume_from_checkpoint nowhere", "--resume_from_checkpoint: 'nowhere' is not a folder"),
    ("--use_lora --resume_from_checkpoint . --overwrite_output_dir", "--resume_from_checkpoint: goes without"),
    ("--use_lora --map messages", "--map: 'messages' is not"),
    ("--use_lora --held_out 0", "--held_out: 0 is neither"),
    ("--use_lora --held_out 1.5", "--held_out: 1.5 is neither"),
    ("--use_lora --held_out nowhere", "--held_out: 'nowhere' is neither a number nor a file"),
]


@pytest.mark.parametrize(("argv", "message"), WRONG)
def test_what_cannot_be_used_gives_one_line_with_flag_value_and_remedy(argv: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        run(*argv.split(" "))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert error.value.remedy


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--train_file", "t"], "--model_name_or_path: no base model"),
        (["--model_name_or_path", "m"], "no training data"),
        (["--model_name_or_path", "m", "--dataset_mixer_list", "a"], "--dataset_mixer_list: 1 values are not pairs"),
        (["--model_name_or_path", "m", "--dataset_mixer_list", "a", "x"], "'x' of 'a' is not a number above 0"),
        (["--model_name_or_path", "m", "--dataset_mixer_list", "a", "1", "a", "1"], "'a' is named twice"),
        (["--model_name_or_path", "m", "--dataset_mixer", "{a: 500, b: 0.5}"], "shares and counts are mixed"),
        (["--model_name_or_path", "m", "--dataset_mixer", "{a: true}"], "True of 'a' is not a number above 0"),
        (["--model_name_or_path", "m", "--dataset_mixer", "{a: -1}"], "-1 of 'a' is not a number above 0"),
    ],
)
def test_missing_or_mixed_up_sources(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        run("--use_lora", *words, base=[])
    assert message in str(error.value)


def test_the_examples_are_the_originals_four() -> None:
    assert {path.name for path in EXAMPLES.glob("*.sh")} == {
        f"test_finetune_{name}.sh" for name in ("lora", "qlora", "prefix_tuning", "prompt_tuning")
    }


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.sh")), ids=lambda path: path.stem)
def test_the_examples_make_the_runs_they_promise(script: Path, tmp_path: Path) -> None:
    """Runs each script with a `peft-study` that only writes down how it was called."""
    fake = tmp_path / "bin" / "peft-study"
    fake.parent.mkdir()
    fake.write_text(
        f"#!/usr/bin/env python3\nimport json, sys\nopen({str(tmp_path / 'calls')!r}, 'a').write("
        "json.dumps(sys.argv[1:]) + '\\n')\n"
    )
    fake.chmod(0o755)
    env = {"PATH": f"{fake.parent}:{os.environ['PATH']}", "OUTPUT": str(tmp_path / "out")}
    subprocess.run([str(script), "--max_train_steps", "2"], env=env, cwd=tmp_path, check=True, timeout=60)
    made_data, finetune, *merge = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert made_data == ["data", "skills", "-o", "data/skills.jsonl"]
    assert finetune[0] == "finetune"
    made = to_run(parse(finetune[1:]))

    methods = {
        "test_finetune_lora": LoraConfig(rank=64, alpha=16, dropout=0.1),
        "test_finetune_qlora": LoraConfig(rank=64, alpha=16, dropout=0.1),
        "test_finetune_prefix_tuning": PrefixTuningConfig(tokens=30),
        "test_finetune_prompt_tuning": PromptTuningConfig(tokens=8, init_text="Follow the instruction"),
    }
    training = made.config.training
    assert made.config.method == methods[script.stem]
    assert made.config.model.name == "smollm2-135m-instruct"
    assert made.config.model.dtype == "auto"
    assert (training.batch_size, training.learning_rate, training.schedule) == (32, 1e-4, "linear")
    four_bit = script.stem == "test_finetune_qlora"  # which runs without DeepSpeed, so nothing is clipped
    assert made.config.model.quantization == ("nf4" if four_bit else None)
    assert training.clip_norm == (None if four_bit else 1.0)
    assert (training.warmup_ratio, training.epochs, training.steps) == (0.03, 1, 2)
    assert made.config.output == tmp_path / "out"
    assert made.warnings == ()
    assert (of_the_rate(made) == []) == script.stem.endswith("lora")  # 1e-4 teaches virtual tokens nothing
    merged = [
        "--lora_model_name_or_path",
        f"{tmp_path}/out",
        "--output_dir",
        f"{tmp_path}/out_merged",
        "--save_tokenizer",
    ]
    original = ["merge", "--base_model_name_or_path", "smollm2-135m-instruct", *merged]
    assert merge == ([original] if script.stem.endswith("lora") else [])
    assert not any("accepted without effect" in note for note in made.notes)
