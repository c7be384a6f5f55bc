"""CIDEr-D (Vedantam et al. 2015): tf-idf weighted n-gram agreement with the references, n = 1 … 4, times ten.

"Document frequency" is the number of pictures whose references hold an n-gram, counted over the references given, so
the score of a caption depends on the set it is scored in: with one picture alone every weight is zero and so is the
score, and identical captions reach 10 only where every n-gram is rarer than the set is large.
The D: counts are clipped to the reference's, and a Gaussian (sigma 6) punishes another length.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from isthmus.evaluation.captions.bleu import ORDERS, ngrams

SIGMA = 6.0
Gram = tuple[str, ...]
Tokens = Sequence[str]


@dataclass(frozen=True, slots=True)
class _Weighted:
    """A caption's tf-idf weights by order, their norms, and its length (counted in bigrams, as the reference does)."""

    weights: list[dict[Gram, float]]
    norms: list[float]
    length: int


class CiderD:
    """Knows the document frequencies of a set of references: one list of tokenised captions per picture."""

    def __init__(self, references: Sequence[Sequence[Tokens]]) -> None:
        self.frequency: Counter[Gram] = Counter()
        for captions in references:
            self.frequency.update({g for c in captions for order in ngrams(c) for g in order})
        self.pictures = math.log(len(references)) if references else 0.0

    def score(self, candidate: Tokens, references: Sequence[Tokens]) -> float:
        """In 0 … 10: the mean over orders and references."""
        ours = self._weigh(candidate)
        total = sum(self._agreement(ours, self._weigh(r)) for r in references)
        return 10.0 * total / (ORDERS * len(references))

    def _weigh(self, tokens: Tokens) -> _Weighted:
        weights = [
            {g: n * (self.pictures - math.log(max(1, self.frequency[g]))) for g, n in order.items()}
            for order in ngrams(tokens)
        ]
        norms = [math.sqrt(sum(w * w for w in order.values())) for order in weights]
        return _Weighted(weights, norms, max(0, len(tokens) - 1))

    def _agreement(self, ours: _Weighted, theirs: _Weighted) -> float:
        total = 0.0
        for n in range(ORDERS):
            there = theirs.weights[n]
            value = sum(min(w, there[g]) * there[g] for g, w in ours.weights[n].items() if g in there)
            norm = ours.norms[n] * theirs.norms[n]
            total += value / norm if norm else value
        return total * math.exp(-((ours.length - theirs.length) ** 2) / (2 * SIGMA**2))
