"""The state of a run in shards: every process writes its part of each tensor, while training goes on.

``checkpoints/step-000200/`` holds ``shard-*.safetensors`` by torch.distributed.checkpoint, with ``rng.json`` and
``state.json`` as an unsharded state has them (state.py). Nothing in it is a pickle. It is read by any number of
processes and any engine: each takes the slices that it holds.
"""

import dataclasses
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from isthmus.checkpoint import Content, begin_folder, entry_of, finish_folder
from isthmus.errors import CheckpointError
from isthmus.processes import all_gather, first, group, talking, world_size
from isthmus.stage import Stage
from isthmus.training.state import (
    TRAINED,
    Generators,
    RunState,
    StateWriter,
    checkpoint_path,
    demand_names,
    drop_old,
    moving_statistics,
    optimizer_tensors,
)


class ShardWriter(StateWriter):
    """Copies the state and writes the copy in a thread, whose messages to the other processes are a group's of their
    own. All processes call it together."""

    def __init__(self) -> None:
        self._group = group()
        self._pool = ThreadPoolExecutor(1, "isthmus-checkpoint")
        self._job: Future[None] | None = None

    def save(
        self,
        folder: Path,
        state: RunState,
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
        parameters: Mapping[str, nn.Parameter],
        generators: Sequence[Generators],
        stage: Stage,
    ) -> None:
        self.wait()
        path = checkpoint_path(folder, state.step)
        aside = all_gather(_begun(path) if first() else None)[0]
        if isinstance(aside, str):
            raise CheckpointError(aside)
        assert aside is not None
        trained = {f"{TRAINED}:{name}": value for name, value in {**parameters, **moving_statistics(net)}.items()}
        tensors = {**trained, **optimizer_tensors(optimizer, parameters)}
        copies = {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}
        rest = {"rng.json": {"processes": list(generators)}, "state.json": dataclasses.asdict(state)}
        self._job = self._pool.submit(self._write, aside, path, copies, rest, folder, stage)

    def _write(
        self,
        aside: Path,
        path: Path,
        tensors: dict[str, Tensor],
        rest: Mapping[str, Content],
        folder: Path,
        stage: Stage,
    ) -> None:
        try:
            writer = HuggingFaceStorageWriter(str(aside), save_distributed=True)
            with talking():
                save(tensors, storage_writer=writer, process_group=self._group)
                own = {file.name: entry_of(file) for file in sorted(aside.glob(f"shard-{dist.get_rank() + 1:05d}-*"))}
                entries = [own] * world_size()  # each place is for another process's
                dist.all_gather_object(entries, own, group=self._group)
            if first():
                finish_folder(aside, path, {name: entry for found in entries for name, entry in found.items()}, rest)
                drop_old(folder, stage)
        except (CheckpointException, OSError) as error:
            if first():
                shutil.rmtree(aside, ignore_errors=True)
            raise CheckpointError(f"Cannot write {path}: {_reason(error)}. What was saved before is intact.") from error

    def wait(self) -> None:
        job, self._job = self._job, None
        if job is not None:
            job.result()

    def close(self) -> None:
        self._pool.shutdown()


def restore_shards(
    folder: Path, net: nn.Module, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> None:
    """Trained tensors and the optimizer's state from shards, each process the slices that it holds. Raises
    CheckpointError when they do not fit."""
    reader = HuggingFaceStorageReader(str(folder))
    found = reader.read_metadata().state_dict_metadata
    known = {key: entry.size for key, entry in found.items() if isinstance(entry, TensorStorageMetadata)}
    targets: dict[str, Tensor] = {f"{TRAINED}:{n}": t for n, t in {**parameters, **moving_statistics(net)}.items()}
    demand_names(set(targets), {key for key in known if key.startswith(f"{TRAINED}:")}, folder)
    for key in known.keys() - targets.keys():
        kind, _, name = key.partition(":")
        demand_names({name}, {name} & parameters.keys(), folder)
        parameter = parameters[name]
        value = torch.zeros((), device=parameter.device) if kind == "step" else torch.zeros_like(parameter)
        optimizer.state[parameter][kind] = targets[key] = value.detach()
    # What has no dimension has one in shards.
    laid_out = {key: _with_dimension(key, value.detach(), known[key]) for key, value in targets.items()}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is .*single process")  # which is what is meant
            load(laid_out, storage_reader=reader, no_dist=world_size() == 1)
    except (CheckpointException, ValueError) as error:
        raise CheckpointError(f"{folder} does not fit what this stage trains: {_reason(error)}") from error


def _with_dimension(key: str, value: Tensor, size: torch.Size) -> Tensor:
    return value.view(1) if value.ndim == 0 and len(size) == 1 else value


def _begun(path: Path) -> Path | str:
    """The folder aside, or why there is none: the other processes are to hear of it."""
    try:
        return begin_folder(path)
    except CheckpointError as error:
        return str(error)


def _reason(error: BaseException) -> str:
    """The first cause that a process had, on one line."""
    if isinstance(error, CheckpointException):
        number, (cause, _) = next(iter(error.failures.items()))
        return f"process {number}: {' '.join(str(cause).split())}"
    return os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
