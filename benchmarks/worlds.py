"""The models and examples that benchmarks run on.

    smollm2-135m-instruct   the embedded model and ../shared/data/tulu-like-mix, tokenised by our own cache
    llama-1b, -3b, -8b      Llama 3's shapes, random weights made on the device
    qwen-0.5b, gemma-270m   a Llama of other shapes: those of Qwen2.5-0.5B and Gemma-3-270M
    tiny                    two layers, random: tests that a benchmark works, its speeds mean nothing

Speed does not depend on what tokens say. Where the real data or its tokenizer is not there, tokens are random and the
lengths and supervised spans are the real ones, kept in real_lengths.json.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import SHARED

from peft_study.config import LoraConfig, MethodConfig, PrefixTuningConfig, PromptTuningConfig
from peft_study.data.conversation import Example
from peft_study.methods import Adapter, create
from peft_study.model.embedded import EMBEDDED
from peft_study.model.load import Base, load_model, load_tokenizer, place_model, resolve_model, wrap
from peft_study.model.precision import Placement, choose

MAX_LENGTH = 1024
TINY_LENGTH = 48
LENGTHS = Path(__file__).with_name("real_lengths.json")
MODELS = (EMBEDDED, "gemma-270m", "qwen-0.5b", "llama-1b", "llama-3b", "llama-8b", "tiny")

METHODS: dict[str, MethodConfig] = {
    "lora": LoraConfig(rank=16, alpha=32),
    # at random, as PEFT begins: far from doing nothing, so that a peer whose examples miss it has another loss
    "prefix_tuning": PrefixTuningConfig(tokens=30, init="random"),
    "prompt_tuning": PromptTuningConfig(tokens=8, init="random"),
}

_SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": {  # Llama-3.2-1B: 1.24 billion parameters
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "llama-3b": {  # Llama-3.2-3B: 3.21 billion parameters
        "vocab_size": 128_256,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    "llama-8b": {  # Llama-3.1-8B: 8.0 billion parameters
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
    "qwen-0.5b": {  # Qwen2.5-0.5B's: 494 million parameters, of them 136 of the embeddings
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "gemma-270m": {  # Gemma-3-270M's: 268 million parameters, of them 168 of the embeddings
        "vocab_size": 262_144,
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "tie_word_embeddings": True,
    },
}


@dataclass(frozen=True, slots=True)
class World:
    """One model on one device.

    Attributes:
        name: of `MODELS`.
        placement: device and precision.
    """

    name: str
    placement: Placement

    def model(self, dtype: torch.dtype | None = None) -> Any:
        """Returns the model anew, on the device: each peer changes its own."""
        dtype = dtype or self.placement.dtype
        if self.name == EMBEDDED:
            return load_model(resolve_model(EMBEDDED), EMBEDDED, dtype=dtype).to(self.placement.device)
        return _random_model(self.name, self.placement.device, dtype)

    def base(self, quantization: str | None = None) -> Base:
        """Returns the model as our engine's base, in nf4 or int8 if asked for."""
        path = f"{self.name} of the benchmarks"
        if quantization is None:
            return wrap(self.model(), None, self.placement, path=path)
        if self.name == EMBEDDED:
            model = place_model(resolve_model(EMBEDDED), EMBEDDED, self.placement, quantization=quantization)
        else:
            with tempfile.TemporaryDirectory() as folder:
                self.model().save_pretrained(folder)
                model = place_model(folder, self.name, self.placement, quantization=quantization)
        return wrap(model, None, self.placement, path=path, quantization=quantization)

    def tokenizer(self) -> Any:
        """Returns the model's tokenizer, or one of bytes."""
        return load_tokenizer(EMBEDDED) if self.name == EMBEDDED else _byte_tokenizer()

    def examples(self, count: int) -> tuple[list[Example], str]:
        """Returns the first examples of the real data, and where they are from."""
        if self.name == EMBEDDED and (SHARED / "data").is_dir():
            return real_examples(count), "tulu-like-mix"
        longest = TINY_LENGTH if self.name == "tiny" else MAX_LENGTH
        return examples_of_real_lengths(count, _SHAPES.get(self.name, {}).get("vocab_size", 49_152), longest), "lengths"


def open_world(name: str, device: str = "auto") -> World:
    """Returns the world of that name."""
    return World(name, choose(device))


def real_examples(count: int) -> list[Example]:
    """Returns the first `count` examples of tulu-like-mix as our cache tokenises them: 193 tokens on average."""
    from peft_study.data.chat import ChatEncoder
    from peft_study.data.tokens import tokenize

    encoder = ChatEncoder(load_tokenizer(EMBEDDED), max_length=MAX_LENGTH)
    data = tokenize([SHARED / "data" / "tulu-like-mix" / "train.jsonl.gz"], encoder)
    return [data[i] for i in range(count)]


def examples_of_real_lengths(count: int, vocabulary: int, longest: int = MAX_LENGTH) -> list[Example]:
    """Returns random tokens with the lengths and supervised spans of the first real examples, over and over."""
    generator, kept = np.random.default_rng(0), json.loads(LENGTHS.read_text())
    made = []
    for number in range(count):
        length, *edges = kept[number % len(kept)]
        supervised = np.zeros(length, dtype=np.bool_)
        for start, end in zip(edges[::2], edges[1::2], strict=True):
            supervised[start:end] = True
        tokens = generator.integers(3, vocabulary, size=length).astype(np.int32)
        if length > longest:  # its end: the answer
            tokens, supervised = tokens[-longest:], supervised[-longest:].copy()
            supervised[0] = False
        made.append(Example(tokens, supervised))
    return made


def examples_of_length(count: int, length: int, vocabulary: int) -> list[Example]:
    """Returns random examples of one length, the last 37 % supervised, as in the real data."""
    generator = np.random.default_rng(0)
    mask = np.arange(length) >= max(1, round(0.63 * length))
    return [Example(generator.integers(3, vocabulary, size=length).astype(np.int32), mask) for _ in range(count)]


def vocabulary_of(base: Base) -> int:
    """Returns how many tokens the model knows."""
    return int(base.model.config.get_text_config().vocab_size)


def adapter_of(config: MethodConfig, base: Base, seed: int = 0) -> Adapter:
    """Returns the method's adapter with a little noise on every parameter, so that none is zero."""
    adapter = create(config, base, None, seed)
    generator = torch.Generator(base.device).manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters().values():
            parameter.add_(torch.randn(parameter.shape, generator=generator, device=base.device), alpha=0.01)
    return adapter


def write_lengths(examples: Sequence[Example]) -> None:
    """Writes real_lengths.json: of each example its length and where its supervised spans begin and end."""
    rows = [[len(e), *np.flatnonzero(np.diff(np.pad(e.supervised_L.astype(np.int8), 1))).tolist()] for e in examples]
    LENGTHS.write_text(json.dumps(rows, separators=(",", ":")).replace("],[", "],\n[") + "\n")


def shape_of(name: str) -> Any:
    """Returns the configuration of a model with random weights."""
    from transformers import LlamaConfig

    return LlamaConfig(
        **_SHAPES[name],
        max_position_embeddings=16_384,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def _random_model(name: str, device: torch.device, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(shape_of(name), dtype=dtype)
    if name == "tiny":  # at the usual size its answers would hardly depend on what it reads
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(10 if parameter.dim() > 1 else 1)
    return model


def save_tiny(folder: Path) -> Path:
    """Writes the tiny model with its tokenizer, as `--model_name_or_path` takes it; returns the folder."""
    _random_model("tiny", torch.device("cpu"), torch.float32).save_pretrained(folder)
    _byte_tokenizer().save_pretrained(folder)
    return folder


def _byte_tokenizer() -> Any:
    """Returns a tokenizer whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    return tokenizer
