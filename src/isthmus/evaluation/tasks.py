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
from typing import Any, ClassVar, Generic, Protocol, cast, runtime_checkable

import numpy as np

from isthmus.errors import CapabilityError, ConfigError, DataError, nearest
from isthmus.evaluation import rules, vqa
from isthmus.evaluation.bootstrap import Outcomes, means
from isthmus.evaluation.controls import Control, answers_with_controls, check_controls, plan_controls, shuffled_among
from isthmus.evaluation.outputs import AnswerRow, AskedRow, Manifest, QuestionRow, R
from isthmus.evaluation.protocols import Answers, Measures, Picture, Records, S, Sample, TextPart
from isthmus.evaluation.turns import Turn, kind_of, last_turn, prompt, texts_of

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
