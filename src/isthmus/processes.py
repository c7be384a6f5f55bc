"""The processes of one training, as ``torchrun`` starts them: each reads its share of the rows.

    join()              # does nothing in a process that is alone
    all_gather(value)   # everybody's value, in order of rank

Alone, every function here answers as the only process would, without any communication.
"""

import atexit
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from isthmus.errors import ConfigError, IsthmusError

T = TypeVar("T")
STOPS = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGUSR1")]
"""Signals that end a training after a step; not every system has the last one."""


class LostError(IsthmusError):
    """Another process of the run has ended, so this one cannot go on; the other one said why."""

    exit_code = 75


_apart = False


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() and not _apart else 1


@contextmanager
def apart() -> Iterator[None]:
    """While inside, this process is the only one to all that asks: a loss that contrasts the rows of all processes sees
    its own."""
    global _apart
    before, _apart = _apart, True
    try:
        yield
    finally:
        _apart = before


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def first() -> bool:
    """Whether this is the process that writes files and talks: the only one, or number 0."""
    return rank() == 0


def torchrun_world_size() -> int:
    """How many processes ``torchrun`` says there are. Raises ConfigError when that is no number."""
    given = os.environ.get("WORLD_SIZE") or "1"
    if not given.isdecimal() or given == "0":
        raise ConfigError(
            f"WORLD_SIZE is {given!r}; torchrun sets it to the number of processes. Unset it to run alone."
        )
    return int(given)


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def join() -> None:
    """Meet the other processes that ``torchrun`` started, until this one ends; alone or met before, nothing.

    Tensors on GPUs travel over NCCL, everything else over gloo. Raises ConfigError when ``WORLD_SIZE`` is set and
    something else that torchrun sets is not.
    """
    if torchrun_world_size() == 1 or world_size() > 1:
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {torchrun_world_size()}, and {', '.join(missing)} not set: start several processes "
            "with `torchrun --nproc-per-node N -m isthmus train …`, or one without WORLD_SIZE."
        )
    on_gpu = device().type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device())
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    atexit.register(dist.destroy_process_group)


def device() -> torch.device:
    """Where a recipe trains: on the GPU of this process (``LOCAL_RANK`` picks it), without one on the CPU."""
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


@contextmanager
def talking() -> Iterator[None]:
    """Around every exchange: torch's error when the other end is gone, in words (LostError)."""
    try:
        yield
    except RuntimeError as error:
        if not any(word in str(error) for word in ("Connection", "peer", "remote process")):
            raise
        raise LostError(
            f"Another process of this run has ended, so process {dist.get_rank()} cannot go on: look for what that one "
            "said. The same command goes on at the last checkpoint."
        ) from error


def wait() -> None:
    """Until all processes are here."""
    if world_size() > 1:
        with talking():
            dist.barrier()


def all_gather(value: T) -> list[T]:
    """The values of all processes in order of rank. They travel pickled between processes of one run, over gloo."""
    if world_size() == 1:
        return [value]
    gathered: list[Any] = [None] * world_size()
    with talking():
        dist.all_gather_object(gathered, value)
    return gathered


def all_of(make: Callable[[], T]) -> list[T]:
    """What ``make`` gives each process, in order of rank. An IsthmusError of one is raised by all."""
    found: T | None = None
    fault: IsthmusError | None = None
    try:
        found = make()
    except IsthmusError as error:
        fault = error
    met = all_gather((found, fault))
    if (fault := next((f for _, f in met if f is not None), None)) is not None:
        raise fault
    return [value for value, _ in met]  # type: ignore[misc]


def of_first(make: Callable[[], T]) -> T:
    """What ``make`` gives the first process, in all of them; the others do not call it. Its IsthmusError is raised by
    all."""
    return all_of(lambda: make() if first() else None)[0]  # type: ignore[return-value]


def sizes(rows: int, device: torch.device) -> list[int]:
    """How many rows each process has."""
    if world_size() == 1:
        return [rows]
    own = torch.tensor([rows], device=device)
    parts = [torch.empty_like(own) for _ in range(world_size())]
    with talking():
        dist.all_gather(parts, own)
    return torch.cat(parts).tolist()


def gather_rows(x: Tensor) -> tuple[list[Tensor], list[int]]:
    """Everybody's rows (B, ...) without a gradient, in order of rank, and how many each process has."""
    counts = sizes(len(x), x.device)
    padded = F.pad(x.detach(), (0, 0) * (x.ndim - 1) + (0, max(counts) - len(x))).contiguous()
    parts = [torch.empty_like(padded) for _ in counts]
    with talking():
        dist.all_gather(parts, padded)
    return [part[:count] for part, count in zip(parts, counts, strict=True)], counts
