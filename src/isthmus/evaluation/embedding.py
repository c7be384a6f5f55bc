"""Vectors for scoring, checked and on the CPU, made by all processes. Shapes: N pictures, M texts, D width."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from isthmus.errors import CapabilityError
from isthmus.processes import all_of, apart, rank, world_size

T = TypeVar("T")

_MARGIN = 1e-6
"""Share of a row's largest absolute similarity within which two values are a tie. The same vector met in two
places of a matrix product can come out one rounding apart, and that must not decide a rank."""


def embed(function: Callable[[Sequence[T]], Tensor], items: Sequence[T], *, what: str, chunk: int = 256) -> Tensor:
    """(N, D) float32 vectors of ``items``, a chunk at a time; (N, Q, D) where a picture has Q of them.

    Of several processes, which must call this together, each makes every so many-th chunk, and all get all vectors: the
    chunks, and so the bits, are those of one process.

    Raises CapabilityError when the model gives another number of vectors than it got items, or one that is not
    finite: no ranking may rest on it.
    """

    def own(place: int) -> Tensor | None:
        return _chunk(function, items[place : place + chunk], place, what) if place < len(items) else None

    rows = []
    for turn in range(0, len(items), chunk * world_size()):
        rows += [made for made in all_of(partial(own, turn + chunk * rank())) if made is not None]
    return torch.cat(rows)


def _chunk(function: Callable[[Sequence[T]], Tensor], some: Sequence[T], start: int, what: str) -> Tensor:
    """Vectors of the items from number ``start`` on."""
    with apart(), torch.inference_mode():
        vectors = function(some).detach().float().cpu()
    if vectors.ndim not in (2, 3) or len(vectors) != len(some):
        raise CapabilityError(f"The model gave {tuple(vectors.shape)} for {len(some)} {what}; one row each is due.")
    bad = (~vectors.isfinite().flatten(1).all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise CapabilityError(
            f"The model's vectors of {len(bad)} {what} are not finite, the first is number {start + bad[0]}; "
            "a model with such vectors cannot be ranked. Was it trained with a rate that is too high?"
        )
    return vectors


def unit(vectors: Tensor) -> Tensor:
    """Rows of length one."""
    return torch.nn.functional.normalize(vectors, dim=-1)


def around(values: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Where ``values`` (R, C) are clearly above their row's right value (R, 1), and where they tie with it."""
    margin = _MARGIN * values.abs().amax(dim=1, keepdim=True)
    return values > right + margin, (values - right).abs() <= margin
