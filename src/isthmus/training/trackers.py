"""Where a run's numbers go beside ``metrics.jsonl``: TensorBoard, Weights & Biases, Trackio. Nothing leaves the machine
by itself: Weights & Biases writes offline unless ``WANDB_MODE`` says otherwise, Trackio keeps a local database."""

import hashlib
import importlib
import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Protocol

from isthmus.errors import ConfigError, MissingExtraError, nearest

PROJECT = "isthmus"


class Tracker(Protocol):
    """Takes numbers by name, step by step."""

    def log(self, numbers: Mapping[str, float], step: int) -> None: ...
    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, folder: Path, step: int, own: str) -> None:
        del own  # a folder of its own is one run
        writer = _imported("torch.utils.tensorboard", "TensorBoard", "'isthmus[track]'").SummaryWriter
        self._writer = writer(str(folder / "tensorboard"), purge_step=step + 1)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Open(Protocol):
    """A run of Weights & Biases, or of Trackio."""

    def log(self, metrics: dict[str, float], *, step: int) -> object: ...
    def finish(self) -> object: ...


class _Run:
    """What the two have in common."""

    def __init__(self, run: _Open) -> None:
        self._run = run

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


def _wandb(folder: Path, step: int, own: str) -> Tracker:
    del step
    wandb, mode = _imported("wandb", "Weights & Biases", "wandb"), os.environ.get("WANDB_MODE", "offline")
    return _Run(wandb.init(project=PROJECT, name=_name(folder), id=own, dir=str(folder), mode=mode, resume="allow"))


def _trackio(folder: Path, step: int, own: str) -> Tracker:
    del step
    trackio = _imported("trackio", "Trackio", "trackio")
    # It knows a run by its name, and folders of one name may be many.
    return _Run(trackio.init(project=PROJECT, name=f"{_name(folder)}-{own[:6]}", resume="allow"))


def _identity(folder: Path, step: int) -> str:
    """Of the run that a tracker shows: a new one where the stage begins, so that a second run in a folder of the same
    name is not added to the first; the one kept in ``tracked.json`` where it goes on."""
    file = folder / "tracked.json"
    if step and file.is_file():
        return json.loads(file.read_text(encoding="utf-8"))["run"]
    # Runs of before kept none.
    own = hashlib.sha256(str(folder.absolute()).encode()).hexdigest()[:16] if step else secrets.token_hex(8)
    file.write_text(json.dumps({"run": own}) + "\n", encoding="utf-8")
    return own


_TRACKERS: dict[str, Callable[[Path, int, str], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _wandb,
    "trackio": _trackio,
}

NAMES = tuple(_TRACKERS)


def open_trackers(names: Sequence[str], folder: Path, step: int) -> list[Tracker]:
    """The trackers of a stage's folder, whose run is at ``step``. Raises ConfigError for an unknown name,
    MissingExtraError for one that is not installed."""
    for name in names:
        if name not in _TRACKERS:
            raise ConfigError(f"report_to: {name!r} is no tracker; {nearest(name, NAMES)}")
    own = _identity(folder, step) if names else ""
    return [_TRACKERS[name](folder, step, own) for name in names]


def _name(folder: Path) -> str:
    """``RUN/STAGE``, from ``RUN/stages/STAGE``."""
    return f"{folder.absolute().parent.parent.name}/{folder.name}"


def _imported(module: str, title: str, package: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(f"{title} was asked for, but is not installed: pip install {package}.") from error
