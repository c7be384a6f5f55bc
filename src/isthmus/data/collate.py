"""Examples -> Batch: padding, grouping of pictures by shape, numbering of pictures and places."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from isthmus.batch import IGNORE, Batch, Places, Tokens, Visuals
from isthmus.data.record import Example, Features, Image, Span
from isthmus.data.visits import read_once
from isthmus.errors import DataError

T = TypeVar("T")


def load_pixels(example: Example) -> Example:
    """The example with its pictures decoded and kept, so that a damaged one fails here and fails alone. Each source is
    read once, for the content key too where one is due."""
    visuals, pixels = [], []
    for image, make in zip(example.visuals, example.pixels, strict=True):
        if example.keyed and not image.key:
            held = read_once(image)
            visuals.append(replace(image, key=held.key))
            pixels.append(_constant(make(held)))
        else:
            visuals.append(image)
            pixels.append(_constant(make(image)))
    return replace(example, visuals=tuple(visuals), pixels=tuple(pixels))


def collate(examples: Sequence[Example]) -> Batch:
    """One batch of all examples, rows in order. Pictures are decoded here unless :func:`load_pixels` did it.

    All examples must come from one processor, that is, hold the same streams. Raises DataError when they do not,
    or when a picture cannot be decoded.
    """
    if not examples:
        raise DataError("a batch needs at least one example")
    names = list(examples[0].streams)
    for example in examples:
        if list(example.streams) != names:
            raise DataError(
                f"sample {example.id!r} has the streams {list(example.streams)} and the batch has {names}; "
                "one batch takes the examples of one processor"
            )
    groups: dict[tuple[int, ...], list[_Found]] = {}  # pixels have one more axis than features
    places: dict[str, list[tuple[int, int, int, int]]] = {name: [] for name in names}
    owner: list[int] = []
    keys: list[str] = []
    for row, example in enumerate(examples):
        first = len(owner)
        sizes = example.sizes or (None,) * len(example.visuals)
        for image, make, size in zip(example.visuals, example.pixels, sizes, strict=True):
            value = make(image)
            if isinstance(value, Features):
                value = value.values
            elif value.ndim == 3:
                value = value[None]  # a picture is a clip of one frame
            groups.setdefault(tuple(value.shape), []).append((len(owner), value, size))
            owner.append(row)
            keys.append(image.content_key() if example.keyed else image.key)
        for place in example.places:
            places[place.stream].append((row, first + place.visual, place.start, place.length))
    return Batch(
        ids=tuple(e.id for e in examples),
        sources=tuple(e.source for e in examples),
        text={name: _pad([e.streams[name] for e in examples]) for name in names},
        visuals=tuple(_visuals(group) for group in groups.values()),
        places={name: _places(rows) for name, rows in places.items() if rows},
        owner=torch.tensor(owner, dtype=torch.long),
        keys=tuple(keys),
    )


_Found = tuple[int, Tensor, tuple[int, int] | None]
"""Number of a visual in the batch, its pixels or features, its size where it counts."""


def _visuals(group: Sequence[_Found]) -> Visuals:
    index, values = torch.tensor([n for n, _, _ in group]), torch.stack([value for _, value, _ in group])
    given = [size for _, _, size in group if size is not None]
    sizes = torch.tensor(given) if given else None
    if values.ndim == 5:
        return Visuals(index=index, pixels=values, sizes=sizes)
    return Visuals(index=index, features=values, sizes=sizes)


def _pad(spans: Sequence[Span]) -> Tokens:
    """Right-padded with id 0, which every vocabulary has; lengths say what is real."""
    lengths = [len(span.ids) for span in spans]
    ids = torch.zeros(len(spans), max(lengths), dtype=torch.long)
    learnt = any(span.labels is not None for span in spans)
    labels = torch.full_like(ids, IGNORE) if learnt else None
    media_index = torch.zeros_like(ids) if any(span.media_index is not None for span in spans) else None
    for row, span in enumerate(spans):
        ids[row, : lengths[row]] = torch.tensor(span.ids, dtype=torch.long)
        if labels is not None and span.labels is not None:
            labels[row, : lengths[row]] = torch.tensor(span.labels, dtype=torch.long)
        if media_index is not None and span.media_index is not None:
            media_index[row, : lengths[row]] = torch.tensor(span.media_index, dtype=torch.long)
    return Tokens(ids=ids, lengths=torch.tensor(lengths, dtype=torch.long), labels=labels, media_index=media_index)


def _places(rows: Sequence[tuple[int, int, int, int]]) -> Places:
    row, visual, start, length = torch.tensor(rows, dtype=torch.long).T.contiguous()
    return Places(row=row, visual=visual, start=start, length=length)


def _constant(value: T) -> Callable[[Image], T]:
    return lambda image: value
