"""By whom a run's fp32 products are on a CPU: oneDNN or torch's own library, which round otherwise.

Measured where a run begins, stored with it, and kept when it goes on, also where the cache of measurements is lost.
"""

import warnings
from dataclasses import dataclass

import torch

from isthmus import products
from isthmus.errors import IsthmusWarning
from isthmus.processes import all_gather, first
from isthmus.products import ONEDNN


@dataclass(frozen=True, slots=True)
class Multiplying:
    """``by`` one of :mod:`isthmus.products`, ``why`` a sentence for the user."""

    by: str
    why: str


def settle(device: torch.device, begun: str | None, name: str) -> Multiplying:
    """From here on the products of the stage ``name`` are by whom they were ``begun``, or without that by the quicker
    one; all processes alike, by the first one's choice. What cannot be kept is warned of."""
    begun = all_gather(begun)[0]
    against = next((why for why in all_gather(products.hindrance(device)) if why is not None), None)
    able = set(all_gather(products.own()))
    if begun is None:
        quick = against is None and all_gather(products.quicker() if first() else None)[0]
        why = "which is quicker here and as exact" if quick else against or "for oneDNN is no quicker here"
        chosen = Multiplying(ONEDNN if quick else products.own(), why)
    elif (begun == ONEDNN and against is None) or able == {begun}:
        chosen = Multiplying(begun, "so the run was begun")
    else:
        chosen = Multiplying(products.own(), against or "somebody set another precision")
        if first():
            warnings.warn(
                f"Stage {name!r}: the run was begun with fp32 products by {begun}, which cannot be kept: {chosen.why}. "
                f"It goes on with those by {chosen.by}, and may differ in the last bits from one without interruption.",
                IsthmusWarning,
                stacklevel=2,
            )
    products.take(chosen.by)
    return chosen
