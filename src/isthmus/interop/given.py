"""What a user names beside a checkpoint that leaves something out, and what opening one comes to."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, Protocol, TypeAlias, cast

import torch
from torch import Tensor

from isthmus.data.images import ImageTransform
from isthmus.data.processor import Processor
from isthmus.errors import CheckpointError
from isthmus.interop.export import AnySource
from isthmus.language import LibraryLM
from isthmus.load_report import Account
from isthmus.net import Net
from isthmus.nn.vit import VisionConfig

Opened: TypeAlias = tuple[Net, Processor, tuple[int, ...]]
"""Net, processor, ids that must never be generated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Given:
    """What the user names beside a checkpoint; ``open``, which loads a model folder of any kind; and the ``account`` of
    the checkpoint's tensors, where every reader writes down what it does with them.

    ``vision``, ``language`` and ``base`` (of adapters of ours, as ``unquantised``: no reader of others takes them) are
    models;
    ``tokenizer`` a folder or OpenAI's merge table; ``activation`` that of a CLIP whose weights do not say it
    (``quick_gelu`` for weights trained by OpenAI's code, mostly ``gelu`` else); ``head_width`` that of its attention
    heads, where its size is none that was published. ``dtype`` is what the model is cast to when it is open, for
    readers that can save the way there.
    """

    open: Callable[[str | Path], AnySource]
    account: Account
    vision: str | Path | None = None
    language: str | Path | None = None
    base: str | Path | None = None
    unquantised: bool | None = None
    tokenizer: str | Path | None = None
    activation: str | None = None
    head_width: int | None = None
    dtype: torch.dtype | None = None

    def need(self, name: Literal["vision", "language", "tokenizer"], where: Path, why: str) -> str | Path:
        """Where that is. Raises CheckpointError unless it was named."""
        value: str | Path | None = getattr(self, name)
        if value is None:
            raise lacking(name, where, why)
        return value

    def only(self, *used: str, where: Path) -> None:
        """Raises CheckpointError for an argument that this checkpoint has no use for."""
        for field in fields(self):
            if field.name not in ("open", "account", "dtype", *used) and getattr(self, field.name) is not None:
                raise CheckpointError(f"{where} needs no {field.name}: leave it out.")

    def encoder(self, path: str | Path) -> "Encoder":
        """The vision encoder of a model that has one, or that is one. Raises CheckpointError for another model."""
        model = self.open(path)
        if model.net.part("vision") is None or model.processor.image is None:
            raise CheckpointError(f"{path} is a {model.kind} model without a vision encoder: give vision=… another.")
        return Encoder(model.net.vision.config, model.net.vision.state_dict(), model.processor.image)


def lacking(name: str, where: Path, why: str) -> CheckpointError:
    """That the argument ``name`` is due, and why."""
    return CheckpointError(f"{where} {why}: give {name}=… (on the command line --{name}).")


class _Talks(Protocol):
    @property
    def language(self) -> LibraryLM: ...


def language_of(model: AnySource) -> LibraryLM:
    """Of a model that has one, or that is one; another has no such attribute."""
    return cast(_Talks, model.net).language


@dataclass(frozen=True, slots=True)
class Encoder:
    """A vision encoder by itself: configuration, our state dict, image transform."""

    config: VisionConfig
    state: Mapping[str, Tensor]
    image: ImageTransform
