"""Rows of like length together: no work for the padding of a batch, where its rows need not be computed side by side.

On a CPU a step takes as long as its padded tokens, and captions of one batch fill three quarters of them. But a block
casts and adds up all weights' gradients anew, which half precision does not make quicker: there a block must be larger
to pay. A GPU would rather have one large launch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

RowIndex = Tensor | slice
"""Numbers of rows, or all of them as they stand, which indexes without a copy."""

_ALL = slice(None)
_MOST = 4
_FEWEST_TOKENS = 512
_FEWEST_TOKENS_HALF = 4096
"""Fewest padded tokens that make a block of their own worth its while, in float32 and in half precision."""
_WORTH = 0.9


def blocks_by_length(lengths: Tensor) -> list[RowIndex]:
    """The numbers of the rows with these ``lengths`` (B,) in up to four blocks, the longest rows first.

    Fewer where blocks would be small, and one of all rows where they would save less than a tenth of the padded
    tokens, or on a GPU.
    """
    if len(lengths) < 2 or lengths.device.type != "cpu":
        return [_ALL]
    fewest = _FEWEST_TOKENS_HALF if torch.is_autocast_enabled("cpu") else _FEWEST_TOKENS
    blocks = min(_MOST, len(lengths), len(lengths) * int(lengths.max()) // fewest)
    if blocks < 2:
        return [_ALL]
    order = torch.argsort(lengths, descending=True, stable=True)
    parts = order.tensor_split(blocks)
    padded = sum(len(part) * int(lengths[part[0]]) for part in parts)
    return [*parts] if padded <= _WORTH * len(lengths) * int(lengths.max()) else [_ALL]


def in_blocks(lengths: Tensor, run: Callable[[RowIndex], Tensor]) -> Tensor:
    """``run`` on each of :func:`blocks_by_length`, its outputs (one per row) back in the rows' order."""
    blocks = blocks_by_length(lengths)
    if len(blocks) == 1:
        return run(blocks[0])
    order = torch.cat([torch.arange(len(lengths))[rows] for rows in blocks])
    return torch.cat([run(rows) for rows in blocks])[torch.argsort(order)]
