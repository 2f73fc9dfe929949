"""Tasks on adapters and their base, side by side; an output a row of every system, kept as it is made.

FOLDER/evaluation.json    tasks, systems and limit: the same command goes on where it was killed
FOLDER/TASK.jsonl         a line an answer, in the order in which they were made
FOLDER/TASK.parquet       the same rows in the order of the task, once all are there
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from peft_study.data.chat import ChatEncoder
from peft_study.data.conversation import Message
from peft_study.engine.engine import DEFAULT_ROW_TOKENS
from peft_study.engine.heldout import example_losses
from peft_study.engine.row import RowRunner
from peft_study.errors import ConfigError, ModelError, OutputError
from peft_study.evaluation.decoding import Decoder, DecodingRequest
from peft_study.evaluation.generation import base_origin, find_base
from peft_study.evaluation.tasks import CHOICE, EvaluationTask, Question
from peft_study.methods.base import Adapter
from peft_study.methods.peft_files import encoding
from peft_study.methods.peft_format import load_adapter
from peft_study.methods.reference import NoAdapter
from peft_study.model.load import Base, load_base, load_tokenizer
from peft_study.model.precision import Placement
from peft_study.statistics import Estimate, accuracy, mcnemar
from peft_study.storage.files import AtomicFiles, atomic_writer, made_folder

BASE = "base"
"""Name of the untouched base among the systems."""
CHUNK = 8
"""Questions whose choices are scored before they are written down."""
PLAN = "evaluation.json"

Row = dict[str, Any]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class System:
    """What is evaluated: the base, or an adapter on it, with the encoder of its training."""

    name: str
    adapter: Adapter
    encoder: ChatEncoder


@dataclass(frozen=True, slots=True)
class Score:
    """What a system reached on a task.

    Attributes:
        task, system: whose.
        right, judged: answers.
        unjudged: rows without a right answer: counted apart, never as wrong.
        accuracy: with its 95 % interval; None where nothing was judged.
        normalised: of a choice task, with the losses divided by the characters of the texts; else None.
        minus_base: difference of the accuracies, on the rows that both have; None for the base.
        p_value: of "as accurate as the base" (McNemar); None for the base.
    """

    task: str
    system: str
    right: int
    judged: int
    unjudged: int
    accuracy: Estimate | None
    normalised: Estimate | None
    minus_base: float | None
    p_value: float | None


def load_systems(adapters: Sequence[Path], base: str | None, placement: Placement) -> tuple[Base, list[System]]:
    """Loads the base of some adapters, once, and the adapters; the base itself comes first.

    Args:
        adapters: folders in PEFT's format, of one base.
        base: model to take instead of the one that they name.
        placement: device and precision.

    Raises:
        ModelError: when an adapter is of another base, or cannot be loaded, or the base cannot pack rows.
    """
    origin = base_origin(adapters[0], base)
    for adapter in adapters[1:]:
        if (path := find_base(adapter, base)) != origin.path:
            what = f"its base is {path}, that of {adapters[0]} is {origin.path}"
            raise ModelError(what, where=str(adapter), remedy="evaluate adapters of one base at a time, or name it")
    found = load_base(
        origin.path,
        tokenizer=load_tokenizer(origin.tokenizer) if origin.tokenizer else None,
        revision=origin.revision,
        placement=placement,
        quantization=origin.quantization,
    )
    if not (found.proof.segmented and found.proof.packs):
        remedy = "use `peft-study generate`, which answers a prompt at a time"
        raise ModelError("this model cannot have several sequences in a row", where=origin.path, remedy=remedy)
    encoders = [ChatEncoder(found.tokenizer, **encoding(adapter)) for adapter in adapters]
    systems = [System(BASE, NoAdapter(), encoders[0])]
    for name, adapter, encoder in zip(short_names(adapters), adapters, encoders, strict=True):
        systems.append(System(name, load_adapter(adapter, found), encoder))
    return found, systems


def short_names(adapters: Sequence[Path]) -> list[str]:
    """Returns the last parts of the adapters' paths, as many as tell them apart; the last one is never ``adapter``."""
    paths = [adapter.resolve() for adapter in adapters]
    parts = [path.parent.parts if path.name == "adapter" else path.parts for path in paths]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len({*names, BASE}) > len(names):
            return names
    return [str(path) for path in paths]


class Evaluation:
    """The answers of systems to tasks, in a folder.

    Args:
        folder: of the outputs; made where it is not there.
        tasks: with different names.
        limit: questions of each task; None: all.

    Raises:
        ConfigError: when two tasks have one name.
        OutputError: when the folder holds an evaluation of other tasks.
    """

    def __init__(self, folder: Path, tasks: Sequence[EvaluationTask], limit: int | None) -> None:
        for name, count in Counter(task.name for task in tasks).items():
            if count > 1:
                remedy = "give one file, or a task file with another name"
                raise ConfigError(f"task {name} is given twice", remedy=remedy)
        self.folder, self.tasks = folder, tasks
        self.questions = {task.name: task.questions(limit) for task in tasks}
        self._plan = {
            "tasks": {task.name: task.config.model_dump(mode="json") for task in tasks},
            "questions": {name: _digest(questions) for name, questions in self.questions.items()},
        }
        kept = folder / PLAN
        if kept.exists() and json.loads(kept.read_text()) != json.loads(json.dumps(self._plan)):
            remedy = "give another folder, or the same tasks, files and limit"
            raise OutputError("holds an evaluation of other tasks", where=str(folder), remedy=remedy)

    def run(self, base: Base, systems: Sequence[System], say: Say) -> None:
        """Has the systems answer what they have not answered yet.

        Raises:
            OutputError: when the answers cannot be written.
        """
        runner = RowRunner(base)
        with made_folder(self.folder), atomic_writer(self.folder / PLAN) as file:
            file.write(json.dumps(self._plan, indent=1) + "\n")
        for task in self.tasks:
            known = {(row["system"], row["id"]) for row in self.rows(task)}
            questions = self.questions[task.name]
            due = [(s, q) for s in systems for q in questions if (s.name, q.id) not in known]
            if due:
                say(f"{task.name}: {len(due)} answers of {len(systems)} systems to {len(questions)} questions")
            answers = (_choose if task.config.metric == CHOICE else _generate)(runner, task, due)
            _append(self.folder / f"{task.name}.jsonl", answers)
            self._table(task)

    def rows(self, task: EvaluationTask) -> list[Row]:
        """Returns the rows of a task that are there, in the task's order; a line that was cut off is left out."""
        path = self.folder / f"{task.name}.jsonl"
        found = [row for line in (path.read_text().splitlines() if path.exists() else ()) if (row := _whole(line))]
        order = {question.id: place for place, question in enumerate(self.questions[task.name])}
        return sorted((row for row in found if row["id"] in order), key=lambda row: order[row["id"]])

    def rescore(self) -> None:
        """Judges the outputs that are there again, without a model, and writes them."""
        for task in self.tasks:
            gold = {question.id: question for question in self.questions[task.name]}
            rows = [{**row, **_judged(task, gold[row["id"]], row)} for row in self.rows(task)]
            with atomic_writer(self.folder / f"{task.name}.jsonl") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            self._table(task)

    def scores(self) -> list[Score]:
        """Returns what each system reached on each task, the base first."""
        found = []
        for task in self.tasks:
            by_system: dict[str, dict[str, Row]] = {}
            for row in self.rows(task):
                by_system.setdefault(row["system"], {})[row["id"]] = row
            for system in sorted(by_system, key=lambda name: name != BASE):
                found.append(_score(task, system, by_system[system], by_system.get(BASE, {})))
        return found

    def _table(self, task: EvaluationTask) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        with AtomicFiles() as files:
            pq.write_table(pa.Table.from_pylist(self.rows(task)), files.open(self.folder / f"{task.name}.parquet"))


def _append(path: Path, rows: Iterable[Row]) -> None:
    """Writes rows behind those of a file, each as soon as it is there; a line that was cut off gives way.

    Raises:
        OutputError: when they cannot be written.
    """
    try:
        with path.open("ab") as file:
            file.truncate(path.read_bytes().rfind(b"\n") + 1)
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                file.flush()
    except OSError as error:
        remedy = "make room, or let this place be written; the same command goes on from the answers that are there"
        raise OutputError(f"writing failed: {error.strerror or error}", where=str(path), remedy=remedy) from error


def _whole(line: str) -> Row | None:
    try:
        row: Row = json.loads(line)
    except ValueError:
        return None
    return row


def _digest(questions: Iterable[Question]) -> str:
    """Returns what changes with the questions of a task."""
    return hashlib.sha256(repr([tuple(map(repr, (q.id, q.turns, q.choices))) for q in questions]).encode()).hexdigest()


def _messages(question: Question) -> list[Message]:
    return [Message(role, text) for role, text in question.turns]  # type: ignore[arg-type]


def _generate(runner: RowRunner, task: EvaluationTask, due: Sequence[tuple[System, Question]]) -> Iterator[Row]:
    """Yields the answers that are generated, as they are ready."""
    base = runner.base
    decoder = Decoder(runner, ends=end_tokens(base), row_tokens=DEFAULT_ROW_TOKENS[base.device.type])
    requests = []
    for system, question in due:
        prompt = system.encoder.prompt_tokens(_messages(question))
        room = task.config.max_new_tokens
        if base.positions is not None:
            room = min(room, base.positions - system.adapter.prefix_tokens - system.adapter.row_tokens - len(prompt))
        requests.append(DecodingRequest(system.adapter, prompt, max(1, room)))
    for place, answer in decoder.answers(requests):
        system, question = due[place]
        row = {
            "task": task.name,
            "system": system.name,
            "id": question.id,
            "prompt": question.turns[-1][1],
            "output": base.tokenizer.decode(answer.tokens, skip_special_tokens=True),
            "gold": question.gold,
            "ended": answer.ended,
            "tokens": len(answer.tokens),
            "seconds": round(answer.seconds, 4),
        }
        yield {**row, **_judged(task, question, row)}


def _choose(runner: RowRunner, task: EvaluationTask, due: Sequence[tuple[System, Question]]) -> Iterator[Row]:
    """Yields the losses of the choices and the likeliest, a few questions of all systems at a time."""
    row_tokens = DEFAULT_ROW_TOKENS[runner.base.device.type]
    for start in range(0, len(due), CHUNK):
        began = time.perf_counter()
        part = due[start : start + CHUNK]
        losses = _choice_losses(runner, part, row_tokens)
        seconds = (time.perf_counter() - began) / len(part)
        for (system, question), found in zip(part, losses, strict=True):
            row = {
                "task": task.name,
                "system": system.name,
                "id": question.id,
                "prompt": question.turns[-1][1],
                "output": question.choices[int(np.argmin(found))],
                "gold": question.gold,
                "losses": [round(float(loss), 5) for loss in found],
                "seconds": round(seconds, 4),
            }
            yield {**row, **_judged(task, question, row)}


def _choice_losses(
    runner: RowRunner, part: Sequence[tuple[System, Question]], row_tokens: int
) -> list[Sequence[float]]:
    """Returns the summed loss of each choice of each question, in nats, in the order given."""
    found: list[Sequence[float]] = []
    for system in {id(system): system for system, _ in part}.values():
        own = [question for other, question in part if other is system]
        examples = [system.encoder.answered(_messages(q), choice) for q in own for choice in q.choices]
        (sums,) = example_losses(runner, [system.adapter], examples, range(len(examples)), row_tokens)
        start = 0
        for question in own:
            found.append(sums[start : start + len(question.choices)].tolist())
            start += len(question.choices)
    return found  # systems stand together in what is due


def _judged(task: EvaluationTask, question: Question, row: Row) -> Row:
    """Returns whether a row is right: ``score``, and of a choice ``normalised``; None where the row has no answer."""
    if task.config.metric != CHOICE:
        return {"score": task.metric(row["output"], question.gold, task.config.pattern)}
    if question.gold_choice is None:
        return {"score": None, "normalised": None}
    losses = np.array(row["losses"])
    lengths = np.array([max(1, len(choice)) for choice in question.choices])
    return {
        "score": bool(losses.argmin() == question.gold_choice),
        "normalised": bool((losses / lengths).argmin() == question.gold_choice),
    }


def end_tokens(base: Base) -> frozenset[int]:
    """Returns the tokens that end an answer, as `generate` of transformers takes them."""
    ends = getattr(base.model.generation_config, "eos_token_id", None)
    ends = ends if ends is not None else base.tokenizer.eos_token_id
    return frozenset([ends] if isinstance(ends, int) else ends or ())


def _score(task: EvaluationTask, system: str, rows: dict[str, Row], base_rows: dict[str, Row]) -> Score:
    judged = [row for row in rows.values() if row["score"] is not None]
    right = sum(row["score"] for row in judged)
    normalised = [row["normalised"] for row in judged if row.get("normalised") is not None]
    both = [row["id"] for row in judged if base_rows.get(row["id"], {}).get("score") is not None]
    minus_base = p_value = None
    if system != BASE and both:
        own, other = (np.array([of[name]["score"] for name in both], dtype=bool) for of in (rows, base_rows))
        minus_base, p_value = float(own.mean() - other.mean()), mcnemar(own, other)
    return Score(
        task=task.name,
        system=system,
        right=right,
        judged=len(judged),
        unjudged=len(rows) - len(judged),
        accuracy=accuracy(right, len(judged)) if judged else None,
        normalised=accuracy(sum(normalised), len(normalised)) if normalised else None,
        minus_base=minus_base,
        p_value=p_value,
    )
