"""What every writer shares: the files to be, what is lost on the way, and how a model that does not fit is refused."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from isthmus.checkpoint import Content, Foreign
from isthmus.data.processor import Processor
from isthmus.errors import CheckpointError
from isthmus.language import Decoding
from isthmus.net import Net

NetOf = TypeVar("NetOf", bound=Net, covariant=True)
ProcessorOf = TypeVar("ProcessorOf", bound=Processor, covariant=True)
Nest: TypeAlias = "Mapping[str, Tensor | Nest]"
"""Tensors by name, in mappings of any depth."""


class Facts(Protocol):
    """What is said of a model's kind: :class:`isthmus.systems.base.System` is one."""

    title: ClassVar[str]
    pipeline: ClassVar[str]

    @property
    def exporters(self) -> Mapping[str, str]: ...


class Source(Protocol[NetOf, ProcessorOf]):
    """What a writer sees of a model whose net and processor are of these classes: :class:`isthmus.model.Model` is one.
    Which writer is for which kind of model says :data:`isthmus.interop.formats.FORMATS`."""

    prompts: dict[str, str]
    forbidden: tuple[int, ...]
    kind: str

    @property
    def net(self) -> NetOf: ...
    @property
    def processor(self) -> ProcessorOf: ...
    @property
    def system(self) -> "Facts": ...
    def ended(self, decoding: Decoding) -> Decoding: ...
    def save(self, folder: str | Path, *, extra: Mapping[str, str] | None = None, replace: bool = False) -> Path: ...


AnySource: TypeAlias = Source[Net, Processor]
"""A model of any kind."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """Files by name. ``losses``: the fields and tensors that the format has no place for and a reader can do without,
    each with why. ``notes``: what is another there and needs no leave, such as a rounding. ``opens``: how the result is
    opened there, for the model card."""

    files: Mapping[str, Content]
    losses: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    opens: str = ""


def must(fits: bool, field: str, value: object, target: str, allowed: str) -> None:
    """Raises CheckpointError, naming ``field``, unless it fits the target."""
    if not fits:
        raise CheckpointError(
            f"{target} cannot hold this model: {field} is {value!r}, and there it is {allowed}. "
            "Choose another format (`--to isthmus` holds everything)."
        )


def pickled(content: Nest) -> Foreign:
    """A file by ``torch.save``, as the format wants it: plain tensors in plain dicts, nothing else."""
    plain = _plain(content)
    return Foreign(partial(torch.save, plain), _bytes(plain) + 4096)


def shards(tensors: Mapping[str, Tensor], most: int, *, stem: str = "model") -> dict[str, Content]:
    """One safetensors file, or where it would pass ``most`` bytes several with an index, in the names all readers of
    transformers' folders know. A single tensor larger than that has a file of its own."""
    groups: list[dict[str, Tensor]] = [{}]
    held = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if groups[-1] and held + size > most:
            groups.append({})
            held = 0
        groups[-1][name] = tensor
        held += size
    if len(groups) == 1:
        return {f"{stem}.safetensors": groups[0]}
    names = [f"{stem}-{n:05d}-of-{len(groups):05d}.safetensors" for n in range(1, len(groups) + 1)]
    index = {
        "metadata": {"total_size": sum(_bytes(group) for group in groups)},
        "weight_map": {tensor: file for file, group in zip(names, groups, strict=True) for tensor in group},
    }
    return {**dict(zip(names, groups, strict=True)), f"{stem}.safetensors.index.json": index}


def common_dtype(tensors: Sequence[Tensor]) -> str:
    """The name of the dtype that most numbers have, as configurations call it: ``float32``, ``bfloat16``."""
    counts: dict[torch.dtype, int] = {}
    for tensor in tensors:
        if tensor.is_floating_point():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return str(max(counts, key=lambda d: counts[d])).removeprefix("torch.")


def _plain(content: Nest) -> Nest:
    """Bare tensors; a view is copied, as torch.save would write the entire storage of the base."""

    def own(tensor: Tensor) -> Tensor:
        bare = tensor.detach().cpu().contiguous()
        return bare if bare.untyped_storage().nbytes() == bare.nbytes else bare.clone()

    return {name: own(value) if isinstance(value, Tensor) else _plain(value) for name, value in content.items()}


def _bytes(content: Nest) -> int:
    return sum(v.numel() * v.element_size() if isinstance(v, Tensor) else _bytes(v) for v in content.values())
