"""Answers of the base and of each method's best final to test prompts (``answers.json``)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from peft_study.errors import OutputError
from peft_study.storage.run_dir import RunFolder

ANSWERS_FILE = "answers.json"


@dataclass(frozen=True, slots=True)
class AnsweredRow:
    """A test row and the answers to its prompt.

    Attributes:
        example: its place in the test part.
        id, source: of the row.
        prompt: {role, content} turns up to the last assistant turn.
        reference: that turn.
        losses: of the row, in nats a supervised token, by system.
        answers: by system; one that could not answer is not there.
    """

    example: int
    id: str | None
    source: str | None
    prompt: tuple[dict[str, str], ...]
    reference: str
    losses: dict[str, float]
    answers: dict[str, str]


@dataclass(frozen=True, slots=True)
class Answers:
    """Answers side by side.

    Attributes:
        max_new_tokens: of an answer; a longer one is cut.
        systems: ``none`` (the untouched base), then the best final of each method by its setting's name, winner first.
        rows: the biggest wins of the winner against the base, then its biggest losses, each biggest first.
    """

    max_new_tokens: int
    systems: tuple[str, ...]
    rows: tuple[AnsweredRow, ...]


def answers(folder: Path) -> Answers | None:
    """Returns the answers that a study has kept; None where it has none.

    Raises:
        OutputError: when the file is damaged.
    """
    values = RunFolder(folder).read_if_there(ANSWERS_FILE)
    if values is None:
        return None
    try:
        rows = [AnsweredRow(**{**row, "prompt": tuple(row["prompt"])}) for row in values["rows"]]
        return Answers(int(values["max_new_tokens"]), tuple(values["systems"]), tuple(rows))
    except (KeyError, TypeError, ValueError) as error:
        raise OutputError(
            f"{ANSWERS_FILE} is damaged", where=str(folder), remedy="delete it; the command of the study makes it again"
        ) from error


def write_answers(folder: Path, found: Answers) -> None:
    """Writes the answers into a study's folder."""
    RunFolder(folder).write(ANSWERS_FILE, asdict(found))
