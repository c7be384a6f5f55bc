"""Where a model looked while it answered, as pictures: bright where its attention was, dim elsewhere."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image as PilImage
from torch import Tensor

from isthmus.data.images import open_image
from isthmus.data.record import Record, without_answer
from isthmus.errors import CapabilityError
from isthmus.model import Model
from isthmus.recipes.curves import png

_DIM = 0.18
"""Brightness of what was not looked at at all."""
_COLOURS = 64


def looks(model: Model, records: Sequence[Record], decoding: Mapping[str, Any]) -> dict[str, bytes]:
    """Record id -> PNG of its first picture as the model saw it, lit by the mean attention over layers and new tokens.

    Empty for a model without maps; an answer without a token has none.
    """
    transform = getattr(model.processor, "image", None)
    seeing = [r for r in records if r.images]
    if transform is None or "attend" not in model.capabilities or not seeing:
        return {}
    try:
        found = model.attend([without_answer(r) for r in seeing], **decoding)
    except CapabilityError:  # a connector whose tokens cannot be traced back to patches
        return {}
    return {
        record.id: png(overlay(transform.fit(open_image(record.images[0].source)), attention.maps[0].mean((0, 1))[0]))
        for record, attention in zip(seeing, found, strict=True)
        if attention.tokens
    }


def overlay(picture: PilImage.Image, heat: Tensor) -> PilImage.Image:
    """The picture lit by ``heat`` (rows, columns), any scale: full brightness where it is highest."""
    levels = heat / heat.max().clamp(min=1e-12)
    size = (picture.height, picture.width)
    light = torch.nn.functional.interpolate(levels[None, None].float(), size, mode="bilinear")[0, 0].numpy()
    lit = np.asarray(picture.convert("RGB"), dtype=np.float32) * (_DIM + (1 - _DIM) * light[..., None])
    return PilImage.fromarray(lit.round().astype(np.uint8)).quantize(_COLOURS)  # a page may hold hundreds
