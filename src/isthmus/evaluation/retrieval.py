"""Retrieval with several captions per picture: recall@K both ways.

Picture to text: a hit if *any* of the picture's captions is among the first K. Text to picture: each caption has one
picture. A tie counts against us: whatever is not clearly below the right one stands above it, so a model that gives
everything the same vector scores nothing. (Counting one caption per picture is a different, easier number.)

Shapes: N pictures, M captions, D width.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from isthmus.errors import DataError
from isthmus.evaluation.bootstrap import Array, Interval, intervals
from isthmus.evaluation.embedding import not_below
from isthmus.nn.losses import Similarity, similarity

CUTS = (1, 5, 10)


def ranks(
    images: Tensor, texts: Tensor, owner: Tensor, *, kind: Similarity = "cosine", chunk: int = 512
) -> tuple[Tensor, Tensor]:
    """Ranks from 0: of each picture's best own caption among foreign ones (N,), of each caption's picture (M,).

    ``owner`` (M,) is the picture each caption belongs to (every picture needs one); ``kind`` the similarity the
    model was trained with. Works on ``chunk`` rows at a time, so (N, M) never stands in memory.
    """
    index = torch.arange(len(images))
    by_image = []
    for rows in index.split(chunk):
        by_image.append(ranks_of_images(similarity(images[rows], texts, kind), owner, rows))
    by_text = []
    for columns in torch.arange(len(texts)).split(chunk):
        by_text.append(ranks_of_texts(similarity(images, texts[columns], kind), owner[columns]))
    return torch.cat(by_image), torch.cat(by_text)


def ranks_of_images(values: Tensor, owner: Tensor, rows: Tensor | None = None) -> Tensor:
    """(n,) rank of each picture's best own caption among foreign ones, from scores (n, M) of the pictures ``rows``."""
    rows = torch.arange(len(values)) if rows is None else rows
    own = owner[None] == rows[:, None]
    best = values.masked_fill(~own, -math.inf).amax(dim=1, keepdim=True)
    return (not_below(values, best) & ~own).sum(dim=1)


def ranks_of_texts(values: Tensor, owner: Tensor) -> Tensor:
    """(m,) rank of each caption's picture among all, from scores (N, m); ``owner`` (m,) are the right pictures."""
    right = values.T.gather(1, owner[:, None])
    return not_below(values.T, right).sum(dim=1) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Recall:
    """One direction: recall@K with its 95 % interval (bootstrap over pictures), and what guessing would reach."""

    n: int
    recall: Mapping[int, float]
    intervals: Mapping[int, Interval]
    chance: Mapping[int, float]

    def to_dict(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"n": self.n}
        for k in self.recall:
            facts[f"recall_at_{k}"] = self.recall[k]
            facts[f"recall_at_{k}_interval"] = list(self.intervals[k])
            facts[f"chance_at_{k}"] = self.chance[k]
        return facts

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> "Recall":
        cuts = [int(key.removeprefix("chance_at_")) for key in facts if key.startswith("chance_at_")]
        return cls(
            n=facts["n"],
            recall={k: facts[f"recall_at_{k}"] for k in cuts},
            intervals={k: (facts[f"recall_at_{k}_interval"][0], facts[f"recall_at_{k}_interval"][1]) for k in cuts},
            chance={k: facts[f"chance_at_{k}"] for k in cuts},
        )


@dataclass(frozen=True, slots=True)
class RetrievalScores:
    """Both directions. In JSON the picture-to-text recalls also stand on top as ``recall_at_1``, ``_5``, ``_10``."""

    image_to_text: Recall
    text_to_image: Recall

    def to_dict(self) -> dict[str, Any]:
        top = {f"recall_at_{k}": value for k, value in self.image_to_text.recall.items()}
        both = {"image_to_text": self.image_to_text.to_dict(), "text_to_image": self.text_to_image.to_dict()}
        return {**top, **both}

    @classmethod
    def from_dict(cls, facts: Mapping[str, Any]) -> "RetrievalScores":
        return cls(Recall.from_dict(facts["image_to_text"]), Recall.from_dict(facts["text_to_image"]))


def score(image_ranks: Sequence[int], text_ranks: Sequence[Sequence[int]], *, seed: int = 0) -> RetrievalScores:
    """From each picture's rank and, per picture, its captions' ranks. Intervals resample pictures with all their
    captions, because captions of one picture are not independent. Raises DataError when there are no pictures."""
    if not image_ranks:
        raise DataError("There is nothing to retrieve: the data set has no pictures with captions.")
    pictures, captions = len(image_ranks), sum(map(len, text_ranks))
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

    guess_text = [float(np.mean([_chance(len(own), captions, k) for own in text_ranks])) for k in CUTS]
    guess_image = [_chance(1, pictures, k) for k in CUTS]
    return RetrievalScores(
        recall(pictures, image_hits.mean(axis=0), intervals(image_hits, of_pictures, seed=seed), guess_text),
        recall(
            captions,
            text_hits[:, :-1].sum(axis=0) / captions,
            intervals(text_hits, of_captions, seed=seed),
            guess_image,
        ),
    )


def _chance(right: int, among: int, k: int) -> float:
    """Probability that one of ``right`` items is among ``k`` drawn from ``among`` without replacement."""
    return 1.0 - math.comb(among - right, k) / math.comb(among, k) if k < among else 1.0
