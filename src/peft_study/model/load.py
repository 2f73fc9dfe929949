"""Loads the one frozen base that all trials share."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from peft_study.errors import ModelError, first_line
from peft_study.model import attention, norm
from peft_study.model.allocator import keep_freed_memory
from peft_study.model.digest import folder_digest
from peft_study.model.embedded import EMBEDDED, embedded_folder, origin
from peft_study.model.head import Transform, head_transform
from peft_study.model.precision import Placement, choose
from peft_study.model.proof import Proof, learned_positions, prove


@dataclass(slots=True)
class Base:
    """The frozen base model and what methods need to know of its shape.

    Attributes:
        model: the causal language model; no parameter requires gradients.
        tokenizer: its tokenizer.
        path: what `from_pretrained` loads it from (a folder that exists, or a hub id).
        digest: sha256 of its weight files.
        origin: where a converted model came from, else None.
        quantization: nf4 where the weights were quantised when they were loaded, else None.
        layers, heads, kv_heads, head_dim, hidden: shape of the decoder.
        positions: how many there are, where the model looks them up in a table; None: it computes them.
        context: positions that its configuration says it was made for; None: it does not say.
    """

    model: Any
    tokenizer: Any
    path: str
    digest: str
    origin: str | None
    quantization: str | None
    placement: Placement
    transform: Transform
    proof: Proof
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    positions: int | None
    context: int | None

    @property
    def device(self) -> torch.device:
        """Where the base lies."""
        return self.placement.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the base."""
        return self.placement.dtype

    @property
    def head(self) -> nn.Module:
        """The output projection."""
        return self.model.get_output_embeddings()

    def embed(self, ids_T: Tensor) -> Tensor:
        """Returns the input embeddings (T, E) from the embedding module: some models scale inside it."""
        return self.model.get_input_embeddings()(ids_T)

    def parameter_count(self) -> int:
        """Returns the number of parameters of the base."""
        count: int = self.model.num_parameters()  # knows that a 4-bit weight packs two numbers a byte
        return count


def resolve_model(name: str) -> str:
    """Returns what `from_pretrained` takes: the embedded model's folder for its name, else the name itself.

    Raises:
        ModelError: when `name` is a path that is not a model folder.
    """
    if name.lower() == EMBEDDED:
        return str(embedded_folder())
    path = Path(name)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ModelError("is a folder without config.json", where=name, remedy="give a model folder or a hub id")
    elif path.exists() or name.startswith((".", "/", "~")):
        raise ModelError("no such model folder", where=name, remedy=f"give a folder, a hub id, or {EMBEDDED!r}")
    return name


@functools.cache
def _hub_options(path: str) -> dict[str, bool]:
    """Returns how `from_pretrained` should look for a model: a hub id that cannot be asked for, in the cache alone.

    Without this, a mistyped folder on a machine without network is retried for the better part of a minute.
    """
    if Path(path).is_dir():
        return {}
    import huggingface_hub

    try:
        huggingface_hub.HfApi().model_info(path, timeout=10)
    except Exception:  # noqa: BLE001  (which HTTP client, and so which error, changes between versions of the library)
        return {"local_files_only": True}
    return {}


def load_tokenizer(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Returns the fast tokenizer of a model folder, hub id or the embedded name.

    Raises:
        ModelError: when there is none.
    """
    from transformers import AutoTokenizer

    path = resolve_model(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code, **_hub_options(path)
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise ModelError(
            f"no tokenizer could be loaded ({first_line(error)})",
            where=name,
            remedy="give a folder that holds tokenizer.json, or name another tokenizer",
        ) from error
    if not tokenizer.is_fast:
        raise ModelError(
            "only a slow tokenizer is there, which cannot map characters to tokens",
            where=name,
            remedy="save a fast one into the folder (tokenizer.json)",
        )
    # of a folder without tokenizer files, transformers makes an empty tokenizer of the model's kind for many kinds
    if not set(tokenizer("a word", add_special_tokens=False).input_ids) - set(tokenizer.all_special_ids):
        raise ModelError(
            "no tokenizer is there, only its name",
            where=name,
            remedy="give a folder that holds tokenizer.json, or name another tokenizer",
        )
    return tokenizer


def load_base(
    name: str,
    *,
    tokenizer: str | None = None,
    revision: str | None = None,
    placement: Placement | None = None,
    quantization: str | None = None,
    trust_remote_code: bool = False,
) -> Base:
    """Loads the model, freezes it, registers segment attention and proves packing and head.

    Raises:
        ModelError: when the folder or hub id cannot be loaded, or is no causal language model.
    """
    placement = placement or choose()
    path = resolve_model(name)
    words = load_tokenizer(tokenizer or name, revision=revision, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {"dtype": placement.dtype}
    if quantization == "nf4":
        options |= _nf4(placement)
    model = load_model(path, name, revision=revision, trust_remote_code=trust_remote_code, **options)
    if quantization is None:  # a quantised model was put in place while it was loaded
        model = model.to(placement.device)
    return wrap(model, words, placement, path=path, quantization=quantization)


def load_model(path: str, name: str, **options: Any) -> Any:
    """Returns the causal language model of a folder or hub id, out of safetensors alone and with all its weights.

    Args:
        path: what `resolve_model` returned.
        name: what the user called it, for the error.
        options: of `from_pretrained`.

    Raises:
        ModelError: when it cannot be loaded, is no causal language model, or lacks weights.
    """
    from transformers import AutoModelForCausalLM

    remedy = "give a folder that holds config.json and *.safetensors, or a hub id when online"
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path, use_safetensors=True, output_loading_info=True, **_hub_options(path), **options
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(
            f"no causal language model could be loaded ({first_line(error)})", where=name, remedy=remedy
        ) from error
    # transformers would fill them with random numbers and say so in a log that nobody reads
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(f"its files lack {len(missing)} weights, {missing[0]} first", where=name, remedy=remedy)
    return model


def wrap(model: Any, tokenizer: Any, placement: Placement, *, path: str, quantization: str | None = None) -> Base:
    """Makes a Base of a model that is already in memory (tests build theirs in process)."""
    attention.register()
    model.requires_grad_(False)
    # bitsandbytes repacks 4-bit weights on CPU in eval mode for a kernel without gradient; dropouts are off below
    model.train(quantization is not None)
    for module in model.modules():
        # the base is evaluated as it is: its own dropout would be noise that depends on neighbours in the row
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1  # models without attention have none
    norm.install(model)
    if placement.device.type == "cpu":
        keep_freed_memory()
    transform = head_transform(config)
    proof = prove(model, model.get_output_embeddings(), transform, config.vocab_size)
    folder = Path(path)
    return Base(
        model=model,
        tokenizer=tokenizer,
        path=str(folder.resolve()) if folder.is_dir() else path,
        digest=folder_digest(folder) if folder.is_dir() else getattr(model.config, "_commit_hash", None) or "unknown",
        origin=origin(folder) if folder.is_dir() else None,
        quantization=quantization,
        placement=placement,
        transform=transform,
        proof=proof,
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        hidden=config.hidden_size,
        positions=learned_positions(model, segmented=proof.segmented),
        context=getattr(config, "max_position_embeddings", None),
    )


def _nf4(placement: Placement) -> dict[str, Any]:
    """Returns the loading options of a 4-bit NormalFloat base, or says why there is none."""
    from transformers import BitsAndBytesConfig

    try:
        import bitsandbytes  # noqa: F401  (only whether it is there)
    except ImportError as error:
        raise ModelError(
            "a 4-bit base (NF4) needs bitsandbytes, which is not installed",
            remedy="run: pip install 'peft-study[quantized]'",
        ) from error
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=placement.dtype,
    )
    return {"quantization_config": quantization, "device_map": {"": placement.device}}
