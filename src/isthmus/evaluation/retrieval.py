"""Retrieval with several captions per picture: recall@K both ways.

Picture to text: a hit if *any* of the picture's captions is among the first K. Text to picture: a hit if a picture with
this caption is. Captions of equal text are one caption, so two pictures with the same caption are both right. (Counting
one caption per picture is a different, easier number.)

Ties: what the model scores alike is put in an order drawn by lot, the same for every row and every run, which neither
favours what is right nor holds it back. A model that gives everything the same vector scores what guessing does.

Shapes: N pictures, M captions, D width.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from isthmus.errors import DataError
from isthmus.evaluation.bootstrap import Array, Interval, Outcomes, intervals
from isthmus.evaluation.embedding import around
from isthmus.evaluation.outputs import RankRow
from isthmus.nn.losses import Similarity, similarity

CUTS = (1, 5, 10)


def ranks(
    images: Tensor,
    texts: Tensor,
    owner: Tensor,
    *,
    words: Tensor | None = None,
    metric: Similarity = "cosine",
    chunk: int = 512,
) -> tuple[Tensor, Tensor]:
    """Ranks from 0: of each picture's best own caption among foreign ones (N,), of each caption's picture (M,).

    ``owner`` (M,) is the picture each caption belongs to (every picture needs one); ``words`` (M,) are numbers that
    are equal for captions of equal text (none given: all differ); ``metric`` the similarity that the model was trained
    with. Works on ``chunk`` rows at a time, so (N, M) never stands in memory.
    """
    words = torch.arange(len(texts)) if words is None else words
    pictures, captions = torch.arange(len(images)), torch.arange(len(texts))
    by_image = [
        rank(similarity(images[rows], texts, metric), owned(owner, words, rows, captions), lots(len(texts)))
        for rows in pictures.split(chunk)
    ]
    by_text = [
        rank(similarity(images, texts[some], metric).T, owned(owner, words, pictures, some).T, lots(len(images)))
        for some in captions.split(chunk)
    ]
    return torch.cat(by_image), torch.cat(by_text)


def owned(owner: Tensor, words: Tensor, pictures: Tensor, captions: Tensor) -> Tensor:
    """(n, m) bool: which of ``captions`` (m,) say what one of the picture's own captions says, for neighbouring
    ``pictures`` (n,)."""
    known, column = words[captions].unique(return_inverse=True)
    both = torch.isin(owner, pictures) & torch.isin(words, known)
    said = torch.zeros(len(pictures), len(known), dtype=torch.bool)
    said[owner[both] - pictures[0], torch.searchsorted(known, words[both])] = True
    return said[:, column]


def lots(items: int) -> Tensor:
    """(items,) the order in which items of equal score stand: drawn by lot, the same in every run."""
    return torch.randperm(items, generator=torch.Generator().manual_seed(0))


def rank(values: Tensor, right: Tensor, lot: Tensor) -> Tensor:
    """(n,) rank of each row's best right column among the wrong ones, from scores and truth, both (n, m).

    Of columns that tie with it, those of a lower ``lot`` (m,) stand before it.
    """
    best = values.masked_fill(~right, -math.inf).amax(dim=1, keepdim=True)
    above, tied = around(values, best)
    own = lot.expand_as(values).masked_fill(~(right & tied), len(lot)).amin(dim=1, keepdim=True)
    return ((above | (tied & (lot < own))) & ~right).sum(dim=1)


def numbered(texts: Sequence[str]) -> Tensor:
    """(M,) a number for each text, equal for equal ones: the ``words`` of :func:`ranks`."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(text, len(numbers)) for text in texts])


@dataclass(frozen=True, slots=True, kw_only=True)
class Recall:
    """One direction: recall@K with its 95 % interval (bootstrap over pictures), and what guessing would reach."""

    n: int
    recall: Mapping[int, float]
    intervals: Mapping[int, Interval]
    chance: Mapping[int, float]

    def to_dict(self) -> dict[str, object]:
        facts: dict[str, object] = {"n": self.n}
        for k in self.recall:
            facts[f"recall_at_{k}"] = self.recall[k]
            facts[f"recall_at_{k}_interval"] = list(self.intervals[k])
            facts[f"chance_at_{k}"] = self.chance[k]
        return facts


@dataclass(frozen=True, slots=True)
class RetrievalScores:
    """Both directions. In JSON the picture-to-text recalls also stand on top as ``recall_at_1``, ``_5``, ``_10``."""

    image_to_text: Recall
    text_to_image: Recall

    def to_dict(self) -> dict[str, object]:
        top = {f"recall_at_{k}": value for k, value in self.image_to_text.recall.items()}
        both = {"image_to_text": self.image_to_text.to_dict(), "text_to_image": self.text_to_image.to_dict()}
        return {**top, **both}


def outcomes(rows: Sequence[RankRow]) -> Outcomes:
    """Recall@1 both ways, for pairs of folders; from output rows."""
    columns = [[r["rank"] < 1, sum(k < 1 for k in r["caption_ranks"]), len(r["caption_ranks"])] for r in rows]

    def statistic(sums: Array) -> Array:
        return np.stack([sums[..., 0] / len(rows), sums[..., 1] / sums[..., 2]], axis=-1)

    names = ("image to text R@1", "text to image R@1")
    return Outcomes(np.array(columns, dtype=np.float64), statistic, names)


def score(
    image_ranks: Sequence[int],
    text_ranks: Sequence[Sequence[int]],
    captions: Sequence[Sequence[str]] | None = None,
    *,
    seed: int = 0,
) -> RetrievalScores:
    """From each picture's rank and, per picture, its captions' ranks and texts (none given: all differ).

    Intervals resample pictures with all their captions, because captions of one picture are not independent. Raises
    DataError when there are no pictures.
    """
    if not image_ranks:
        raise DataError("There is nothing to retrieve: the data set has no pictures with captions.")
    pictures, total = len(image_ranks), sum(map(len, text_ranks))
    image_hits = np.array([[rank < k for k in CUTS] for rank in image_ranks], dtype=np.float64)
    text_hits = np.array([[sum(r < k for r in own) for k in CUTS] + [len(own)] for own in text_ranks], dtype=np.float64)

    def of_pictures(sums: Array) -> Array:
        return sums / pictures

    def of_captions(sums: Array) -> Array:
        return sums[:, :-1] / sums[:, -1:]

    def recall(n: int, values: Array, spread: list[Interval], chance: list[float]) -> Recall:
        return Recall(
            n=n,
            recall={k: float(v) for k, v in zip(CUTS, values, strict=True)},
            intervals=dict(zip(CUTS, spread, strict=True)),
            chance=dict(zip(CUTS, chance, strict=True)),
        )

    right_captions, right_pictures = _right(text_ranks, captions)
    guess_text = [float(np.mean([_chance(n, total, k) for n in right_captions])) for k in CUTS]
    guess_image = [float(np.mean([_chance(n, pictures, k) for n in right_pictures])) for k in CUTS]
    return RetrievalScores(
        recall(pictures, image_hits.mean(axis=0), intervals(image_hits, of_pictures, seed=seed), guess_text),
        recall(
            total,
            text_hits[:, :-1].sum(axis=0) / total,
            intervals(text_hits, of_captions, seed=seed),
            guess_image,
        ),
    )


def _right(ranks: Sequence[Sequence[int]], captions: Sequence[Sequence[str]] | None) -> tuple[list[int], list[int]]:
    """How many captions are right for each picture, and how many pictures for each caption."""
    if captions is None:
        return [len(own) for own in ranks], [1] * sum(map(len, ranks))
    said = Counter(text for own in captions for text in own)
    shared = Counter(text for own in captions for text in set(own))
    return [sum(said[text] for text in set(own)) for own in captions], [shared[t] for own in captions for t in own]


def _chance(right: int, among: int, k: int) -> float:
    """Probability that one of ``right`` items is among ``k`` drawn from ``among`` without replacement."""
    return 1.0 - math.comb(among - right, k) / math.comb(among, k) if k < among else 1.0
