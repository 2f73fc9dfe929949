"""What the cases of half B are trained on: small pretrained bases, real texts, one artificial task."""

from __future__ import annotations

import gzip
import json
import random
from pathlib import Path
from typing import Any

import torch

FILES = {
    "dolly": "dolly-partial/train.jsonl.gz",
    "roleplay": "gpteacher/roleplay.jsonl.gz",
    "codegen": "gpteacher/codegen.jsonl.gz",
    "toolformer": "gpteacher/toolformer.jsonl.gz",
    "csqa": "commonsenseqa/train.jsonl.gz",
    "codealpaca": "codealpaca-2k/train.jsonl.gz",
    "p3": "p3-t0/train.jsonl.gz",
}
PAD, BOS, EOS = 0, 1, 2
HELD_OUT = 48
Pair = tuple[str, str]
Row = dict[str, list[int]]


def pairs(name: str, folder: Path) -> list[Pair]:
    """Returns questions with their answers; `caesar` and `copy` are made: a word, and the word, moved or not."""
    if name in ("caesar", "copy"):
        return [_caesar(index, 3 if name == "caesar" else 0) for index in range(4000)]
    with gzip.open(folder / FILES[name], "rt", encoding="utf-8") as lines:
        found = [json.loads(line)["messages"] for line in lines]
    return [(m[-2]["content"], m[-1]["content"]) for m in found if len(m) > 1]


def _caesar(index: int, by: int) -> Pair:
    letters = random.Random(index).choices("abcdefghijklmnopqrstuvwxyz", k=8)
    moved = [chr((ord(letter) - 97 + by) % 26 + 97) for letter in letters]
    return " ".join(letters), " ".join(moved)


def split(name: str, folder: Path, seed: int, rows: int | None = None) -> tuple[list[Pair], list[Pair]]:
    """Returns training and held-out pairs, drawn with the seed; `a+b` takes half of the rows of each, a first."""
    if "+" in name:
        parts = [split(part, folder, seed, rows and rows // 2) for part in name.split("+")]
        return [p for train, _ in parts for p in train], [p for _, held in parts for p in held[: HELD_OUT // 2]]
    found = pairs(name, folder)
    random.Random(seed).shuffle(found)
    return found[HELD_OUT:][: rows or 2000], found[:HELD_OUT]


def tiny_tokenizer(work: Path, data: Path, *, bos: bool) -> Any:
    """Returns a byte-level BPE of 512 tokens, trained on the first use."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    path = work / "tokenizer.json"
    if not path.exists():
        made = Tokenizer(models.BPE(unk_token=None))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=["<pad>", "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        made.train_from_iterator(
            [text for name in [*FILES][:6] for pair in pairs(name, data)[:600] for text in pair], trainer
        )
        made.save(str(path))
    built = Tokenizer.from_file(str(path))
    if bos:
        built.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=built, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=256
    )


def tiny_config(family: str) -> Any:
    """Returns the configuration of a base of two to four layers."""
    import transformers

    ids = {"vocab_size": 512, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
    if family == "gpt2":
        return transformers.GPT2Config(n_embd=80, n_layer=2, n_head=4, n_positions=320, **ids)
    shape = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 320, **ids}
    if family == "qwen2":
        return transformers.Qwen2Config(hidden_size=64, intermediate_size=176, num_hidden_layers=4, **shape)
    return transformers.LlamaConfig(hidden_size=80, intermediate_size=208, num_hidden_layers=3, **shape)


def base(case: dict[str, Any], model: Path | None, data: Path, work: Path, device: str) -> tuple[Any, Any]:
    """Returns the base model of a case and its tokenizer; a tiny one is pretrained on the first use."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if case["model"] == "smollm2":
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).to(device)
        loaded.config._name_or_path = loaded.name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
        return loaded, AutoTokenizer.from_pretrained(model)
    family = case["model"]
    tokenizer = tiny_tokenizer(work, data, bos=family == "llama")
    torch.manual_seed(7)
    built = AutoModelForCausalLM.from_config(tiny_config(family), dtype=torch.float32)
    path = work / f"{family}.pt"
    if not path.exists():
        _pretrain(built, tokenizer, data)
        torch.save(built.state_dict(), path)
    built.load_state_dict(torch.load(path))
    built.config._name_or_path = built.name_or_path = f"acme/tiny-{family}"
    return built.to(device), tokenizer


def _pretrain(model: Any, tokenizer: Any, data: Path, steps: int = 900) -> None:
    """Teaches a random model prose and copying; code, tool use and multiple choice stay unseen."""
    copies = [_caesar(index, 0) for index in range(10_000, 11_500)]
    rows = [encode(pair, tokenizer, 96, masked=False) for pair in pairs("dolly", data)[2000:] + copies]
    rows += [encode(pair, tokenizer, 96, masked=False) for pair in pairs("roleplay", data)[1000:]]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    draw = random.Random(5)
    for _ in range(steps):
        loss = model(**collate(draw.sample(rows, 16), "cpu")).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        model.zero_grad()


def fitting(found: list[Pair], tokenizer: Any, length: int) -> list[Pair]:
    """Returns the pairs that fit whole."""
    whole = ["".join((*as_text(q, tokenizer)[:1], a, tokenizer.eos_token)) for q, a in found]
    return [pair for pair, text in zip(found, whole, strict=True) if len(tokenizer(text)["input_ids"]) <= length]


def as_text(question: str, tokenizer: Any) -> tuple[str, str]:
    """Returns a question in the form that the model reads, and the end of an answer."""
    if len(tokenizer) > 600:
        return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n"
    return f"Q: {question}\nA: ", tokenizer.eos_token


def encode(pair: Pair, tokenizer: Any, length: int, *, masked: bool = True) -> Row:
    """Returns ids and labels of a pair; a long question loses its start, a long answer its end."""
    question, end = as_text(pair[0], tokenizer)
    asked = tokenizer(question)["input_ids"]
    answered = tokenizer(pair[1] + end, add_special_tokens=False)["input_ids"][: length * 2 // 3]
    asked = asked[-(length - len(answered)) :]
    return {"input_ids": asked + answered, "labels": ([-100] * len(asked) if masked else asked) + answered}


def collate(rows: list[Row], device: str) -> dict[str, torch.Tensor]:
    """Returns a padded batch."""
    longest = max(len(row["input_ids"]) for row in rows)
    pad = [longest - len(row["input_ids"]) for row in rows]
    return {
        "input_ids": torch.tensor([r["input_ids"] + [PAD] * n for r, n in zip(rows, pad, strict=True)], device=device),
        "labels": torch.tensor([r["labels"] + [-100] * n for r, n in zip(rows, pad, strict=True)], device=device),
        "attention_mask": torch.tensor([[1] * (longest - n) + [0] * n for n in pad], device=device),
    }


@torch.no_grad()
def held_out_loss(model: Any, rows: list[Row], device: str) -> float:
    """Returns nats a supervised token."""
    training = model.training
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(rows), 16):
        batch = collate(rows[start : start + 16], device)
        n = int((batch["labels"] != -100).sum())
        total, count = total + float(model(**batch).loss) * n, count + n
    model.train(training)
    return total / max(count, 1)


def attach(case: dict[str, Any], model: Any, tokenizer: Any) -> Any:
    """Returns the model with the case's adapter, started as a careful user would start it; full: as it is."""
    import peft

    torch.manual_seed(case["seed"])
    if case["method"] == "full":
        return model
    wrapped = peft.get_peft_model(model, adapter_config(case))
    if case["method"] == "prompt_tuning" and case["model"] == "smollm2":
        _text_prompt(wrapped, model, tokenizer)
    if case["method"] == "prefix_tuning":
        with torch.no_grad():
            wrapped.prompt_encoder["default"].embedding.weight.mul_(0.1)
    return wrapped


def adapter_config(case: dict[str, Any]) -> Any:
    """Returns the peft configuration of a case."""
    import peft

    gpt2, tokens = case["model"] == "gpt2", case.get("tokens", 8)
    if case["method"] == "lora":
        return peft.LoraConfig(
            r=case.get("rank", 8),
            lora_alpha=2 * case.get("rank", 8),
            target_modules=["c_attn", "c_proj"] if gpt2 else ["q_proj", "v_proj", "o_proj", "up_proj"],
            fan_in_fan_out=gpt2,
            modules_to_save=case.get("modules_to_save"),
            task_type="CAUSAL_LM",
        )
    if case["method"] == "ia3":
        return peft.IA3Config(
            target_modules=["c_attn", "mlp.c_proj"] if gpt2 else ["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["mlp.c_proj"] if gpt2 else ["down_proj"],
            fan_in_fan_out=gpt2,
            task_type="CAUSAL_LM",
        )
    if case["method"] == "prompt_tuning":
        init = "RANDOM" if case.get("init") == "random" else "SAMPLE_VOCAB"
        return peft.PromptTuningConfig(num_virtual_tokens=tokens, prompt_tuning_init=init, task_type="CAUSAL_LM")
    return peft.PrefixTuningConfig(num_virtual_tokens=tokens, task_type="CAUSAL_LM")


def _text_prompt(wrapped: Any, model: Any, tokenizer: Any) -> None:
    """Starts a soft prompt from the embeddings of a sentence."""
    prompt = wrapped.prompt_encoder["default"].embedding.weight
    ids = tokenizer("Answer the question below as well as you can, in few words and plain style. " * 4)["input_ids"]
    table = model.get_input_embeddings().weight
    with torch.no_grad():
        prompt.copy_(table[torch.tensor(ids[: len(prompt)], device=table.device)])
