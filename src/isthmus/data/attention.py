"""Where a model looked while it wrote, and how several endings share their beginning."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from isthmus.batch import IGNORE
from isthmus.data.record import Example, Span


@dataclass(frozen=True, slots=True)
class Attention:
    """An answer's ``text``, its ``tokens``, and one map per visual: (layers, tokens, F, rows, columns) of patches.

    A map of a token sums to 1 over the patches of the visual it saw, and is zero on every other visual.
    """

    text: str
    tokens: tuple[str, ...]
    maps: tuple[Tensor, ...]


def with_answer(prompt: Example, answer: Sequence[int]) -> Example:
    """A prompt of stream ``lm`` with the tokens of an answer behind it, which see what its last token sees."""
    span = prompt.streams["lm"]
    seen = None if span.seen is None else [*span.seen, *span.seen[-1:] * len(answer)]
    return replace(prompt, streams={**prompt.streams, "lm": Span([*span.ids, *answer], None, seen)})


def shared_beginning(examples: Sequence[Example]) -> tuple[Example, list[Tensor], list[Tensor]] | None:
    """What all the examples begin with as one example without labels, then each one's ids and labels behind it.

    Nothing learnt is in the beginning, and all visuals are; none when there is no such beginning.
    """
    spans = [example.streams["lm"] for example in examples]
    first = spans[0]
    end = min(next((i for i, w in enumerate(s.labels or ()) if w != IGNORE), len(s.ids)) for s in spans)
    end = next((i for i in range(end) if any(s.ids[i] != first.ids[i] for s in spans)), end)
    visuals = [[v.content_key() for v in example.visuals] for example in examples]
    behind = any(place.start >= end for example in examples for place in example.places)
    if end < 1 or behind or any(keys != visuals[0] for keys in visuals):
        return None
    seen = None if first.seen is None else first.seen[:end]
    beginning = replace(examples[0], streams={"lm": Span(first.ids[:end], None, seen)})
    return (
        beginning,
        [torch.tensor(s.ids[end:]) for s in spans],
        [torch.tensor((s.labels or [])[end:]) for s in spans],
    )
