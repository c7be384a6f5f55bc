"""The processes of one command, as ``torchrun`` or ``srun`` starts them: each reads its share of the rows.

    join()              # does nothing in a process that is alone
    all_gather(value)   # everybody's value, in order of rank
    doing("...")        # what the others read when this one does not come

Alone, every function here answers as the only process would, without any communication.

Whoever waits in vain for another process leaves: its end is noticed at once, its hanging after ``parallel.timeout``.
All who wait leave a note of it where the processes met, so who left none is the one to look for.
"""

import atexit
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from isthmus.errors import ConfigError, IsthmusError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

T = TypeVar("T")
STOPS = [s for s in signal.Signals if s.name in ("SIGINT", "SIGTERM", "SIGUSR1")]
"""Signals that end a training after a step; not every system has the last one."""


TIMEOUT = 1800.0
"""Seconds that a process waits for the others before it gives up."""
_GRACE = 1.0
"""Seconds that those who wait in vain have for saying so."""
_WAITS = "waits in vain"

_notes: "Store | None" = None
_timeout = TIMEOUT


class LostError(IsthmusError):
    """Another process of the run has ended or hangs, so this one cannot go on; who ended said why."""

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


def launched_world_size() -> int:
    """How many processes ``torchrun`` or SLURM's ``srun`` says there are. Raises ConfigError when that is no number."""
    _read_slurm()
    given = os.environ.get("WORLD_SIZE") or "1"
    if not given.isdecimal() or given == "0":
        raise ConfigError(
            f"WORLD_SIZE is {given!r}; torchrun sets it to the number of processes. Unset it to run alone."
        )
    return int(given)


def _read_slurm() -> None:
    """What ``srun`` says of this process, in the words of ``torchrun``, whose own go first. All meet at the first node
    of the step, at a port that follows from the job's number."""
    step = {name: os.environ.get(f"SLURM_{name}", "") for name in ("STEP_NUM_TASKS", "PROCID", "LOCALID", "JOB_ID")}
    node = re.match(r"([^\[,]+)(?:\[(\d+))?", os.environ.get("SLURM_STEP_NODELIST", ""))
    if "WORLD_SIZE" in os.environ or node is None or not all(value.isdecimal() for value in step.values()):
        return
    os.environ |= {
        "WORLD_SIZE": step["STEP_NUM_TASKS"],
        "RANK": step["PROCID"],
        "LOCAL_RANK": step["LOCALID"],
        "MASTER_ADDR": os.environ.get("MASTER_ADDR") or f"{node[1]}{node[2] or ''}",
        "MASTER_PORT": os.environ.get("MASTER_PORT") or str(15_000 + int(step["JOB_ID"]) % 20_000),
    }


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def join(timeout: float = TIMEOUT) -> None:
    """Meet the other processes that were started with this one, until this one ends; alone or met before, nothing. None
    waits longer than ``timeout`` seconds for another.

    Tensors on GPUs travel over NCCL, everything else over gloo. Raises ConfigError when ``WORLD_SIZE`` is set and
    something else that torchrun sets is not, LostError when the others do not come.
    """
    global _notes, _timeout
    if launched_world_size() == 1 or world_size() > 1:
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {launched_world_size()}, and {', '.join(missing)} not set: start several processes "
            "with `torchrun --nproc-per-node N -m isthmus train …`, or one without WORLD_SIZE."
        )
    on_gpu = device().type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device())
    from torch._C._distributed_c10d import PrefixStore  # not in every build of torch
    from torch.distributed.rendezvous import rendezvous

    _timeout = timeout
    try:
        store, number, count = next(rendezvous("env://", timeout=timedelta(seconds=timeout)))
        store.set_timeout(timedelta(seconds=timeout))
        _notes = PrefixStore("notes", store)
        doing("its beginning")
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=PrefixStore("group", store),
            rank=number,
            world_size=count,
            timeout=timedelta(seconds=timeout),
        )
    except RuntimeError as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise LostError(
            f"Process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} did not meet the others at {place} "
            f"(MASTER_ADDR and MASTER_PORT): {' '.join(str(error).split())[:200]}. Were all started, within "
            f"{timeout:g} s (parallel.timeout), and is the port free on the first one's machine?"
        ) from error
    atexit.register(dist.destroy_process_group)


def group() -> "dist.ProcessGroup":
    """One more group of all processes over gloo, for messages that may cross those of the others."""
    made = dist.new_group(backend="gloo", timeout=timedelta(seconds=_timeout))
    assert isinstance(made, dist.ProcessGroup)
    return made


def doing(what: str) -> None:
    """Leave a note of what this process does from now on: another one that waits in vain for it reads it."""
    if _notes is not None:
        with suppress(RuntimeError):  # where the notes are gone, the next exchange tells what happened
            _notes.set(os.environ["RANK"], json.dumps([time.time(), what]))


def device() -> torch.device:
    """Where a recipe trains: on the GPU of this process (``LOCAL_RANK`` picks it), without one on the CPU."""
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


@contextmanager
def talking() -> Iterator[None]:
    """Around every exchange: torch's error when the other end is gone, or does not come, in words (LostError)."""
    try:
        yield
    except RuntimeError as error:
        if not (dist.is_available() and dist.is_initialized()):
            raise
        late = "Timed out" in str(error)
        if not late and not any(word in str(error) for word in ("Connection", "peer", "remote process")):
            raise
        raise LostError(_in_vain(late)) from error


def _in_vain(late: bool) -> str:
    """Who was waited for in vain, and what it did last."""
    number, missing = dist.get_rank(), _missing()
    many = len(missing) > 1
    who = f"Process{'es' * many} {', '.join(map(str, missing))}" if missing else "Another process"
    said = f"{who} of this run {'have' if many else 'has'}"
    if late:
        said += f" not come within {_timeout:g} s (parallel.timeout), so process {number} gives up."
    else:
        said += f" ended, so process {number} cannot go on: look for what that one said."
    last = [f" Process {n} was last seen at {what}." for n, what in missing.items() if what]
    return f"{said}{''.join(last)} The same command goes on at what was saved last."


def _missing() -> dict[int, str]:
    """The processes that do not wait themselves, with the last note of each. Where the notes are gone, the first one
    is, who keeps them."""
    if _notes is None:
        return {}
    number = dist.get_rank()
    others = [n for n in range(dist.get_world_size()) if n != number]
    doing(_WAITS)
    until = time.monotonic() + _GRACE * (1 if number else 2)  # who keeps the notes leaves last
    try:
        _notes.set_timeout(timedelta(seconds=_GRACE))
        while True:
            notes = {n: json.loads(_notes.get(str(n))) for n in others}
            away = {n: note for n, note in notes.items() if note[1] != _WAITS}
            if not away or time.monotonic() > until:
                return {n: f"{what}, {max(0, round(time.time() - at))} s ago" for n, (at, what) in away.items()}
            time.sleep(0.05)
    except RuntimeError:
        return {0: ""} if number else {}


def wait() -> None:
    """Until all processes are here."""
    if world_size() > 1:
        with talking():
            dist.barrier()


def all_gather(value: T) -> list[T]:
    """The values of all processes in order of rank. They travel pickled between processes of one run, over gloo."""
    if world_size() == 1:
        return [value]
    gathered = cast("list[T]", [None] * world_size())
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
