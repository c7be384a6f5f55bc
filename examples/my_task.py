"""An evaluation task of one's own: how near a model counts.

In a recipe, relative to the recipe's file:

    evaluate:
      - {name: counting, task: my_task.py:Counting, data: {kind: my_source.py:Cards, count: 200}, options: {near: 2}}

or on the command line, relative to the working folder:

    isthmus eval MODEL --task examples/my_task.py:Counting --data examples/my_source.py:Cards --set count=200

A task makes output rows, which are kept on disk as they come, so that an interrupted evaluation goes on; and scores
from the rows alone. What it needs of a model is a protocol of :mod:`isthmus.evaluation.protocols`.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import ClassVar

from isthmus.errors import DataError
from isthmus.evaluation.outputs import ScoredRow
from isthmus.evaluation.protocols import Answers, Records, Sample
from isthmus.evaluation.tasks import Task
from isthmus.evaluation.turns import last_turn, prompt


class CountingRow(ScoredRow):
    """A row has an ``id``, and what the score is made from."""

    truth: int
    answer: str


@dataclass(frozen=True, kw_only=True)
class CountingScores:
    """``exact`` and ``near`` are the shares of answers that were right, or nearly; ``unread`` held no number."""

    n: int
    exact: float
    near: float
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
        found = [re.search(r"\d+", row["answer"]) for row in rows]
        off = [abs(int(n[0]) - row["truth"]) for n, row in zip(found, rows, strict=True) if n is not None]
        return CountingScores(
            n=len(rows),
            exact=sum(distance == 0 for distance in off) / len(rows),
            near=sum(distance <= self.near for distance in off) / len(rows),
            unread=len(rows) - len(off),
        )
