"""What an answer depends on: what the model attended to for each of its words, and what covering each region changes.

Attention says where information was taken from, not what was made of it; covering a region and scoring the same answer
again (occlusion; Zeiler and Fergus 2013, 1311.2901, sec. 4.2) runs the model itself.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from PIL import Image as PilImage
from PIL import ImageDraw
from torch import Tensor

from isthmus.comparison.curves import overlay
from isthmus.data.images import as_image
from isthmus.data.record import Record, Text
from isthmus.errors import CapabilityError, ConfigError, DataError
from isthmus.model import Model

SIDE = 448
"""Pixels of a written picture's short side, at least."""

_GREY = (128, 128, 128)
_LESS, _MORE = (214, 40, 40), (40, 90, 214)


@dataclass(frozen=True, slots=True)
class Covered:
    """Log-probability (natural log) of an ``answer``, and by how much covering each cell lowers it, (cells, cells)."""

    answer: str
    logprob: float
    drop: Tensor


def request(picture: PilImage.Image, question: str) -> Record:
    """A question about a picture."""
    return Record(id="look", parts=(as_image(picture), Text(question, role="user")))


def word_pictures(
    model: Model, picture: PilImage.Image, question: str, *, max_new_tokens: int
) -> tuple[str, list[tuple[str, PilImage.Image]]]:
    """The answer, and for each of its words the picture as the model gets it, bright where its attention was.

    Raises CapabilityError for a model without maps.
    """
    transform = model.processor.image
    if transform is None:
        raise CapabilityError("This model reads only text, so there is no picture to attend to.")
    found = model.attend([request(picture, question)], max_new_tokens=max_new_tokens)[0]
    shown = enlarged(transform.views(picture)[0] if transform.mode == "anyres" else transform.fit(picture))
    maps = found.heat(0) if found.maps else []
    return found.text, [(word, overlay(shown, heat[0])) for (word, _), heat in zip(found.words(), maps, strict=True)]


def cover(
    model: Model,
    picture: PilImage.Image,
    question: str,
    answer: str,
    *,
    cells: int,
    note: Callable[[int, int], None] = lambda done, of: None,
) -> Covered:
    """Cover each cell of a grid in grey and score the answer again; ``note`` hears of the progress.

    Raises DataError for an empty answer, ConfigError for a grid finer than the picture, CapabilityError for a model
    that scores no answers.
    """
    model.need("score")
    if not answer.strip():
        raise DataError("the answer is empty, so covering the picture cannot change it; ask something else")
    if not 1 <= cells <= min(picture.size):
        raise ConfigError(f"a picture of {picture.width} x {picture.height} has no grid of {cells} cells a side")

    def logprob(image: PilImage.Image) -> float:
        return model.score(request(image, question).parts, [answer])[0]

    plain, drops = logprob(picture), []
    for number, box in enumerate(boxes(picture.size, cells), 1):
        hidden = picture.copy()
        hidden.paste(_GREY, box)
        drops.append(plain - logprob(hidden))
        note(number, cells * cells)
    return Covered(answer, plain, torch.tensor(drops).view(cells, cells))


def boxes(size: Sequence[int], cells: int) -> Iterator[tuple[int, int, int, int]]:
    """Left, top, right, bottom of each cell, row by row; together they cover the picture."""
    across, down = ([side * n // cells for n in range(cells + 1)] for side in size)
    for top, bottom in pairwise(down):
        for left, right in pairwise(across):
            yield left, top, right, bottom


def drawn(picture: PilImage.Image, covered: Covered) -> PilImage.Image:
    """The picture, grey, with cells red where covering made the answer less likely and blue where likelier; the
    greatest change is the strongest colour."""
    picture = enlarged(picture).convert("L").convert("RGB")
    tint, mask = picture.copy(), PilImage.new("L", picture.size)
    colours, shades = ImageDraw.Draw(tint), ImageDraw.Draw(mask)
    drops = covered.drop.flatten().tolist()
    most = max((abs(drop) for drop in drops), default=0) or 1
    for drop, (left, top, right, bottom) in zip(drops, boxes(picture.size, len(covered.drop)), strict=True):
        area = (left, top, right - 1, bottom - 1)
        colours.rectangle(area, _LESS if drop > 0 else _MORE)
        shades.rectangle(area, round(200 * abs(drop) / most))
    return PilImage.composite(tint, picture, mask)


def enlarged(picture: PilImage.Image) -> PilImage.Image:
    """At least SIDE pixels on the short side."""
    times = max(1.0, SIDE / min(picture.size))
    return picture.resize((round(picture.width * times), round(picture.height * times)), PilImage.Resampling.BICUBIC)
