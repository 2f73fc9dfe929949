"""Greedy answers of several adapters to the same prompts: ours side by side, PEFT's `generate` at its best batch.

    python benchmarks/answers.py

The prompts are GSM8K's questions. Both write the same number of tokens for each. The adapters are the three methods in
turn, moved a little from where they begin. PEFT loads the same files, one model a method, as it mixes none, and takes
one adapter after another, prompts sorted by length. Its best batch is searched first; then both run in turn, `--rounds`
times. A row has the seconds of each and the share of answers that are equal token by token: in float32 all are, in
bfloat16 a sum in another order may choose another token.
"""

from __future__ import annotations

import argparse
import gzip
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from common import SHARED, Rows, arguments, median, seconds
from transformers import AutoModelForCausalLM

from peft_study.config import LoraConfig, MethodConfig, PrefixTuningConfig, PromptTuningConfig
from peft_study.data.chat import ChatEncoder
from peft_study.data.conversation import Message
from peft_study.engine.engine import DEFAULT_ROW_TOKENS
from peft_study.engine.row import RowRunner
from peft_study.evaluation.decoding import Decoder, DecodingRequest
from peft_study.methods.base import Adapter
from peft_study.methods.peft_format import load_adapter
from peft_study.methods.registry import create
from peft_study.model.load import Base, load_base
from peft_study.model.precision import choose

SETTINGS: tuple[MethodConfig, ...] = (
    LoraConfig(rank=16),
    PrefixTuningConfig(tokens=30, init="random"),
    PromptTuningConfig(tokens=20, init="random"),
)
BATCHES = 1, 2, 4, 8, 16, 32, 64


def adapters(base: Base, count: int, folder: Path) -> list[Path]:
    """Writes adapters of the three methods in turn, each with numbers of its own."""
    found = []
    for number in range(count):
        adapter = create(SETTINGS[number % len(SETTINGS)], base, None, number)
        draw = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in adapter.parameters().values():
                noise = torch.randn(parameter.shape, generator=draw).to(parameter.device, parameter.dtype)
                parameter += 0.01 * noise
        adapter.save(path := folder / str(number), base)
        found.append(path)
    return found


def prompts(encoder: ChatEncoder, count: int) -> list[list[int]]:
    """Returns the tokens of GSM8K's first questions, longest first."""
    with gzip.open(SHARED / "data" / "gsm8k" / "test.jsonl.gz", "rt") as file:
        questions = [json.loads(line)["question"] for line, _ in zip(file, range(count), strict=False)]
    return sorted((encoder.prompt_tokens([Message("user", q)]) for q in questions), key=len, reverse=True)


class Peft:
    """PEFT's models with all adapters, one a method."""

    def __init__(self, base: Base, folders: Sequence[Path], pad: int) -> None:
        self.models: dict[int, Any] = {}
        self.count, self.pad = len(folders), pad
        for number, folder in enumerate(folders):
            kind = number % len(SETTINGS)
            if kind in self.models:
                self.models[kind].load_adapter(folder, adapter_name=str(number))
            else:
                model = AutoModelForCausalLM.from_pretrained(base.path, dtype=base.dtype).to(base.device)
                self.models[kind] = peft.PeftModel.from_pretrained(model, folder, adapter_name=str(number)).eval()

    @torch.inference_mode()
    def answers(self, texts: Sequence[Sequence[int]], most: int, batch: int, count: int | None = None) -> list[Any]:
        """Returns the answers of each adapter to each prompt, adapter by adapter."""
        found: list[Any] = []
        for number in range(count or self.count):
            model = self.models[number % len(SETTINGS)]
            model.set_adapter(str(number))
            for start in range(0, len(texts), batch):
                part = texts[start : start + batch]
                longest = max(map(len, part))
                ids = torch.tensor([[self.pad] * (longest - len(text)) + list(text) for text in part])
                mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in part])
                out = model.generate(
                    input_ids=ids.to(model.device),
                    attention_mask=mask.to(model.device),
                    min_new_tokens=most,
                    max_new_tokens=most,
                    do_sample=False,
                    pad_token_id=self.pad,
                )
                found += out[:, -most:].tolist()
        return found


def ours(base: Base, loaded: Sequence[Adapter], texts: Sequence[Sequence[int]], most: int, batch: int) -> list[Any]:
    """Returns the same answers, made side by side."""
    row_tokens = DEFAULT_ROW_TOKENS[base.device.type]
    decoder = Decoder(RowRunner(base), ends=frozenset(), row_tokens=row_tokens, batch=batch)
    requests = [DecodingRequest(adapter, text, most) for adapter in loaded for text in texts]
    found = dict(decoder.answers(requests))
    return [list(found[place].tokens) for place in range(len(requests))]


def measure(options: argparse.Namespace, count: int, rows: Rows) -> None:
    """Measures `count` adapters beside PEFT."""
    base = load_base(options.model, placement=choose(options.device, options.dtype))
    texts = prompts(ChatEncoder(base.tokenizer), options.prompts)
    with tempfile.TemporaryDirectory() as folder:
        folders = adapters(base, count, Path(folder))
        loaded = [load_adapter(path, base) for path in folders]
        theirs = Peft(base, folders, base.tokenizer.pad_token_id or base.tokenizer.eos_token_id)
        short = min(8, options.tokens)
        tried = {
            batch: seconds(lambda batch=batch: theirs.answers(texts, short, batch, 1), base.device)  # type: ignore[misc]
            for batch in BATCHES
            if batch <= options.prompts or batch == 1
        }
        best = min(tried, key=lambda batch: tried[batch])
        taken: dict[str, list[float]] = {"ours": [], "peft": []}
        for _ in range(options.rounds):
            began = time.perf_counter()
            own = ours(base, loaded, texts, options.tokens, options.batch)
            taken["ours"].append(time.perf_counter() - began)
            began = time.perf_counter()
            other = theirs.answers(texts, options.tokens, best)
            taken["peft"].append(time.perf_counter() - began)
    equal = sum(a == b for a, b in zip(own, other, strict=True)) / len(own)
    ratios = [theirs_s / ours_s for ours_s, theirs_s in zip(taken["ours"], taken["peft"], strict=True)]
    rows.add(
        row="answers",
        adapters=count,
        prompts=len(texts),
        tokens=options.tokens,
        batch=options.batch,
        peft_batch=best,
        peft_batches={str(batch): round(value, 2) for batch, value in tried.items()},
        ours_seconds=median(taken["ours"], 2),
        peft_seconds=median(taken["peft"], 2),
        ratio=median(ratios, 3),
        ratios=[round(ratio, 3) for ratio in ratios],
        equal=round(equal, 3),
        dtype=base.placement.dtype_name,
    )


def main() -> None:
    """Measures one adapter and several."""
    parser = arguments(__doc__, "answers")
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--adapters", type=int, nargs="+", default=[8, 1])
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--batch", type=int, default=64, help="sequences that ours continues together")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rows = Rows(options)
    for count in options.adapters:
        measure(options, count, rows)


if __name__ == "__main__":
    main()
