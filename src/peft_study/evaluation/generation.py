"""Answers of trained adapters, through PEFT's own classes: what is exported is what is used here."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError

from peft_study.data.chat import ChatEncoder
from peft_study.data.conversation import Message
from peft_study.data.formats import turns_of
from peft_study.data.readers import RawRow
from peft_study.data.sources import open_sources
from peft_study.errors import DataError, ModelError, first_line
from peft_study.methods.peft_files import CONFIG, WEIGHTS, base_mismatch, encoding, read_config, read_note
from peft_study.model.digest import folder_digest
from peft_study.model.embedded import DESCRIPTION, EMBEDDED
from peft_study.model.in_memory import lent
from peft_study.model.load import Base, load_model, load_tokenizer, place_model, resolve_model
from peft_study.model.precision import Placement, choose
from peft_study.model.proof import learned_positions
from peft_study.storage.files import atomic_writer, made_folder, read_text
from peft_study.storage.run_dir import RunFolder

_KEPT = ("id", "source")
"""Columns of a prompt's row that its answer keeps."""


class BaseOrigin(NamedTuple):
    """Where an adapter's base and its tokenizer come from: what loads them as they were in training.

    `tokenizer` is the name of one of its own, None: the base's; without a `revision` or `quantization` they are None.
    """

    path: str
    tokenizer: str | None
    revision: str | None
    quantization: str | None


class AdapterBase(NamedTuple):
    """The base of an adapter, loaded as it was trained on: `model`, `tokenizer`, and the `path` it came from.

    `quantization` is nf4 or int8 where the weights are codes, else None.
    """

    model: Any
    tokenizer: Any
    path: str
    quantization: str | None


def is_whole_model(folder: Path) -> bool:
    """Returns whether the folder is a model itself, as a run that trained all weights leaves it."""
    return not (folder / CONFIG).exists() and (folder / "config.json").exists()


def find_adapter(path: Path) -> Path:
    """Returns the folder of an adapter or of a model trained as a whole: `path`, or that of the run in `path`.

    Any other folder is returned as it is: the caller's reading names the missing file.

    Raises:
        ModelError: when a run in `path` left none, or it is a study.
    """
    run = RunFolder(path)
    for folder in (path, run.adapter):
        if (folder / CONFIG).exists() or is_whole_model(folder):
            return folder
    if (path / "trials").is_dir():
        raise ModelError(
            "is a study, with an adapter for each trial", where=str(path), remedy="give one: STUDY/trials/NAME"
        )
    state = (run.status() or ("", None))[0]
    if state == "finished":
        raise ModelError("holds no adapter: this run kept none", where=str(path), remedy="give another run")
    if state or run.checkpoints.is_dir():
        raise ModelError(
            f"holds no adapter: the run has not finished ({state or 'no status'})",
            where=str(path),
            remedy="an interrupted run resumes with the same command",
        )
    return path


def load_whole_model(folder: Path, placement: Placement) -> Any:
    """Returns a trained model in the precision of its files: rounded to another, it would lose part of what it learned.

    Raises:
        ModelError: when it cannot be loaded.
    """
    return load_model(str(folder), str(folder), dtype="auto").to(placement.device)


def find_base(adapter: Path, base: str | None = None) -> str:
    """Returns the folder or hub id of an adapter's base: `base`, else the folder it was trained on, else by its name.

    The folder may be missing: it may lie in a cache that was deleted, or on another machine.

    Raises:
        ModelError: when it is not found.
    """
    if base is not None:
        return resolve_model(base)
    note = read_note(adapter)
    path = str(read_config(adapter).get("base_model_name_or_path") or "")
    name = path
    if not Path(path).is_dir():
        # older notes have no name, but the origin of the embedded model
        name = note.get("base_name") or (EMBEDDED if note.get("base_origin") == DESCRIPTION else path)
    try:
        if not name:
            raise ModelError(f"{CONFIG} names no base", where=str(adapter))
        return resolve_model(name)
    except ModelError as error:
        remedy = f"name it with --base ({error.remedy})" if error.remedy else "name it with --base"
        place = path if name == path else f"{name}, which was {path}"
        raise ModelError(f"its base {place} is not found: {error.what}", where=str(adapter), remedy=remedy) from error


def base_origin(adapter: Path, base: str | None = None) -> BaseOrigin:
    """Returns where an adapter's base comes from; arguments and errors as of `find_base`."""
    path, note = find_base(adapter, base), read_note(adapter)
    revision = note.get("base_revision") if base is None else None
    return BaseOrigin(path, note.get("base_tokenizer"), revision, note.get("base_quantization"))


def load_adapter_base(adapter: Path, base: str | None, placement: Placement) -> AdapterBase:
    """Loads an adapter's base, quantised as it was in training, and the tokenizer it was trained with.

    Warns where the base's weights differ from those of the training.

    Args:
        adapter: folder of the adapter.
        base: model to take instead of the one that it names.
        placement: device and precision.

    Raises:
        ModelError: when it holds no adapter, or its base cannot be loaded.
    """
    read_config(adapter)
    if not (adapter / WEIGHTS).is_file():
        raise ModelError(f"holds no {WEIGHTS}", where=str(adapter), remedy="only safetensors are loaded; save it again")
    path, own, revision, quantization = base_origin(adapter, base)
    if Path(path).is_dir():
        mismatch = base_mismatch(adapter, folder_digest(Path(path)))
        if mismatch:
            warnings.warn(mismatch, stacklevel=2)
    tokenizer = load_tokenizer(own) if own else load_tokenizer(path, revision=revision)
    model = place_model(path, path, placement, quantization=quantization, revision=revision)
    return AdapterBase(model, tokenizer, path, quantization)


def put_on(adapter: Path, base: AdapterBase) -> Any:
    """Returns PEFT's model of an adapter on its base, which is changed.

    Raises:
        ModelError: when it does not fit.
    """
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(base.model, adapter)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        what = f"the adapter cannot be put on {base.path} ({first_line(error)})"
        remedy = "name the base it was trained on with --base, or export it again"
        raise ModelError(what, where=str(adapter), remedy=remedy) from error


@contextmanager
def exported(base: Base, adapter: Path | None) -> Iterator[Any]:
    """Yields the model of a base as PEFT and transformers run it, with an adapter on it; it is then as it was.

    It has its own attention and is in evaluation mode.

    Args:
        base: that is loaded.
        adapter: folder of the adapter; None: the base alone.

    Raises:
        ModelError: when the adapter does not fit.
    """
    with lent(base.model):
        base.model.set_attn_implementation(base.attention)
        model = base.model
        if adapter is not None:
            model = put_on(adapter, AdapterBase(model, base.tokenizer, base.path, base.quantization))
        model.eval()
        for module in model.modules():  # 4-bit layers stay as they are: bitsandbytes repacks them on CPU in eval mode
            if any(not parameter.is_floating_point() for parameter in module.parameters(recurse=False)):
                module.training = True
        yield model


class Answerer:
    """An adapted model that answers conversations, greedily."""

    def __init__(self, model: Any, tokenizer: Any, encoder: ChatEncoder) -> None:
        self._model, self._tokenizer, self._encoder = model, tokenizer, encoder
        config = getattr(model, "active_peft_config", None)  # none where all weights were trained
        self._virtual: int = getattr(config, "num_virtual_tokens", None) or 0
        self._positions = learned_positions(model if config is None else model.get_base_model())

    @classmethod
    def load(cls, adapter: Path, *, base: str | None = None, device: str = "auto") -> Answerer:
        """Loads an adapter folder on its base, or a model folder: of a run that trained all weights, or merged.

        Raises:
            ModelError: when it holds no adapter, or its base cannot be loaded.
            ConfigError: when there is no such device.
        """
        placement = choose(device)
        if base is None and is_whole_model(adapter):
            model, tokenizer = load_whole_model(adapter, placement), load_tokenizer(str(adapter))
        else:
            loaded = load_adapter_base(adapter, base, placement)
            model, tokenizer = put_on(adapter, loaded), loaded.tokenizer
        return cls(model.eval(), tokenizer, ChatEncoder(tokenizer, **encoding(adapter)))

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
        streamer = None
        if stream is not None:
            streamer = TextStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
            streamer.on_finalized_text = lambda text, stream_end=False: stream(text)
        return self.continue_tokens(self._encoder.prompt_tokens(turns), max_new_tokens, streamer)

    def continue_tokens(self, prompt: Sequence[int], max_new_tokens: int, streamer: Any = None) -> str:
        """Returns the answer to a prompt of tokens.

        Args:
            prompt: as `ChatEncoder.prompt_tokens` returns it.
            max_new_tokens: as of `answer`.
            streamer: of transformers; receives the tokens one by one.

        Raises:
            ModelError: when the prompt leaves no position for an answer.
        """
        tokens = self.next_tokens(prompt, max_new_tokens, streamer)
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def next_tokens(self, prompt: Sequence[int], max_new_tokens: int, streamer: Any = None) -> list[int]:
        """Returns the tokens of an answer, with the one that ended it; arguments and errors as of `continue_tokens`."""
        ids = torch.tensor([list(prompt)], device=self._model.device)
        if self._positions is not None:
            max_new_tokens = min(max_new_tokens, self._positions - self._virtual - ids.shape[1])
            if max_new_tokens < 1:
                virtual = f" and {self._virtual} virtual tokens" if self._virtual else ""
                what = f"{ids.shape[1]} tokens of the prompt{virtual} leave none of the model's {self._positions} "
                remedy = "give a shorter prompt, or begin a new conversation"
                raise ModelError(f"{what}positions for an answer", remedy=remedy)
        with torch.inference_mode():
            out = self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                repetition_penalty=1.0,  # a model's own settings may have others: then the likeliest token is not taken
                no_repeat_ngram_size=0,
                streamer=streamer,
                pad_token_id=self._tokenizer.pad_token_id or self._tokenizer.eos_token_id,
            )
        tokens: list[int] = out[0, ids.shape[1] :].tolist()
        return tokens


@dataclass(frozen=True, slots=True)
class Prompts:
    """Conversations to answer.

    Attributes:
        rows: each with the turns so far as ``prompt``, and ``id`` and ``source`` where its row has them.
        files: that they were read from.
    """

    rows: tuple[dict[str, Any], ...]
    files: tuple[Path, ...]


def read_prompts(path: Path) -> Prompts:
    """Reads the conversations to be answered: lines of a .txt, or rows with turns, prompt, instruction, question.

    Trailing assistant turns are left out: they are generated.

    Raises:
        DataError: when there are none, or a row cannot be read.
        ConfigError: when a .txt cannot be read.
    """
    if path.suffix == ".txt":
        if not path.exists():
            raise DataError("no such file", where=str(path), remedy="give a file of prompts")
        files, lines = [path], read_text(path).splitlines()
        rows = [{"prompt": [{"role": "user", "content": line}]} for line in lines if line.strip()]
    else:
        sources = open_sources([str(path)])
        files = [file for source in sources for file in source.files]
        rows = [_prompt(row) for source in sources for row in source.rows(lambda _share: None)]
    if not rows:
        raise DataError("holds no prompts", where=str(path), remedy="write a prompt a line")
    return Prompts(tuple(rows), tuple(files))


def _prompt(row: RawRow) -> dict[str, Any]:
    if row.broken is not None:
        raise row.broken
    values = row.values
    return {**{name: values[name] for name in _KEPT if values.get(name) is not None}, "prompt": _turns(row)}


def _turns(row: RawRow) -> list[dict[str, Any]]:
    values = row.values
    for column in ("messages", "conversations"):
        if isinstance(values.get(column), list):
            turns = [message.to_dict() for message in turns_of(values[column], column, row.where)]
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
    """Writes answers as JSON lines, whole or not at all, and makes their folder.

    Raises:
        OutputError: when they cannot be written.
    """
    with made_folder(path.parent), atomic_writer(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
