"""Workers as actors of a Ray cluster: one a GPU, or without GPUs one a node.

Ray places the actors and reports deaths. When a node is lost, its trials resume on other workers, and its actor waits
until the cluster has room again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from peft_study.config import ModelConfig
from peft_study.errors import ConfigError, ProcessError, first_line
from peft_study.training.interrupt import STOP_SIGNALS
from peft_study.workers.backend import WorkerDied
from peft_study.workers.worker_process import Answer, WorkerProcess

RESTARTS = 20
CONNECT_SECONDS = 5.0
"""Time limit of a connection to the cluster's address."""
PLACING_SECONDS = 60.0
"""How long a study without any worker waits for room in the cluster."""


class RayLauncher:
    """Actors of a Ray cluster.

    Args:
        address: of the cluster, or auto.
        model: says on which devices, and how much memory a worker asks for.

    Raises:
        ConfigError: when Ray is not installed.
    """

    restarts = RESTARTS
    count = 0
    threads = 1
    sharing = 1

    def __init__(self, address: str, model: ModelConfig) -> None:
        self._address, self._model = address, model
        self._links: list[ActorLink] = []
        self._options: dict[str, Any] = {}
        self._ours = False
        try:
            with _own_signals():
                import ray
        except ImportError as error:
            raise ConfigError("Ray is not installed", where="--ray", remedy="pip install 'peft-study[ray]'") from error
        self._ray = ray

    def __enter__(self) -> RayLauncher:
        if not self._ray.is_initialized():
            self._connect()
        try:
            self._plan()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_error: object) -> None:
        for link in self._links:
            link.end()
        if self._ours:
            self._ray.shutdown()

    def open(self, place: int) -> ActorLink:
        """Asks for an actor; Ray starts it when the cluster has room."""
        actor = self._ray.remote(WorkerProcess).options(max_restarts=0, max_task_retries=0, **self._options).remote()
        link = ActorLink(self._ray, actor)
        self._links.append(link)
        return link

    def wait(self, links: Sequence[Any]) -> list[ActorLink]:
        """Waits for answers or deaths.

        Raises:
            ProcessError: when none of the actors has a place for a minute.
        """
        refs = {link.pending: link for link in links}
        while True:
            ready, _ = self._ray.wait(list(refs), num_returns=1, timeout=1.0)
            if ready:
                ready, _ = self._ray.wait(list(refs), num_returns=len(refs), timeout=0)
                return [refs[ref] for ref in ready]
            if all(link.waits_for_place() for link in links):
                asked = ", ".join(f"{name.removeprefix('num_')} {value:g}" for name, value in self._asked().items())
                raise ProcessError(
                    f"no node of the Ray cluster has room for a worker ({asked})",
                    where=f"--ray {self._address}",
                    remedy="see `ray status`; the same command resumes the study when there is room",
                )

    def _asked(self) -> dict[str, float]:
        return {name: value for name, value in self._options.items() if isinstance(value, (int, float))}

    def _connect(self) -> None:
        where = f"--ray {self._address}"
        remedy = "start one with `ray start --head`, and `ray start --address=HOST:6379` on each other machine"
        _check_reachable(self._address, where, remedy)
        try:
            with _own_signals():
                self._ray.init(address=self._address, log_to_driver=False, logging_level="ERROR")
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise ConfigError(f"no Ray cluster answers ({first_line(error)})", where=where, remedy=remedy) from error
        self._ours = True

    def _plan(self) -> None:
        """Decides how many workers there are and what each asks for."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        device = self._model.device
        with_gpus = [node for node in nodes if node.get("GPU", 0) >= 1]
        if device == "cuda" and not with_gpus:
            raise ConfigError("the Ray cluster has no GPU", where="--device cuda", remedy="use --device cpu")
        if with_gpus and device in ("auto", "cuda"):
            self.count = sum(int(node["GPU"]) for node in with_gpus)
            self.threads = max(1, int(min(node.get("CPU", 1) / node["GPU"] for node in with_gpus)))
            self._options = {"num_gpus": 1, "num_cpus": self.threads}
        else:
            processors = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1]
            if not processors:
                raise ConfigError("the Ray cluster has no CPU to give", where=f"--ray {self._address}")
            self.threads = min(processors)
            self.count = sum(number // self.threads for number in processors)
            self.sharing = max(processors) // self.threads
            self._options = {"num_cpus": self.threads, "scheduling_strategy": "SPREAD"}
        weights = weight_bytes(self._model.name)
        if weights:
            self._options["memory"] = 2 * weights  # read from the disk's pages into the model: twice while it loads


class ActorLink:
    """One actor."""

    def __init__(self, ray: Any, actor: Any) -> None:
        self._ray, self._actor = ray, actor
        self._placed = actor.where.remote()
        self._asked_at = time.monotonic()
        self.pending: Any = None

    def call(self, method: str, *arguments: Any) -> None:
        """Sends a call."""
        self.pending = self._actor.answer.remote(method, arguments)

    def answer(self) -> Answer:
        """Waits for its answer."""
        errors = self._ray.exceptions
        try:
            answer: Answer = self._ray.get(self.pending)
        except errors.RayTaskError:
            raise
        except errors.RayError as error:
            raise WorkerDied(type(error).__name__) from error
        return answer

    def waits_for_place(self) -> bool:
        """True where the cluster had no room for it for `PLACING_SECONDS`."""
        if time.monotonic() - self._asked_at < PLACING_SECONDS:
            return False
        return not self._ray.wait([self._placed], timeout=0)[0]

    def end(self) -> None:
        """Kills the actor."""
        self._ray.kill(self._actor)


def weight_bytes(model: str) -> int:
    """Returns the bytes of the weights in a model's folder; 0 for a model that is no folder."""
    folder = Path(model).expanduser()
    names = ("*.safetensors", "*.gguf")
    return sum(path.stat().st_size for name in names for path in folder.glob(name)) if folder.is_dir() else 0


def _check_reachable(address: str, where: str, remedy: str) -> None:
    """Tries the address, because Ray itself would try for a minute and print pages.

    Raises:
        ConfigError: when nothing listens there, or it is no address.
    """
    if address in ("auto", "local"):
        return
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not colon or not port.isdigit():
        raise ConfigError(f"{address!r} is no address", where=where, remedy="give auto or HOST:PORT")
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise ConfigError(f"nobody answers there ({first_line(error)})", where=where, remedy=remedy) from error


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Restores the signal handlers after the block: Ray installs one for SIGTERM that ends the program."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    environment = os.environ.get("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO")
    if environment is None:  # else it warns of a change to come
        os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    try:
        yield
    finally:
        for number, handler in before.items():
            with contextlib.suppress(ValueError):  # outside the main thread, where Ray cannot have changed them
                signal.signal(number, handler)
