"""Rows of like length together: no work for the padding of a batch, where its rows need not be computed side by side.

On a CPU a step takes as long as its padded tokens, and captions of one batch fill three quarters of them. A GPU would
rather have one large launch.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_MOST = 4
_FEWEST_ROWS = 8
_WORTH = 0.9


def blocks_by_length(lengths: Tensor) -> list[Tensor]:
    """The numbers of the rows with these ``lengths`` (B,) in up to four blocks, the longest rows first.

    One block with all rows in order where that would save less than a tenth of the padded tokens, or on a GPU.
    """
    everyone = torch.arange(len(lengths), device=lengths.device)
    blocks = min(_MOST, len(lengths) // _FEWEST_ROWS)
    if blocks < 2 or lengths.device.type != "cpu":
        return [everyone]
    order = torch.argsort(lengths, descending=True, stable=True)
    parts = list(order.tensor_split(blocks))
    padded = sum(len(part) * int(lengths[part[0]]) for part in parts)
    return parts if padded <= _WORTH * len(lengths) * int(lengths.max()) else [everyone]


def in_blocks(lengths: Tensor, run: Callable[[Tensor], Tensor]) -> Tensor:
    """``run`` on each of :func:`blocks_by_length`, its outputs (one per row) back in the rows' order."""
    blocks = blocks_by_length(lengths)
    if len(blocks) == 1:
        return run(blocks[0])
    return torch.cat([run(rows) for rows in blocks])[torch.argsort(torch.cat(blocks))]
