"""A connector of one's own: neighbours mixed by a convolution, then pooled: Honeybee's idea (2312.06742), smaller.

    features (N, F, P, D) ─ map ─→ (N·F, D, side, side) ─ 1x1 ─ 3x3 ─ GELU ─ average f x f ─ 1x1 ─→ (N, R, D_out)

Legend: N visuals, F frames, P patches of a square map, D and D_out widths of the encoder and of the language model,
f ``factor``, R = F·P/f² visual tokens.

    isthmus train examples/my_connector.yaml

The options after the two widths come from the recipe, and are checked against the annotations here.
"""

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from isthmus.errors import ConfigError
from isthmus.nn.connectors import Connector


class ConvPool(Connector):
    """See the drawing above. ``width`` is that between the convolutions."""

    def __init__(self, vision_width: int, out_width: int, *, factor: int = 2, width: int = 64) -> None:
        super().__init__()
        self.factor = factor
        self.before = nn.Conv2d(vision_width, width, 1)
        self.mix = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.after = nn.Conv2d(width, out_width, 1)

    def forward(self, features: Tensor, text: Any = None) -> Tensor:
        """(N, F, P, D) -> (N, R, D_out), frame after frame."""
        side = math.isqrt(features.shape[2])
        maps = features.flatten(0, 1).transpose(1, 2).unflatten(2, (side, side))
        mixed = F.gelu(self.mix(self.before(maps)))
        tokens = self.after(F.avg_pool2d(mixed, self.factor)).flatten(2).transpose(1, 2)
        return tokens.unflatten(0, features.shape[:2]).flatten(1, 2)

    def num_tokens(self, frames: int, grid: tuple[int, int]) -> int:
        """R: what the processor keeps as places in the text."""
        if grid[0] != grid[1] or grid[0] % self.factor:
            raise ConfigError(f"ConvPool takes a square map with a side that {self.factor} divides, not {grid}.")
        return frames * math.prod(grid) // self.factor**2
