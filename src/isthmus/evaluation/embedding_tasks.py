"""Tasks of a model that makes vectors: retrieval, classification by names, a linear probe."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, TypeVar, get_args

import numpy as np
import torch
from torch import Tensor

from isthmus.data.sources.files import merged_names, same_name
from isthmus.errors import DataError, nearest
from isthmus.evaluation import linear_probe, retrieval, zero_shot
from isthmus.evaluation.bootstrap import Outcomes, means
from isthmus.evaluation.embedding import embed
from isthmus.evaluation.outputs import ClassManifest, ClassRow, Manifest, ProbeRow, RankRow
from isthmus.evaluation.protocols import Embeds, HasVisionFeatures, Picture, Records, Sample
from isthmus.evaluation.tasks import StandardTask, fingerprint, known, listed, seed_of, unique
from isthmus.evaluation.turns import captions_of
from isthmus.nn.losses import Similarity
from isthmus.processes import world_size

C = TypeVar("C", bound=ClassRow)


def _picture(record: Sample, task: str) -> Picture:
    if len(record.images) != 1:
        raise DataError(f"Task {task!r}: sample {record.id!r} has {len(record.images)} pictures; exactly one is due.")
    return record.images[0]


@dataclass(frozen=True, kw_only=True)
class RetrievalTask(StandardTask[RankRow]):
    """Recall@1/5/10 both ways. A caption is any text to be learnt (an answer, not its question) or alternative of one;
    records of the same picture count as one picture with all their captions, and captions of equal text as one caption.
    ``similarity``: cosine, dot or euclidean, as the model was trained."""

    kind: ClassVar[str] = "retrieval"
    version: ClassVar[int] = 3
    needs: ClassVar[type] = Embeds
    together: ClassVar[bool] = True

    name: str
    records: Records[Sample]
    similarity: Similarity = "cosine"
    prefix: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        known(self.similarity, get_args(Similarity), "similarity")

    @cached_property
    def _pairs(self) -> dict[str, tuple[str, Picture, list[str]]]:
        """Content key -> (id of the first record, picture, its captions)."""
        found: dict[str, tuple[str, Picture, list[str]]] = {}
        for record in listed(self.records):
            picture = _picture(record, self.name)
            entry = found.setdefault(picture.content_key(), (record.id, picture, []))
            captions = captions_of(record)
            if not captions:
                raise DataError(f"Task {self.name!r}: sample {record.id!r} has no caption.")
            entry[2].extend(captions)
        return found

    @cached_property
    def ids(self) -> list[str]:
        return unique([first for first, _, _ in self._pairs.values()], self.name)

    def describe(self) -> dict[str, object]:
        return {"similarity": self.similarity, "prefix": self.prefix, "data": fingerprint(self.records)}

    def rows(self, model: Embeds, done: Collection[str], *, chunk: int) -> Iterator[list[RankRow]]:
        pairs = list(self._pairs.values())
        owner = torch.tensor([i for i, (_, _, captions) in enumerate(pairs) for _ in captions])
        texts = [self.prefix + c for _, _, captions in pairs for c in captions]
        image_ranks, text_ranks = retrieval.ranks(
            embed(model.embed_images, [p for _, p, _ in pairs], what="pictures", chunk=chunk),
            embed(model.embed_texts, texts, what="captions", chunk=chunk),
            owner,
            words=retrieval.numbered(texts),
            metric=self.similarity,
        )
        of_captions = iter(text_ranks.tolist())
        rows: list[RankRow] = [
            {"id": name, "captions": captions, "rank": rank, "caption_ranks": [next(of_captions) for _ in captions]}
            for (name, _, captions), rank in zip(pairs, image_ranks.tolist(), strict=True)
        ]
        yield [row for row in rows if row["id"] not in done]

    @classmethod
    def scored(cls, rows: Sequence[RankRow], manifest: Manifest) -> retrieval.RetrievalScores:
        return retrieval.score(
            [r["rank"] for r in rows],
            [r["caption_ranks"] for r in rows],
            [r["captions"] for r in rows],
            seed=seed_of(manifest),
        )

    @classmethod
    def outcomes(cls, rows: Sequence[RankRow], manifest: Manifest) -> Outcomes:
        return retrieval.outcomes(rows)


@dataclass(frozen=True, kw_only=True)
class _Classified(StandardTask[C]):
    """Records of one picture each, with their class in ``meta["class"]``."""

    version: ClassVar[int] = 1
    together: ClassVar[bool] = True

    name: str
    records: Records[Sample]
    seed: int = 0

    def _labels(self, records: Records[Sample]) -> list[str]:
        labels = []
        for record in listed(records):
            if not record.meta.get("class"):
                raise DataError(f"Task {self.name!r}: sample {record.id!r} has no class in its meta data.")
            labels.append(str(record.meta["class"]))
        return labels

    def _classes_of(self, records: Records[Sample]) -> list[str]:
        """The classes that occur, alphabetically."""
        return list(dict.fromkeys(merged_names(sorted(set(self._labels(records))), "class")))

    def _places(self, records: Records[Sample], classes: Sequence[str]) -> Tensor:
        """(N,) the class numbers of records."""
        number = {same_name(c): i for i, c in enumerate(classes)}
        unknown = sorted(label for label in set(self._labels(records)) if same_name(label) not in number)
        if unknown:
            raise DataError(f"Task {self.name!r}: class {unknown[0]!r} is unknown; {nearest(unknown[0], classes)}")
        return torch.tensor([number[same_name(c)] for c in self._labels(records)])

    def _pictures(self, records: Records[Sample]) -> list[Picture]:
        return [_picture(r, self.name) for r in listed(records)]

    def _ranked(
        self, ids: Sequence[str], truths: Tensor, order: Tensor, ranks: Tensor, classes: list[str]
    ) -> list[ClassRow]:
        """Rows of (n,) true classes, (n, C) classes by falling score, and the truths' (n,) ranks."""
        found = zip(ids, truths.tolist(), order[:, :5].tolist(), ranks.tolist(), strict=True)
        return [
            {
                "id": name,
                "truth": classes[truth],
                "answers": [classes[c] for c in best],
                "rank": rank,
                "correct": rank == 0,
            }
            for name, truth, best, rank in found
        ]

    @classmethod
    def scored(cls, rows: Sequence[C], manifest: ClassManifest) -> zero_shot.ClassScores:
        return zero_shot.score(rows, classes=len(manifest["classes"]), seed=seed_of(manifest))

    @classmethod
    def outcomes(cls, rows: Sequence[C], manifest: Manifest) -> Outcomes:
        return means(np.array([[r["rank"] < 1, r["rank"] < 5] for r in rows], dtype=np.float64), "top_1", "top_5")


@dataclass(frozen=True, kw_only=True)
class ZeroShotTask(_Classified[ClassRow]):
    """Classification by names alone. ``classes`` defaults to all that occur, alphabetically; ``similarity``: cosine,
    dot or euclidean, as the model was trained."""

    kind: ClassVar[str] = "zero_shot"
    needs: ClassVar[type] = Embeds

    classes: Sequence[str] = ()
    templates: Sequence[str] = zero_shot.PLAIN
    similarity: Similarity = "cosine"

    def __post_init__(self) -> None:
        known(self.similarity, get_args(Similarity), "similarity")
        zero_shot.check_templates(self.templates)

    @cached_property
    def _names(self) -> list[str]:
        if self.classes:
            return list(dict.fromkeys(merged_names(self.classes, "class")))
        return self._classes_of(self.records)

    def describe(self) -> dict[str, object]:
        facts: dict[str, object] = {
            "classes": self._names,
            "templates": list(self.templates),
            "data": fingerprint(self.records),
        }
        return facts if self.similarity == "cosine" else {**facts, "similarity": self.similarity}

    def rows(self, model: Embeds, done: Collection[str], *, chunk: int) -> Iterator[list[ClassRow]]:
        truths = self._places(self.records, self._names)
        vectors = zero_shot.class_vectors(model, self._names, self.templates, metric=self.similarity)
        todo = [i for i, name in enumerate(self.ids) if name not in done]
        for start in range(0, len(todo), chunk * world_size()):
            places = todo[start : start + chunk * world_size()]
            pictures = [_picture(self.records[i], self.name) for i in places]
            images = embed(model.embed_images, pictures, what="pictures", chunk=chunk)
            for n in range(0, len(places), chunk):
                yield self._rows(places[n : n + chunk], images[n : n + chunk], vectors, truths)

    def _rows(self, places: Sequence[int], images: Tensor, vectors: Tensor, truths: Tensor) -> list[ClassRow]:
        order, rank = zero_shot.classify(images, vectors, truths[places], metric=self.similarity)
        return self._ranked([self.ids[i] for i in places], truths[places], order, rank, self._names)


@dataclass(frozen=True, kw_only=True)
class LinearProbeTask(_Classified[ProbeRow]):
    """Logistic regression on frozen features: fitted on ``train``, scored on ``records``."""

    kind: ClassVar[str] = "linear_probe"
    needs: ClassVar[type] = HasVisionFeatures

    train: Records[Sample]

    @cached_property
    def _names(self) -> list[str]:
        return self._classes_of(self.train)

    def describe(self) -> dict[str, object]:
        return {"classes": self._names, "data": fingerprint(self.records), "train": fingerprint(self.train)}

    def rows(self, model: HasVisionFeatures, done: Collection[str], *, chunk: int) -> Iterator[list[ProbeRow]]:
        def features(records: Records[Sample]) -> Tensor:
            return embed(model.vision_features, self._pictures(records), what="pictures", chunk=chunk)

        truths = self._places(self.records, self._names)
        probe, sweep = linear_probe.train_probe(
            features(self.train), self._places(self.train, self._names), len(self._names), seed=self.seed
        )
        logits = probe.logits(features(self.records))
        rows = self._ranked(self.ids, truths, *zero_shot.by_score(logits, truths), self._names)
        yield [{**row, "strength": sweep.strength} for row in rows if row["id"] not in done]
