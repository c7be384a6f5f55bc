"""Batch: what a net sees, and Term: what its loss answers with.

Shapes: B rows, T tokens, N visuals of the batch, F frames, P patches, D width, K places.

A batch holds named token streams (``text`` for CLIP, ``lm`` for a decoder, later ``qformer``, ``encoder``,
``decoder``), visuals grouped by equal shape, and the places where visuals stand in a stream. Padding is the
batch's private matter: rows are right-padded and carry their lengths, and no loss depends on the padding.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import SupportsInt, TypeVar

import torch
from torch import Tensor

from isthmus.errors import ConfigError, DataError

T = TypeVar("T")

CAUSAL = "lm"
"""The stream of a causal language model; an encoder-decoder reads ``encoder`` and writes ``decoder``."""
IGNORE = -100
"""Label of a position where nothing is learnt (the value PyTorch's cross-entropy ignores)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """One token stream of a batch, right-padded. ``ids`` (B, T), ``lengths`` (B,), ``labels`` (B, T) or none.

    ``media_index`` (B, T) is the number from 1 of the row's visual that a token may attend to, 0 for none; only streams
    with cross-attention to visuals have it (Flamingo's index φ).
    """

    ids: Tensor
    lengths: Tensor
    labels: Tensor | None = None
    media_index: Tensor | None = None

    @property
    def mask(self) -> Tensor:
        """(B, T) bool, true on real tokens. Built from lengths, never from a pad id that text may contain."""
        return torch.arange(self.ids.shape[1], device=self.ids.device)[None] < self.lengths[:, None]

    def rows(self, index: Tensor | slice) -> "Tokens":
        """The named rows, re-padded to their own longest."""
        lengths = self.lengths[index]
        longest = int(lengths.max()) if len(lengths) else 0
        labels = None if self.labels is None else self.labels[index, :longest]
        media_index = None if self.media_index is None else self.media_index[index, :longest]
        return Tokens(ids=self.ids[index, :longest], lengths=lengths, labels=labels, media_index=media_index)


@dataclass(frozen=True, slots=True, kw_only=True)
class Visuals:
    """Visuals of one shape. ``index`` (n,) are their positions 0..N-1 in the batch's order of visuals.

    Exactly one of ``pixels`` (n, F, 3, H, W; normalised) and ``features`` (n, F, P, D; from a cache) is given.
    ``sizes`` (n, 2) are height and width of the pictures as they came, where the frames are views of one (AnyRes).
    """

    index: Tensor
    pixels: Tensor | None = None
    features: Tensor | None = None
    sizes: Tensor | None = None

    def to(self, device: torch.device | str) -> "Visuals":
        return Visuals(
            index=self.index.to(device),
            pixels=_moved(self.pixels, device),
            features=_moved(self.features, device),
            sizes=self.sizes,  # only counted with, never computed with
        )

    def pick(self, local: Sequence[int], index: Tensor) -> "Visuals":
        """The named ones of the group under new numbers."""
        chosen = list(local)
        return Visuals(
            index=index,
            pixels=None if self.pixels is None else self.pixels[chosen],
            features=None if self.features is None else self.features[chosen],
            sizes=None if self.sizes is None else self.sizes[chosen],
        )


def _moved(value: Tensor | None, device: torch.device | str) -> Tensor | None:
    return None if value is None else value.to(device)


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where visuals stand in one stream: K places, each (row, visual 0..N-1, start, length in tokens)."""

    row: Tensor
    visual: Tensor
    start: Tensor
    length: Tensor

    @staticmethod
    def none() -> "Places":
        zero = torch.zeros(0, dtype=torch.long)
        return Places(row=zero, visual=zero, start=zero, length=zero)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """B rows ready for a net.

    ``owner`` (N,) is the row each visual belongs to; ``keys`` their content keys (equal key = equal picture).
    ``loss_weights`` are the weights of the sources' mean losses in a step that weighs them (Flamingo's λ); empty
    where all tokens count alike.
    """

    ids: tuple[str, ...]
    sources: tuple[str, ...]
    text: Mapping[str, Tokens]
    visuals: tuple[Visuals, ...] = ()
    places: Mapping[str, Places] = field(default_factory=dict)
    owner: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    keys: tuple[str, ...] = ()
    loss_weights: Mapping[str, float] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_visuals(self) -> int:
        return len(self.keys)

    def supervised(self) -> int:
        """Number of learnt tokens over all streams (next-token targets; position 0 is never a target)."""
        streams = (t.labels for t in self.text.values() if t.labels is not None)
        return sum(int((labels[:, 1:] != IGNORE).sum()) for labels in streams)

    def visual_of_rows(self, what: str) -> Tensor:
        """(B,) the visual of each row. Raises DataError, saying that ``what`` wants it, unless each owns one."""
        counts = torch.bincount(self.owner, minlength=len(self))
        if len(self) == 0 or bool((counts != 1).any()):
            row = int((counts != 1).int().argmax()) if len(self) else 0
            found = f"sample {self.ids[row]!r} has {int(counts[row])}" if len(self) else "the batch is empty"
            raise DataError(f"{what} wants one picture per sample; {found}.")
        return torch.argsort(self.owner)

    def per_visual(self, make: Callable[[Visuals], Iterable[T]]) -> list[T]:
        """What ``make`` gives for the members of each group of visuals, in the batch's order of visuals. Raises
        ConfigError where it gives another number."""
        found: dict[int, T] = {}
        for group in self.visuals:
            numbers, made = group.index.tolist(), list(make(group))
            if len(made) != len(numbers):
                raise ConfigError(
                    f"what the net made of {len(numbers)} visuals is of {len(made)}: encoder and connector keep the "
                    "first axis, one entry per visual."
                )
            found.update(zip(numbers, made, strict=True))
        return [found[number] for number in range(len(found))]

    def per_row(self, make: Callable[[Visuals], Iterable[T]], what: str) -> list[T]:
        """The same in the order of rows that own one visual each; DataError as :meth:`visual_of_rows` raises it."""
        order = self.visual_of_rows(what)
        found = self.per_visual(make)
        return [found[number] for number in order.tolist()]

    def to(self, device: torch.device | str) -> "Batch":
        return replace(
            self,
            text={
                k: Tokens(
                    ids=t.ids.to(device),
                    lengths=t.lengths.to(device),
                    labels=_moved(t.labels, device),
                    media_index=_moved(t.media_index, device),
                )
                for k, t in self.text.items()
            },
            visuals=tuple(group.to(device) for group in self.visuals),
            places={
                k: Places(
                    row=p.row.to(device),
                    visual=p.visual.to(device),
                    start=p.start.to(device),
                    length=p.length.to(device),
                )
                for k, p in self.places.items()
            },
            owner=self.owner.to(device),
        )

    def select(self, rows: Sequence[int]) -> "Batch":
        """The named rows as a batch of their own, visuals renumbered, padding cut to the new longest row."""
        index = torch.as_tensor(list(rows), dtype=torch.long)
        new_row = {int(r): i for i, r in enumerate(rows)}
        kept = [n for r in rows for n in torch.nonzero(self.owner == int(r)).flatten().tolist()]
        new_visual = {n: i for i, n in enumerate(kept)}
        visuals = []
        for group in self.visuals:
            local = [j for j, n in enumerate(group.index.tolist()) if n in new_visual]
            if local:
                numbers = torch.as_tensor([new_visual[int(group.index[j])] for j in local])
                visuals.append(group.pick(local, numbers))
        places = {}
        for name, p in self.places.items():
            k = [i for i, r in enumerate(p.row.tolist()) if r in new_row]
            places[name] = Places(
                row=torch.as_tensor([new_row[int(p.row[i])] for i in k], dtype=torch.long),
                visual=torch.as_tensor([new_visual[int(p.visual[i])] for i in k], dtype=torch.long),
                start=p.start[k],
                length=p.length[k],
            )
        return Batch(
            ids=tuple(self.ids[r] for r in rows),
            sources=tuple(self.sources[r] for r in rows),
            text={k: t.rows(index) for k, t in self.text.items()},
            visuals=tuple(visuals),
            places=places,
            owner=torch.as_tensor([new_row[int(self.owner[n])] for n in kept], dtype=torch.long),
            keys=tuple(self.keys[n] for n in kept),
            loss_weights=self.loss_weights,
        )

    def split(self, parts: int) -> list["Batch"]:
        """Contiguous micro-batches of (nearly) equal row counts; never an empty one."""
        return [self.select(rows) for rows in in_parts(range(len(self)), parts)]


def in_parts(rows: Sequence[T], parts: int) -> list[Sequence[T]]:
    """Contiguous parts of (nearly) equal size; never an empty one."""
    bounds = [round(i * len(rows) / parts) for i in range(parts + 1)]
    return [rows[a:b] for a, b in pairwise(bounds) if b > a]


@dataclass(frozen=True, slots=True)
class Term:
    """One named part of a loss: ``total`` (scalar, a sum) over ``count`` items; its mean is total / count.

    ``scope`` says over what the sum may be split: a ``token`` term adds up over any micro-batches or ranks; a
    ``batch`` term (contrastive, matching) belongs to the step's full batch and must not be split. ``weight`` is what
    the mean counts in the step's loss. A term of one source's rows is called ``stream/source``. A ``count`` of numpy's
    or in a tensor becomes an int where it is a whole number.
    """

    total: Tensor
    count: int
    scope: str = "token"
    weight: float = 1.0

    def __post_init__(self) -> None:
        if (count := _whole(self.count)) is not None:
            object.__setattr__(self, "count", count)

    @property
    def mean(self) -> Tensor:
        return self.total / max(self.count, 1)


def _whole(value: object) -> int | None:
    """The whole number that a value is, if it is one."""
    if not isinstance(value, SupportsInt):
        return None
    try:
        number = int(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # several numbers, or none that is finite
        return None
    return number if number == value else None
