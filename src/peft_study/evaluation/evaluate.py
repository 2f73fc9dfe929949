"""Tasks on systems, side by side; a row of every answer, kept as it is made.

FOLDER/evaluation.json    what was asked of whom: the same command goes on where it was killed
FOLDER/TASK.jsonl         a line an answer, in the order in which they were made
FOLDER/TASK.parquet       the same rows in the order of the task, with their scores
FOLDER/scores.json        scores, and what an answer costs each system
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from peft_study.config import EvaluationConfig, StudyConfig
from peft_study.data.chat import ChatEncoder
from peft_study.engine.row import RowRunner
from peft_study.errors import ConfigError, DataError, ModelError, OutputError
from peft_study.evaluation.answer_costs import TOKENS, measure_cost
from peft_study.evaluation.answer_files import Row, append_answers, keep_complete, read_answers
from peft_study.evaluation.answering import Query, answers, judged, room_after
from peft_study.evaluation.harness import HarnessTask, refuse_overlap
from peft_study.evaluation.questions import Question
from peft_study.evaluation.scores import (
    BASE,
    AnswerCost,
    EvaluationResult,
    Score,
    read_scores,
    scores_of,
    table_of,
    write_scores,
)
from peft_study.evaluation.systems import System, load_systems
from peft_study.evaluation.tasks import LM_EVAL, EvaluationTask, find_tasks
from peft_study.methods.reference import NoAdapter
from peft_study.model.digest import folder_digest
from peft_study.model.in_memory import ModelInMemory, lent
from peft_study.model.load import Base
from peft_study.model.precision import choose
from peft_study.storage.files import AtomicFiles, atomic_writer, made_folder, refuse_unwritable
from peft_study.storage.run_dir import RunFolder

PLAN = "evaluation.json"
_PLAN_WORDS = {
    "questions": "tasks or questions",
    "most_tokens": "lengths of answers (max_new_tokens)",
    "worked_examples": "worked examples",
    "system_prompt": "system prompts",
    "lm_eval": "tasks of lm-eval",
}
_HARNESS = "lm_eval-"
"""How the files of lm-eval's tasks begin."""

Say = Callable[..., None]
"""Shows the user a line, or with a share from 0 to 1 how much of the work in that line is done."""


def evaluate(
    folders: Mapping[str, Path],
    config: EvaluationConfig,
    output: Path,
    say: Say,
    *,
    base: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    in_memory: ModelInMemory | None = None,
) -> EvaluationResult:
    """Asks adapters and their base tasks, or goes on where an earlier call was stopped.

    Args:
        folders: adapters of one base in PEFT's format, or models trained as a whole, by the names of their systems.
        config: which tasks, and the baselines of the base.
        output: folder of every output.
        say: receives lines of progress.
        base: model to take instead of the one that the adapters name.
        device, dtype: of the base.
        in_memory: the base as an object, which is given back as it was.

    Raises:
        UserError: of many kinds, each one line.
    """
    refuse_unwritable(output, folder=True)
    evaluation = Evaluation(output, config)
    placement = choose(device, dtype)
    with (
        RunFolder(output).locked(),
        nullcontext() if in_memory is None else lent(in_memory.model),
    ):
        for loaded, systems in load_systems(folders, base, placement, evaluation.of_base, in_memory):
            evaluation.run(loaded, systems, say)
            del loaded, systems  # the next model takes its place
        return evaluation.result()


def check_tasks(study: StudyConfig) -> None:
    """Reads the tasks of a study before it trains, so that what is wrong with one is said at once.

    Raises:
        ConfigError, DataError: as `Evaluation`.
    """
    choosing = None if study.finals.task is None else EvaluationConfig(tasks=(study.finals.task,))
    if choosing is not None and choosing.tasks[0].startswith(LM_EVAL):
        what = "a task of lm-eval may have several scores, so it cannot choose a winner"
        raise ConfigError(what, where="finals.task", remedy="give a task of this program, or a task file")
    for config in filter(None, (study.evaluation, choosing)):
        for task in find_tasks(config):
            questions = _questions(task, config)
            task.worked_examples(config.shots)
            if config is choosing and task.config.has_answers and not any(q.answered for q in questions):
                what = f"no row of task {task.name} has a right answer, so it cannot choose a winner"
                raise ConfigError(what, where="finals.task", remedy="give rows with answers")
        refuse_overlap(_harness_tasks(config))


def _questions(task: EvaluationTask, config: EvaluationConfig) -> list[Question]:
    """Returns the questions of a task; raises DataError where answers are given, but none is among its choices."""
    found = task.questions(config.limit)
    if all(question.choices and question.gold and question.gold_choice is None for question in found):
        what = f"no row's answer is one of its choices: the first has {found[0].gold[:60]!r}"
        remedy = f"give the label, the text or the number of a choice: {', '.join(found[0].choices)[:200]}"
        raise DataError(what, where=str(task.data), remedy=remedy)
    return found


def _harness_tasks(config: EvaluationConfig) -> list[HarnessTask]:
    specs = [spec for spec in config.tasks if spec.startswith(LM_EVAL)]
    return [HarnessTask(spec, chat=config.lm_eval_chat, limit=config.limit) for spec in specs]


class Evaluation:
    """The answers of systems to tasks, in a folder.

    Args:
        folder: of the outputs; made where it is not there.
        config: which tasks, and the baselines of the base.

    Raises:
        ConfigError: when there is no such task, or its file is wrong.
        DataError: when rows cannot be read.
        OutputError: when the folder holds an evaluation of other tasks.
    """

    def __init__(self, folder: Path, config: EvaluationConfig) -> None:
        self.folder, self.config, self.tasks = folder, config, find_tasks(config)
        self._harness = _harness_tasks(config)
        self.questions = {task.name: _questions(task, config) for task in self.tasks}
        self._worked = {task.name: task.worked_examples(config.shots) for task in self.tasks}
        self._plan: dict[str, Any] = {
            "questions": {name: _digest(questions) for name, questions in self.questions.items()},
            "most_tokens": {task.name: task.config.max_new_tokens for task in self.tasks if task.config.generates},
            "worked_examples": {name: _digest(rows, answered=True) for name, rows in self._worked.items()},
            "system_prompt": config.system_prompt,
            "lm_eval": {task.name: task.plan for task in self._harness},
        }
        self._costs = _known_costs(folder)
        kept = self._kept()
        other = next((name for name in self._plan if kept and kept.get(name) != self._plan[name]), None)
        if other is not None:
            what = f"holds an evaluation of other {_PLAN_WORDS[other]}"
            raise OutputError(what, where=str(folder), remedy="give another folder, or ask the same")

    def of_base(self, encoder: ChatEncoder) -> list[System]:
        """Returns the base and, as far as they are asked for, its two baselines: is tuning needed at all?"""
        found, shots = [System(BASE, NoAdapter(), encoder)], self.config.shots
        if shots and any(self._worked.values()):
            found.append(System(f"{BASE}, {shots} examples", NoAdapter(), encoder, shots=shots))
        if self.config.system_prompt is not None:
            instruction = self.config.system_prompt
            found.append(System(f"{BASE}, system prompt", NoAdapter(), encoder, instruction=instruction))
        return found

    def run(self, base: Base, systems: Sequence[System], say: Say) -> None:
        """Has the systems of one base answer what they have not answered yet.

        Raises:
            OutputError: when the answers cannot be written.
        """
        runner = RowRunner(base)
        waiting = {harness.name: self._unasked(harness, systems) for harness in self._harness}
        if any(waiting.values()):  # before anything is answered: lm-eval may miss data that has to be loaded elsewhere
            if not base.proof.decodes:
                what = "tasks of lm-eval need a model that packs rows, and whose keys and values have one shape"
                raise ModelError(what, where=base.path)
            refuse_overlap(self._harness)
        self._keep(base, systems)
        for task in self.tasks:
            due = self._due(task, systems)
            line = f"{task.name}: {len(due)} answers of {len({asked.system.name for asked in due})} systems"
            append_answers(
                self.folder / f"{task.name}.jsonl", _with_progress(answers(runner, task, due), line, len(due), say)
            )
        for harness in self._harness:
            for system in waiting[harness.name]:
                say(f"lm-eval's {harness.name}: {system.name}")
                append_answers(self.folder / f"{_HARNESS}{harness.name}.jsonl", harness.rows(runner, system))
        self._measure_costs(runner, systems, say)

    def _unasked(self, harness: HarnessTask, systems: Sequence[System]) -> list[System]:
        known = keep_complete(self.folder / f"{_HARNESS}{harness.name}.jsonl")
        return [system for system in systems if harness.takes(system) and system.name not in known]

    def _measure_costs(self, runner: RowRunner, systems: Sequence[System], say: Say) -> None:
        """Measures what an answer to a prompt of middle length costs each system, unless that was done before."""
        task = next((task for task in self.tasks if task.config.generates), None)
        due = [system for system in systems if task and system.name not in self._costs and system.takes(task)]
        if task is None or not due or not runner.base.proof.decodes:
            return
        say(f"what an answer costs each of {len(due)} systems")
        questions = sorted(self.questions[task.name], key=lambda question: len(question.turns[-1][1]))
        middle = questions[len(questions) // 2]
        worked = self._worked[task.name]
        for system in due:
            prompt = system.encoder.prompt_tokens(system.messages(middle, worked))
            if room_after(runner.base, system, len(prompt)) > TOKENS:
                self._costs[system.name] = measure_cost(runner, system.adapter, prompt)

    def _kept(self) -> dict[str, Any]:
        path = self.folder / PLAN
        if not path.exists():
            return {}
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return {**found, "systems": dict(found.get("systems", {}))}
        except (ValueError, TypeError, AttributeError) as error:
            raise OutputError("is damaged", where=str(path), remedy="give another folder") from error

    def _keep(self, base: Base, systems: Sequence[System]) -> None:
        """Writes the plan, with weights and precision of each system: no answers of others are mixed in."""
        known: dict[str, list[str]] = self._kept().get("systems", {})
        precision = base.quantization or base.placement.dtype_name
        own = {s.name: [base.digest if s.folder is None else folder_digest(s.folder), precision] for s in systems}
        for name, (digest, _) in own.items():
            before = known.get(name, own[name])
            if before != own[name]:
                what = f"another {name}" if before[0] != digest else f"{name} in {before[1]}, not {precision}"
                raise OutputError(f"holds answers of {what}", where=str(self.folder), remedy="give another folder")
        with made_folder(self.folder), atomic_writer(self.folder / PLAN) as file:
            file.write(json.dumps({**self._plan, "systems": {**known, **own}}, indent=1) + "\n")

    def _due(self, task: EvaluationTask, systems: Sequence[System]) -> list[Query]:
        known = {(row["system"], row["id"]) for row in read_answers(self.folder / f"{task.name}.jsonl")}
        worked = self._worked[task.name]
        return [
            Query(system, question, system.messages(question, worked) if task.config.has_answers else ())
            for system in systems
            if system.takes(task)
            for question in self.questions[task.name]
            if (system.name, question.id) not in known
        ]

    def rows(self, task: EvaluationTask) -> list[Row]:
        """Returns the rows of a task that are there, in the task's order, each with its score."""
        questions = {question.id: question for question in self.questions[task.name]}
        order = {name: place for place, name in enumerate(questions)}
        known = [row for row in read_answers(self.folder / f"{task.name}.jsonl") if row["id"] in order]
        found = sorted(known, key=lambda row: order[row["id"]])
        return [{**row, **judged(task, questions[row["id"]], row)} for row in found]

    def result(self) -> EvaluationResult:
        """Judges all answers that are there, which needs no model, writes them as tables, and returns the scores."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        found = [(task.name, self.rows(task), task.config.has_answers) for task in self.tasks]
        for harness in self._harness:
            rows = read_answers(self.folder / f"{_HARNESS}{harness.name}.jsonl")
            for name in dict.fromkeys(row["task"] for row in rows):  # a group has several
                own = [row for row in rows if row["task"] == name]
                found.append((name, own, "loss" not in own[0]))
        if not any(rows for _, rows, _ in found):
            remedy = "leave --rescore out, so that the questions are asked"
            raise OutputError("holds no answers of these tasks", where=str(self.folder), remedy=remedy)
        scores: list[Score] = []
        for name, own, has_answers in ((name, own, has) for name, own, has in found if own):
            with AtomicFiles() as files:
                pq.write_table(pa.Table.from_pylist(own), files.open(self.folder / table_of(name)))
            scores += scores_of(name, own, has_answers=has_answers)
        kept = EvaluationResult(self.folder, tuple(scores), self._costs)
        write_scores(kept)
        return kept


def _with_progress(rows: Iterable[Row], line: str, total: int, say: Say) -> Iterator[Row]:
    """Yields rows, and says how many of all there are."""
    if total:
        say(line, 0.0)
    for done, row in enumerate(rows, start=1):
        yield row
        say(line, done / total)


def _known_costs(folder: Path) -> dict[str, AnswerCost]:
    """Returns the costs that were measured; a file that is damaged is written again."""
    try:
        found = read_scores(folder)
    except OutputError:
        return {}
    return {} if found is None else dict(found.costs)


def _digest(questions: Iterable[Question], *, answered: bool = False) -> str:
    """Returns what changes with questions, and with what they are `answered`: a task's own answers may be corrected."""
    parts: list[tuple[Any, ...]] = [
        (q.id, q.turns, q.choices, q.conversation, q.answered if answered else None) for q in questions
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()
