"""The processes of one training, as ``torchrun`` starts them: each holds the whole net and reads its share of the rows.

    join()          # does nothing in a process that is alone
    told(value)     # everybody's value, in order of rank

Alone, every function here answers as the only process would, without any communication.
"""

import atexit
import os
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from isthmus.errors import ConfigError

T = TypeVar("T")
_BUCKET = 2**25
"""Numbers summed over the processes at a time."""


def world() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if world() > 1 else 0


def first() -> bool:
    """Whether this is the process that writes files and talks: the only one, or number 0."""
    return rank() == 0


def asked() -> int:
    """How many processes ``torchrun`` says there are. Raises ConfigError when that is no number."""
    given = os.environ.get("WORLD_SIZE") or "1"
    if not given.isdecimal() or given == "0":
        raise ConfigError(
            f"WORLD_SIZE is {given!r}; torchrun sets it to the number of processes. Unset it to run alone."
        )
    return int(given)


def join() -> None:
    """Meet the other processes that ``torchrun`` started, until this one ends; alone or met before, nothing.

    Over gloo on a CPU, NCCL where this process has a GPU of its own (``LOCAL_RANK`` picks it). Raises ConfigError when
    ``WORLD_SIZE`` is set without the rest of what torchrun sets.
    """
    if asked() == 1 or world() > 1:
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {asked()}, and {', '.join(missing)} not set: start several processes with `torchrun "
            "--nproc-per-node N -m isthmus train …`, or one without WORLD_SIZE."
        )
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if cuda else "gloo")
    atexit.register(dist.destroy_process_group)


def wait() -> None:
    """Until all processes are here."""
    if world() > 1:
        dist.barrier()


def told(value: T) -> list[T]:
    """The values of all processes in order of rank. They travel pickled between processes of one run."""
    if world() == 1:
        return [value]
    values: list[T | None] = [None] * world()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def sum_gradients(parameters: Iterable[Tensor]) -> None:
    """Add up every parameter's gradient over the processes, in place; one that no process has stays without."""
    if world() == 1:
        return
    tensors = list(parameters)
    reached = torch.tensor([p.grad is not None for p in tensors], dtype=torch.int32, device=_device(tensors))
    dist.all_reduce(reached, op=dist.ReduceOp.MAX)
    met = [p for p, anywhere in zip(tensors, reached.tolist(), strict=True) if anywhere]
    bucket: list[Tensor] = []
    for parameter in met:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        if sum(g.numel() for g in bucket) >= _BUCKET or parameter is met[-1]:
            _sum(bucket)
            bucket = []


def _sum(gradients: list[Tensor]) -> None:
    joint = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(joint)
    for gradient, part in zip(gradients, joint.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def _device(tensors: Sequence[Tensor]) -> torch.device:
    return tensors[0].device if tensors else torch.device("cpu")


def sizes(rows: int, device: torch.device) -> list[int]:
    """How many rows each process has."""
    if world() == 1:
        return [rows]
    own = torch.tensor([rows], device=device)
    parts = [torch.empty_like(own) for _ in range(world())]
    dist.all_gather(parts, own)
    return torch.cat(parts).tolist()


def gather_rows(x: Tensor) -> tuple[list[Tensor], list[int]]:
    """Everybody's rows (B, ...) without a gradient, in order of rank, and how many each process has."""
    counts = sizes(len(x), x.device)
    padded = F.pad(x.detach(), (0, 0) * (x.ndim - 1) + (0, max(counts) - len(x))).contiguous()
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return [part[:count] for part, count in zip(parts, counts, strict=True)], counts
