"""Merging adapters, with the model's outputs before and after side by side."""

from isthmus import adapters
from isthmus.data.collate import collate
from isthmus.errors import CheckpointError, ConfigError
from isthmus.model import Model
from isthmus.testing.probe import WORDS, outputs, prompts

TOLERANCE = 1e-4
"""Most that an output may change, as a share of the largest: rounding of one sum taken in another order."""


def merge_and_compare(model: Model) -> str:
    """Merge the model's adapters in place, and say how many there were and how far its outputs moved.

    Raises ConfigError without adapters, CheckpointError where an output moved by more than TOLERANCE or as
    :func:`isthmus.adapters.merge`; the model is then of no more use.
    """
    summary = adapters.summary(model.net)
    if not summary:
        raise ConfigError("This model carries no adapters, so there is nothing to merge: leave --merge out.")
    batch = collate(prompts(model, WORDS, (1, 2, 3)))
    before = outputs(model, batch)
    adapters.merge(model.net)
    model.base = None
    after = outputs(model, batch)
    largest = max(float(row.abs().max()) for row in before)
    moved = max(float((one - two).abs().max()) for one, two in zip(before, after, strict=True))
    if not moved <= TOLERANCE * largest:
        raise CheckpointError(
            f"Merged, the model computes otherwise: an output moved by {moved:.3g}, where the largest is {largest:.3g} "
            f"and {TOLERANCE:g} of it is let pass. Nothing was written; open it in float32 (--dtype float32)."
        )
    return f"{summary}; outputs moved by at most {moved:.2g} (largest {largest:.3g})"
