"""Image-text matching: does this caption belong to this picture? Scored by the area under the ROC curve.

The AUC is the probability that a pair that belongs together scores above one that does not, ties counting half: no
threshold is chosen. Pairs that do not belong together are either in the data (``meta["answers"]`` or
``meta["class"]`` says true or false), or made: each caption with the picture of another record.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from isthmus.errors import ConfigError, DataError
from isthmus.evaluation.binary import parse
from isthmus.evaluation.bootstrap import Array, Interval
from isthmus.evaluation.controls import shuffled_partners
from isthmus.evaluation.embedding import embed
from isthmus.evaluation.outputs import Manifest, MatchingRow
from isthmus.evaluation.protocols import Embeds, Matches, Records, Sample
from isthmus.evaluation.tasks import StandardTask, fingerprint, known, listed, seed_of, unique
from isthmus.evaluation.turns import captions_of, texts_of
from isthmus.nn.losses import Similarity, similarity

DRAWS = 1000
PairScores = Callable[[Sequence[str], Sequence[int]], list[float]]
"""Scores of texts, each with the picture of the record of that number."""


def auc(scores: Array, labels: NDArray[np.bool_]) -> float:
    """(n,) scores and (n,) bool labels -> the area. Raises DataError when one of the two classes is missing."""
    positive = int(labels.sum())
    negative = len(labels) - positive
    if not positive or not negative:
        raise DataError(f"An AUC needs pairs that match and pairs that do not; there are {positive} and {negative}.")
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # from 1, ties share their mean rank
    return float((ranks[labels].sum() - positive * (positive + 1) / 2) / (positive * negative))


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchingScores:
    """``auc`` with a 95 % bootstrap interval (both classes resampled by themselves), and ``shuffled``: the same with
    the pictures exchanged, near 0.5 unless the captions alone give the answer away. The gain is above the better of
    that and a guess."""

    n: int
    matching: int
    auc: float
    interval: Interval
    shuffled: float

    def to_dict(self) -> dict[str, object]:
        best = max(self.shuffled, 0.5)
        return {
            "auc": self.auc,
            "auc_interval": list(self.interval),
            "shuffled": self.shuffled,
            "best_without_looking": best,
            "gain": self.auc - best,
            "n": self.n,
            "matching": self.matching,
        }


def score(rows: Sequence[MatchingRow], *, seed: int = 0) -> MatchingScores:
    """From output rows with ``label``, ``score`` and ``shuffled``. Raises DataError without pairs of both classes."""
    labels = np.array([bool(r["label"]) for r in rows])
    values = np.array([r["score"] for r in rows], dtype=np.float64)
    area = auc(values, labels)
    rng = np.random.default_rng(seed)
    classes = [np.flatnonzero(labels), np.flatnonzero(~labels)]
    drawn = []
    for _ in range(DRAWS):
        chosen = np.concatenate([rng.choice(c, size=len(c)) for c in classes])
        drawn.append(auc(values[chosen], labels[chosen]))
    low, high = np.percentile(drawn, [2.5, 97.5])
    shuffled = auc(np.array([r["shuffled"] for r in rows], dtype=np.float64), labels)
    return MatchingScores(
        n=len(rows), matching=int(labels.sum()), auc=area, interval=(float(low), float(high)), shuffled=shuffled
    )


@dataclass(frozen=True, kw_only=True)
class MatchingTask(StandardTask[MatchingRow]):
    """A pair's score is the similarity of the model's embeddings: cosine, dot or euclidean, as it was trained.

    ``pairs``: made here, or ``given`` by the records.
    """

    kind: ClassVar[str] = "matching"
    version: ClassVar[int] = 1
    needs: ClassVar[type] = Embeds
    by: ClassVar[str] = "similarity"

    name: str
    records: Records[Sample]
    pairs: Literal["made", "given"] = "made"
    seed: int = 0
    similarity: Similarity = "cosine"

    def __post_init__(self) -> None:
        known(self.similarity, get_args(Similarity), "similarity")
        if self.pairs not in ("made", "given"):
            raise ConfigError(f"Task {self.name!r}: pairs is made or given, not {self.pairs!r}.")

    @cached_property
    def _listed(self) -> list[tuple[str, str, int, int, bool]]:
        """(id, caption, its record's number, that of the picture shown with it, do they match?) of every pair."""
        keys, texts, labels = [], [], []
        for record in listed(self.records):
            captions = captions_of(record)
            if len(record.images) != 1 or not captions:
                raise DataError(f"Task {self.name!r}: sample {record.id!r} needs one picture and a caption.")
            keys.append(record.images[0].content_key())
            texts.append(captions[0])
            labels.append(self._label(record) if self.pairs == "given" else True)
        unique([r.id for r in listed(self.records)], self.name)
        own = [(r.id, t, i, i, x) for i, (r, t, x) in enumerate(zip(listed(self.records), texts, labels, strict=True))]
        if self.pairs == "given":
            return own
        other = shuffled_partners(keys, self.seed)
        made = [(f"{name}/other", text, i, other[i], False) for name, text, i, _, _ in own]
        return [pair for both in zip(own, made, strict=True) for pair in both]

    def _label(self, record: Sample) -> bool:
        given = texts_of(record, "answers") or (str(record.meta.get("class", "")),)
        said = parse(given[0])
        if said is None:
            raise DataError(f"Task {self.name!r}: sample {record.id!r} says neither true nor false of its pair.")
        return said == "yes"

    @cached_property
    def ids(self) -> list[str]:
        return unique([name for name, *_ in self._listed], self.name)

    def describe(self) -> dict[str, object]:
        facts: dict[str, object] = {"by": self.by, "pairs": self.pairs, "data": fingerprint(self.records)}
        return facts if self.similarity == "cosine" else {**facts, "similarity": self.similarity}

    def rows(self, model: Embeds, done: Collection[str], *, chunk: int) -> Iterator[list[MatchingRow]]:
        return self._made(lambda texts, places: self._similarities(model, texts, places), done, chunk)

    def _made(self, scores: PairScores, done: Collection[str], chunk: int) -> Iterator[list[MatchingRow]]:
        keys = [r.images[0].content_key() for r in listed(self.records)]
        other = shuffled_partners(keys, self.seed + 1)
        todo = [p for p in self._listed if p[0] not in done]
        for start in range(0, len(todo), chunk):
            some = todo[start : start + chunk]
            texts = [text for _, text, _, _, _ in some]
            own = scores(texts, [shown for _, _, _, shown, _ in some])
            shuffled = scores(texts, [other[i] for _, _, i, _, _ in some])
            yield [
                {"id": name, "caption": text, "label": label, "score": own[j], "shuffled": shuffled[j]}
                for j, (name, text, _, _, label) in enumerate(some)
            ]

    def _similarities(self, model: Embeds, texts: Sequence[str], places: Sequence[int]) -> list[float]:
        pictures = [self.records[i].images[0] for i in places]
        images = embed(model.embed_images, pictures, what="pictures")
        captions = embed(model.embed_texts, texts, what="captions")
        return similarity(images, captions, self.similarity).diagonal().tolist()

    @classmethod
    def scored(cls, rows: Sequence[MatchingRow], manifest: Manifest) -> MatchingScores:
        return score(rows, seed=seed_of(manifest))


@dataclass(frozen=True, kw_only=True)
class MatchingHeadTask(MatchingTask):
    """A pair's score is what the model's own matching head says (BLIP-2's ITM)."""

    needs: ClassVar[type] = Matches
    by: ClassVar[str] = "match"

    def rows(self, model: Matches, done: Collection[str], *, chunk: int) -> Iterator[list[MatchingRow]]:
        def scores(texts: Sequence[str], places: Sequence[int]) -> list[float]:
            return [float(model.match(self.records[i].images[0], t)) for i, t in zip(places, texts, strict=True)]

        return self._made(scores, done, chunk)
