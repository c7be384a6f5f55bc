"""Visual question answering: points for answers beside what can be reached without the picture.

A score stands beside three scores of a model that does not see the picture: **blind** (the same model without the
picture), **shuffled** (with another sample's picture) and **prior** (the training answers' most frequent answer to
the same question text). The highest of the three is the best control; the **gain** is the distance above
it, per question kind and overall.
"""

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np

from isthmus.errors import DataError
from isthmus.evaluation.bootstrap import Array, Interval, intervals
from isthmus.evaluation.outputs import AnswerRow, SaidRow, Way, said
from isthmus.evaluation.protocols import Sample
from isthmus.evaluation.turns import kind_of, turns

ENOUGH = 300
"""Fewer questions of a kind than this, and its gain says little: it is marked."""

_ARTICLES = ("a ", "an ", "the ")
_CONTROLS: tuple[Way, ...] = ("blind", "shuffled", "prior")


def normalise(answer: str) -> str:
    """Case, white space, a trailing full stop and a leading article do not matter; everything else does."""
    text = " ".join(answer.casefold().split()).rstrip(".").rstrip()
    for article in _ARTICLES:
        if text.startswith(article):
            return text[len(article) :]
    return text


def is_right(answer: str, truths: Iterable[str]) -> bool:
    """Exact match with any accepted answer after :func:`normalise`. An empty answer is never right."""
    given = normalise(answer)
    return bool(given) and given in {normalise(t) for t in truths}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How an answer is scored: ``points`` in 0 … 1, and ``says``, what the answer is read as (none: unparsable).

    ``version`` is raised with every change that can move a score; it stands in the manifest of every score.
    """

    name: str
    version: int
    points: Callable[[str, AnswerRow], float]
    says: Callable[[str, AnswerRow], str | None] = field(default=lambda answer, row: normalise(answer))


EXACT = Rule(name="exact", version=1, points=lambda answer, row: float(is_right(answer, row["truth"])))


class AnswerPrior:
    """The most frequent training answer per question text, else of the question's kind, else of all.

    Answers that differ only in what :func:`normalise` takes away are counted as one and said in their commonest
    spelling, for there are rules to which that matters. Equally frequent ones: the alphabetically first. With no
    training answers at all it answers nothing.
    """

    def __init__(self, by_question: Mapping[str, str], by_kind: Mapping[str, str], overall: str) -> None:
        self.by_question, self.by_kind, self.overall = dict(by_question), dict(by_kind), overall

    @classmethod
    def fit(cls, records: Iterable[Sample]) -> "AnswerPrior":
        """Counts every turn of every record."""
        questions: defaultdict[str, Counter[str]] = defaultdict(Counter)
        kinds: defaultdict[str, Counter[str]] = defaultdict(Counter)
        spellings: defaultdict[str, Counter[str]] = defaultdict(Counter)
        for record in records:
            for turn in turns(record):
                answer = normalise(turn.answers[0])
                spellings[answer][turn.answers[0]] += 1
                questions[_question_key(turn.question)][answer] += 1
                kinds[kind_of(record)][answer] += 1
        overall = sum(kinds.values(), Counter())

        def said(counts: Counter[str]) -> str:
            return _most_frequent(spellings[_most_frequent(counts)])

        return cls(
            {q: said(c) for q, c in questions.items()},
            {k: said(c) for k, c in kinds.items()},
            said(overall) if overall else "",
        )

    def answer(self, question: str, kind: str) -> str:
        return self.by_question.get(_question_key(question)) or self.by_kind.get(kind) or self.overall

    def fingerprint(self) -> str:
        """sha256 of all it would answer."""
        table = json.dumps([self.by_question, self.by_kind, self.overall], sort_keys=True)
        return hashlib.sha256(table.encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Fractions over ``n`` questions; a control that was not run is none, and so is the gain without any control.

    ``interval`` and ``gain_interval`` are 95 % bootstrap intervals over questions, the gain's paired and with its
    best control chosen anew in each resample. ``empty`` counts empty answers and ``unparsable`` those that the rule
    cannot read, empty ones among them (each of them wrong; there is no fallback answer).
    """

    n: int
    accuracy: float
    interval: Interval
    blind: float | None = None
    shuffled: float | None = None
    prior: float | None = None
    gain: float | None = None
    gain_interval: Interval | None = None
    empty: int = 0
    unparsable: int = 0

    @property
    def best_without_looking(self) -> float | None:
        known = [c for c in (self.blind, self.shuffled, self.prior) if c is not None]
        return max(known) if known else None

    @property
    def enough(self) -> bool:
        return self.n >= ENOUGH

    def to_dict(self) -> dict[str, object]:
        return {
            "accuracy": self.accuracy,
            "accuracy_interval": list(self.interval),
            "blind": self.blind,
            "shuffled": self.shuffled,
            "prior": self.prior,
            "best_without_looking": self.best_without_looking,
            "gain": self.gain,
            "gain_interval": list(self.gain_interval) if self.gain_interval else None,
            "n": self.n,
            "enough": self.enough,
            "empty": self.empty,
            "unparsable": self.unparsable,
        }


@dataclass(frozen=True, slots=True)
class VqaScores:
    """Overall and per question kind (alphabetically)."""

    overall: Score
    kinds: Mapping[str, Score] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """The overall facts, with ``kinds`` beside them: what stands under ``models.<name>`` in results.json."""
        return {**self.overall.to_dict(), "kinds": {k: s.to_dict() for k, s in self.kinds.items()}}


@runtime_checkable
class HasAnswers(Protocol):
    """Scores that hold those of answers among others: yes or no, conversations, groups."""

    @property
    def answers(self) -> VqaScores: ...


def score(rows: Sequence[AnswerRow], *, rule: Rule = EXACT, seed: int = 0) -> VqaScores:
    """Scores of output rows by ``rule``: each has ``truth`` (list), ``kind``, ``answer``, and ``blind``, ``shuffled``
    and ``prior`` (the raw answers, or none where the control was not run).

    Raises DataError when there are no rows.
    """
    return pooled([rows], rule=rule, seed=seed)


def pooled(runs: Sequence[Sequence[AnswerRow]], *, rule: Rule = EXACT, seed: int = 0) -> VqaScores:
    """Scores of several runs over the same questions in the same order, one per training seed: the means over runs.
    A question is drawn with all its answers, so intervals are over questions, not over seeds."""
    if not runs or not runs[0]:
        raise DataError("There are no answers to score: the data set is empty.")
    if any([r["id"] for r in rows] != [r["id"] for r in runs[0]] for rows in runs[1:]):
        raise DataError("The runs to pool do not hold the same questions in the same order.")
    kinds: defaultdict[str, list[int]] = defaultdict(list)
    for place, row in enumerate(runs[0]):
        kinds[row["kind"]].append(place)
    return VqaScores(
        _score(runs, rule, seed),
        {k: _score([[rows[i] for i in kinds[k]] for rows in runs], rule, seed) for k in sorted(kinds)},
    )


def controls_of(rows: Sequence[SaidRow]) -> list[Way]:
    """The controls that were run for every row."""
    return [c for c in _CONTROLS if all(r.get(c) is not None for r in rows)]


def _score(runs: Sequence[Sequence[AnswerRow]], rule: Rule, seed: int) -> Score:
    every = [r for rows in runs for r in rows]
    controls = controls_of(every)
    ways: list[Way] = ["answer", *controls]
    points = [[[rule.points(said(r, way), r) for way in ways] for r in rows] for rows in runs]
    right = np.array(points, dtype=np.float64).mean(axis=0)
    n = len(right)

    def statistic(sums: Array) -> Array:
        gain = sums[:, 0] - sums[:, 1:].max(axis=1, initial=0)
        return np.stack([sums[:, 0], gain], axis=1) / n

    accuracy, gain = intervals(right, statistic, seed=seed)
    means = right.mean(axis=0)
    values: dict[str, float] = {c: float(m) for c, m in zip(controls, means[1:], strict=True)}
    return Score(
        n=n,
        accuracy=float(means[0]),
        interval=accuracy,
        gain=float(means[0]) - max(values.values()) if values else None,
        gain_interval=gain if values else None,
        empty=sum(not normalise(r["answer"]) for r in every),
        unparsable=sum(not rule.says(r["answer"], r) for r in every),
        **values,
    )


def _question_key(question: str) -> str:
    return " ".join(question.casefold().split())


def _most_frequent(counts: Counter[str]) -> str:
    return min(counts, key=lambda answer: (-counts[answer], answer))
