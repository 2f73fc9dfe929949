"""Several processes that train the same trials: each runs its own rows, all take the same optimizer steps.

    plan (the same everywhere)   row 0 | row 1 | ... | row N-1
    process r                    runs row r forward and backward
    exchange                     loss of every item, then the gradients of trials whose batch is complete, summed

Every process holds the same adapters and optimizer states, so nothing else is ever sent.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from peft_study.errors import ConfigError, ProcessError


@dataclass(frozen=True, slots=True)
class ProcessGroup:
    """This process among those of the run; alone, every exchange returns its input."""

    rank: int = 0
    count: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009  (immutable)

    @property
    def writes(self) -> bool:
        """True in the one process that writes files and tells the user."""
        return self.rank == 0

    def total(self, values: Sequence[float]) -> list[float]:
        """Returns the sums over the processes, in float64."""
        if self.count == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        _sum(tensor)
        return [float(x) for x in tensor.tolist()]

    def sum_gradients(self, parameters: Sequence[nn.Parameter]) -> None:
        """Adds up each parameter's gradient over the processes; it stays None where no process has one."""
        if self.count == 1 or not parameters:
            return
        there = self.total([float(p.grad is not None) for p in parameters])
        chosen = [p for p, count in zip(parameters, there, strict=True) if count]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in chosen])
        _sum(flat)
        for parameter, piece in zip(chosen, flat.split([p.numel() for p in chosen]), strict=True):
            parameter.grad = piece.view_as(parameter)

    def of_first(self, values: Sequence[float]) -> list[float]:
        """Returns the first process's values: a file that each has read may have changed meanwhile."""
        return self.total(values if self.rank == 0 else [0.0] * len(values))

    def wait(self) -> None:
        """Returns when every process has called this."""
        self.total([0.0])


ALONE = ProcessGroup()


def _sum(tensor: Tensor) -> None:
    """Adds the tensor up over the processes, in place."""
    try:
        dist.all_reduce(tensor)
    except RuntimeError as error:  # of any backend: the connection closed, or nothing came in time
        what = "another process of this run ended, so this one cannot go on"
        raise ProcessError(what, remedy="its own message says why") from error


def _started(environ: Mapping[str, str]) -> int:
    size = environ.get("WORLD_SIZE", "1")
    return max(1, int(size)) if size.isdigit() else 1


@contextmanager
def joined(environ: Mapping[str, str] = os.environ) -> Iterator[ProcessGroup]:
    """Joins the processes that ``accelerate launch`` or torchrun started; NCCL on CUDA, gloo elsewhere.

    Raises:
        ConfigError: when the launcher's variables are incomplete, or the others cannot be reached.
    """
    size = _started(environ)
    if size == 1:
        yield ALONE
        return
    local = int(environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available() and environ.get("ACCELERATE_USE_CPU", "").lower() not in ("1", "true", "yes")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"process {local} of this machine has no GPU of its own, there are {torch.cuda.device_count()}",
                where="--num_processes",
                remedy="start one process a GPU",
            )
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if cuda else "gloo")
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"the {size} processes could not join ({str(error).splitlines()[0]})",
            where=f"WORLD_SIZE={size}",
            remedy="start them with `accelerate launch --num_processes N` or `torchrun --nproc-per-node N`",
        ) from error
    try:
        yield ProcessGroup(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def refuse_several_processes(environ: Mapping[str, str]) -> None:
    """Stops a command that was started as one of several processes, each of which would do the same work.

    Raises:
        ConfigError: ``WORLD_SIZE`` of ``environ`` is above 1.
    """
    size = _started(environ)
    if size > 1:
        raise ConfigError(
            f"started as one of {size} processes, but a study is one process, with many trials in it",
            where=f"WORLD_SIZE={size}",
            remedy="start it once, without `accelerate launch` or torchrun",
        )
