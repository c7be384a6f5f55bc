"""Attention maps of answers as pictures: bright where the attention was, dark elsewhere."""

from collections.abc import Callable, Mapping, Sequence

from isthmus.comparison.curves import overlay, png
from isthmus.data.attention import Attention
from isthmus.data.record import Record, without_answer
from isthmus.errors import CapabilityError
from isthmus.model import Model

_COLOURS = 64
"""A page may hold hundreds of these pictures."""


def _attended(
    attend: Callable[..., list[Attention]], records: Sequence[Record], decoding: Mapping[str, object]
) -> list[Attention]:
    """With keywords as a user wrote them, which the model checks."""
    return attend(records, **decoding)


def attention_pictures(model: Model, records: Sequence[Record], decoding: Mapping[str, object]) -> dict[str, bytes]:
    """Record id -> PNG of its first picture as the model saw it, under the mean attention over layers and new tokens.

    Empty for a model without maps; an answer without a token has none.
    """
    transform = model.processor.image
    seeing = [r for r in records if r.images]
    if transform is None or "attend" not in model.capabilities or not seeing:
        return {}
    try:
        found = _attended(model.attend, [without_answer(r) for r in seeing], decoding)
    except CapabilityError:  # a connector whose tokens cannot be traced back to patches
        return {}
    shown: dict[str, bytes] = {}
    for record, attention in zip(seeing, found, strict=True):
        if attention.tokens:
            picture = transform.fit(transform.opened(record.images[0]))
            shown[record.id] = png(overlay(picture, attention.maps[0].mean((0, 1))[0]).quantize(_COLOURS))
    return shown
