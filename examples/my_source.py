"""A data source of one's own: an ID card per sample, drawn when it is read, and a question about what is on it.

In a recipe, relative to the recipe's file:

    data:
      - {kind: my_source.py:Cards, count: 1000}

or on the command line, relative to the working folder:

    isthmus eval MODEL --task vqa --data examples/my_source.py:Cards --set count=100

A source gives records by number. The options are those of ``__init__``, checked against its annotations. A record is
cheap: its picture is made by ``read()``, when a loader needs the pixels, and ``describe()`` names it for errors.
"""

import io
import random
from dataclasses import dataclass

from PIL import Image as PilImage
from PIL import ImageDraw

from isthmus.data.mix import Source
from isthmus.data.record import Image, Record, Text

COLOURS = ("red", "green", "blue", "yellow")


@dataclass(frozen=True)
class Card:
    """A coloured card with some dots on it."""

    colour: str
    dots: int

    def describe(self) -> str:
        """What stands in an error about this picture; equal texts mean equal pictures."""
        return f"a {self.colour} card with {self.dots} dots"

    def read(self) -> bytes:
        """The picture as a file of any format that Pillow reads."""
        picture = PilImage.new("RGB", (64, 64), self.colour)
        draw = ImageDraw.Draw(picture)
        for number in range(self.dots):
            x, y = 8 + 16 * (number % 4), 8 + 16 * (number // 4)
            draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill="black")
        out = io.BytesIO()
        picture.save(out, "PNG")
        return out.getvalue()


class Cards(Source):
    """``count`` cards and questions, a pure function of ``seed`` and number, so that a run can go on exactly."""

    def __init__(self, *, count: int = 1000, seed: int = 0) -> None:
        self.name = "cards"
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        dice = random.Random(f"{self.seed}/{index}")
        card = Card(dice.choice(COLOURS), dice.randint(1, 9))
        question, answer, kind = dice.choice(
            [("what colour is the card?", card.colour, "colour"), ("how many dots?", str(card.dots), "count")]
        )
        parts = (Image(card), Text(question, role="user"), Text(answer, role="assistant", learn=True))
        return Record(f"{self.seed}/{index}", parts, self.name, {"kind": kind})
