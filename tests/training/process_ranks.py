"""What each process of the tests of several processes runs, as torchrun would start it."""

import errno
import json
import os
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from isthmus.batch import Batch, Term
from isthmus.errors import CheckpointError
from isthmus.processes import TIMEOUT, LostError, all_gather, join, rank, wait, world_size
from isthmus.stage import Group, Stage
from isthmus.training import Interrupted, Preempted, shard_files, train
from isthmus.training.engines import engine
from isthmus.training.gradient import NonFiniteLoss, backward
from isthmus.training.parallel import DDP, Parallel
from isthmus.training.precision import context
from tests.narrow import must_be

from .toys import ToyLoader, ToyNet, make_batch

LIMIT = 2.0
"""Seconds."""
FP32 = context("fp32", torch.device("cpu"))
FSDP = Parallel(engine="fsdp")
SPLITS: list[list[list[list[int]]]] = [
    [[[1, 2, 3]], [[4]]],  # one micro-batch each, unlike numbers of rows
    [[[1, 2, 3, 4]], []],  # a process without rows
    [[[1], [2, 3]], [[4]]],  # two micro-batches and one
    [[[1], [2]], [[3], [4]]],
]
"""Of every process the rows of each of its micro-batches."""


class OneOpen(ToyNet):
    """Its language part learns from the first process's rows alone."""

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        logits = super().logits(ids)
        return logits if rank() == 0 else logits.detach() + 0 * self.connector.weight.sum()


class PartLoader(ToyLoader):
    """Every ``world_size()``-th row of each step. ``stop_at``: process 1 gets a signal before that step."""

    stop_at = -1

    def steps(self, start: Any) -> Any:
        for number, (position, batches) in enumerate(super().steps(start)):
            if number == self.stop_at and rank() == 1:
                os.kill(os.getpid(), 15)
            rows = [int(name[1:]) for batch in batches for name in batch.ids][rank() :: world_size()]
            yield position, [make_batch(rows)]


def net() -> ToyNet:
    return ToyNet(dtype=torch.float64, dropout=0.0)


def stage(steps: int = 6) -> Stage:
    groups = (Group("connector.*", lr=1e-2), Group("language.*", lr=1e-2))
    return Stage(name="s", train=groups, steps=steps, precision="fp32", save_every=2, log_every=1)


def gradient(model: ToyNet, batches: list[Batch]) -> dict[str, Any]:
    means = backward(engine(model.eval()), batches, FP32)
    return {"means": means, **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


class NanHere(ToyNet):
    """Its loss is none in process 1."""

    def loss(self, batch: Batch) -> dict[str, Term]:
        (term,) = super().loss(batch).values()
        return {"lm": replace(term, total=term.total * float("nan"))} if rank() == 1 else {"lm": term}


def _non_finite(how: Parallel, micro: int) -> list[str]:
    """What each process says when process 1 alone meets a NaN."""
    runs = engine(NanHere(dtype=torch.float64, dropout=0.0), how)
    try:
        backward(runs, [make_batch([1, 2])] * micro, FP32)
    except NonFiniteLoss as problem:
        return all_gather(str(problem))
    return all_gather("nothing")


def _full(path: Path) -> list[str]:
    """What each process says when process 1 has no room for its shards; the run is at step 2 by then."""

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer: Any = shard_files.HuggingFaceStorageWriter
    usual = writer.write_data
    with suppress(Preempted):
        train(net(), PartLoader(), stage(), path, progress=False, parallel=FSDP, stop_at=2)
    writer.write_data = full if rank() == 1 else usual
    try:
        return _refused(path)
    finally:
        writer.write_data = usual


def _refused(path: Path) -> list[str]:
    """What each process says when no checkpoint can be written."""
    try:
        train(net(), PartLoader(), stage(), path, progress=False, parallel=FSDP)
    except CheckpointError as refused:
        return all_gather(str(refused))
    return all_gather("nothing")


def _frozen_half(path: Path, how: Parallel) -> tuple[dict[str, Tensor], set[torch.dtype], dict[str, Tensor]]:
    """The net before, the widths of its frozen head in its passes, and the net afterwards."""
    model, widths = ToyNet(dropout=0.0), set[torch.dtype]()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    model.language["head"].register_forward_hook(
        lambda module, *_: widths.add(must_be(torch.nn.Linear, module).weight.dtype)
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    half = replace(stage(3), precision="bf16", frozen_dtype="bf16", train=(Group("connector.*", lr=1e-2),))
    train(model, PartLoader(), half, path, progress=False, parallel=how)
    return before, widths, model.state_dict()


def _stopped(folder: Path, how: Parallel = DDP) -> tuple[list[str], dict[str, torch.Tensor]]:
    """A signal to process 1 alone stops both after the same step; the same call goes on."""
    loader = PartLoader()
    loader.stop_at = 3
    try:
        train(net(), loader, stage(), folder, progress=False, parallel=how)
    except Interrupted as stopped:
        heard = all_gather(str(stopped))
        resumed = net()
        train(resumed, PartLoader(), stage(), folder, progress=False, parallel=how)
        return heard, resumed.state_dict()
    return all_gather("nothing"), {}


def run_a_while(number: int, world_size: int, port: int, folder: str, stop_at: int | None) -> None:
    """Go on with a sharded run, up to a step."""
    enter(number, world_size, port)
    with suppress(Preempted):
        train(net(), PartLoader(), stage(8), folder, progress=False, parallel=FSDP, stop_at=stop_at)


class SleepingLoader(PartLoader):
    """Process 1 sleeps before its third step for longer than the other one waits."""

    def steps(self, start: Any) -> Any:
        for number, (position, batches) in enumerate(super().steps(start)):
            if rank() == 1 and number == 2:
                time.sleep(4 * LIMIT)
            yield position, batches


def run_late(number: int, world_size: int, port: int, folder: str) -> None:
    """What each process says when process 1 does not come."""
    enter(number, world_size, port, LIMIT)
    try:
        train(net(), SleepingLoader(), stage(), Path(folder) / "late", progress=False)
    except LostError as lost:
        (Path(folder) / f"said-{number}").write_text(str(lost))


def run_under_slurm(number: int, world_size: int, port: int, folder: str) -> None:
    """As ``srun`` starts a process: without a word of torchrun's."""
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR"):
        os.environ.pop(name, None)
    os.environ |= {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NUM_TASKS": str(world_size),
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": str(number),
        "MASTER_PORT": str(port),
    }
    join()
    (Path(folder) / str(number)).write_text(json.dumps(all_gather(number)))


def enter(number: int, world_size: int, port: int, timeout: float = TIMEOUT) -> None:
    os.environ |= {
        "RANK": str(number),
        "LOCAL_RANK": str(number),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    join(timeout)


def run(number: int, world_size: int, port: int, folder: str) -> None:
    enter(number, world_size, port)
    place = Path(folder)
    found: dict[str, Any] = {
        "gradients": [gradient(net(), [make_batch(rows) for rows in own[number]]) for own in SPLITS],
        "one open": gradient(OneOpen(dtype=torch.float64), [make_batch([1, 2])]),
    }
    found["told"] = all_gather("a" * 10_000 * number)
    whole = net()
    train(whole, PartLoader(), stage(), place / "whole", progress=False)
    found["weights"] = whole.state_dict()
    found["non-finite"] = [_non_finite(how, micro) for how in (DDP, FSDP) for micro in (1, 2)]
    found["half"] = [_frozen_half(place / f"half-{how.engine}", how) for how in (DDP, FSDP)]
    found["full"] = _full(place / "full")
    if rank() == 0:
        (place / "closed").mkdir()
        (place / "closed" / "checkpoints").touch()  # whoever is root may write into any folder, but not into a file
    found["closed"] = _refused(place / "closed")
    found["stopped"], _ = _stopped(place / "stopped")
    found["sharded"] = _stopped(place / "sharded", FSDP)
    torch.save(found, place / f"rank{number}.pt")
    wait()
