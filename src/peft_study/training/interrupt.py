"""Stopping between two steps: once for a checkpoint and a clean end, twice (or before the first step) for at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Whether somebody asked the run to stop.

    Attributes:
        asked: somebody did.
        heeded: set once steps are taken and `asked` is looked at between them. Until then there is nothing to keep, and
            a signal stops at once.
    """

    heeded = False

    def __init__(self) -> None:
        self.asked = False

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Listens for SIGINT and SIGTERM inside the block; a second one, or one before any step, stops at once.

        Outside the main thread Python allows no signal handlers: there nobody asks.

        Raises:
            KeyboardInterrupt: then.
        """

        if threading.current_thread() is not threading.main_thread():
            yield self
            return

        def handle(_number: int, _frame: FrameType | None) -> None:
            if self.asked or not self.heeded:
                raise KeyboardInterrupt
            self.asked = True

        before = {number: signal.signal(number, handle) for number in STOP_SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
