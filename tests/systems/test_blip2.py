"""BLIP-2 as a system: what a recipe takes over from the model that it starts from."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from isthmus.errors import IsthmusError
from isthmus.models.blip2 import Blip2
from isthmus.systems import system
from tests.models.tiny_blip2 import VISION, tiny


@dataclass
class Part:
    """A model as a recipe's part."""

    net: Any


@torch.no_grad()
def test_a_start_at_a_larger_size_stretches_the_position_table() -> None:
    """Fine-tuning at 364 from 224 pixels: as the smaller encoder reads larger pictures, and all else as it was."""
    old = tiny()
    larger = Blip2(replace(old.config, vision=replace(VISION, image_size=2 * VISION.image_size))).eval()
    system("blip2").take(larger, {"init": Part(old)})
    pixels = torch.randn(2, 3, 2 * VISION.image_size, 2 * VISION.image_size)
    expected = old.vision(pixels, layers=(-1,), interpolate="hf", pooled=False).layers[0]
    torch.testing.assert_close(larger.vision(pixels, layers=(-1,), pooled=False).layers[0], expected)
    state = larger.state_dict()
    others = {name: t for name, t in old.state_dict().items() if name != "vision.positions"}
    assert all(torch.equal(t, state[name]) for name, t in others.items())


def test_a_start_of_other_widths_is_refused() -> None:
    other = Blip2(replace(tiny().config, vision=replace(VISION, mlp_width=2 * VISION.mlp_width)))
    with pytest.raises(IsthmusError, match="mlp"):
        system("blip2").take(other, {"init": Part(tiny())})
