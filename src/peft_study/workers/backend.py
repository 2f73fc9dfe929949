"""Where the workers of a team live: what processes on this machine and actors of a Ray cluster have in common."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, Protocol

from peft_study.workers.worker_process import Answer


class WorkerDied(Exception):
    """The process or actor behind a link is dead; says how it died."""


class Link(Protocol):
    """The way to one host: a call, then its answer."""

    def call(self, method: str, *arguments: Any) -> None:
        """Has the host call a method; one call at a time.

        Raises:
            Gone: it is dead.
        """

    def answer(self) -> Answer:
        """Waits for the answer to the call.

        Raises:
            Gone: it is dead.
        """

    def end(self) -> None:
        """Ends the host at once, whatever it does."""


class Launcher(Protocol):
    """Starts hosts.

    Attributes:
        count: of the devices: places for a host.
        threads: of each host.
        sharing: hosts, at most, that share the memory of one machine; 1 where each has a device of its own.
        restarts: how often a place's host is started again after it died.
    """

    count: int
    threads: int
    sharing: int
    restarts: int

    def __enter__(self) -> Launcher: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def open(self, place: int) -> Link:
        """Starts a host on a device, from 0; it may be long in coming."""

    def wait(self, links: Sequence[Link]) -> Sequence[Link]:
        """Waits until some of the links have an answer, or are gone, and returns those.

        Raises:
            ProcessError: when none of them ever will.
        """
