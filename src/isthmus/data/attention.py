"""Where a model looked while it wrote."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

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
