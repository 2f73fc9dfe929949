"""Loads the one frozen base that all trials share."""

from __future__ import annotations

import difflib
import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from peft_study.errors import ModelError, first_line, nearest_path
from peft_study.model import attention
from peft_study.model.cpu import norm
from peft_study.model.cpu.allocator import keep_freed_memory
from peft_study.model.digest import folder_digest
from peft_study.model.embedded import EMBEDDED, embedded_folder, origin
from peft_study.model.head import Transform, head_transform
from peft_study.model.precision import Placement, choose
from peft_study.model.proof import Proof, learned_positions, prove


@dataclass(slots=True)
class Base:
    """The frozen base model and its shape.

    Attributes:
        model: the causal language model; no parameter requires gradients.
        tokenizer: its tokenizer.
        path: a folder that exists, or a hub id, for `from_pretrained`.
        name, revision, tokenizer_name: as given by the user, to find them again on another machine.
        digest: sha256 of its weight files.
        origin: where a converted model came from, else None.
        quantization: nf4 or int8 where the weights were quantised when they were loaded, else None.
        layers, heads, kv_heads, head_dim, hidden: shape of the decoder.
        positions: size of its table of positions; None: it computes them.
        context: positions that it was made for, by its configuration; None: not given there.
        attention: name of the attention that it was loaded with; with that one it generates.
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
    attention: str
    name: str
    revision: str | None = None
    tokenizer_name: str | None = None

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


MEMORY = "in memory: "
"""How the name of a model in memory begins, which no path and no hub id does (model/in_memory.py)."""


def resolve_model(name: str) -> str:
    """Returns what `from_pretrained` takes: the embedded model's folder for its name, else the name itself.

    Raises:
        ModelError: when there is no such folder or hub id.
    """
    if name.lower() == EMBEDDED:
        return str(embedded_folder())
    path = Path(name)
    if name.startswith(MEMORY):
        what = "was in the memory of another process"
        raise ModelError(what, where=name, remedy="give it again from Python, or set model.name to a folder")
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ModelError("is a folder without config.json", where=name, remedy="give a model folder or a hub id")
        return name
    # a hub id has one slash at most
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError("no such model folder", where=name, remedy=_meant(name))
    hub_options(name)
    return name


def _meant(name: str) -> str:
    """Returns the remedy for a model that is not there, with the nearest name or folder."""
    if difflib.get_close_matches(Path(name).name.lower(), [EMBEDDED], cutoff=0.8):
        return f"did you mean {EMBEDDED!r}?"
    close = nearest_path(Path(name), folders=True)
    return f"did you mean {close}?" if close else f"give a folder, a hub id, or {EMBEDDED!r}"


@functools.cache
def hub_options(path: str) -> dict[str, bool]:
    """Returns options for `from_pretrained`: without the hub, look for a hub id in the cache alone.

    Otherwise a mistyped folder on a machine without network is retried for the better part of a minute.

    Raises:
        ModelError: when it is neither a folder, nor in the cache, nor on the hub.
    """
    if Path(path).is_dir():
        return {}
    import huggingface_hub
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    try:
        huggingface_hub.HfApi().model_info(path, timeout=10)
    except Exception as error:  # which HTTP client, and so which error, changes between versions of the library
        if not Path(HF_HUB_CACHE, repo_folder_name(repo_id=path, repo_type="model")).is_dir():
            what = (
                f"no such model: no folder here, none in the hub's cache, and none from the hub ({first_line(error)})"
            )
            raise hub_refusal(error, path) or ModelError(what, where=path, remedy=_meant(path)) from error
        return {"local_files_only": True}
    return {}


def hub_refusal(error: BaseException | None, name: str) -> ModelError | None:
    """Returns what to do where the hub wants a token, for a gated or private model; None for any other error."""
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    while error is not None and not isinstance(error, RepositoryNotFoundError):
        error = error.__cause__ or error.__context__  # transformers wraps the hub's errors
    token = huggingface_hub.get_token()
    if isinstance(error, GatedRepoError):
        why = "the account of this HF_TOKEN has no access" if token else "no HF_TOKEN is set"
        page = f"{huggingface_hub.constants.ENDPOINT}/{name}"
        return ModelError(
            f"is gated on the hub, and {why}",
            where=name,
            remedy=f"accept its terms at {page}, then set HF_TOKEN to your token",
        )
    if error is not None and error.response.status_code in (401, 403):  # said of a model that is not there, too
        how = "with this HF_TOKEN" if token else "without HF_TOKEN"
        what = f"no such model: no folder here, and none on the hub that can be read {how}"
        return ModelError(what, where=name, remedy=f"{_meant(name)}; where it is private, set HF_TOKEN to your token")
    return None


def load_tokenizer(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """Returns the fast tokenizer of a model folder, hub id or the embedded name.

    Raises:
        ModelError: when there is none.
    """
    from transformers import AutoTokenizer

    path = resolve_model(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=revision, trust_remote_code=trust_remote_code, **hub_options(path)
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        what = f"no tokenizer could be loaded ({first_line(error)})"
        raise hub_refusal(error, name) or ModelError(what, where=name, remedy=_TOKENIZER_REMEDY) from error
    return check_tokenizer(tokenizer, name)


_TOKENIZER_REMEDY = "give a folder that holds tokenizer.json, or name another tokenizer"


def check_tokenizer(tokenizer: Any, name: str) -> Any:
    """Returns a tokenizer that can map characters to tokens.

    Raises:
        ModelError: when it cannot, or has no words.
    """
    if not tokenizer.is_fast:
        what = "only a slow tokenizer is there, which cannot map characters to tokens"
        raise ModelError(what, where=name, remedy="save a fast one into the folder (tokenizer.json)")
    # for many kinds of model, transformers makes an empty tokenizer of a folder without tokenizer files
    if not set(tokenizer("a word", add_special_tokens=False).input_ids) - set(tokenizer.all_special_ids):
        raise ModelError("no tokenizer is there, only its name", where=name, remedy=_TOKENIZER_REMEDY)
    return tokenizer


def load_base(
    name: str,
    *,
    tokenizer: Any = None,
    revision: str | None = None,
    placement: Placement | None = None,
    quantization: str | None = None,
    trust_remote_code: bool = False,
) -> Base:
    """Loads the model, freezes it, registers segment attention and proves packing and head.

    Args:
        name: folder, hub id or embedded name.
        tokenizer: what `load_tokenizer` returned; None: the model's own is loaded.
        revision: git revision on the hub.
        placement: device and precision.
        quantization: nf4 for a 4-bit base, int8 for an 8-bit one.
        trust_remote_code: run code that ships with the model.

    Raises:
        ModelError: when the folder or hub id cannot be loaded, or is no causal language model.
    """
    placement = placement or choose()
    path = resolve_model(name)
    words = tokenizer or load_tokenizer(name, revision=revision, trust_remote_code=trust_remote_code)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    model = place_model(path, name, placement, quantization=quantization, **options)
    base = wrap(model, words, placement, path=path, quantization=quantization)
    base.name, base.revision = name, revision
    return base


def place_model(path: str, name: str, placement: Placement, *, quantization: str | None = None, **options: Any) -> Any:
    """Returns a model on its device and in its precision, quantised if asked for; arguments as of `load_model`.

    Raises:
        ModelError: as `load_model`, and where bitsandbytes is needed but not installed.
    """
    options["dtype"] = placement.dtype
    if quantization is not None:  # a quantised model is put in place while it is loaded
        return load_model(path, name, **options, **quantised_options(quantization, placement))
    return load_model(path, name, **options).to(placement.device)


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
            path, use_safetensors=True, output_loading_info=True, **hub_options(path), **options
        )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        what = f"no causal language model could be loaded ({first_line(error)})"
        raise hub_refusal(error, name) or ModelError(what, where=name, remedy=remedy) from error
    # transformers would fill them with random numbers and only log it
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(f"its files lack {len(missing)} weights, {missing[0]} first", where=name, remedy=remedy)
    return model


def wrap(model: Any, tokenizer: Any, placement: Placement, *, path: str, quantization: str | None = None) -> Base:
    """Makes a Base of a model that is already in memory."""
    attention.register()
    loaded_with = model.config._attn_implementation
    model.requires_grad_(False)
    # bitsandbytes repacks 4-bit weights on CPU in eval mode for a kernel without gradient; dropouts are off below
    model.train(quantization is not None)
    without_dropout(model)
    config = model.config.get_text_config()
    norm.install(model)
    if placement.device.type == "cpu":
        keep_freed_memory()
    transform = head_transform(config)
    sizes = shape(config)
    cached = sizes["kv_heads"], sizes["head_dim"]
    proof = prove(model, model.get_output_embeddings(), transform, config.vocab_size, cached)
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
        **sizes,
        name=path,
        positions=learned_positions(model, segmented=proof.segmented),
        context=getattr(config, "max_position_embeddings", None),
        attention=loaded_with,
    )


def without_dropout(model: nn.Module) -> None:
    """Turns a base's own dropout off: it would be noise that depends on neighbours in the row.

    It is a module (its `p`), or a share that a module's forward hands to a function: `dropout`, `layerdrop`,
    `attn_pdrop`, `jitter_noise` and the like. It would be back wherever the base is in training mode.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and _NOISE.search(name):
                setattr(module, name, 0.0)


_NOISE = re.compile("drop|jitter")


def shape(text: Any) -> dict[str, Any]:
    """Returns the shape of a decoder as a Base has it, from the configuration of its text model."""
    heads = getattr(text, "num_attention_heads", None) or 1  # absent in models without attention
    return {
        "layers": text.num_hidden_layers,
        "heads": heads,
        "kv_heads": getattr(text, "num_key_value_heads", None) or heads,
        "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
        "hidden": text.hidden_size,
    }


def quantised_options(quantization: str, placement: Placement) -> dict[str, Any]:
    """Returns the loading options of a base in nf4 or int8.

    int8 has no columns of outliers in higher precision, which LLM.int8 (arXiv:2208.07339) takes from the whole row: a
    token's numbers would then depend on what stands beside it.

    Raises:
        ModelError: without bitsandbytes.
    """
    from transformers import BitsAndBytesConfig

    try:
        import bitsandbytes  # noqa: F401  (only whether it is there)
    except ImportError as error:
        what = f"a base in {quantization} needs bitsandbytes, which is not installed"
        raise ModelError(what, remedy="run: pip install 'peft-study[quantized]'") from error
    if quantization == "int8":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=placement.dtype,
        )
    return {"quantization_config": config, "device_map": {"": placement.device}}
