"""Answers that a judge scores beside a reference: the relative score of LLaVA-Bench.

Relative is the ratio of means, mean(candidate) / mean(reference), per category and over all; a question's scores are
the means over both orders. A question of which an order could not be read is excluded, and counted.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import numpy as np

from isthmus.config import check_options
from isthmus.errors import ConfigError, DataError
from isthmus.evaluation.bootstrap import Array, Interval, Outcomes, intervals
from isthmus.evaluation.controls import answers_of
from isthmus.evaluation.judge import Judge, Pair, Review
from isthmus.evaluation.outputs import JudgedRow, Manifest
from isthmus.evaluation.protocols import Answers, Records, Sample
from isthmus.evaluation.tasks import StandardTask, fingerprint, listed, seed_of
from isthmus.evaluation.turns import kind_of, last_turn, prompt

_CHUNK = 4
"""Questions between two writings: a judge's replies cost more than a model's answers."""
_PROBES = 8


@dataclass(frozen=True, kw_only=True)
class JudgedTask(StandardTask[JudgedRow]):
    """The last question of each record, answered and judged beside the record's own answer, the reference.
    ``meta["context"]`` is what the judge reads about the picture. ``judge``: the fields of :class:`.judge.Judge`,
    ``url`` and ``model`` among them. With ``sanity`` the judge is tried first, on references beside those of other
    questions.
    """

    kind: ClassVar[str] = "judged"
    version: ClassVar[int] = 1
    needs: ClassVar[type] = Answers

    name: str
    records: Records[Sample]
    judge: Mapping[str, object] = field(default_factory=dict)
    decoding: Mapping[str, object] = field(default_factory=dict)
    sanity: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for needed in ("url", "model"):
            if not self.judge.get(needed):
                raise ConfigError(f"Task {self.name!r}: name the judge: --judge URL and --judge-model NAME.")
        _ = self._judge

    @cached_property
    def _judge(self) -> Judge:
        check_options(Judge, self.judge, f"Task {self.name!r}: judge")
        return _made(Judge, self.judge)

    def describe(self) -> dict[str, object]:
        return {
            "judge": self._judge.describe(),
            "decoding": dict(self.decoding),
            "data": fingerprint(self.records),
            "contexts": [_context(r, self.name) for r in listed(self.records)],
        }

    def prompts(self) -> Iterator[Sample]:
        """The records as the model gets them."""
        return (prompt(r) for r in listed(self.records))

    def rows(self, model: Answers, done: Collection[str], *, chunk: int) -> Iterator[list[JudgedRow]]:
        todo = [i for i, name in enumerate(self.ids) if name not in done]
        if todo and self.sanity:
            self._probe()
        for start in range(0, len(todo), min(chunk, _CHUNK)):
            records = [self.records[i] for i in todo[start : start + min(chunk, _CHUNK)]]
            answers = answers_of(model, [prompt(r) for r in records], self.decoding)
            pairs = [self._pair(r, answer) for r, answer in zip(records, answers, strict=True)]
            reviews = self._judge.reviews([p for pair in pairs for p in (pair, pair.turned())])
            yield [
                self._row(r, answer, straight, turned)
                for r, answer, straight, turned in zip(records, answers, reviews[::2], reviews[1::2], strict=True)
            ]

    def _pair(self, record: Sample, answer: str) -> Pair:
        turn = last_turn(record)
        context = _context(record, self.name)
        return Pair(record.id, kind_of(record), context, turn.question, turn.answers[0], answer)

    def _row(self, record: Sample, answer: str, straight: Review, turned: Review) -> JudgedRow:
        """``straight`` has the reference first, as LLaVA-Bench has it."""
        turn = last_turn(record)
        return {
            "id": record.id,
            "kind": kind_of(record),
            "question": turn.question,
            "truth": [turn.answers[0]],
            "answer": answer,
            "reference_first": straight.to_dict(),
            "candidate_first": turned.to_dict(),
        }

    def _probe(self) -> None:
        """References beside those of questions about other pictures; nothing where there are no two different ones."""
        some = [self.records[i] for i in range(min(len(self.records), 4 * _PROBES))]
        pairs = []
        for place, record in enumerate(some):
            others = (some[(place + k) % len(some)] for k in range(1, len(some)))
            wrong = next((o for o in others if _pictures(o) != _pictures(record) and _said(o) != _said(record)), None)
            if wrong is not None:
                pairs.append(self._pair(record, _said(wrong)))
        if pairs:
            self._judge.probe(pairs[:_PROBES])

    @classmethod
    def scored(cls, rows: Sequence[JudgedRow], manifest: Manifest) -> "JudgedScores":
        return score(rows, seed=seed_of(manifest))

    @classmethod
    def outcomes(cls, rows: Sequence[JudgedRow], manifest: Manifest) -> Outcomes:
        return Outcomes(columns(rows), ratio, ("relative",))


def _made(kind: Callable[..., Judge], options: Mapping[str, object]) -> Judge:
    """Of what a user wrote, which is checked."""
    return kind(**options)


def _context(record: Sample, task: str) -> str:
    context = record.meta.get("context")
    if not context:
        raise DataError(f"Task {task!r}: sample {record.id!r} has no `context`, from which a judge knows the picture.")
    return str(context)


def _pictures(record: Sample) -> list[str]:
    return [image.content_key() for image in record.images]


def _said(record: Sample) -> str:
    return last_turn(record).answers[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Relative:
    """Of ``n`` questions that could be read, and ``excluded`` that could not: mean scores of 1 to 10, and their
    ratio."""

    n: int
    excluded: int
    relative: float | None = None
    interval: Interval | None = None
    candidate: float | None = None
    reference: float | None = None

    def to_dict(self) -> dict[str, object]:
        return {
            "relative": self.relative,
            "relative_interval": list(self.interval) if self.interval else None,
            "candidate": self.candidate,
            "reference": self.reference,
            "n": self.n,
            "excluded": self.excluded,
        }


@dataclass(frozen=True, slots=True)
class JudgedScores:
    """Overall and by category; ``retried`` counts the reviews that were requested more than once, ``orders`` what
    became of the winner when the order was turned: ``stays``, ``first`` or ``second`` (whoever stood there), ``mixed``
    (a tie)."""

    overall: Relative
    kinds: Mapping[str, Relative]
    retried: int
    orders: Mapping[str, int]

    def to_dict(self) -> dict[str, object]:
        kinds = {kind: one.to_dict() for kind, one in self.kinds.items()}
        return {**self.overall.to_dict(), "retried": self.retried, "orders": dict(self.orders), "kinds": kinds}


def columns(rows: Sequence[JudgedRow]) -> Array:
    """(n, 2): candidate's and reference's mean score over both orders; zeros where one could not be read."""
    out = np.zeros((len(rows), 2))
    for i, row in enumerate(rows):
        straight, turned = row["reference_first"]["scores"], row["candidate_first"]["scores"]
        if straight and turned:
            out[i] = (straight[1] + turned[0]) / 2, (straight[0] + turned[1]) / 2
    return out


def ratio(sums: Array) -> Array:
    """(…, 2) sums of :func:`columns` -> (…, 1) relative score; nothing read is 0."""
    candidate, reference = sums[..., :1], sums[..., 1:]
    return np.divide(candidate, reference, out=np.zeros_like(candidate), where=reference > 0)


def score(rows: Sequence[JudgedRow], *, seed: int = 0) -> JudgedScores:
    """From output rows. Raises DataError when there are none."""
    if not rows:
        raise DataError("There are no answers to score: the data set is empty.")
    kinds: defaultdict[str, list[JudgedRow]] = defaultdict(list)
    for row in rows:
        kinds[row["kind"]].append(row)
    reviews = [review for row in rows for review in (row["reference_first"], row["candidate_first"])]
    return JudgedScores(
        _relative(rows, seed),
        {kind: _relative(kinds[kind], seed) for kind in sorted(kinds)},
        sum(review["tries"] > 1 for review in reviews),
        _orders(rows),
    )


def _relative(rows: Sequence[JudgedRow], seed: int) -> Relative:
    found = columns(rows)
    found = found[found[:, 1] > 0]
    excluded = len(rows) - len(found)
    if not len(found):
        return Relative(n=0, excluded=excluded)
    candidate, reference = found.mean(axis=0)
    return Relative(
        n=len(found),
        excluded=excluded,
        relative=float(candidate / reference),
        interval=intervals(found, ratio, seed=seed)[0],
        candidate=float(candidate),
        reference=float(reference),
    )


def _orders(rows: Sequence[JudgedRow]) -> dict[str, int]:
    found: Counter[str] = Counter()
    for row in rows:
        straight, turned = row["reference_first"]["scores"], row["candidate_first"]["scores"]
        if straight and turned:
            one, other = np.sign(straight[0] - straight[1]), np.sign(turned[0] - turned[1])
            stays = one == -other
            found["stays" if stays else "first" if one > 0 < other else "second" if one < 0 > other else "mixed"] += 1
    return {name: found[name] for name in ("stays", "first", "second", "mixed")}
