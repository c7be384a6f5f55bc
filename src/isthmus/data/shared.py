"""What several examples begin with, so that a model reads it once."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from isthmus.batch import CAUSAL, IGNORE
from isthmus.data.record import Example, Span

FEW = 32
"""Tokens that are not worth reading apart, where no picture is among them."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Examples cut in two: their common ``beginning``, and what each has after it."""

    beginning: Example
    endings: list[Example]


def shared_beginning(examples: Sequence[Example]) -> tuple[Example, list[Tensor], list[Tensor]] | None:
    """What rows to be scored begin with as one example without labels, then each one's ids and labels after it.

    Nothing learnt is in the beginning, and all visuals are; none when there is no such beginning. What an
    encoder-decoder reads is the beginning of all that its decoder writes after the start token.
    """
    first, visuals = examples[0], _visuals(examples)
    if any(keys != visuals[0] for keys in visuals):
        return None
    written = "decoder" if "decoder" in first.streams else CAUSAL
    spans = [example.streams[written] for example in examples]
    others = [name for name in first.streams if name != written]
    if any(e.streams[name].ids != first.streams[name].ids for e in examples for name in others):
        return None
    end = min(next((i for i, w in enumerate(s.labels or ()) if w != IGNORE), len(s.ids)) for s in spans)
    end = 1 if written == "decoder" else _equal([s.ids for s in spans], end)
    if end < 1 or any(p.start >= end for e in examples for p in e.places if p.stream == written):
        return None
    streams = {name: Span(first.streams[name].ids) for name in others}
    if written == CAUSAL:
        media_index = spans[0].media_index
        streams[CAUSAL] = Span(spans[0].ids[:end], None, None if media_index is None else media_index[:end])
    return (
        replace(first, streams=streams),
        [torch.tensor(s.ids[end:]) for s in spans],
        [torch.tensor((s.labels or [])[end:]) for s in spans],
    )


def cut(examples: Sequence[Example]) -> Cut | None:
    """Prompts of a causal language model cut after what they all begin with, visuals and text; none where that is not
    worth reading apart. Something is left of every prompt."""
    if len(examples) < 2 or any(CAUSAL not in example.streams for example in examples):
        return None
    first, visuals = examples[0], _visuals(examples)
    others = [name for name in first.streams if name != CAUSAL]  # what else is read beside the pictures
    if any(e.streams[name].ids != first.streams[name].ids for e in examples for name in others):
        return None
    end = _equal([e.streams[CAUSAL].ids for e in examples], min(len(e.streams[CAUSAL].ids) for e in examples) - 1)
    places = [sorted((p for p in e.places if p.stream == CAUSAL), key=lambda p: p.start) for e in examples]
    count = 0
    for n, place in enumerate(places[0]):
        same = all(len(own) > n and own[n] == place for own in places)
        same = same and place.visual == n and all(keys[n] == visuals[0][n] for keys in visuals)
        if not same or place.start + place.length > end:
            end = min(end, place.start)
            break
        count = n + 1
    # A place of a longer list may begin before the end, too.
    end = min([end, *(own[count].start for own in places if len(own) > count)])
    unplaced = any(len(own) != len(e.visuals) for own, e in zip(places, examples, strict=True))
    if end < 1 or unplaced or (not count and end * (len(examples) - 1) < FEW):
        return None
    return Cut(_upto(first, end, count), [_after(example, end, count) for example in examples])


def _upto(example: Example, end: int, count: int) -> Example:
    span = example.streams[CAUSAL]
    own = Span(span.ids[:end], None, None if span.media_index is None else span.media_index[:end])
    return replace(
        example,
        streams={**example.streams, CAUSAL: own},
        visuals=example.visuals[:count],
        pixels=example.pixels[:count],
        sizes=example.sizes[:count],
        places=tuple(p for p in example.places if p.visual < count),
    )


def _after(example: Example, end: int, count: int) -> Example:
    span = example.streams[CAUSAL]
    own = Span(span.ids[end:], None, None if span.media_index is None else span.media_index[end:])
    return replace(
        example,
        streams={**example.streams, CAUSAL: own},
        visuals=example.visuals[count:],
        pixels=example.pixels[count:],
        sizes=example.sizes[count:],
        places=tuple(
            replace(p, visual=p.visual - count, start=p.start - end) for p in example.places if p.visual >= count
        ),
    )


def _visuals(examples: Sequence[Example]) -> list[list[Hashable]]:
    return [[visual.identity() for visual in example.visuals] for example in examples]


def _equal(ids: Sequence[Sequence[int]], limit: int) -> int:
    """How many of the first ``limit`` ids are the same in all rows."""
    first = ids[0]
    return next((i for i in range(limit) if any(row[i] != first[i] for row in ids)), limit)
