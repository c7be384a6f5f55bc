"""Saving and resuming: everything that the next step depends on, in one folder that is complete or not there.

``checkpoints/step-000200/`` holds ``trained.safetensors`` (open tensors and running statistics),
``optimizer.safetensors``, ``rng.json`` and ``state.json``. Frozen tensors are not stored; their hashes are.
"""

import base64
import dataclasses
import os
import random
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy
import torch
from torch import Tensor, nn

from isthmus.checkpoint import clean_leftovers, load_tensors, read_folder, read_json, write_folder
from isthmus.errors import CheckpointError, StageError
from isthmus.processes import first, rank
from isthmus.stage import Stage, canonical
from isthmus.training.proof import moving_buffers
from isthmus.training.shards import like, put

TRAINED = "trained"
"""Name of the open tensors' file, and before their names in shards."""


@dataclass(frozen=True, slots=True)
class RunState:
    """Where a run stands after ``step`` steps. ``frozen`` maps each frozen tensor to its sha256 at the start.

    ``unproven`` are trained tensors that had no gradient yet; ``skipped`` counts the last non-finite steps in a row.
    ``products``: by whom fp32 products are; none in states that were written before it was kept.
    """

    step: int
    samples: int
    position: Mapping[str, object]
    seconds: float
    losses: Mapping[str, float]
    unproven: tuple[str, ...]
    skipped: int
    frozen: Mapping[str, str]
    stage: str
    identity: Mapping[str, object]
    seed: int
    processes: int
    threads: int
    torch: str
    precision: str
    device: str
    warnings: tuple[str, ...]
    products: str | None = None


class Generators(TypedDict):
    """The random generators of a process, as JSON-able data; tuples come back as lists."""

    torch: str
    cuda: list[str]
    python: tuple[int, Sequence[int], float | None]
    numpy: tuple[str, Sequence[int], int, int, float]


class StateWriter:
    """Writes checkpoints of a net that every process holds in full: the first process does, before training goes on."""

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
        """Write the checkpoint of ``state.step`` and drop those that ``stage`` does not keep. Raises CheckpointError.

        ``generators`` are the processes' :func:`rng_state`.
        """
        if not first():
            return
        write_folder(
            checkpoint_path(folder, state.step),
            {
                f"{TRAINED}.safetensors": {**parameters, **moving_statistics(net)},
                "optimizer.safetensors": optimizer_tensors(optimizer, parameters),
                "rng.json": {"processes": list(generators)},
                "state.json": dataclasses.asdict(state),
            },
        )
        drop_old(folder, stage)

    def wait(self) -> None:
        """Until what was saved is on the disk. Raises CheckpointError where it could not be written."""

    def close(self) -> None:
        """At the end, whatever it was."""


def drop_old(folder: Path, stage: Stage) -> None:
    """Remove the checkpoints that the stage does not keep."""
    for old in checkpoints(folder)[: -stage.keep_last]:
        if stage.keep_every is not None and _step(old) % stage.keep_every == 0:
            continue
        # Renamed first, so that a kill while deleting never leaves a half folder under a checkpoint's name.
        doomed = old.with_name(f"{old.name}.tmp-{os.getpid()}")
        old.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    found = [p for p in (folder / "checkpoints").glob("step-*") if p.name.removeprefix("step-").isdigit()]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def newest_state(folder: Path) -> tuple[RunState, dict[str, Path]] | None:
    """The newest checkpoint's state and verified files; none for a new run.

    Raises CheckpointError when it is damaged: going on from an older one silently is not for the loop to decide.
    """
    if first():
        clean_leftovers(folder / "checkpoints")
    found = checkpoints(folder)
    if not found:
        return None
    try:
        files = read_folder(found[-1])
        saved = read_json(files["state.json"])
        fields = {f.name for f in dataclasses.fields(RunState)}
        if set(saved) | {"products"} != fields:
            raise CheckpointError(f"{files['state.json']} was written by another version of isthmus.")
    except CheckpointError as error:
        older = f"the run then goes on from {found[-2].name}" if len(found) > 1 else "the run then starts anew"
        raise CheckpointError(f"{error} (Without {found[-1]}, {older}.)") from error
    saved["unproven"], saved["warnings"] = tuple(saved["unproven"]), tuple(saved["warnings"])
    return RunState(**saved), files


def check_same(saved: RunState, current: RunState, folder: Path) -> tuple[str, ...]:
    """Compare a checkpoint with the run that wants to go on from it.

    Raises StageError when stage, seed or identity differ; answers with warnings for what changes only the bits.
    """

    def differ(what: str) -> StageError:
        return StageError(f"{folder} was begun with {what}. Use the same, or choose another run folder for a new run.")

    if saved.stage != current.stage:
        raise differ(f"another definition of this stage (see {folder / 'stage.json'})")
    if saved.seed != current.seed:
        raise differ(f"seed {saved.seed}, not {current.seed}")
    for key in sorted(saved.identity.keys() | current.identity.keys()):
        if saved.identity.get(key) != current.identity.get(key):
            raise differ(f"{key} = {saved.identity.get(key)!r}, not {current.identity.get(key)!r}")
    return tuple(
        f"step {saved.step}: resumed with {what} {new} instead of {old}; the result may differ in the last bits"
        for what, old, new in (
            ("process count", saved.processes, current.processes),
            ("thread count", saved.threads, current.threads),
            ("torch", saved.torch, current.torch),
            ("device", saved.device, current.device),
            ("fp32 products by", saved.products or current.products, current.products),
        )
        if old != new
    )


def restore_generators(files: Mapping[str, Path]) -> None:
    """Put this process's random generators back."""
    generators: list[Generators] = read_json(files["rng.json"])["processes"]
    # With more processes than before the further ones keep what they were seeded with.
    if rank() < len(generators):
        _restore_rng(generators[rank()])


def restore_tensors(
    files: Mapping[str, Path], net: nn.Module, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> None:
    """Put trained tensors and optimizer state back. Raises CheckpointError when they do not fit."""
    targets = {**parameters, **moving_statistics(net)}
    trained = load_tensors(files["trained.safetensors"])
    demand_names(set(targets), set(trained), files["trained.safetensors"])
    with torch.no_grad():
        for name, target in targets.items():
            # What has no dimension has one in shards.
            if (target.shape or (1,)) != (trained[name].shape or (1,)):
                raise CheckpointError(
                    f"{files['trained.safetensors']}: {name!r} has shape "
                    f"{tuple(trained[name].shape)}, the net wants {tuple(target.shape)}."
                )
            put(trained[name], target)
    for key, tensor in load_tensors(files["optimizer.safetensors"]).items():
        kind, _, name = key.partition(":")
        demand_names({name}, {name} & parameters.keys(), files["optimizer.safetensors"])
        # A copy in memory of its own: the file may be deleted while the optimizer goes on writing.
        parameter = parameters[name]
        optimizer.state[parameter][kind] = (
            tensor.clone().to(parameter.device) if kind == "step" else like(tensor, parameter)
        )


def demand_names(wanted: set[str], given: set[str], where: Path) -> None:
    """Raises CheckpointError with some of the names that differ."""
    if wanted != given:
        shown = ", ".join(sorted(wanted ^ given)[:5])
        raise CheckpointError(f"{where} does not fit what this stage trains; it differs in: {shown}.")


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where a step's checkpoint stands."""
    return folder / "checkpoints" / f"step-{step:06d}"


def moving_statistics(net: nn.Module) -> dict[str, Tensor]:
    """Running statistics, which train along."""
    moving = moving_buffers(net)
    return {canonical(name): buffer for name, buffer in net.named_buffers() if canonical(name) in moving}


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """``kind:parameter`` -> tensor."""
    return {
        f"{kind}:{name}": value
        for name, parameter in parameters.items()
        for kind, value in optimizer.state.get(parameter, {}).items()
    }


def seed_generators(seed: int) -> None:
    """All generators of this process from one number."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state() -> Generators:
    """The random generators of this process."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = numpy.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "torch": _encode(torch.get_rng_state()),
        "cuda": [_encode(state) for state in cuda],
        "python": (version, list(numbers), gauss),
        "numpy": (str(name), [int(k) for k in keys], int(position), int(has_gauss), float(cached)),
    }


def _restore_rng(saved: Generators) -> None:
    torch.set_rng_state(_decode(saved["torch"]))
    if torch.cuda.is_available() and len(saved["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_decode(state) for state in saved["cuda"]])
    version, numbers, gauss = saved["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = saved["numpy"]
    numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, cached))


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.cpu().numpy().tobytes()).decode()


def _decode(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
