"""What is evaluated: the base, with worked examples or a system prompt too; adapters on it; models trained as a whole.

Systems of one model are answered together: first the base and its adapters, then each whole model, loaded in turn.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from peft_study.data.chat import ChatEncoder
from peft_study.data.conversation import Message
from peft_study.errors import ConfigError, ModelError
from peft_study.evaluation.generation import BaseOrigin, base_origin, is_whole_model
from peft_study.evaluation.questions import Question
from peft_study.evaluation.scores import BASE
from peft_study.evaluation.tasks import EvaluationTask
from peft_study.methods.base import Adapter
from peft_study.methods.peft_files import encoding, read_note
from peft_study.methods.peft_format import load_adapter
from peft_study.methods.reference import NoAdapter
from peft_study.model.in_memory import ModelInMemory, borrow
from peft_study.model.load import Base, load_base, load_tokenizer
from peft_study.model.precision import Placement, choose


@dataclass(frozen=True, slots=True)
class System:
    """What is evaluated.

    Attributes:
        name: as the tables call it.
        adapter: on its base; of the base itself and of a whole model none.
        encoder: of its training.
        folder: of the adapter or the whole model; None: of the base.
        shots: worked examples before each question.
        instruction: system turn before each question, instead of the task's own.
    """

    name: str
    adapter: Adapter
    encoder: ChatEncoder
    folder: Path | None = None
    shots: int = 0
    instruction: str | None = None

    def takes(self, task: EvaluationTask) -> bool:
        """Returns whether it takes part in a task: worked examples and instructions belong to questions."""
        if not task.config.has_answers:
            return not (self.shots or self.instruction)
        return not self.shots or task.examples is not None

    def messages(self, question: Question, worked: Sequence[Question]) -> list[Message]:
        """Returns the turns before the answer to a question.

        Args:
            question: of the task.
            worked: the task's worked examples, of which it has its own number.
        """
        system = [Message("system", text) for role, text in question.turns if role == "system"]
        if self.instruction is not None:
            system = [Message("system", self.instruction)]
        turns = []
        for example in worked[: self.shots]:
            turns += [Message("user", example.turns[-1][1]), Message("assistant", example.answered or "")]
        return [*system, *turns, Message("user", question.turns[-1][1])]


def load_systems(
    folders: Mapping[str, Path],
    base: str | None,
    placement: Placement,
    of_base: Callable[[ChatEncoder], list[System]],
    in_memory: ModelInMemory | None = None,
) -> Iterator[tuple[Base, list[System]]]:
    """Yields each model with its systems: first the base and its adapters, then each model trained as a whole.

    Args:
        folders: adapters of one base in PEFT's format, or whole models, by the names of their systems.
        base: model to take instead of the one that they name.
        placement: device and precision.
        of_base: returns the base and its baselines, with this encoder.
        in_memory: the base as an object of the caller's, who lends it; nothing is loaded in its place.

    Raises:
        ModelError: when an adapter is of another base, or one cannot be loaded.
    """
    whole = {name: folder for name, folder in folders.items() if is_whole_model(folder)}
    adapters = {name: folder for name, folder in folders.items() if name not in whole}
    if in_memory is not None:
        yield _with_base(borrow(in_memory), adapters, of_base)
    elif (origin := _origin(adapters, whole, base)) is not None:
        found = load_base(
            origin.path,
            tokenizer=load_tokenizer(origin.tokenizer) if origin.tokenizer else None,
            revision=origin.revision,
            placement=placement,
            quantization=origin.quantization,
        )
        yield _with_base(found, adapters, of_base)
        del found  # a whole model takes its place
    for name, folder in whole.items():
        model = load_base(str(folder), placement=choose(placement.device.type, _precision(folder)))
        yield model, [System(name, NoAdapter(), ChatEncoder(model.tokenizer, **encoding(folder)), folder)]


def _with_base(
    base: Base, adapters: Mapping[str, Path], of_base: Callable[[ChatEncoder], list[System]]
) -> tuple[Base, list[System]]:
    encoders = {name: ChatEncoder(base.tokenizer, **encoding(folder)) for name, folder in adapters.items()}
    systems = of_base(next(iter(encoders.values()), None) or ChatEncoder(base.tokenizer))
    systems += [System(name, load_adapter(folder, base), encoders[name], folder) for name, folder in adapters.items()]
    return base, systems


def _origin(adapters: Mapping[str, Path], whole: Mapping[str, Path], base: str | None) -> BaseOrigin | None:
    """Returns where the one base of all adapters comes from; None for whole models that name no base."""
    if not adapters:
        noted = next((name for folder in whole.values() if (name := read_note(folder).get("base_name"))), None)
        named = base or noted
        return None if named is None else BaseOrigin(named, None, None, None)
    first, *others = adapters.values()
    origin = base_origin(first, base)
    for adapter in others:
        if (own := base_origin(adapter, base)) != origin:
            names = "base", "tokenizer", "revision", "quantization"
            name, its, firsts = next((n, a, b) for n, a, b in zip(names, own, origin, strict=True) if a != b)
            what = f"its {name} is {its or 'the usual'}, that of {first} is {firsts or 'the usual'}"
            remedy = "evaluate adapters of one base, loaded in one way, at a time"
            raise ModelError(what, where=str(adapter), remedy=remedy)
    return origin


def _precision(folder: Path) -> str:
    """Returns the precision of a model's files: rounded to another, it would lose part of what it learned."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def short_names(folders: Sequence[Path]) -> list[str]:
    """Returns the last parts of the folders' paths, as many as tell them apart; the last one is never ``adapter``."""
    paths = [folder.resolve() for folder in folders]
    parts = [path.parent.parts if path.name == "adapter" else path.parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len({*names, BASE}) > len(names):
            return names
    raise ConfigError(f"{folders[0]} is given twice", remedy="give each adapter once")
