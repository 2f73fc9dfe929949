"""A tiny world with something to learn, for the doctor's cases: words, tasks on them, and a base that knows some.

    <s> <|user|> t3 w5 w9 w1 <|assistant|> f2 f11 w8 w12 w4 </s>
                 |  \\______/               \\____/ \\_______/
              task   words             chatter: noise   the words, each moved on by the task's number

The base was trained on tasks t0 to t3. Adapters learn one without its name (which a prompt can tell the base), a new
one (t6), or other chatter. The chatter keeps the loss from falling to zero, as real text does.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config

SPECIAL = ("<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>")
WORDS, CHATTER, TASKS = 32, 40, 8
MOVES = {"known": 2, "new": 6, "style": 1, "hard": 3}
OTHER = 0.15
"""Share of the other chatter in what the base was trained on."""
ORDINARY = ("a", "word")
"""Of no task: a tokenizer that knows no ordinary word is taken for an empty one."""
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ ' <|' + m['role'] + '|> ' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ ' ' + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' <|assistant|>' }}{% endif %}"
)
NAMES = {"llama": "tiny-org/words-llama", "qwen": "tiny-org/words-qwen"}
"""What the adapters' files name as the base, in a hub's form."""

Row = dict[str, Any]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Returns the tokenizer: a token a word; it puts BOS before a text by itself."""
    words = [*SPECIAL, *(f"t{n}" for n in range(TASKS)), *(f"w{n}" for n in range(WORDS))]
    words += [*(f"f{n}" for n in range(CHATTER)), *ORDINARY]
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<pad>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def word_rows(task: str, number: int, seed: int, *, words: tuple[int, int] = (3, 7)) -> list[Row]:
    """Returns chats of a task.

    Args:
        task: known (t2 without its name), new (t6), style (t1 with other chatter), hard (nearly all chatter), mixed
            (new and style), general (what the base was trained on).
        number: rows.
        seed: of the words.
        words: fewest and most words of a row.
    """
    draw, made = np.random.default_rng([seed, 7]), []
    for _ in range(number):
        kind = task if task != "mixed" else str(draw.choice(["new", "style"]))
        asked = draw.integers(0, WORDS, size=int(draw.integers(words[0], words[1] + 1)))
        if kind == "general":
            name, moves, other = _general(draw, len(asked))
        else:
            moved = MOVES[kind]
            name, moves, other = f"t{moved}" * (kind != "known"), np.full(len(asked), moved), kind in ("style", "hard")
        said = _chatter(draw, int(draw.integers(*((4, 6) if kind == "hard" else (2, 5)))), float(other))
        told = (asked + moves)[: 1 if kind == "hard" else None] % WORDS
        answer = [*said, *(f"w{n}" for n in told)]
        made.append(
            {"user": " ".join([name, *(f"w{n}" for n in asked)]).strip(), "assistant": " ".join(answer), "source": kind}
        )
    return made


def _general(draw: np.random.Generator, words: int) -> tuple[str, Any, float]:
    """Returns task, moves and share of other chatter of a row of the base: sure of t0 to t3, undecided on the rest."""
    part = draw.random()
    if part < 0.6:
        moved = int(draw.integers(0, 4))
        return f"t{moved}", np.full(words, moved), OTHER
    if part < 0.75:
        return "", draw.integers(0, 4, size=words), OTHER
    return f"t{draw.integers(4, TASKS)}", draw.integers(0, TASKS, size=words), OTHER


def messages(row: Row) -> list[dict[str, str]]:
    """Returns a row's two turns."""
    return [{"role": role, "content": row[role]} for role in ("user", "assistant")]


def tiny_model(family: str, seed: int = 0) -> Any:
    """Returns a random model of three layers."""
    shape: dict[str, Any] = {
        "vocab_size": len(SPECIAL) + TASKS + WORDS + CHATTER + len(ORDINARY),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 96,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(seed)
    config = LlamaConfig(**shape) if family == "llama" else Qwen3Config(**shape)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def pretrained(family: str, folder: Path, *, steps: int = 2500) -> Path:
    """Trains the base on the known tasks, once; returns its folder."""
    place = folder / family
    if (place / "config.json").is_file():
        return place
    tokenizer, model = word_tokenizer(), tiny_model(family)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    rows = encoded(word_rows("general", 20000, 99), tokenizer)
    draw, model = np.random.default_rng(3), model.train()
    for step in range(steps):
        batch = [_behind_others(rows[n], draw, len(tokenizer)) for n in draw.integers(0, len(rows), size=48)]
        loss = model(**padded(batch)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 250 == 0 or step == steps - 1:
            print(json.dumps({"base": family, "step": step, "loss": round(loss.item(), 4)}), flush=True)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def _behind_others(row: dict[str, list[int]], draw: np.random.Generator, words: int) -> dict[str, list[int]]:
    """Puts other text before every second row: real bases saw packed texts, and bear a prompt before their BOS."""
    number = int(draw.integers(1, 25)) if draw.random() < 0.5 else 0
    # one word again and again, or any: so are the texts that prompts begin from
    other = draw.integers(3, words, size=number if draw.random() < 0.7 else 1).tolist()
    other = (other * number)[:number]
    return {"input_ids": other + row["input_ids"], "labels": [-100] * number + row["labels"]}


def encoded(rows: Sequence[Row], tokenizer: Any) -> list[dict[str, list[int]]]:
    """Returns the tokens and labels of chats; prompts are not trained on."""
    chats = [messages(row) for row in rows]
    whole = tokenizer.apply_chat_template(chats, tokenize=False)
    asked = tokenizer.apply_chat_template([chat[:1] for chat in chats], tokenize=False, add_generation_prompt=True)
    tokens = tokenizer(whole, add_special_tokens=False)["input_ids"]
    starts = [len(each) for each in tokenizer(asked, add_special_tokens=False)["input_ids"]]
    return [
        {"input_ids": each, "labels": [-100] * start + each[start:]} for each, start in zip(tokens, starts, strict=True)
    ]


def padded(rows: Sequence[dict[str, list[int]]], *, pad: int = 0) -> dict[str, torch.Tensor]:
    """Returns a batch, filled up on the right."""
    longest = max(len(row["input_ids"]) for row in rows)
    fill = [longest - len(row["input_ids"]) for row in rows]
    lines = {
        "input_ids": [row["input_ids"] + [pad] * n for row, n in zip(rows, fill, strict=True)],
        "labels": [row["labels"] + [-100] * n for row, n in zip(rows, fill, strict=True)],
        "attention_mask": [[1] * len(row["input_ids"]) + [0] * n for row, n in zip(rows, fill, strict=True)],
    }
    return {name: torch.tensor(values) for name, values in lines.items()}


def _chatter(draw: np.random.Generator, number: int, other: float) -> list[str]:
    weights = 1 / np.arange(1, CHATTER // 2 + 1)
    drawn = draw.choice(CHATTER // 2, size=number, p=weights / weights.sum())
    return [f"f{n + (CHATTER // 2 if draw.random() < other else 0)}" for n in drawn]
