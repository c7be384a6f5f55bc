"""Odd pictures: of all modes and shapes, and photographs that a camera stored lying on their side."""

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image as PilImage

_ORIENTATION = 0x0112


def pictures(dice: random.Random) -> Iterator[PilImage.Image]:
    """A new choice of odd sizes and modes for each draw."""
    noise = np.random.default_rng(dice.randrange(2**31))

    def coloured(width: int, height: int) -> PilImage.Image:
        return PilImage.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8))

    strip = (dice.randint(200, 700), 3)
    for size in ((dice.randint(1, 90), dice.randint(1, 90)), (33, 32), (32, 32), (1, 1), strip, strip[::-1]):
        yield coloured(*size)
    plain = coloured(40, 61)
    for mode in dice.sample(("L", "1", "P", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "I", "F"), 3):
        yield plain.convert(mode)
    yield plain.convert("RGBA").convert("RGBa")
    palette = plain.convert("P")
    palette.info["transparency"] = dice.randrange(256)
    yield palette
    yield PilImage.fromarray(noise.integers(0, 65536, (31, 45), dtype=np.uint16))
    yield PilImage.fromarray(noise.normal(100.0, 200.0, (31, 45)).astype(np.float32))


def turned(dice: random.Random, folder: Path) -> Path:
    """A JPEG whose EXIF data say how it is to be turned."""
    picture, facts = next(pictures(dice)), PilImage.Exif()
    facts[_ORIENTATION] = dice.randint(2, 8)
    path = folder / "turned.jpg"
    picture.save(path, exif=facts)
    return path
