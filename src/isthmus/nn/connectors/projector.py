"""Projector: LLaVA's connector, one linear layer (2304.08485, eq. 1) or an MLP with exact GELU (2310.03744, sec. 3.3).

Legend: N visuals, F frames, P patches, D width of the features, D_out width of the language model.
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from isthmus.batch import Tokens
from isthmus.errors import ConfigError
from isthmus.nn.connectors.base import Connector, by_frame


class Projector(Connector):
    """``depth`` linear layers ``linear_1`` … with the exact (erf) GELU between them, applied to every patch alone.

    Initialised as PyTorch's linear layers are, like the original code. Raises ConfigError for a depth below 1.
    """

    def __init__(self, vision_width: int, out_width: int, *, depth: int = 2) -> None:
        super().__init__()
        if depth < 1:
            raise ConfigError(f"a projector has at least one layer, not {depth}.")
        for number in range(1, depth + 1):
            self.add_module(f"linear_{number}", nn.Linear(vision_width if number == 1 else out_width, out_width))

    def forward(self, features: Float[Tensor, "N F P D"], text: Tokens | None = None) -> Float[Tensor, "N R D_out"]:
        """(N, F, P, D) -> (N, F·P, D_out), frame after frame."""
        x = features.flatten(1, 2)
        for number, layer in enumerate(self.children()):
            x = layer(F.gelu(x) if number else x)
        return x

    def num_tokens(self, frames: int, grid: tuple[int, int]) -> int:
        """Every patch of every frame becomes one token."""
        return frames * math.prod(grid)

    def patch_weights(self, features: Float[Tensor, "N F P D"], text: Tokens | None = None) -> Float[Tensor, "N R F P"]:
        """(N, F·P, F, P): each token is one patch."""
        count, frames, patches = features.shape[:3]
        return by_frame(torch.eye(patches, device=features.device).expand(count, frames, -1, -1))
