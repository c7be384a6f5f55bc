"""BLEU-1..4 (Papineni et al. 2002) as the COCO caption scorer counts it: clipped n-gram precisions, brevity by the
closest reference length, over the corpus.

Two small constants keep a sum of nothing from dividing by zero, as in the reference; they are why a caption without
any common 4-gram scores about 1e-4 and not 0.
"""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from isthmus.evaluation.bootstrap import Array

ORDERS = 4
_NEVER, _ALMOST_NEVER = 1e-9, 1e-15
COLUMNS = 2 * ORDERS + 2
"""Per caption: common n-grams (4), n-grams (4), length, length of the closest reference."""


def ngrams(tokens: Sequence[str], orders: int = ORDERS) -> list[Counter[tuple[str, ...]]]:
    """How often each n-gram occurs, for n = 1 … ``orders``."""
    return [Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)) for n in range(1, orders + 1)]


def counts(candidate: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """The COLUMNS of one caption; those of a corpus are their sums. Of equally close references the shorter counts."""
    of_references = [ngrams(r) for r in references]
    common, there = [], []
    for n, grams in enumerate(ngrams(candidate)):
        most: Counter[tuple[str, ...]] = Counter()
        for reference in of_references:
            most |= reference[n]
        common.append(sum((grams & most).values()))
        there.append(grams.total())
    closest = min((abs(len(r) - len(candidate)), len(r)) for r in references)[1]
    return [*common, *there, len(candidate), closest]


def bleu(sums: Array) -> Array:
    """(…, COLUMNS) counts -> (…, 4): BLEU-1 to BLEU-4."""
    common, there = sums[..., :ORDERS], sums[..., ORDERS : 2 * ORDERS]
    length, closest = sums[..., -2:-1], sums[..., -1:]
    precision = np.cumprod((common + _ALMOST_NEVER) / (there + _NEVER), axis=-1)
    ratio = (length + _ALMOST_NEVER) / (closest + _NEVER)
    with np.errstate(over="ignore", under="ignore"):
        brevity = np.where(ratio < 1, np.exp(1 - 1 / np.minimum(ratio, 1)), 1.0)
    return precision ** (1 / np.arange(1, ORDERS + 1)) * brevity
