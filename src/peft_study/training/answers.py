"""Answers of the base and of finalists to test prompts, on the base that the session has loaded.

base --own attention, eval mode--> + adapter, as PEFT puts it on --> answers --> base as it was, the next adapter
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from peft_study.config import DataConfig, MethodConfig, NoneConfig
from peft_study.data import skills
from peft_study.data.conversation import Conversation, Message
from peft_study.data.parallel import row_digest
from peft_study.data.stream import read_conversations
from peft_study.errors import TemplateError, first_line
from peft_study.evaluation.generation import Answerer, exported
from peft_study.methods.reference import FullAdapter
from peft_study.methods.registry import create, is_exclusive
from peft_study.training.session import Session


def answer_rows(
    session: Session,
    data: DataConfig,
    systems: Sequence[tuple[str, MethodConfig, Path]],
    examples: Sequence[int],
    max_new_tokens: int,
) -> list[dict[str, Any]]:
    """Returns test rows with their prompt, their reference and the greedy answers to the prompt.

    Args:
        session: of the study; no trial is in its engine.
        data: where the rows' texts are read again.
        systems: name, setting and adapter folder of each; of the untouched base the folder is not looked at. One that
            cannot answer is left out, with a warning.
        examples: of the test part; one whose text is not found, or that the template refuses, is left out.
        max_new_tokens: tokens an answer may have.

    Returns:
        A row an example: ``example``, ``id``, ``source``, ``prompt`` ({role, content} turns), ``reference`` and
        ``answers`` by system.

    Raises:
        DataError: when the data can no longer be read.
    """
    rows: list[dict[str, Any]] = []
    prompts: list[list[int]] = []
    for example, conversation in _conversations(session, data, examples).items():
        turns, reference = _parted(conversation)
        try:
            prompts.append(session.encoder.prompt_tokens(turns, conversation.tools))
        except TemplateError as error:
            warnings.warn(f"test row {example} is not answered: {error}", stacklevel=2)
            continue
        prompt = [turn.to_dict() for turn in turns]
        named = {"example": example, "id": conversation.id, "source": conversation.source}
        rows.append({**named, "prompt": prompt, "reference": reference, "answers": {}})
    for name, method, folder in systems if rows else ():
        try:
            answers = _answers(session, method, folder, prompts, max_new_tokens)
        except Exception as error:  # noqa: BLE001  (of an architecture that cannot generate, of PEFT, out of memory)
            warnings.warn(f"{name} does not answer the test prompts: {first_line(error)}", stacklevel=2)
            continue
        for row, answer in zip(rows, answers, strict=True):
            row["answers"][name] = answer
    return rows


def _conversations(session: Session, data: DataConfig, examples: Sequence[int]) -> dict[int, Conversation]:
    """Returns the conversations of test rows, in the order given, read again: only their tokens were kept."""
    assert session.test is not None
    wanted = {}
    for example in examples:
        tokens, row = session.test.places[example]
        wanted[example] = (tokens.ids[row], tokens.digests[row])
    ids, missing = {name for name, _ in wanted.values()}, set(wanted.values())
    found: dict[tuple[str, bytes], Conversation] = {}
    for conversation in _read(data):
        if conversation.id in ids and (own := (conversation.id, row_digest(conversation))) in missing:
            found[own] = conversation
            missing.remove(own)
        if not missing:
            break
    return {example: found[own] for example, own in wanted.items() if own in found}


def _read(data: DataConfig) -> Iterator[Conversation]:
    """Yields all conversations of the data; those that test rows are most likely among come first."""
    files = [path for path in (data.test, data.held_out) if isinstance(path, str)]
    for path in (*files, *(source.path for source in data.train)):
        if path == skills.EMBEDDED_NAME:
            yield from skills.generate()
        else:
            yield from read_conversations([path], split=data.split, mapping=data.mapping)


def _parted(conversation: Conversation) -> tuple[list[Message], str]:
    """Returns the turns before the last assistant turn, and its text."""
    turns = conversation.messages
    last = max(place for place, turn in enumerate(turns) if turn.role == "assistant")
    return list(turns[:last]), turns[last].content


def _answers(
    session: Session, method: MethodConfig, folder: Path, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[str]:
    """Returns one system's answers; the base is then as it was."""
    base = session.base
    if is_exclusive(method.method):
        with whole_model(session, method, folder):
            return _answers(session, NoneConfig(), folder, prompts, max_new_tokens)
    with exported(base, None if isinstance(method, NoneConfig) else folder) as model:
        answerer = Answerer(model, base.tokenizer, session.encoder)
        # one at a time: beside others a prompt gets other tokens in half precision (4 of 12 on the quickstart)
        return [answerer.continue_tokens(prompt, max_new_tokens) for prompt in prompts]


@contextmanager
def whole_model(session: Session, method: MethodConfig, folder: Path) -> Iterator[None]:
    """Gives the base the weights of a trained model for the block."""
    weights = create(method, session.base, session.material, 0)
    assert isinstance(weights, FullAdapter)
    weights.load(load_file(folder / "model.safetensors"))
    weights.attach()
    try:
        yield
    finally:
        weights.detach()
