"""The embedded data set: short instructions in twelve skills, each with one right answer, made from a seed.

    Draws(seed) --Skill.make--> question, reason, result --> Conversation(source="skills/<name>")

Every answer has the same form, which a base model does not know and a fine-tuned one learns: one line of
reasoning, then ``Answer: <result>``.
"""

from __future__ import annotations

import json
from pathlib import Path

from peft_study.data.conversation import Conversation, Message
from peft_study.data.skills import dates, numbers, text
from peft_study.data.skills.base import Draws, Skill
from peft_study.errors import ConfigError
from peft_study.storage.files import atomic_writer, made_folder

EMBEDDED_NAME = "skills"
"""Name of the data set on the command line and in configuration files."""

SKILLS: dict[str, Skill] = {skill.name: skill for skill in (*dates.SKILLS, *numbers.SKILLS, *text.SKILLS)}

# A skill that needs more draws than this for a new instruction has run out of them.
_MOST_DRAWS = 500


def generate(count: int = 2000, seed: int = 0) -> list[Conversation]:
    """Returns ``count`` conversations of one user and one assistant turn, all user turns different.

    The same seed gives the same conversations on every machine, and a smaller count gives the first of them. Each
    group of ``len(SKILLS)`` conversations has every skill once, in random order.

    Raises:
        ConfigError: ``count`` is below 1, or above what the skills can make without repeating themselves.
    """
    if count < 1:
        raise ConfigError(f"count is {count}", remedy="ask for at least 1 conversation")
    draw = Draws(seed)
    seen: set[str] = set()
    rows: list[Conversation] = []
    order: list[Skill] = []
    while len(rows) < count:
        order = order or draw.sample(tuple(SKILLS.values()), len(SKILLS))
        skill = order.pop()
        for _ in range(_MOST_DRAWS):
            task = skill.make(draw)
            if task.question not in seen:
                break
        else:
            raise ConfigError(
                f"count is {count}, but skill {skill.name!r} has no new instruction after {len(rows)} conversations",
                remedy=f"ask for at most {len(rows)}",
            )
        seen.add(task.question)
        turns = (Message("user", task.question), Message("assistant", task.answer))
        rows.append(Conversation(f"{EMBEDDED_NAME}-{seed}-{len(rows):06d}", turns, f"{EMBEDDED_NAME}/{skill.name}"))
    return rows


def write(path: str | Path, count: int = 2000, seed: int = 0) -> Path:
    """Writes the conversations to ``path`` as JSON lines, whole or not at all, and returns the path.

    Raises:
        ConfigError: see ``generate``.
        OutputError: the file cannot be written.
    """
    target = Path(path)
    rows = generate(count, seed)
    with made_folder(target.parent), atomic_writer(target) as file:
        for row in rows:
            file.write(json.dumps(row.to_dict(), ensure_ascii=False) + "\n")
    return target
