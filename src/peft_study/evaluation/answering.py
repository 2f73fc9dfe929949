"""The answers of systems to a task's questions, a row each, as they are ready: generated, chosen, or a loss alone."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from peft_study.data.conversation import Example, Message
from peft_study.engine.engine import DEFAULT_ROW_TOKENS
from peft_study.engine.heldout import example_losses
from peft_study.engine.row import RowRunner, retried
from peft_study.evaluation.answer_files import Row
from peft_study.evaluation.decoding import Continuation, Decoder, DecodingRequest
from peft_study.evaluation.generation import Answerer, exported
from peft_study.evaluation.questions import Question
from peft_study.evaluation.systems import System
from peft_study.evaluation.task_file import CHOICE, LOSS
from peft_study.evaluation.tasks import EvaluationTask
from peft_study.model.load import Base

CHUNK = 8
"""Questions whose losses are measured before they are written down."""


@dataclass(frozen=True, slots=True)
class Query:
    """A question that a system is to answer; `messages` are the turns before the answer."""

    system: System
    question: Question
    messages: Sequence[Message]


def answers(runner: RowRunner, task: EvaluationTask, due: Sequence[Query]) -> Iterator[Row]:
    """Yields a row an answer, not judged yet.

    Args:
        runner: of the base that all systems are on.
        task: whose questions they are.
        due: those of one system stand together.

    Raises:
        DoesNotFit: where a question does not fit into the memory.
    """
    for asked, found in (_generated if task.config.generates else _measured)(runner, task, due):
        row = {"task": task.name, "system": asked.system.name, "id": asked.question.id}
        if asked.question.turns:
            row["prompt"] = asked.question.turns[-1][1]
        yield {**row, **found}


def judged(task: EvaluationTask, question: Question, row: Row) -> Row:
    """Returns whether a row is right: ``score``, and of a choice ``normalised``; None where that cannot be said."""
    if not task.config.has_answers:
        return {}
    if task.config.generates:
        score = None if row["output"] is None else task.judge(row["output"], question)
        return {"score": score, "gold": question.gold}
    if question.gold_choice is None or row["losses"] is None:
        return {"score": None, "normalised": None, "gold": question.gold}
    losses = np.array(row["losses"])
    lengths = np.array([max(1, len(choice)) for choice in question.choices])
    return {
        "score": bool(losses.argmin() == question.gold_choice),
        "normalised": bool((losses / lengths).argmin() == question.gold_choice),
        "gold": question.gold,
    }


def end_tokens(base: Base) -> frozenset[int]:
    """Returns the tokens that end an answer, as `generate` of transformers takes them."""
    ends = getattr(base.model.generation_config, "eos_token_id", None)
    ends = ends if ends is not None else base.tokenizer.eos_token_id
    return frozenset([ends] if isinstance(ends, int) else ends or ())


def room_after(base: Base, system: System, tokens: int) -> int:
    """Returns for how many tokens the model has positions behind so many of a system's."""
    if base.positions is None:
        return sys.maxsize
    return base.positions - system.adapter.prefix_tokens - system.adapter.row_tokens - tokens


def decoder(runner: RowRunner, ends: frozenset[int]) -> Decoder:
    """Returns what continues prompts on a base, with rows of the usual size for its device."""
    return Decoder(runner, ends=ends, row_tokens=DEFAULT_ROW_TOKENS[runner.base.device.type])


def _generated(runner: RowRunner, task: EvaluationTask, due: Sequence[Query]) -> Iterator[tuple[Query, Row]]:
    """Yields the answers that are generated; what has no room for an answer has none, and is not judged."""
    base = runner.base
    requests: list[DecodingRequest] = []
    pending: list[Query] = []
    for asked in due:
        adapter, prompt = asked.system.adapter, asked.system.encoder.prompt_tokens(asked.messages)
        room = min(task.config.max_new_tokens, room_after(base, asked.system, len(prompt)))
        if room < 1:
            yield asked, {"output": None, "ended": False, "tokens": 0, "seconds": 0.0}
            continue
        pending.append(asked)
        requests.append(DecodingRequest(adapter, prompt, room))
    if base.proof.decodes:
        found = decoder(runner, end_tokens(base)).answers(requests)
    else:
        found = _one_by_one(base, pending, requests)
    for place, answer in found:
        output = base.tokenizer.decode(answer.tokens, skip_special_tokens=True)
        length = {"ended": answer.ended, "tokens": len(answer.tokens), "seconds": round(answer.seconds, 4)}
        yield pending[place], {"output": output, **length}


def _one_by_one(
    base: Base, pending: Sequence[Query], requests: Sequence[DecodingRequest]
) -> Iterator[tuple[int, Continuation]]:
    """Yields the answers of a model whose rows hold one sequence: PEFT puts the adapter on, transformers generates."""
    ends = end_tokens(base)
    for _, group in groupby(enumerate(pending), key=lambda entry: id(entry[1].system)):
        places = list(group)
        system = places[0][1].system
        with exported(base, system.folder if system.adapter.parameters() else None) as model:
            answerer = Answerer(model, base.tokenizer, system.encoder)
            for place, _ in places:
                began = time.perf_counter()
                tokens = answerer.next_tokens(requests[place].prompt, requests[place].most)
                ended = bool(tokens) and tokens[-1] in ends
                seconds = time.perf_counter() - began
                yield place, Continuation(tuple(tokens[:-1] if ended else tokens), ended, seconds)


def _measured(runner: RowRunner, task: EvaluationTask, due: Sequence[Query]) -> Iterator[tuple[Query, Row]]:
    """Yields losses in nats, a few questions at once: of each choice, or of a conversation or text."""
    examples_of: Callable[[Query, int], list[Example]] = {CHOICE: _choices, LOSS: _conversation}.get(
        task.config.metric, _text
    )
    for _, group in groupby(due, key=lambda asked: id(asked.system)):
        own = list(group)
        for start in range(0, len(own), CHUNK):
            began = time.perf_counter()
            part = own[start : start + CHUNK]
            room = min(room_after(runner.base, own[0].system, 0), runner.base.context or sys.maxsize)
            examples = [examples_of(asked, room) for asked in part]
            sums = _losses(runner, own[0].system, [example for each in examples for example in each])
            seconds = round((time.perf_counter() - began) / len(part), 4)
            for asked, each in zip(part, examples, strict=True):
                found = [round(next(sums), 5) for _ in each]
                yield asked, {**_reading(asked, each, found), "seconds": seconds}


def _losses(runner: RowRunner, system: System, examples: Sequence[Example]) -> Iterator[float]:
    """Yields the loss of each example; nothing is supervised in an empty text, and nothing is lost."""
    row_tokens = DEFAULT_ROW_TOKENS[runner.base.device.type]
    full = [place for place, example in enumerate(examples) if example.supervised_L.any()]
    (sums,) = (
        retried(lambda tokens: example_losses(runner, [system.adapter], examples, full, tokens), row_tokens)
        if full
        else ((),)
    )
    found = dict(zip(full, map(float, sums), strict=True))
    return iter([found.get(place, 0.0) for place in range(len(examples))])


def _reading(asked: Query, examples: Sequence[Example], losses: list[float]) -> Row:
    if asked.question.choices:
        if not examples:
            return {"output": None, "losses": None}
        return {"output": asked.question.choices[int(np.argmin(losses))], "losses": losses}
    source = asked.question.conversation.source if asked.question.conversation else ""
    return {"loss": losses[0], "tokens": int(examples[0].supervised_L.sum()), "source": source}


def _choices(asked: Query, room: int) -> list[Example]:
    """Returns the prompt with each choice; nothing where one of them is longer than the model's positions."""
    found = [asked.system.encoder.answered(asked.messages, choice) for choice in asked.question.choices]
    return found if max(map(len, found)) <= room else []


def _conversation(asked: Query, room: int) -> list[Example]:
    assert asked.question.conversation is not None
    return [_cut(asked.system.encoder.encode_whole(asked.question.conversation), room)]


def _text(asked: Query, room: int) -> list[Example]:
    return [_cut(asked.system.encoder.plain(asked.question.turns[-1][1]), room)]


def _cut(example: Example, room: int) -> Example:
    return Example(example.tokens_L[:room], example.supervised_L[:room])
