"""AnyRes: a large picture as an overview and the tiles of a canvas (LLaVA 1.6; no paper, the released code).

    picture h x w ─ best canvas H x W ─→ [overview, tile, tile, …] ─ vision, connector ─→ (1 + tiles, P, D)
    ─ arrange ─→ [ tokens of the overview | the tiles stitched to one map, its padding cut off, a newline after each row
    ]

Sizes are (height, width) throughout. Legend: F views (the overview and the tiles), P tokens per view, D width, R tokens
of the picture, G patches along the side of a view.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from isthmus.errors import ConfigError

Size = tuple[int, int]
"""Height and width in pixels."""

PINPOINTS: tuple[Size, ...] = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
"""The canvases of the published 1.6 models, in transformers' order. The original code reads each pair as (width,
height), which exchanges two neighbours: see :func:`turned`."""


def turned(pinpoints: Sequence[Size]) -> tuple[Size, ...]:
    """The same list read the other way round. It decides between canvases that serve a picture equally: of pictures of
    common shapes those no larger than one tile."""
    return tuple((width, height) for height, width in pinpoints)


def check_pinpoints(pinpoints: Sequence[Size], tile: int) -> None:
    """Raises ConfigError for a canvas that is no whole number of tiles of ``tile`` pixels."""
    for height, width in pinpoints:
        if height < 1 or width < 1 or height % tile or width % tile:
            raise ConfigError(
                f"pinpoints: a canvas of {height} x {width} pixels is not cut into whole tiles of {tile} x {tile}."
            )


def best_canvas(size: Size, pinpoints: Sequence[Size]) -> Size:
    """The canvas on which most of the picture's pixels survive; of equals that with least left over, then the first.

    In floating point, as in the published code, which decides by the last bit at some sizes.
    """
    height, width = size

    def worth(canvas: Size) -> tuple[int, int]:
        scale = min(canvas[1] / width, canvas[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, -(canvas[0] * canvas[1] - kept)

    return max(pinpoints, key=worth)


def fitted(size: Size, canvas: Size) -> Size:
    """Height and width of the picture on the canvas: its shape kept, one side the canvas's, the other rounded up."""
    (height, width), (rows, columns) = size, canvas
    across, down = columns / width, rows / height
    if across < down:
        return min(math.ceil(height * across), rows), columns
    return rows, min(math.ceil(width * down), columns)


def unpadded(size: Size, grid: Size) -> Size:
    """Rows and columns of a patch map of ``grid`` that are left when what the canvas added is cut off both ends."""
    (height, width), (rows, columns) = size, grid
    if width * rows > columns * height:
        return rows - 2 * ((rows - height * columns // width) // 2), columns
    return rows, columns - 2 * ((columns - width * rows // height) // 2)


def patch_map(size: Size, pinpoints: Sequence[Size], tile: int, side: int) -> Size:
    """Rows and columns of the stitched map of all tiles, ``side`` patches along each."""
    height, width = best_canvas(size, pinpoints)
    return height // tile * side, width // tile * side


def num_tokens(size: Size, pinpoints: Sequence[Size], *, tile: int, side: int) -> int:
    """R of a picture of that size: those of the overview, and those of the map with a newline per row."""
    rows, columns = unpadded(size, patch_map(size, pinpoints, tile, side))
    return side * side + rows * (columns + 1)


def arrange(tokens: Tensor, size: Size, pinpoints: Sequence[Size], *, tile: int, newline: Tensor) -> Tensor:
    """(F, P, D) tokens of the views and (D,) newline -> (R, D). P must be a square number."""
    side = math.isqrt(tokens.shape[1])
    rows, columns = grid = patch_map(size, pinpoints, tile, side)
    tiles = tokens[1:].unflatten(1, (side, side)).unflatten(0, (rows // side, columns // side))
    stitched = tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)
    kept = unpadded(size, grid)
    top, left = (rows - kept[0]) // 2, (columns - kept[1]) // 2
    stitched = stitched[top : top + kept[0], left : left + kept[1]]
    lines = torch.cat([stitched, newline.to(stitched.dtype).expand(kept[0], 1, -1)], dim=1)
    return torch.cat([tokens[0], lines.flatten(0, 1)])
