"""Bootstrap intervals: how far a score would move on another sample of as many items."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]
Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Outcomes:
    """(n, C) ``columns`` per item; ``statistic`` maps their sums over n items to the scores named ``names``."""

    columns: Array
    statistic: Callable[[Array], Array]
    names: tuple[str, ...]


def means(columns: Array, *names: str) -> Outcomes:
    """Outcomes whose scores are the columns' means."""
    return Outcomes(columns, lambda sums: sums / len(columns), names)


def resampled_sums(outcomes: Array, *, draws: int, seed: int) -> Array:
    """Column sums over ``draws`` resamples with replacement: (n, C) -> (draws, C).

    An item is drawn with all its columns, so they stay paired. Items with equal outcomes are interchangeable: drawing
    how often each distinct row occurs is the same experiment, and costs the number of distinct rows instead of n.
    """
    rows, counts = np.unique(outcomes, axis=0, return_counts=True)
    share = counts / counts.sum()
    rng = np.random.default_rng(seed)
    size = max(1, 4_000_000 // len(rows))
    blocks = [
        rng.multinomial(len(outcomes), share, size=min(size, draws - start)) @ rows for start in range(0, draws, size)
    ]
    return np.concatenate(blocks)


def intervals(
    outcomes: Array,
    statistic: Callable[[Array], Array],
    *,
    seed: int = 0,
    draws: int = 2000,
    level: float = 0.95,
) -> list[Interval]:
    """Percentile intervals of ``statistic``, which maps (draws, C) column sums to (draws, S) values.

    Deterministic in ``seed``. An outcome without any spread (all items right) has an interval of length zero: read
    small sets with care.
    """
    values = statistic(resampled_sums(np.asarray(outcomes, dtype=np.float64), draws=draws, seed=seed))
    tail = 50 * (1 - level)
    low, high = np.percentile(values, [tail, 100 - tail], axis=0)
    return [(float(a), float(b)) for a, b in zip(low, high, strict=True)]
