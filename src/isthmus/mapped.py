"""Nets whose weights lie in a file that all processes of a run map, so that none of them holds all of the net.

A page of a mapped file is read when it is used and may be dropped at any time: such a net costs its process next to
nothing until something is copied out of it, as the shards of FSDP2 are. :func:`made` has the first process make a net,
writing through to a file, and the others the same net without values; then all map the file, each for itself: what one
changes there the others do not see.
"""

import math
import mmap
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode

from isthmus.errors import CheckpointError
from isthmus.processes import all_gather, first, rank, wait

N = TypeVar("N", bound=nn.Module)

AT_ONCE = 2**28
"""Bytes that may be written before what was written is left to the system."""
_NAME = "weights.tmp"


class Place(NamedTuple):
    """Where a tensor begins in a file, in bytes, and what it is."""

    start: int
    dtype: torch.dtype
    shape: torch.Size


_hollow = False


@contextmanager
def hollow() -> Iterator[None]:
    """While inside, parameters have no values (they are on the meta device), until something is :func:`given` to them.
    Buffers are made as ever."""
    with _set_hollow(True), _registering(_emptied):
        yield


@contextmanager
def solid() -> Iterator[None]:
    """Within :func:`hollow`: parameters have values again."""
    with _set_hollow(False):
        yield


@contextmanager
def _set_hollow(wanted: bool) -> Iterator[None]:
    global _hollow
    before, _hollow = _hollow, wanted
    try:
        yield
    finally:
        _hollow = before


@contextmanager
def _registering(hook: Callable[[nn.Module, str, nn.Parameter], nn.Parameter | None]) -> Iterator[None]:
    handle = register_module_parameter_registration_hook(hook)  # type: ignore[arg-type]  # its answer is used
    try:
        yield
    finally:
        handle.remove()


def is_hollow() -> bool:
    return _hollow


def _emptied(_module: nn.Module, _name: str, parameter: nn.Parameter) -> nn.Parameter | None:
    if not _hollow or parameter.is_meta:  # tied: it is registered for the second time
        return None
    return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)


def given(parameter: Tensor, value: Tensor) -> None:
    """Let ``value``'s memory be the parameter's, whose identity stays, and with it what is tied to it."""
    if parameter.is_meta:
        torch.utils.swap_tensors(parameter, nn.Parameter(value.detach(), requires_grad=parameter.requires_grad))
    else:
        parameter.data = value.detach()


def made(make: Callable[[], N], folder: Path) -> N:
    """The net that ``make`` makes, of the first process's values, mapped from a file that is in ``folder`` meanwhile;
    all processes share that folder, and call together. ``make`` runs in all of them.

    Raises CheckpointError where the file cannot be written.
    """
    if not first():
        with hollow(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*which is a no-op")  # values for parameters that have none
            net = make()
        found = _shared(folder, None, ())
    else:
        with _written(folder) as file:
            with _registering(file.registered), _Counted(file):
                net = make()
            found = _shared(folder, file, net.named_parameters())
    for name, parameter in net.named_parameters():
        given(parameter, found[name])
    kept = dict(net.named_buffers())
    for name, buffer in all_gather({n: kept[n] for n in net.state_dict() if n in kept} if first() else {})[0].items():
        kept[name].copy_(buffer)
    return net


def shared(tensors: Iterable[tuple[str, Tensor]], folder: Path) -> dict[str, Tensor]:
    """Tensors that all processes have, in all of them mapped from one file, which the first one writes. All call
    together and iterate together, so the tensors may be put together from shards one by one."""
    if not first():
        for _ in tensors:
            pass
        return _shared(folder, None, ())
    with _written(folder) as file:
        return _shared(folder, file, tensors)


@contextmanager
def _written(folder: Path) -> Iterator["_File"]:
    """A file that goes again; its memory stays until the last process lets go of it. What a killed process left is
    removed: one run at a time has the folder."""
    for old in folder.glob(f"{_NAME}-*"):
        old.unlink()
    file = _File(folder / f"{_NAME}-{os.getpid()}")
    try:
        yield file
    finally:
        file.path.unlink(missing_ok=True)


def _shared(folder: Path, file: "_File | None", tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    wrote: tuple[str, dict[str, Place]] | None = None
    if file is not None:
        wrote = file.path.name, {name: file.placed(tensor.detach()) for name, tensor in tensors}
        file.sync()
    told_first = all_gather(wrote)[0]
    assert told_first is not None
    name, table = told_first
    found = _mapped(folder / name, table)
    wait()
    return found


def _mapped(path: Path, table: Mapping[str, Place]) -> dict[str, Tensor]:
    try:
        with path.open("rb") as file:
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise CheckpointError(
            f"Process {rank()} cannot map {path} ({error.strerror}), in which the first process wrote the net's "
            "weights: the run's folder must be on a disk that all processes share, one that can map files."
        ) from error
    return {name: _tensor(pages, place) for name, place in table.items()}


def _tensor(pages: mmap.mmap, place: Place) -> Tensor:
    count = math.prod(place.shape)
    if not count:
        return torch.empty(place.shape, dtype=place.dtype)
    return torch.frombuffer(pages, dtype=place.dtype, count=count, offset=place.start).view(place.shape)


class _File:
    """A file of tensors that grows; each is mapped, and what is written to it stands in the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise self._refused(error) from error
        self._end = 0
        self._pages: list[mmap.mmap] = []
        self._places: dict[int, Place] = {}
        self._fresh = 0

    def registered(self, _module: nn.Module, _name: str, parameter: nn.Parameter) -> None:
        """Hook: the parameter's memory is the file's from now on."""
        if parameter.device.type == "cpu" and parameter.numel() and parameter.data_ptr() not in self._places:
            parameter.data = self._put(parameter.detach())

    def placed(self, tensor: Tensor) -> Place:
        """Where the tensor stands; it is written where it does not yet."""
        place = self._places.get(tensor.data_ptr()) if tensor.numel() else Place(0, tensor.dtype, tensor.shape)
        if place is None or (place.dtype, place.shape) != (tensor.dtype, tensor.shape):
            place = self._places[self._put(tensor).data_ptr()]
        return place

    def _put(self, tensor: Tensor) -> Tensor:
        place = Place(self._end, tensor.dtype, tensor.shape)
        self._grow(tensor.nbytes)
        pages = mmap.mmap(self._handle, tensor.nbytes, offset=self._end)
        step = mmap.ALLOCATIONGRANULARITY
        self._end += -(-tensor.nbytes // step) * step
        self._pages.append(pages)
        written = _tensor(pages, place._replace(start=0)).copy_(tensor)
        self._places[written.data_ptr()] = place
        self.wrote(tensor.nbytes)
        return written

    def _grow(self, count: int) -> None:
        """Room on the disk: without, writing to the mapped file would end the process."""
        try:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._handle, self._end, count)
            else:
                os.ftruncate(self._handle, self._end + count)
        except OSError as error:
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> CheckpointError:
        return CheckpointError(
            f"Cannot write {self.path}: {error.strerror}. The net's weights lie there while its shards train, so that "
            "no process has to hold them all: choose another folder, or free some space."
        )

    def wrote(self, count: int) -> None:
        """So many bytes more; now and then all pages are left to the system, which has them in the file."""
        self._fresh += count
        if self._fresh > AT_ONCE and hasattr(mmap, "MADV_DONTNEED"):
            self._fresh = 0
            for pages in self._pages:
                pages.madvise(mmap.MADV_DONTNEED)

    def sync(self) -> None:
        """Until all is on the disk, where processes of other machines read it; then the file is closed."""
        os.ftruncate(self._handle, max(1, self._end))  # nothing at all could not be mapped
        os.fsync(self._handle)
        os.close(self._handle)


class _Counted(TorchDispatchMode):
    """Tells a file how much is computed, most of which goes into it while a net is made."""

    def __init__(self, file: _File) -> None:
        super().__init__()
        self._file = file

    def __torch_dispatch__(
        self,
        function: Callable[..., object],
        types: object,
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        found = function(*args, **(kwargs or {}))
        if isinstance(found, Tensor):
            self._file.wrote(found.nbytes)
        return found
