"""Answers of trained adapters, through PEFT's own classes: what is exported is what is used here."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from peft_study.data.atomic import atomic_folder, atomic_writer
from peft_study.data.chat import ChatEncoder
from peft_study.data.conversation import Message
from peft_study.data.readers import RawRow
from peft_study.data.sources import open_sources
from peft_study.errors import DataError, ModelError, OutputError, first_line
from peft_study.methods.peft_format import CONFIG, WEIGHTS, base_mismatch, encoding, read_config
from peft_study.model.digest import folder_digest
from peft_study.model.load import load_model, load_tokenizer, resolve_model
from peft_study.model.precision import choose
from peft_study.model.proof import learned_positions

SOFT = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CARTRIDGE")


def _load(adapter: Path, base: str | None, *, dtype: torch.dtype | None, device: torch.device) -> tuple[Any, Any, str]:
    """Returns the adapted model, its tokenizer and the base's path; warns where the base is another one."""
    from peft import PeftModel

    if base is None and not (adapter / CONFIG).exists() and (adapter / "config.json").exists():
        # where all weights were trained, the folder is the model itself
        whole = load_model(str(adapter), str(adapter), dtype=dtype or "auto").to(device)
        return whole.eval(), load_tokenizer(str(adapter)), str(adapter)
    config = read_config(adapter)
    if not (adapter / WEIGHTS).is_file():
        raise ModelError(f"holds no {WEIGHTS}", where=str(adapter), remedy="only safetensors are loaded; save it again")
    path = resolve_model(base or config["base_model_name_or_path"])
    if Path(path).is_dir():
        mismatch = base_mismatch(adapter, folder_digest(Path(path)))
        if mismatch:
            warnings.warn(mismatch, stacklevel=2)
    tokenizer = load_tokenizer(path)
    model = load_model(path, path, dtype=dtype or "auto").to(device)
    try:
        return PeftModel.from_pretrained(model, adapter).eval(), tokenizer, path
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"the adapter cannot be put on {path} ({first_line(error)})",
            where=str(adapter),
            remedy="name the base it was trained on with --base, or export it again",
        ) from error


class Answerer:
    """An adapted model that answers conversations, greedily."""

    def __init__(self, model: Any, tokenizer: Any, encoder: ChatEncoder) -> None:
        self._model, self._tokenizer, self._encoder = model, tokenizer, encoder
        config = getattr(model, "active_peft_config", None)  # none where all weights were trained
        self._virtual: int = getattr(config, "num_virtual_tokens", None) or 0
        self._positions = learned_positions(model if config is None else model.get_base_model())

    @classmethod
    def load(cls, adapter: Path, *, base: str | None = None, device: str = "auto") -> Answerer:
        """Loads an adapter folder on its base, or the model folder of a run that trained all weights.

        Raises:
            ModelError: when it holds no adapter, or its base cannot be loaded.
        """
        placement = choose(device)
        model, tokenizer, _ = _load(adapter, base, dtype=placement.dtype, device=placement.device)
        return cls(model, tokenizer, ChatEncoder(tokenizer, **encoding(adapter)))

    def answer(
        self, messages: Sequence[dict[str, str]], max_new_tokens: int, stream: Callable[[str], None] | None = None
    ) -> str:
        """Returns the next assistant turn of a conversation of {role, content} turns.

        Args:
            messages: the turns so far.
            max_new_tokens: tokens the answer may have; fewer where the model's positions end.
            stream: receives the answer piece by piece.

        Raises:
            ModelError: when the conversation leaves no position for an answer.
        """
        from transformers import TextStreamer

        turns = [Message(m["role"], m["content"]) for m in messages]  # type: ignore[arg-type]
        ids = torch.tensor([self._encoder.prompt_tokens(turns)], device=self._model.device)
        if self._positions is not None:
            max_new_tokens = min(max_new_tokens, self._positions - self._virtual - ids.shape[1])
            if max_new_tokens < 1:
                virtual = f" and {self._virtual} virtual tokens" if self._virtual else ""
                raise ModelError(
                    f"{ids.shape[1]} tokens of the prompt{virtual} leave none of the model's {self._positions} "
                    "positions for an answer",
                    remedy="give a shorter prompt, or begin a new conversation",
                )
        streamer = None
        if stream is not None:
            streamer = TextStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
            streamer.on_finalized_text = lambda text, stream_end=False: stream(text)
        with torch.inference_mode():
            out = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                streamer=streamer,
                pad_token_id=self._tokenizer.pad_token_id or self._tokenizer.eos_token_id,
            )
        text: str = self._tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        return text


def merge(adapter: Path, output: Path, *, base: str | None = None) -> None:
    """Writes the base with a LoRA adapter merged in, as a model folder with tokenizer.

    Raises:
        ModelError: for soft prompts, which are no change of weights.
        OutputError: when the folder holds something.
    """
    kind = read_config(adapter)["peft_type"]
    if kind in SOFT:
        raise ModelError(
            f"{kind.lower().replace('_', ' ')} cannot be merged: it changes no weights",
            where=str(adapter),
            remedy="serve it beside the base: peft.PeftModel.from_pretrained(base, adapter), or peft-study chat",
        )
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise OutputError("is not an empty folder", where=str(output), remedy="give another -o")
    model, tokenizer, _ = _load(adapter, base, dtype=None, device=torch.device("cpu"))
    merged = model.merge_and_unload()
    with atomic_folder(output) as place:
        merged.save_pretrained(place)
        tokenizer.save_pretrained(place)


def read_prompts(path: Path) -> list[list[dict[str, str]]]:
    """Returns the conversations to be answered: lines of a .txt, or rows with messages, prompt, instruction, question.

    Trailing assistant turns are what is to be generated, and are left out.

    Raises:
        DataError: when there are none.
    """
    if path.suffix == ".txt":
        if not path.exists():
            raise DataError("no such file", where=str(path), remedy="give a file of prompts")
        found = [
            [{"role": "user", "content": line}]
            for line in path.read_text(encoding="utf-8").splitlines()
            if line.strip()
        ]
    else:
        found = [_prompt(row) for source in open_sources([str(path)]) for row in source.rows(lambda _share: None)]
    if not found:
        raise DataError("holds no prompts", where=str(path), remedy="write a prompt a line")
    return found


def _prompt(row: RawRow) -> list[dict[str, str]]:
    if row.broken is not None:
        raise row.broken
    values = row.values
    if isinstance(values.get("messages"), list):
        turns = [{"role": str(m["role"]), "content": str(m["content"])} for m in values["messages"]]
        while turns and turns[-1]["role"] == "assistant":
            turns.pop()
        if turns:
            return turns
    for column in ("prompt", "instruction", "question"):
        if isinstance(values.get(column), str) and values[column].strip():
            extra = values.get("input")
            text = values[column] if not extra else f"{values[column]}\n\n{extra}"
            return [{"role": "user", "content": text}]
    raise DataError(
        f"has no prompt among its columns {', '.join(values)}",
        where=row.where,
        remedy="name a column messages, prompt, instruction or question",
    )


def write_answers(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Writes answers as JSON lines, whole or not at all."""
    with atomic_writer(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
