"""Augmentation of training pictures: a random crop, a flip, as a pure function of the draw.

A resumed run sees the same. CLIP crops at random (2103.00020, sec. 2.4), BLIP-2 crops and flips (2301.12597, sec. 3.4).
A model's folder never holds it: answers are given about unaugmented pictures.
"""

import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from PIL import Image as PilImage
from torch import Tensor

from isthmus.data.images import ImageTransform
from isthmus.data.mix import key
from isthmus.data.record import Example, Image, Video
from isthmus.errors import ConfigError

_UNITS = 2**64


@dataclass(frozen=True, slots=True)
class Augment:
    """``crop``: the least share of the picture's area that a crop keeps (1 keeps all); its aspect is the picture's own.
    ``flip``: mirror every second picture left to right, which spoils words such as "left of". Raises ConfigError.
    """

    crop: float = 1.0
    flip: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.crop <= 1:
            raise ConfigError(f"augment: crop is the least share of the area to keep, in (0, 1], not {self.crop}")

    def __call__(self, example: Example, transform: ImageTransform | None, draw: int) -> Example:
        """The example with its pictures' pixels augmented as ``draw`` decides; a clip's frames all alike.

        Raises ConfigError for a crop of what is cut into tiles: the sample's tokens are counted by then."""
        if transform is None or not example.visuals:
            return example
        if self.crop < 1 and transform.mode == "anyres":
            raise ConfigError("augment: a crop changes how many tiles a picture has; with image mode anyres only flip.")
        pixels = (
            partial(self.pixels, transform=transform, draw=key("augment", draw, n)) for n in range(len(example.visuals))
        )
        return replace(example, pixels=tuple(pixels))

    def pixels(self, visual: Image, transform: ImageTransform, draw: int) -> Float[Tensor, "*frames 3 height width"]:
        """What ``transform`` makes of the augmented picture, or of every frame of a clip."""
        if isinstance(visual, Video):
            return torch.stack([transform(self.picture(frame, draw)) for frame in visual.source.read()])
        return transform(self.picture(transform.opened(visual), draw))

    def picture(self, picture: PilImage.Image, draw: int) -> PilImage.Image:
        share, across, down, mirrored = (key(draw, word) / _UNITS for word in ("share", "across", "down", "mirrored"))
        side = math.sqrt(self.crop + (1 - self.crop) * share)
        width, height = (max(1, round(length * side)) for length in picture.size)
        left, top = int(across * (picture.width - width + 1)), int(down * (picture.height - height + 1))
        if (width, height) != picture.size:
            picture = picture.crop((left, top, left + width, top + height))
        if self.flip and mirrored < 0.5:
            picture = picture.transpose(PilImage.Transpose.FLIP_LEFT_RIGHT)
        return picture
