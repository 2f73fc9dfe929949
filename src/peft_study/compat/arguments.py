"""The arguments of open-instruct's ``finetune.py`` (December 2024) with the PEFT additions, and our own beside them.

Names, types and defaults are the original's, so scripts and YAML files written for it run unchanged. Where a value
means something else here, ``compat.finetune`` prints a note.
"""

# ruff: noqa: RUF009 -- _arg returns a dataclass field, which is what the rule wants; it only knows `field` by name

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

from peft_study.config import Device, Dtype, PrefixTuningConfig, PromptTuningConfig, Schedule

NO_EFFECT = "no effect: "
"""The help of an argument that is accepted and ignored begins with this; the reason follows."""


def _arg(default: Any, text: str, choices: tuple[str, ...] = (), short: str | None = None) -> Any:
    """Declares one argument; ``text`` is its help, in which argparse reads ``%`` as a format."""
    metadata = {"help": text.replace("%", "%%"), **({"choices": choices} if choices else {})}
    if short is not None:
        metadata["aliases"] = [short]
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class FinetuneArguments:
    """The 65 arguments of the original."""

    _argument_group_name = "arguments of open-instruct's finetune.py"

    # model and tokenizer
    exp_name: str = _arg("finetune", "name of the experiment, kept in the run's record")
    run_name: str | None = _arg(None, "name of the run")
    model_name_or_path: str | None = _arg(None, "base model: folder, hub id, or smollm2-135m-instruct (embedded)")
    config_name: str | None = _arg(None, "configuration of another model; only the model's own can be used")
    tokenizer_name: str | None = _arg(None, "tokenizer, when it is not the model's")
    tokenizer_revision: str | None = _arg(None, "git revision of the tokenizer; only the model's own can be used")
    chat_template_name: str = _arg("tulu", "a named chat template or a file")
    use_flash_attn: bool = _arg(True, NO_EFFECT + "chosen by the device")
    use_slow_tokenizer: bool = _arg(True, NO_EFFECT + "the fast tokenizer is needed for the loss mask")
    model_revision: str | None = _arg(None, "git revision of the model on the hub")
    trust_remote_code: bool = _arg(False, "run code that ships with the model")
    low_cpu_mem_usage: bool = _arg(False, NO_EFFECT + "safetensors are mapped")
    # data
    dataset_name: str | None = _arg(None, "data set: hub id, folder, or skills (embedded)")
    dataset_mixer: dict | None = _arg(None, "{data set: share or count}, as YAML or JSON")  # type: ignore[type-arg]
    dataset_mixer_list: list[str] | None = _arg(None, "DATASET SHARE [DATASET SHARE ...]; counts if any is above 1")
    dataset_mix_dir: str | None = _arg(None, NO_EFFECT + "the mixture is not written")
    dataset_config_name: str | None = _arg(None, "configuration of the hub data set; convert it first")
    train_file: str | None = _arg(None, "training file: what `peft-study data convert` reads")
    max_train_samples: int | None = _arg(None, "use this many rows, drawn at random by --seed")
    preprocessing_num_workers: int | None = _arg(None, "processes that tokenise; left out: all cores")
    max_seq_length: int | None = _arg(None, "tokens an example; the rest is cut off; left out: no limit")
    overwrite_cache: bool = _arg(False, NO_EFFECT + "tokens are cached by content")
    add_bos: bool = _arg(False, "put BOS first where the template does not")
    # optimisation
    clip_grad_norm: float = _arg(-1, "largest gradient norm; -1: off (1.0 under DeepSpeed, as in the original)")
    gradient_accumulation_steps: int = _arg(1, "micro-batches an update; only its product with the batch counts here")
    learning_rate: float = _arg(2e-5, "peak rate of AdamW; left out: the method's own default, not this number")
    logging_steps: int | None = _arg(None, "optimizer steps between log lines; left out: 1")
    lora_rank: int = _arg(64, "rank of LoRA")
    lora_alpha: float = _arg(16, "the LoRA update is scaled by alpha / rank")
    lora_dropout: float = _arg(0.1, "dropout before the LoRA update")
    lr_scheduler_type: str = _arg("linear", "course of the rate after the warm-up", get_args(Schedule))
    num_train_epochs: int = _arg(2, "passes over the data")
    output_dir: str = _arg("output/", "folder of the run")
    per_device_train_batch_size: int = _arg(8, "examples a micro-batch")
    use_lora: bool = _arg(False, "method: LoRA")
    use_qlora: bool = _arg(False, "4-bit base (NF4); goes with --use_lora")
    use_8bit_optimizer: bool = _arg(False, NO_EFFECT + "32-bit optimizer states")
    warmup_ratio: float = _arg(0.03, "share of the steps over which the rate rises")
    weight_decay: float = _arg(0.0, "decoupled weight decay of AdamW")
    timeout: int = _arg(1800, NO_EFFECT + "torch's default holds")
    reduce_loss: str = _arg(
        "mean", "mean: over the supervised tokens of the batch; sum: divided by the accumulation", ("mean", "sum")
    )
    gradient_checkpointing: bool = _arg(
        False, "recompute layers in the backward pass; left out: where rows do not fit otherwise"
    )
    max_train_steps: int | None = _arg(None, "optimizer steps; overrides the epochs")
    seed: int = _arg(42, "seed of initialisation, dropout, data order and held-out rows")
    fused_optimizer: bool = _arg(True, NO_EFFECT + "chosen by the device")
    load_balancing_loss: bool = _arg(False, NO_EFFECT + "no auxiliary loss here")
    load_balancing_weight: float = _arg(0.5, NO_EFFECT + "no auxiliary loss here")
    # tracking and checkpoints
    wandb_entity: str | None = _arg(None, "W&B team of --report_to wandb")
    resume_from_checkpoint: str | None = _arg(None, "continue from this checkpoint folder")
    with_tracking: bool = _arg(False, "write TensorBoard files and to --report_to; metrics.jsonl is always written")
    report_to: str | list[str] = _arg("all", "with --with_tracking: wandb, trackio, mlflow; all: TensorBoard alone")
    save_to_hub: str | None = _arg(None, NO_EFFECT + "hub upload")
    checkpointing_steps: str | None = _arg(None, "optimizer steps between checkpoints, or epoch")
    overwrite_output_dir: bool = _arg(False, "replace the run that output_dir holds")
    keep_last_n_checkpoints: int = _arg(3, "newest checkpoints that are kept; -1: all")
    # hub and Beaker
    push_to_hub: bool = _arg(False, NO_EFFECT + "hub upload")
    hf_entity: str | None = _arg(None, NO_EFFECT + "hub upload")
    hf_repo_id: str | None = _arg(None, NO_EFFECT + "hub upload")
    hf_repo_revision: str | None = _arg(None, NO_EFFECT + "hub upload")
    hf_repo_url: str | None = _arg(None, NO_EFFECT + "hub upload")
    try_launch_beaker_eval_jobs: bool = _arg(False, NO_EFFECT + "Beaker")
    hf_metadata_dataset: str | None = _arg("allenai/tulu-3-evals", NO_EFFECT + "Beaker")
    # the PEFT additions
    use_prefix_tuning: bool = _arg(False, "method: prefix tuning")
    use_prompt_tuning: bool = _arg(False, "method: prompt tuning")
    num_virtual_tokens: int = _arg(0, "virtual tokens; 0: the method's default (prefix 30, prompt 50)")


@dataclass(frozen=True)
class ExtraArguments:
    """Arguments that the original does not have."""

    _argument_group_name = "arguments of peft-study"

    device: str = _arg("auto", "device that trains", get_args(Device))
    dtype: str = _arg("auto", "precision of the frozen base", get_args(Dtype))
    held_out: str | None = _arg(None, "rows, a share below 1, or a file; left out: 64 rows, at most a tenth")
    eval_steps: int | None = _arg(
        None, "optimizer steps between held-out losses; left out: 4 a run, 20 with --early_stopping"
    )
    early_stopping: int | None = _arg(
        None, "keep the adapter of the best held-out step, and end after so many without a better one (3 if not given)"
    )
    prefix_init: str | None = _arg(
        None, "start of prefix tuning", get_args(PrefixTuningConfig.model_fields["init"].annotation)
    )
    prompt_init: str | None = _arg(
        None, "start of prompt tuning", get_args(PromptTuningConfig.model_fields["init"].annotation)
    )
    init_text: str | None = _arg(None, "text of --prefix_init text and --prompt_init text; left out: from the data")
    row_tokens: int | None = _arg(None, "tokens packed into one row; left out: the default of the device")
    chat_template: str | None = _arg(
        None, "instead of --chat_template_name: a name, a file, or own (the tokenizer's own)"
    )
    map: str | None = _arg(None, "other column names: messages=COL or prompt=COL,response=COL")
    verbose: bool = _arg(
        False,
        "print every step and library warnings; -q, --quiet: only warnings, errors and result",
        short="-v",
    )
