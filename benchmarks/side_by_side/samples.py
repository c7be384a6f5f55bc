"""What the rows read, and features made of it once."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from benchmarks.side_by_side.models import Sizes, picture
from torch import Tensor

from isthmus.batch import Batch
from isthmus.data.cache import Features
from isthmus.data.record import Example, Record, Text

LONG = "how many of them are there, seen from the left? "


def contrast_records(rows: int, side: int) -> list[Record]:
    """Pictures with captions of 21 words, each its own."""
    return [Record(str(n), (picture(n, side), Text(LONG * 2 + str(n), role="text", learn=True))) for n in range(rows)]


def interleaved_records(rows: int, side: int) -> list[Record]:
    """Rows of three pictures, a text behind each."""
    found = []
    for n in range(rows):
        parts: list[Any] = []
        for k in range(3):
            parts += [picture(3 * n + k, side), Text(LONG, role="text", learn=True)]
        found.append(Record(str(n), tuple(parts)))
    return found


def pixels_of(batch: Batch) -> Tensor:
    """Those of its first group of visuals."""
    found = batch.visuals[0].pixels
    assert found is not None
    return found


def with_features(net: Any, example: Example) -> Example:
    pairs = zip(example.visuals, example.pixels, strict=True)
    made: list[Features] = []
    for image, make in pairs:
        pixels = make(image)
        assert isinstance(pixels, Tensor)
        made.append(Features(net.visual_features(pixels[None, None])[0]))
    return replace(example, pixels=tuple(lambda image, features=features: features for features in made))


def step(net: Any, loss: Callable[[], Tensor], sizes: Sizes) -> Callable[[], float]:
    """One side of a training row: loss and gradients; answers with the loss."""

    def run() -> float:
        net.zero_grad()
        with sizes.autocast():
            found = loss()
        found.backward()
        return float(found.detach())

    return run


def own_step(net: Any, batch: Batch, sizes: Sizes) -> Callable[[], float]:
    """The same of one of our nets, whose loss has one term."""

    def mean() -> Tensor:
        (term,) = net.loss(batch).values()
        return term.total / term.count

    return step(net, mean, sizes)
