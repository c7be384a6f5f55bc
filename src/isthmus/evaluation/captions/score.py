"""Scores of captions against references: corpus and per item, under the names of the COCO caption scorer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from isthmus.config import plain
from isthmus.errors import DataError
from isthmus.evaluation.bootstrap import Array, Interval, intervals
from isthmus.evaluation.captions import bleu
from isthmus.evaluation.captions.cider import CiderD
from isthmus.evaluation.captions.rouge import rouge_l
from isthmus.evaluation.captions.tokens import tokens

NAMES = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr")
VERSION = 1
"""Raised with every change that can move a score."""

_ROUGE, _CIDER = bleu.COLUMNS, bleu.COLUMNS + 1


class CaptionScorer:
    """A set of references, tokenised once; candidates are scored against it.

    Raises DataError when an item has no reference, or only empty ones.
    """

    def __init__(self, references: Mapping[str, Sequence[str]], *, tokenised: bool = False) -> None:
        self.cut = str.split if tokenised else tokens
        self.references = {i: [self.cut(c) for c in captions] for i, captions in references.items()}
        for name, captions in self.references.items():
            if not any(captions):
                raise DataError(f"item {name!r} has no reference caption with a word in it; drop it or write one")
        self.cider = CiderD(list(self.references.values()))

    def outcomes(self, candidates: Mapping[str, str]) -> Array:
        """(n, C): per item, in the order of the references, BLEU's counts, ROUGE-L and CIDEr-D."""
        rows = []
        for name, references in self.references.items():
            candidate = self.cut(candidates[name])
            rows.append(
                [
                    *bleu.counts(candidate, references),
                    rouge_l(candidate, references),
                    self.cider.score(candidate, references),
                ]
            )
        return np.array(rows, dtype=np.float64)


def from_sums(sums: Array, n: int) -> Array:
    """(…, C) sums over n items -> (…, 6) scores in the order of NAMES."""
    return np.concatenate([bleu.bleu(sums[..., : bleu.COLUMNS]), sums[..., [_ROUGE, _CIDER]] / n], axis=-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptionScores:
    """``corpus`` and ``per_item`` scores by name, as fractions (CIDEr up to 10), and 95 % bootstrap intervals of the
    corpus scores over items, the document frequencies of CIDEr held fixed. ``empty`` counts captions without a word.
    """

    n: int
    corpus: Mapping[str, float]
    intervals: Mapping[str, Interval]
    per_item: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    empty: int = 0

    def to_dict(self) -> dict[str, object]:
        return plain(self)


def score_captions(
    references: Mapping[str, Sequence[str]],
    candidates: Mapping[str, str],
    *,
    tokenised: bool = False,
    extra: Mapping[str, tuple[float, Sequence[float]]] | None = None,
    seed: int = 0,
) -> CaptionScores:
    """Score one candidate per item of ``references``.

    Args:
        tokenised: the texts are tokens joined by spaces already (to test a metric apart from a tokenizer).
        extra: further metrics (METEOR, SPICE): the corpus score and the items', in the references' order. They have
            no interval, for their corpus score is no function of sums over items.

    Raises DataError: nothing to score, an item without candidate or reference.
    """
    if not references:
        raise DataError("There are no captions to score: the references are empty.")
    missing = [i for i in references if i not in candidates]
    if missing:
        raise DataError(f"{len(missing)} items have no caption, the first is {missing[0]!r}.")
    scorer = CaptionScorer(references, tokenised=tokenised)
    outcomes = scorer.outcomes(candidates)
    n, further = len(outcomes), dict(extra or {})
    names = (*NAMES, *further)
    corpus = [*from_sums(outcomes.sum(axis=0), n), *(c for c, _ in further.values())]
    single = [from_sums(outcomes, 1), *(np.asarray(items)[:, None] for _, items in further.values())]
    spread = intervals(outcomes, lambda sums: from_sums(sums, n), seed=seed)
    return CaptionScores(
        n=n,
        corpus={k: float(v) for k, v in zip(names, corpus, strict=True)},
        intervals=dict(zip(NAMES, spread, strict=True)),
        per_item={
            i: {k: float(v) for k, v in zip(names, row, strict=True)}
            for i, row in zip(references, np.concatenate(single, axis=1), strict=True)
        },
        empty=sum(not scorer.cut(candidates[i]) for i in references),
    )
