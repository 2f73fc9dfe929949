"""The cases of half B, as planned before any of them was tried: what is trained, how, and what is broken in it.

A row is a dictionary. Keys of the label (tests/doctor/cases_b.json): id, faults, accept, look_alike_of, kind, method,
model, data, steps, seed, note. All other keys are the recipe; see `cases_b_loop.py` and
`cases_b_trainers.py` for what each one does.
"""

from __future__ import annotations

from typing import Any

Case = dict[str, Any]

LABEL = ("id", "faults", "accept", "look_alike_of", "kind", "method", "model", "data", "steps", "seed", "note")
_DEFAULTS: Case = {
    "faults": [],
    "accept": [],
    "look_alike_of": None,
    "method": "lora",
    "note": "",
    "rate": 1e-3,
    "batch": 8,
    "schedule": "linear",
    "warmup": 10,
    "arguments": None,
    "adapter_config": True,
    "broken": None,
}


def _row(kind: str, model: str, data: str, steps: int, seed: int, **more: Any) -> Case:
    return {**_DEFAULTS, "kind": kind, "model": model, "data": data, "steps": steps, "seed": seed, **more}


def _faulty_logs() -> list[Case]:
    return [
        _row("jsonl", "qwen2", "codealpaca", 200, 11, faults=["rate_too_low"], accept=["too_cold"], rate=2e-6,
             arguments="json", val=40, note="LoRA at 2e-6"),
        _row("csv", "gpt2", "toolformer", 160, 12, faults=["rate_too_high"], accept=["too_hot", "diverged"], rate=0.1,
             arguments="yaml", val=40, note="LoRA at 0.1"),
        _row("jsonl", "llama", "codegen", 240, 13, faults=["rate_zero"], accumulation=8, batch=2, val=40,
             broken="scheduler_per_microbatch", arguments="json",
             note="the scheduler steps once a micro-batch: the rate is 0 after an eighth of the run"),
        _row("jsonl", "qwen2", "toolformer", 200, 14, faults=["never_learned"],
             accept=["untouched", "adapter_frozen", "nothing_trains"], broken="optimizer_of_a_copy", val=50,
             arguments="json", note="the optimizer holds the parameters of a copy of the model"),
        _row("csv", "llama", "codealpaca", 100, 15, faults=["warmup_too_short"], method="full", rate=0.1, warmup=0,
             accept=["rate_too_high", "too_hot"], val=12, arguments="json",
             note="full at 0.1, no warm-up: held-out 5.13 after 60 steps, 3.95 with 20 of warm-up; 0.01 did no harm"),
        _row("csv", "qwen2", "csqa", 150, 16, faults=["memorising"], accept=["overfitting"], rows=16, rate=3e-3,
             method="full", epoch=True,
             note="16 rows, 75 epochs, nothing held out; full instead of LoRA, which ended at 0.42 only"),
        _row("jsonl", "gpt2", "codegen", 300, 17, faults=["source_rising"], accept=["one_source"], method="full",
             rate=1e-3, sources=["codegen", "roleplay"], val=30, broken="one_source",
             note="code alone trains; chat, which is evaluated beside it, is forgotten"),
        _row("csv", "gpt2", "roleplay+csqa", 240, 18, faults=["epoch_jumps"], rows=480, epoch=True,
             broken="sorted", rate=3e-3, note="the data are sorted by source and never shuffled: 4 epochs of a saw"),
        _row("csv", "llama", "toolformer", 100, 19, faults=["resume_jump"], broken="fresh_after_resume", resume=60,
             rate=2e-3, note="taken up again at step 60 with a new adapter: the saved one is not loaded"),
        _row("jsonl", "qwen2", "codegen", 200, 20, faults=["always_clipped"], optimizer="sgd", rate=0.1, clip=0.002,
             arguments="yaml", val=40, note="SGD, gradients clipped to 0.002"),
        _row("jsonl", "llama", "codealpaca", 90, 21, faults=["fp16_overflow"], broken="hysteresis", rate=1e-3,
             arguments="json", note="fp16 from a loss scale of 2^40 with a hysteresis of 8: all steps are skipped"),
    ]  # fmt: skip


def _faulty_trainers() -> list[Case]:
    return [
        _row("trainer", "llama", "codealpaca", 60, 31, faults=["not_attached"], accept=["base_trains"], rate=1e-4,
             method="prompt_tuning", broken="not_attached", callback=True, arguments="json", adapter_config=False,
             note="a PromptTuningConfig is made and never attached: full fine-tuning at 1e-4"),
        _row("trainer", "qwen2", "codegen", 75, 32, faults=["base_trains", "rate_too_high"], rate=0.2,
             broken="base_trains", callback=True, arguments="json",
             note="all parameters are set to train after get_peft_model, at 0.2 (0.02 did no harm)"),
        _row("trainer", "gpt2", "toolformer", 60, 33, faults=["adapter_frozen"], accept=["base_trains"], rate=5e-4,
             broken="adapter_frozen", callback=True,
             note="every adapter weight frozen, the last norm of the base trains"),
        _row("trainer", "qwen2", "dolly", 150, 34, faults=["nothing_masked"], broken="pad_supervised", callback=True,
             arguments="json", note="labels are a copy of the padded ids: prompt and padding are learned"),
        _row("trainer", "llama", "codegen", 75, 35, faults=["labels_shifted"], broken="shift_labels", callback=True,
             note="the collator shifts labels by one, and the model shifts them again"),
        _row("trainer", "qwen2", "csqa", 75, 36, faults=["truncated", "no_end_token"], callback=True,
             accept=["nothing_supervised"], broken="truncate", max_length=72, arguments="json",
             note="cut at 72 tokens: most answers are cut off whole; no end token is added. "
             "At 40 tokens of roleplay no row had an answer"),
        _row("trainer", "qwen2", "caesar", 150, 37, faults=["wrong_labels"], broken="shuffled_answers", callback=True,
             rate=2e-3,
             note="each question has the answer of another one; qwen2, for gpt2 learns little of right ones, too"),
        _row("trl", "llama", "codealpaca", 75, 38, faults=["rate_too_low", "double_bos"], accept=["too_cold"],
             rate=1e-6, broken="double_bos", callback=True, arguments="yaml",
             note="LoRA at 1e-6, and the text has a BOS of its own before the tokenizer's"),
        _row("trl", "qwen2", "toolformer", 40, 39, faults=["warmup_unusual"], warmup=1000, rate=1e-3,
             accept=["too_few_steps", "rate_too_low", "too_cold"], arguments="json",
             note="1,000 warm-up steps in a run of 40: the rate never comes near its peak"),
        _row("tensorboard", "gpt2", "codealpaca", 75, 40, faults=["rate_too_high", "always_clipped"], rate=5e-2,
             accept=["too_hot", "diverged"], clip=0.02, arguments="json", note="LoRA at 0.05, clipped at 0.02"),
    ]  # fmt: skip


def _faulty_folders() -> list[Case]:
    return [
        _row("trainer", "llama", "copy", 80, 41, faults=["init_wrecks"], method="prompt_tuning", tokens=40, rate=1e-3,
             init="random", callback=True, arguments="json",
             note="40 random virtual tokens at a small rate; Trainer and copying, which the base can do: in our "
             "finetune's chat format the base was so bad that the prompt could not harm it"),
        _row("adapter", "qwen2", "codegen", 30, 42, faults=["untouched"], broken="optimizer_of_a_copy",
             note="saved after a training in which the optimizer held another model's parameters: B is zero"),
        _row("adapter", "llama", "toolformer", 30, 43, faults=["bad_weights", "base_not_found"], rate=1e30,
             broken="nan", note="trained at an absurd rate until NaN; the base path is another machine's"),
        _row("adapter", "gpt2", "dolly", 30, 44, faults=["embeddings_saved"], broken="embeddings",
             note="save_embedding_layers=True though no embedding was trained"),
        _row("adapter", "qwen2", "codealpaca", 30, 45, faults=["config_differs"], rank=4, broken="edited",
             note="r edited from 4 to 16 in adapter_config.json after the training"),
    ]  # fmt: skip


def _faulty_smollm2() -> list[Case]:
    return [
        _row("csv", "smollm2", "dolly", 40, 51, faults=["too_hot"], accept=["rate_too_high", "diverged"], rate=2e-2,
             batch=4, adapter_config=False, note="LoRA at 2e-2; the log has the rate, nothing lies beside it"),
        _row("jsonl", "smollm2", "codealpaca", 30, 52, faults=["rate_too_low"], accept=["too_cold", "never_learned"],
             method="prompt_tuning", tokens=16, rate=1e-5, batch=4, arguments="json", val=10,
             note="prompt tuning at 1e-5"),
        _row("jsonl", "llama", "roleplay", 120, 53, faults=["overfitting"], accept=["memorising"], rows=24, rank=32,
             rate=3e-3, val=12, arguments="json", note="24 rows, 40 epochs; a tiny model: no GPU for SmolLM2"),
        _row("csv", "qwen2", "codegen", 80, 54, faults=["diverged"], accept=["rate_too_high", "too_hot"],
             method="full", optimizer="sgd", rate=10.0, warmup=60, rate_logged=False, clip=None,
             note="SGD, slowly warmed up to 10; no rate in the log; AdamW at 0.1 did no harm to this tiny model"),
    ]  # fmt: skip


def _healthy_plain() -> list[Case]:
    return [
        _row("jsonl", "qwen2", "codealpaca", 250, 101, batch=1, rate=5e-4, look_alike_of="rising",
             schedule="constant", note="batch of 1, every step logged"),
        _row("csv", "gpt2", "p3", 200, 102, batch=1, rate=1e-3, val=50, look_alike_of="rising",
             note="batch of 1; other data than planned: the base knew dolly already"),
        _row("jsonl", "llama", "p3", 110, 103, rate=3e-4, val=20, arguments="json", look_alike_of="never_learned",
             note="slow but steady; other data than planned, which the base knew, and 3e-4 for 1e-4"),
        _row("csv", "qwen2", "csqa", 200, 104, rate=2e-4, val=40, look_alike_of="too_cold", note="slow but steady"),
        _row("jsonl", "gpt2", "codegen", 250, 105, schedule="cosine", rate=2e-3, val=50, look_alike_of="rate_zero",
             arguments="yaml", note="flat at the end: the cosine ends in 0"),
        _row("csv", "llama", "toolformer", 100, 106, schedule="linear", rate=1e-3, look_alike_of="rate_zero"),
        _row("jsonl", "qwen2", "p3", 125, 107, rate=1e-3, val=25, look_alike_of="wrong_labels",
             note="hard data; other than planned: the base knew dolly already"),
        _row("csv", "gpt2", "p3", 110, 108, rate=1e-3, val=22, look_alike_of="wrong_labels",
             note="hard data; other than planned: the base knew roleplay already"),
        _row("jsonl", "llama", "codealpaca", 125, 109, rate=1e-3, bump=60, val=25, look_alike_of="diverged",
             note="two strange batches at steps 60 and 61; it recovers at once"),
        _row("csv", "qwen2", "toolformer", 220, 110, rate=1e-3, bump=90, look_alike_of="rising",
             note="one strange batch"),
        _row("jsonl", "gpt2", "codealpaca", 150, 111, rate=5e-3, val=25, arguments="json",
             look_alike_of="rate_too_high",
             note="a high rate that is fine here; not caesar as planned, of which gpt2 learns little"),
        _row("csv", "llama", "codegen", 120, 112, rate=3e-3, warmup=10, val=20, look_alike_of="too_hot"),
        _row("jsonl", "qwen2", "codegen", 240, 113, rows=640, epoch=True, rate=5e-4, val=40,
             look_alike_of="overfitting", note="three epochs of 640 rows"),
        _row("csv", "llama", "csqa", 120, 114, rows=240, epoch=True, rate=3e-4, val=20, look_alike_of="memorising",
             note="four epochs of 240 rows"),
        _row("jsonl", "gpt2", "toolformer", 12, 115, rate=1e-3, warmup=1, look_alike_of="too_few_steps",
             arguments="json", note="a smoke test of 12 steps"),
        _row("csv", "qwen2", "codegen", 12, 116, rate=1e-3, warmup=2, look_alike_of="undecided", note="12 steps"),
        _row("jsonl", "llama", "toolformer", 100, 117, schedule="constant", warmup=0, rate=5e-4, val=20,
             arguments="yaml"),
        _row("csv", "gpt2", "codealpaca", 100, 118, schedule="constant_with_warmup", rate=1e-3, val=20,
             arguments="json"),
        _row("jsonl", "qwen2", "toolformer", 200, 119, resume=120, rate=1e-3, look_alike_of="resume_jump",
             note="taken up again at step 120 with weights, optimizer and rate; steps 121 to 126 stand there twice"),
        _row("csv", "llama", "codegen", 110, 120, clip=0.5, rate=1e-3, val=22, arguments="json",
             look_alike_of="always_clipped", note="clipped often, which AdamW does not mind"),
        _row("jsonl", "llama", "codealpaca", 80, 121, broken=None, fp16=True, rate=1e-3, look_alike_of="fp16_overflow",
             note="fp16: a few skipped steps at the start, as is usual"),
        _row("csv", "qwen2", "caesar", 300, 122, rate=3e-3, val=50, look_alike_of="memorising",
             note="an easy task: the training loss comes near 0, and so does the held-out one"),
        _row("jsonl", "gpt2", "codegen", 110, 123, sources=["codegen", "codealpaca"], val=22, rate=5e-4,
             look_alike_of="source_rising", note="one source falls much faster than the other; both fall"),
        _row("csv", "llama", "codealpaca", 100, 124, method="full", rate=3e-4, val=20, look_alike_of="base_trains"),
        _row("jsonl", "gpt2", "toolformer", 100, 125, method="full", rate=2e-4, arguments="json"),
        _row("csv", "qwen2", "codegen", 220, 126, method="ia3", rate=1e-2, val=44),
        _row("jsonl", "llama", "toolformer", 120, 127, method="prompt_tuning", tokens=8, rate=3e-2, val=20,
             arguments="json"),
        _row("csv", "gpt2", "codegen", 120, 128, method="prompt_tuning", tokens=8, rate=0.1, val=20,
             note="8 tokens at 0.1 on codegen; on toolformer, as planned, it hardly got below the base"),
        _row("jsonl", "qwen2", "codealpaca", 240, 129, method="prefix_tuning", tokens=10, rate=1e-2, val=40),
        _row("csv", "llama", "codegen", 75, 130, accumulation=4, batch=2, rate=1e-3, val=15, warmup=15,
             look_alike_of="warmup_unusual", arguments="yaml", note="a fifth of the run is warm-up"),
    ]  # fmt: skip


def _healthy_trainers() -> list[Case]:
    return [
        _row("trainer", "llama", "codealpaca", 75, 201, callback=True, arguments="json", rate=1e-3),
        _row("trainer", "qwen2", "codegen", 150, 202, callback=True, rate=5e-4, look_alike_of="base_trains",
             modules_to_save=["norm"], note="LoRA that trains the last norm of the base on purpose"),
        _row("trainer", "gpt2", "toolformer", 75, 203, callback=True, method="full", rate=3e-4, arguments="yaml",
             look_alike_of="not_attached", note="full fine-tuning on purpose"),
        _row("trainer", "llama", "toolformer", 75, 204, rate=1e-3, schedule="cosine"),
        _row("trainer", "qwen2", "csqa", 150, 205, callback=True, rate=1e-3, arguments="json"),
        _row("trainer", "gpt2", "codealpaca", 60, 206, method="ia3", rate=1e-2, arguments="json"),
        _row("trl", "llama", "codegen", 60, 207, callback=True, rate=1e-3, arguments="json"),
        _row("trl", "qwen2", "toolformer", 120, 208, callback=True, rate=5e-4, schedule="constant"),
        _row("trl", "qwen2", "csqa", 120, 209, rate=1e-3, text_only=True, look_alike_of="nothing_masked",
             callback=True, note="plain language modelling: one text column, all of it is learned; "
             "not roleplay as planned: its rows are long"),
        _row("trl", "gpt2", "p3", 200, 210, rate=1e-3, look_alike_of="wrong_labels",
             note="hard data; other than planned: the base knew dolly already"),
        _row("trl", "llama", "csqa", 12, 211, rate=1e-3, warmup=1, look_alike_of="too_few_steps", arguments="json",
             note="a smoke test of 12 steps"),
        _row("tensorboard", "qwen2", "codealpaca", 75, 212, rate=1e-3, arguments="json"),
        _row("tensorboard", "gpt2", "toolformer", 75, 213, rate=1e-3, batch=2, look_alike_of="noisy"),
        _row("tensorboard", "llama", "codegen", 75, 214, method="full", rate=3e-4),
    ]  # fmt: skip


def _healthy_folders() -> list[Case]:
    return [
        _row("ours", "llama", "codealpaca", 40, 301, rate=1e-3),
        _row("ours", "llama", "codegen", 40, 302, rate=5e-4, schedule="constant"),
        _row("ours", "llama", "codealpaca", 120, 303, method="prompt_tuning", tokens=8, init="text", rate=3e-2,
             note="not toolformer as planned, where it hardly got below the base"),
        _row("ours", "llama", "codealpaca", 120, 304, method="prefix_tuning", tokens=8, init="text", rate=1e-2,
             note="not toolformer as planned, where it hardly got below the base"),
        _row("adapter", "qwen2", "codegen", 40, 305, rank=2),
        _row("adapter", "llama", "codealpaca", 40, 306, method="ia3", rate=1e-2),
        _row("adapter", "gpt2", "codegen", 80, 307, method="prompt_tuning", tokens=8, rate=0.1,
             note="not toolformer as planned, where it did not get below the base"),
        _row("adapter", "qwen2", "toolformer", 40, 308, rank=2, modules_to_save=["norm"],
             look_alike_of="embeddings_saved", note="a norm of the base was trained on purpose and saved along"),
    ]  # fmt: skip


def _healthy_smollm2() -> list[Case]:
    tiny = "a tiny model: no GPU for SmolLM2"
    return [
        _row("jsonl", "smollm2", "dolly", 40, 401, rate=5e-4, batch=4, val=10, warmup=4, arguments="json"),
        _row("csv", "smollm2", "roleplay", 40, 402, rate=2e-4, batch=4, schedule="constant", val=10),
        _row("jsonl", "llama", "codegen", 100, 403, method="ia3", rate=1e-2, val=10, arguments="yaml", note=tiny),
        _row("csv", "qwen2", "codealpaca", 110, 404, method="prompt_tuning", tokens=16, rate=3e-2, val=10, note=tiny),
        _row("jsonl", "gpt2", "csqa", 90, 405, method="full", rate=2e-4, val=10, arguments="json", note=tiny),
        _row("csv", "smollm2", "csqa", 90, 406, batch=1, rate=2e-4, look_alike_of="rising", note="batch of 1"),
        _row("jsonl", "smollm2", "dolly", 12, 407, rate=2e-4, warmup=1, batch=4, look_alike_of="too_few_steps",
             note="a smoke test of 12 steps"),
        _row("csv", "qwen2", "toolformer", 45, 408, rows=120, epoch=True, rate=1e-3, val=7,
             look_alike_of="overfitting", note=f"three epochs of 120 rows; {tiny}"),
    ]  # fmt: skip


def cases() -> list[Case]:
    """Returns all cases, with their ids: 30 with planted faults, then 60 healthy ones."""
    rows = _faulty_logs() + _faulty_trainers() + _faulty_folders() + _faulty_smollm2()
    rows += _healthy_plain() + _healthy_trainers() + _healthy_folders() + _healthy_smollm2()
    return [{"id": f"b-{number:03d}", **row} for number, row in enumerate(rows, 1)]


def label(case: Case) -> Case:
    """Returns what a reader of the case may know after its diagnosis."""
    return {key: case[key] for key in LABEL}
