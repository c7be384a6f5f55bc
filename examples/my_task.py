"""An evaluation task of one's own: how near a model counts.

In a recipe, relative to the recipe's file:

    evaluate:
      - {name: counting, task: my_task.py:Counting, data: {kind: my_source.py:Cards, count: 200}, options: {near: 2}}

or on the command line, relative to the working folder:

    isthmus eval MODEL --task examples/my_task.py:Counting --data examples/my_source.py:Cards --set count=200

A task makes output rows, which are kept on disk as they come, so that an interrupted evaluation goes on; and scores
from the rows alone. What it needs of a model is a protocol of :mod:`isthmus.evaluation.protocols`.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import ClassVar

import numpy as np

from isthmus.errors import DataError
from isthmus.evaluation.bootstrap import Array, Interval, Outcomes, intervals, means
from isthmus.evaluation.outputs import Manifest, ScoredRow
from isthmus.evaluation.protocols import Answers, Records, Sample
from isthmus.evaluation.tasks import Task
from isthmus.evaluation.turns import last_turn, prompt


class CountingRow(ScoredRow):
    """A row has an ``id``, and what the score is made from."""

    truth: int
    answer: str


@dataclass(frozen=True, kw_only=True)
class CountingScores:
    """``exact`` and ``near`` are the shares of answers that were right, or nearly; ``unread`` held no number.

    ``isthmus compare`` shows every share, with the 95 % interval that stands beside it under its name."""

    n: int
    exact: float
    exact_interval: Interval
    near: float
    near_interval: Interval
    unread: int

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Counting(Task[CountingRow]):
    """Questions whose answer is a number; the others of the data are left aside. ``near`` is the greatest distance that
    still counts as nearly right."""

    kind: ClassVar[str] = "counting"
    needs: ClassVar[type] = Answers

    name: str
    records: Records[Sample]
    seed: int = 0
    near: int = 1
    decoding: Mapping[str, object] = field(default_factory=lambda: {"max_new_tokens": 8})

    @property
    def ids(self) -> list[str]:
        """One row for each question about a number."""
        every = (self.records[i] for i in range(len(self.records)))
        found = [r.id for r in every if last_turn(r).answers[0].isdigit()]
        if not found:
            raise DataError(f"Task {self.name!r}: no answer of the data is a number.")
        return found

    def describe(self) -> dict[str, object]:
        """Kept in the output folder, which goes on only with the same."""
        return {**super().describe(), "near": self.near, "decoding": dict(self.decoding)}

    def rows(self, model: Answers, done: Collection[str], *, chunk: int) -> Iterator[list[CountingRow]]:
        wanted = set(self.ids) - set(done)
        records = [r for r in (self.records[i] for i in range(len(self.records))) if r.id in wanted]
        for start in range(0, len(records), chunk):
            some = records[start : start + chunk]
            answers = model.answer_records([prompt(r) for r in some], **self.decoding)
            yield [
                {"id": r.id, "truth": int(last_turn(r).answers[0]), "answer": a}
                for r, a in zip(some, answers, strict=True)
            ]

    def score(self, rows: Sequence[CountingRow]) -> CountingScores:
        points = _points(rows, self.near)
        exact, near = points.mean(axis=0).tolist()
        of_exact, of_near = intervals(points, lambda sums: sums / len(rows), seed=self.seed)
        unread = sum(_number(row) is None for row in rows)
        return CountingScores(
            n=len(rows), exact=exact, exact_interval=of_exact, near=near, near_interval=of_near, unread=unread
        )

    @classmethod
    def outcomes(cls, rows: Sequence[CountingRow], manifest: Manifest) -> Outcomes:
        """What each item adds to the scores: with this two models are compared in pairs, over the same items."""
        described: Mapping[str, object] = manifest  # what describe() gave stands there too
        return means(_points(rows, int(str(described["near"]))), "exact", "near")


def _number(row: CountingRow) -> int | None:
    """The first number of an answer."""
    found = re.search(r"\d+", row["answer"])
    return None if found is None else int(found[0])


def _points(rows: Sequence[CountingRow], near: int) -> Array:
    """(n, 2): is the number the true one, and is it near?"""
    off = [math.inf if (n := _number(row)) is None else abs(n - row["truth"]) for row in rows]
    return np.array([[distance == 0, distance <= near] for distance in off], dtype=np.float64)
