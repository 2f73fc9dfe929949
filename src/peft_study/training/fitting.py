"""Whether a setting can be trained on a session's base, data and device; asked before anything is written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from peft_study.config import MethodConfig
from peft_study.errors import ModelError, first_line, out_of_memory
from peft_study.methods.registry import create, size
from peft_study.training.session import Session, refuse_past_positions


def refuse_unfit(session: Session, method: MethodConfig) -> None:
    """Refuses a setting that cannot be trained on this base, data and device.

    Raises:
        ModelError: when it needs more positions than the model has, or more memory than there is.
    """
    refuse_past_positions(session.base, session.longest, size(method, session.base))
    session.room.refuse(method, session.longest)


@contextmanager
def room_for(session: Session, method: MethodConfig) -> Iterator[None]:
    """Turns out of memory in the block into a ModelError that names the setting."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        name, device = size(method, session.base).name, session.base.device
        what = f"{name} does not fit into the memory of {device} ({first_line(error)})"
        raise ModelError(what, remedy="make it smaller, or have fewer trials side by side (slots)") from None


def check_methods(session: Session, methods: Iterable[MethodConfig], seed: int) -> None:
    """Makes each method's adapter once, so that one that does not fit is refused before anything is written.

    Raises:
        ModelError: when a method does not fit the model, its positions or the memory.
        ConfigError: when the data is too small for its initialisation.
    """
    for method in methods:
        with room_for(session, method):
            refuse_unfit(session, method)
            if method.method != "full":  # which fits every model, and would copy all of it
                create(method, session.base, session.material, seed)
