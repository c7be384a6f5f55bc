"""Position embeddings of patches, for a connector that reads patches as a set.

A Q-Former and a resampler know a patch's position only by what the encoder left of it in the features. A language
model that gets every patch in order has positions of its own. Qwen-VL's resampler gets such embeddings as well (Bai et
al. 2023, 2308.12966, sec. 2.1).
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_TEMPERATURE = 20.0
"""Longest wave over shortest: DAB-DETR's for pictures (Liu et al. 2022, 2201.12329), where text has 10,000."""


def patch_positions(grid: tuple[int, int], width: int) -> Float[Tensor, "P {width}"]:
    """(rows · columns, width): sines and cosines of each patch's row, then of its column, mean square 1.

    A place is a share of the picture's height and width (DETR's form, Carion et al. 2020, 2005.12872), so a picture of
    any size has its own table; the shortest wave is once the picture.
    """
    quarter = width // 4
    waves = 2 * math.pi * _TEMPERATURE ** (-torch.arange(quarter) / max(quarter, 1))
    sides = []
    for count in grid:
        angles = (torch.arange(count) + 0.5)[:, None] / count * waves
        sides.append(math.sqrt(2) * torch.cat([angles.sin(), angles.cos()], dim=1))
    rows, columns = sides
    table = torch.cat([rows[:, None].expand(-1, grid[1], -1), columns[None].expand(grid[0], -1, -1)], dim=-1)
    return F.pad(table.flatten(0, 1), (0, width - 4 * quarter))


def add_patch_positions(features: Float[Tensor, "n P D"], grid: tuple[int, int]) -> Float[Tensor, "n P D"]:
    """(n, P, D) or (n, 1 + P, D) features with each patch's position added; a class token in front stays as it is.

    A position is as large as the features it is added to (root mean square), so that it weighs the same after
    encoders of different scales: what reads them norms them first.
    """
    patches = grid[0] * grid[1]
    table = patch_positions(grid, features.shape[-1]).to(features)
    size = features.detach().square().mean(-1, keepdim=True).sqrt()
    return features + size * F.pad(table, (0, 0, features.shape[1] - patches, 0))
