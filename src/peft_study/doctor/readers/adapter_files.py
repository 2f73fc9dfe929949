"""An adapter's folder as PEFT writes it, read without building the model.

adapter_config.json + adapter_model.safetensors (+ the base's folder)  ──►  Observations
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peft_study.doctor.observations import AdapterState, Observations, UsedSettings
from peft_study.doctor.readers.adapter_config import differences, method_settings
from peft_study.errors import ModelError, UserError, first_line, nearest_path

_CONFIG, _WEIGHTS, _PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_TABLES = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "lm_head", "embed_out")
"""Last parts of the names of embedding tables and heads."""
_STARTS: dict[str, tuple[tuple[str, ...], float]] = {
    "lora": (("lora_B.", "lora_embedding_A"), 0.0),
    "adalora": (("lora_E",), 0.0),
    "ia3": (("ia3_l",), 1.0),
    "vera": (("vera_lambda_b",), 0.0),
    "oft": (("oft_R", "oft_r"), 0.0),
    "boft": (("boft_R",), 0.0),
    "miss": (("miss_block",), 0.0),
}
"""Method -> its tensors that begin at one value, by parts of their names, and the value."""
_ZERO_B = (None, True, "gaussian", "eva", "default")
"""Values of `init_lora_weights` with which B begins at zero."""

Reason = tuple[str, str]


def read_adapter(folder: Path | str, *, base: str | None = None) -> Observations:
    """Returns what an adapter's files tell.

    Args:
        folder: of adapter_config.json and adapter_model.safetensors.
        base: folder of the base model; None: the one that the configuration names, where it is a path.

    Raises:
        ModelError: it is no adapter's folder, or a file is empty or damaged.
    """
    folder = _adapter_folder(Path(folder))
    config = _config(folder)
    name = base if base is not None else config.get("base_model_name_or_path")
    found, why = _base_found(name, folder)
    if base is not None and not found:
        raise ModelError("no model folder with a config.json", where=f"--base {base}", remedy="give the base's folder")
    reasons: dict[str, Reason] = {} if why is None else {"adapter.base_found": why}
    adapter = AdapterState(base=name, base_found=found)
    settings = UsedSettings(**method_settings(config))
    if not (folder / _WEIGHTS).exists():
        for part in ("untouched", "bad", "embeddings", "differences"):
            reasons[f"adapter.{part}"] = _no_weights(folder)
        return Observations(settings=settings, adapter=adapter, reasons=reasons)
    place = _folder_of(name, folder) if found else None
    adapter, more = _weights(folder / _WEIGHTS, config, adapter, place)
    return Observations(settings=settings, adapter=adapter, reasons=reasons | more)


def _adapter_folder(path: Path) -> Path:
    if path.name in (_CONFIG, _WEIGHTS, _PICKLE) and path.is_file():
        path = path.parent
    if not path.is_dir():
        near = nearest_path(path)
        raise ModelError("there is no such folder", where=str(path), remedy=f"did you mean {near}?" if near else None)
    if not (path / _CONFIG).is_file():
        inside = sorted(file.parent for file in path.glob(f"*/{_CONFIG}"))
        remedy = f"give one of its adapters, such as {inside[-1]}" if inside else "give the folder of a PEFT adapter"
        raise ModelError(f"holds no {_CONFIG}", where=str(path), remedy=remedy)
    return path


def _config(folder: Path) -> dict[str, Any]:
    path = folder / _CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        state = "is empty" if path.stat().st_size == 0 else f"is no valid JSON ({first_line(error)})"
        raise ModelError(f"{_CONFIG} {state}", where=str(folder), remedy="save the adapter again") from error
    if not isinstance(values, dict) or "peft_type" not in values:
        raise ModelError(f"{_CONFIG} names no peft_type", where=str(folder), remedy="give the folder of a PEFT adapter")
    return values


def _no_weights(folder: Path) -> Reason:
    if (folder / _PICKLE).exists():
        return (
            f"{_PICKLE} is a pickle, which can run code when it is read; load it where you trust it, and save it again "
            "with save_pretrained, as safetensors",
            f"{_PICKLE} 是 pickle，读取时可能执行代码；请在可信环境中加载，再用 save_pretrained 存成 safetensors",
        )
    raise ModelError(f"holds no {_WEIGHTS}", where=str(folder), remedy="save the adapter again")


def _base_found(name: str | None, folder: Path) -> tuple[bool | None, Reason | None]:
    """Returns whether the base is there; None, and why, where that cannot be seen on this disk."""
    if not name:
        return None, ("the configuration names no base", "配置没有写明基座")
    if _folder_of(name, folder) is not None:
        return True, None
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not name.startswith("."):
        return None, (f"{name} is a name on a hub", f"{name} 是 hub 上的名称")
    return False, None


def _folder_of(name: str | None, folder: Path) -> Path | None:
    places = (Path(name or "").expanduser(), folder / (name or ""))
    return next((place for place in places if (place / "config.json").is_file()), None)


def _weights(
    path: Path, config: Mapping[str, Any], adapter: AdapterState, base: Path | None
) -> tuple[AdapterState, dict[str, Reason]]:
    import dataclasses

    from safetensors import SafetensorError, safe_open

    size = path.stat().st_size
    if size == 0:
        raise ModelError(f"{path.name} is empty (0 bytes)", where=str(path.parent), remedy="save the adapter again")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            if not tensors:
                raise ModelError(f"{path.name} holds no tensor", where=str(path.parent), remedy="save it again")
            bad, spread = _values(file, tensors)
            bytes_of_tables = sum(_bytes(file.get_slice(name)) for name in tensors if _is_table(name, config))
            untouched, why = _untouched(file, spread, config, base)
    except SafetensorError as error:
        what = f"{path.name} is truncated or damaged ({first_line(error)})"
        raise ModelError(what, where=str(path.parent), remedy="save the adapter again") from error
    lines, unknown = differences(config, tensors, base)
    adapter = dataclasses.replace(
        adapter, untouched=untouched, bad=bad, embeddings=bytes_of_tables, bytes=size, differences=lines
    )
    reasons = {"adapter.untouched": why} if why else {}
    return adapter, reasons | ({"adapter.differences": unknown} if unknown else {})


def _values(file: Any, names: Iterable[str]) -> tuple[tuple[str, ...], dict[str, tuple[float, float]]]:
    """Returns the names of tensors with NaN or infinity, and the least and greatest number of each."""
    bad, spread = [], {}
    for name in names:
        tensor = file.get_tensor(name)
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        tensor = tensor.float()
        if not bool(tensor.isfinite().all()):
            bad.append(name)
        spread[name] = (float(tensor.min()), float(tensor.max()))
    return tuple(bad), spread


def _bytes(part: Any) -> int:
    size = re.search(r"\d+", str(part.get_dtype()))
    count = 1
    for length in part.get_shape():
        count *= length
    return count * int(size.group() if size else 32) // 8


def _is_table(name: str, config: Mapping[str, Any]) -> bool:
    """True for an embedding table or head of the base that the configuration does not ask to train."""
    parts = name.split(".")
    asked = config.get("modules_to_save") or ()
    return parts[-1] == "weight" and bool({*parts} & {*_TABLES}) and not {*parts} & {*asked} and not _adapted(parts)


def _adapted(parts: list[str]) -> bool:
    return parts[-2] not in (*_TABLES, "base_layer", "original_module")


def _untouched(
    file: Any, spread: Mapping[str, tuple[float, float]], config: Mapping[str, Any], base: Path | None
) -> tuple[bool | None, Reason | None]:
    """Returns whether the weights equal their initialisation; None, and why, where that is not known."""
    method = str(config["peft_type"]).lower()
    if method == "prefix_tuning":
        ends = spread.get("prompt_embeddings")
        if ends == (0.0, 0.0):
            return True, None
        if config.get("init_weights") == "zero":
            return False, None
        return None, _RANDOM
    if method == "prompt_tuning":
        return _prompt_untouched(file, config, base)
    parts, value = _STARTS.get(method, ((), 0.0))
    ends_of = [ends for name, ends in spread.items() if any(part in name for part in parts)]
    if not ends_of:
        return None, (f"how {method} begins is not known", f"不了解 {method} 的初始值")
    if all(ends == (value, value) for ends in ends_of):
        return True, None
    if method == "lora" and config.get("init_lora_weights") not in _ZERO_B:
        return None, _RANDOM
    return False, None


_RANDOM = ("its random start is not kept", "随机初始值没有保存")
_NO_BASE = ("the base is not at hand: give --base", "没有基座：请用 --base 指定")


def _prompt_untouched(file: Any, config: Mapping[str, Any], base: Path | None) -> tuple[bool | None, Reason | None]:
    """Returns whether every row of a prompt is still a row of the base's embedding table, as text and words are."""
    import torch

    if str(config.get("prompt_tuning_init")).upper().endswith("RANDOM"):
        return None, _RANDOM
    if base is None:
        return None, _NO_BASE
    if "prompt_embeddings" not in file.keys():  # noqa: SIM118
        return None, ("there is no prompt in the file", "文件里没有提示向量")
    try:
        table = _embedding_table(base)
    except (OSError, ValueError, UserError) as error:
        return None, (first_line(error), first_line(error))
    if table is None:
        return None, ("the base's embedding table was not found", "没有找到基座的嵌入表")
    prompt = file.get_tensor("prompt_embeddings")
    if prompt.ndim != 2 or prompt.shape[1] != table.shape[1]:
        return None, ("the base's embeddings have another width", "基座嵌入的宽度不同")
    # the base may have been loaded in another dtype than its file's
    return any(_all_rows_of(prompt, table, dtype) for dtype in {table.dtype, torch.bfloat16, torch.float16}), None


def _all_rows_of(prompt: Any, table: Any, dtype: Any) -> bool:
    """Returns whether each row of a prompt is a row of a table that was rounded to a dtype."""
    start = table[:, :4].to(dtype).to(prompt.dtype)  # a few columns tell nearly all rows apart
    for row in prompt:
        near = (start == row[:4]).all(1).nonzero()[:, 0]
        if not bool((table[near].to(dtype).to(prompt.dtype) == row).all(1).any()):
            return False
    return True


def _embedding_table(base: Path) -> Any:
    """Returns the base's input embeddings (vocabulary, width), read from its safetensors files."""
    from safetensors import safe_open

    for path in sorted(base.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                if re.search(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight$", name):
                    return file.get_tensor(name)
    return None
