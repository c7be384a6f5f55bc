"""Splice: visual tokens take their places in an embedded token sequence.

Legend: B rows, T tokens, D width, N visuals, R visual tokens per visual, K places, S positions in all places.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from isthmus.batch import Places
from isthmus.errors import ConfigError, DataError


def splice(
    embeds: Float[Tensor, "B T D"],
    visual_tokens: Sequence[Tensor] | Float[Tensor, "N R D"],  # a user's connector makes them: checked below
    places: Places,
    *,
    names: Sequence[str] = (),
) -> Float[Tensor, "B T D"]:
    """Put visual tokens into ``embeds`` (B, T, D) at ``places``; answers with a new (B, T, D).

    Args:
        visual_tokens: one (R, D) per visual in the batch's order of visuals, or (N, R, D) when all are alike.
        places: each says that visual n stands in a row from ``start`` on, ``length`` tokens long.
        names: the rows' sample ids, for error messages.

    Raises ConfigError for visual tokens of another width or shape, and DataError when a place is not as long as its
    visual has tokens, leaves its row or overlaps another, or when a visual has no place. A visual may stand in several
    places.
    """
    rows = _as_rows(places)
    _check_shape(visual_tokens, embeds.shape[2])
    counts = [len(tokens) for tokens in visual_tokens]
    _check(rows, counts, tuple(embeds.shape[:2]), names)
    if not rows:
        return embeds
    firsts = torch.tensor([0, *counts]).cumsum(0).tolist()
    source = torch.cat([torch.arange(firsts[visual], firsts[visual] + length) for _, visual, _, length in rows])
    target = _flat_positions(rows, embeds.shape[1])
    values = torch.cat(list(visual_tokens)).to(embeds.dtype)[source.to(embeds.device)]
    return embeds.flatten(0, 1).index_copy(0, target.to(embeds.device), values).unflatten(0, embeds.shape[:2])


def at_places(places: Places, ids: Int[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
    """(B, T) bool, true where a visual stands in ``ids`` (B, T), so that the ids there need mean nothing."""
    positions = torch.arange(ids.shape[1], device=ids.device)
    first = places.start.to(ids.device)[:, None]
    inside = (positions >= first) & (positions < first + places.length.to(ids.device)[:, None])
    count = torch.zeros(ids.shape, dtype=torch.long, device=ids.device)
    return count.index_add(0, places.row.to(ids.device), inside.long()) > 0


def _as_rows(places: Places) -> list[list[int]]:
    """K lists [row, visual, start, length]; one transfer from the device."""
    return torch.stack([places.row, places.visual, places.start, places.length], dim=1).tolist()


def _flat_positions(rows: list[list[int]], width: int) -> Tensor:
    """(S,) positions in the flattened (B·T) sequence, in order of the places."""
    return torch.cat(
        [torch.arange(row * width + start, row * width + start + length) for row, _, start, length in rows]
    )


def _check_shape(visual_tokens: Sequence[Tensor] | Tensor, width: int) -> None:
    for number, tokens in enumerate(visual_tokens):
        if tokens.ndim != 2 or tokens.shape[1] != width:
            raise ConfigError(
                f"the connector made {tuple(tokens.shape)} of visual {number}; due are its tokens, each as wide as the "
                f"language model's embeddings: (number of tokens, {width})."
            )


def _check(rows: list[list[int]], counts: list[int], shape: tuple[int, ...], names: Sequence[str]) -> None:
    end_of_last: dict[int, int] = {}
    for row, visual, start, length in sorted(rows, key=lambda place: (place[0], place[2])):
        where = f"sample {names[row]!r}" if row < len(names) else f"row {row}"
        if not 0 <= visual < len(counts):
            raise DataError(f"{where}: a place is for visual {visual}, but the batch has {len(counts)}.")
        if length != counts[visual]:
            raise DataError(
                f"{where}: the text keeps {length} places for visual {visual}, but the connector made "
                f"{counts[visual]} tokens of it. Either it is a clip, and a model that splices reads pictures only, "
                "or processor and model were made for different sizes, or the connector's num_tokens says another "
                "number than it makes."
            )
        if not (0 <= row < shape[0] and start >= 0 and start + length <= shape[1]):
            raise DataError(
                f"{where}: visual {visual} should stand at {start} to {start + length}, outside the "
                f"batch of {shape[0]} rows and {shape[1]} tokens."
            )
        if start < end_of_last.get(row, 0):
            raise DataError(f"{where}: visual {visual} starts at {start}, inside the visual before it.")
        end_of_last[row] = start + length
    homeless = sorted(set(range(len(counts))) - {visual for _, visual, _, _ in rows})
    if homeless:
        raise DataError(
            f"visual {homeless[0]} of the batch has no place in the text; a picture must not be dropped silently."
        )
