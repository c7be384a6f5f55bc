"""Tasks: records together with the rule that scores them.

A task says what it needs of a model (``needs``), what identifies it (``describe``), which output rows there are
(``ids``), makes the missing ones (``rows``) and scores them (``score``). Scores come from the rows alone, so an
interrupted evaluation continues, and a finished one can be scored again without model and data. A task whose scores are
made of sums over items also says how two of its folders are compared in pairs (``outcomes``).
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar, Generic, Protocol, TypeVar, cast, get_args, runtime_checkable

import numpy as np
import torch

from isthmus.data.sources.files import merged_names, same_name
from isthmus.errors import CapabilityError, ConfigError, DataError, nearest
from isthmus.evaluation import linear_probe, retrieval, rules, vqa, zero_shot
from isthmus.evaluation.bootstrap import Outcomes, means
from isthmus.evaluation.controls import Control, answers_with_controls, check_controls, plan_controls, shuffled_among
from isthmus.evaluation.embedding import embed
from isthmus.evaluation.outputs import (
    AnswerRow,
    AskedRow,
    ClassManifest,
    ClassRow,
    Manifest,
    ProbeRow,
    QuestionRow,
    R,
    RankRow,
)
from isthmus.evaluation.protocols import (
    Answers,
    Embeds,
    HasVisionFeatures,
    Measures,
    Picture,
    Records,
    S,
    Sample,
    TextPart,
)
from isthmus.evaluation.turns import Turn, captions_of, kind_of, last_turn, prompt, texts_of
from isthmus.nn.losses import Similarity
from isthmus.processes import world_size

C = TypeVar("C", bound=ClassRow)
CLOSE = 1e-4
"""Two best tokens nearer than this (in logits) may change places when sums are taken in another order."""
_SCORED = ("answers", "class", "kind", "choices", "group")
"""What scoring reads of a record's meta data."""


@runtime_checkable
class Scores(Protocol):
    """What a task's scoring gives: fractions by name."""

    def to_dict(self) -> dict[str, object]: ...


class Task(ABC, Generic[R]):
    """See the head of this file. A task of one's own derives from this class, as a keyword-only dataclass with
    ``name``, ``records`` and ``seed`` (and ``train``, where it takes training data), and gives ``rows`` and ``score``;
    the rest has defaults. ``Task[MyRow]``, a TypedDict, says what its rows hold.

    ``kind`` names the scoring rule, ``version`` is raised with every change that can move a score, ``needs`` is the
    protocol of models that can do it, ``decoding`` how the model generates. Several processes share the items, each
    making rows of its own; with ``together`` all make all rows and share what :func:`.embedding.embed` encodes.
    """

    kind: ClassVar[str] = "own"
    version: ClassVar[int | None] = None
    needs: ClassVar[type] = Answers
    together: ClassVar[bool] = False
    name: str
    records: Records[Sample]
    seed: int
    decoding: Mapping[str, object] = MappingProxyType({})

    @cached_property
    def ids(self) -> Sequence[str]:
        """An id per output row: the records'. Raises DataError when two are alike."""
        return unique([r.id for r in listed(self.records)], self.name)

    def describe(self) -> dict[str, object]:
        """What identifies the evaluation beside name, kind and seed; an output folder goes on only with the same. What
        stands here under a field's name is what the rows are scored with again."""
        return {"data": fingerprint(self.records)}

    def prompts(self) -> Iterable[Sample]:
        """The records as the model gets them, for the manifest; nothing where it gets none."""
        return ()

    def prepare(self, model: Any, *, chunk: int) -> None:
        """What rows of any item need, made before the first one, by all processes together; as a rule nothing."""

    @abstractmethod
    def rows(self, model: Any, done: Collection[str], *, chunk: int) -> Iterator[list[R]]:
        """Output rows, each with its ``id``, for the ids that are not ``done``, some ``chunk`` at a time. ``model`` is
        what ``needs`` says: each task names its own protocol here."""

    @abstractmethod
    def score(self, rows: Sequence[R]) -> Scores:
        """Scores from the rows alone, in the order of the ids."""

    @classmethod
    def outcomes(cls, rows: Sequence[R], manifest: Manifest) -> Outcomes | None:
        """What each item contributes to the scores, for pairs; none where a score is no function of sums over items
        (an AUC)."""
        del rows, manifest
        return None


class StandardTask(Task[R]):
    """A task of the package. Its scores are a function of the rows and of what the manifest says (``seed`` and what
    ``describe`` gives), for a first and for every later scoring."""

    def score(self, rows: Sequence[R]) -> Scores:
        return self.scored(rows, cast(Manifest, {"seed": self.seed, **self.describe()}))

    @classmethod
    @abstractmethod
    def scored(cls, rows: Sequence[R], manifest: Manifest) -> Scores:
        """Scores from rows and manifest alone."""


def seed_of(manifest: Manifest) -> int:
    return int(manifest.get("seed", 0))


def rule_of(manifest: Manifest) -> vqa.Rule:
    """The rule that a folder's answers get points by."""
    return rules.rule(str(manifest.get("rule", "exact")))


def points(rule: vqa.Rule, rows: Sequence[AnswerRow]) -> Outcomes:
    """Each answer's points, whose mean is the accuracy."""
    return means(np.array([[rule.points(r["answer"], r)] for r in rows], dtype=np.float64), "accuracy")


def fingerprint(records: Records[Sample]) -> str:
    """sha256 over every record's id, words, pictures and what scoring reads of it, in order."""
    total = hashlib.sha256()
    for record in listed(records):
        scored = {k: record.meta[k] for k in _SCORED if k in record.meta}
        total.update(repr((record.id, [_identity(p) for p in record.parts], sorted(scored.items()))).encode())
    return total.hexdigest()


def listed(records: Records[S]) -> Iterator[S]:
    """The records in order."""
    return (records[i] for i in range(len(records)))


def _identity(part: object) -> object:
    if isinstance(part, TextPart):
        return (part.role, part.text, part.learn)
    return part.content_key() if isinstance(part, Picture) else repr(part)


def unique(ids: Sequence[str], task: str) -> list[str]:
    """The ids, or a DataError that names the first one that comes twice."""
    seen: set[str] = set()
    for i in ids:
        if i in seen:
            raise DataError(
                f"Task {task!r}: two samples have the id {i!r}; ids must differ, outputs are found by them. Give each "
                "one of its own, or take the field out of the rows: they are numbered then."
            )
        seen.add(i)
    return list(ids)


def known(name: str, choices: Sequence[str], what: str) -> None:
    if name not in choices:
        raise ConfigError(f"Unknown {what} {name!r}; {nearest(name, choices)}")


def _picture(record: Sample, task: str) -> Picture:
    if len(record.images) != 1:
        raise DataError(f"Task {task!r}: sample {record.id!r} has {len(record.images)} pictures; exactly one is due.")
    return record.images[0]


@dataclass(frozen=True, kw_only=True)
class Questions(StandardTask[R]):
    """What all tasks of questions share: the controls of :mod:`.vqa` and the prior, from the training records.

    ``controls`` chooses among ``blind`` and ``shuffled``; for questions without pictures (a bare language model) leave
    both out.
    """

    name: str
    records: Records[Sample]
    prior: vqa.AnswerPrior | None = None
    controls: Sequence[Control] = ("blind", "shuffled")
    seed: int = 0

    def __post_init__(self) -> None:
        check_controls(self.controls)

    def describe(self) -> dict[str, object]:
        return {
            "controls": list(self.controls),
            "prior": self.prior.fingerprint() if self.prior else None,
            "data": fingerprint(self.records),
            **shuffled_among(self.controls, len(self.records)),
        }

    def prompts(self) -> Iterator[Sample]:
        """The records as the model gets them, with their pictures."""
        return (prompt(r) for r in listed(self.records))

    def row(self, name: str, turn: Turn, kind: str, said: Mapping[str, str]) -> AskedRow:
        """A question with its truths and what was said: ``answer``, and the controls' answers where there are any."""
        return {
            "id": name,
            "kind": kind,
            "question": turn.question,
            "truth": list(turn.answers),
            "answer": said["answer"],
            "blind": said.get("blind"),
            "shuffled": said.get("shuffled"),
            "prior": self.prior.answer(turn.question, kind) if self.prior else None,
        }


@dataclass(frozen=True, kw_only=True)
class VqaTask(Questions[QuestionRow]):
    """Answers to the last question of each record, scored by ``rule``.

    ``rule`` is a name of :mod:`.rules`: ``exact``, ``vqa``, ``ok-vqa``, ``gqa``, ``yes-no``, ``choice``. In ``mixed``
    data records without a picture keep their answer in the controls. ``decoding`` is handed to the model as it is.
    ``gaps`` also measures how near another answer was: what is nearer than CLOSE is counted, as it may come out
    otherwise in another batch or on another machine.
    """

    kind: ClassVar[str] = "vqa"
    version: ClassVar[int] = 1
    needs: ClassVar[type] = Answers

    decoding: Mapping[str, object] = field(default_factory=dict)
    rule: str = "exact"
    mixed: bool = False
    gaps: bool = False

    def __post_init__(self) -> None:
        Questions.__post_init__(self)
        rules.rule(self.rule)

    def describe(self) -> dict[str, object]:
        facts: dict[str, object] = {**Questions.describe(self), "rule": self.rule, "decoding": dict(self.decoding)}
        return {**facts, "gaps": True} if self.gaps else facts

    def rows(self, model: Answers, done: Collection[str], *, chunk: int) -> Iterator[list[QuestionRow]]:
        plan = plan_controls(self.records, self.name, self.controls, self.seed, mixed=self.mixed)
        todo = [i for i, name in enumerate(self.ids) if name not in done]
        for i in todo:  # what the rule cannot score is met before the model runs
            self._row(self.records[i], {"answer": ""})
        for places in plan.chunks(todo, chunk):
            records = [self.records[i] for i in places]
            others = [self.records[plan.other[i]] for i in places]
            prompts = [prompt(r) for r in records]
            answers = answers_with_controls(model, prompts, others, self.controls, self.decoding)
            rows = [self._row(r, {k: v[j] for k, v in answers.items()}) for j, r in enumerate(records)]
            if self.gaps:
                for row, gap in zip(rows, self._gaps(model, prompts), strict=True):
                    row["gap"] = gap
            yield rows

    def _gaps(self, model: Answers, prompts: Sequence[Sample]) -> list[float]:
        if not isinstance(model, Measures):
            raise CapabilityError(f"Task {self.name!r}: this model gives no gaps; leave the option out.")
        return model.gaps(prompts, **self.decoding)

    def _row(self, record: Sample, said: Mapping[str, str]) -> QuestionRow:
        row = self.row(record.id, last_turn(record), kind_of(record), said)
        if "choices" in record.meta:
            row["choices"] = list(texts_of(record, "choices"))
        if "group" in record.meta:
            row["group"] = str(record.meta["group"])
        return {**row, "correct": rules.rule(self.rule).points(row["answer"], row)}

    @classmethod
    def scored(cls, rows: Sequence[QuestionRow], manifest: Manifest) -> Scores:
        return vqa.score(rows, rule=rule_of(manifest), seed=seed_of(manifest))

    @classmethod
    def outcomes(cls, rows: Sequence[QuestionRow], manifest: Manifest) -> Outcomes:
        return points(rule_of(manifest), rows)


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

    def _places(self, records: Records[Sample], classes: Sequence[str]) -> torch.Tensor:
        """(N,) the class numbers of records."""
        number = {same_name(c): i for i, c in enumerate(classes)}
        unknown = sorted(label for label in set(self._labels(records)) if same_name(label) not in number)
        if unknown:
            raise DataError(f"Task {self.name!r}: class {unknown[0]!r} is unknown; {nearest(unknown[0], classes)}")
        return torch.tensor([number[same_name(c)] for c in self._labels(records)])

    def _pictures(self, records: Records[Sample]) -> list[Picture]:
        return [_picture(r, self.name) for r in listed(records)]

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

    def _rows(
        self, places: Sequence[int], images: torch.Tensor, vectors: torch.Tensor, truths: torch.Tensor
    ) -> list[ClassRow]:
        order, rank = zero_shot.classify(images, vectors, truths[places], metric=self.similarity)
        return [
            {
                "id": self.ids[i],
                "truth": self._names[int(truths[i])],
                "answers": [self._names[c] for c in best[:5]],
                "rank": r,
                "correct": r == 0,
            }
            for i, best, r in zip(places, order.tolist(), rank.tolist(), strict=True)
        ]


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
        def features(records: Records[Sample]) -> torch.Tensor:
            return embed(model.vision_features, self._pictures(records), what="pictures", chunk=chunk)

        truths = self._places(self.records, self._names)
        probe, sweep = linear_probe.train_probe(
            features(self.train), self._places(self.train, self._names), len(self._names), seed=self.seed
        )
        logits = probe.logits(features(self.records))
        order, rank = zero_shot.by_score(logits, truths)
        rows: list[ProbeRow] = [
            {
                "id": name,
                "truth": self._names[truth],
                "answers": [self._names[c] for c in best[:5]],
                "rank": r,
                "correct": r == 0,
                "strength": sweep.strength,
            }
            for name, truth, best, r in zip(self.ids, truths.tolist(), order.tolist(), rank.tolist(), strict=True)
        ]
        yield [row for row in rows if row["id"] not in done]
