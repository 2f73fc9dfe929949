"""The two forms data takes inside the program.

a row of a file  --formats-->  Conversation  --chat-->  Example (tokens + supervised mask)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. ``extra`` holds what only a chat template reads (``tool_calls``, ``name``, ``tool_call_id``)."""

    role: Role
    content: str
    extra: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the turn as the mapping that chat templates and JSON lines use."""
        return {"role": self.role, "content": self.content, **(self.extra or {})}


@dataclass(frozen=True, slots=True)
class Conversation:
    """One training example before tokenisation: at least one assistant turn, no empty answers."""

    id: str
    messages: tuple[Message, ...]
    source: str
    tools: list[dict[str, Any]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the row that ``data convert`` writes; ``tools`` only where the row has them."""
        row: dict[str, Any] = {"id": self.id, "messages": [m.to_dict() for m in self.messages], "source": self.source}
        if self.tools is not None:
            row["tools"] = self.tools
        return row


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenised conversation of L tokens.

    ``supervised_L[i]`` is true if the model learns to predict token ``i`` from the tokens before it;
    position 0 is never supervised, because nothing precedes it.
    """

    tokens_L: npt.NDArray[np.int32]
    supervised_L: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.tokens_L)
