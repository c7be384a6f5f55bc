"""Tasks whose official score is over groups of questions: MME's accuracy+ and MMBench's circular evaluation."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from isthmus.errors import DataError
from isthmus.evaluation import vqa
from isthmus.evaluation.answer_tasks import BinaryTask
from isthmus.evaluation.binary import YES_NO
from isthmus.evaluation.bootstrap import Interval, Outcomes, intervals
from isthmus.evaluation.choice import CHOICE
from isthmus.evaluation.outputs import AnswerRow, Manifest, QuestionRow
from isthmus.evaluation.tasks import VqaTask, points, rule_of, seed_of

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR",
)  # fmt: skip
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


def _groups(rows: Sequence[AnswerRow], right: Callable[[AnswerRow], bool]) -> list[bool]:
    """Of each group, whether all of it is right. Raises DataError for a row without a group."""
    found: defaultdict[str, list[bool]] = defaultdict(list)
    for row in rows:
        group = row.get("group")
        if group is None:
            raise DataError(f"Sample {row.get('id')!r} has no `group`, which this task is scored by.")
        found[str(group)].append(right(row))
    return [all(answers) for answers in found.values()]


def _by_kind(rows: Sequence[AnswerRow]) -> dict[str, list[AnswerRow]]:
    kinds: defaultdict[str, list[AnswerRow]] = defaultdict(list)
    for row in rows:
        kinds[row["kind"]].append(row)
    return {k: kinds[k] for k in sorted(kinds)}


def parse_as_mme(answer: str) -> str:
    """yes, no or other, by the published ``calculation.py``: a "yes", else a "no", within the first four characters."""
    start = answer[:4].lower()
    return "yes" if "yes" in start else "no" if "no" in start else "other"


@dataclass(frozen=True, slots=True)
class MmeScores:
    """``answers`` by our reading; ``official`` by category: accuracy, accuracy+ (both questions of a picture right) and
    100 times their sum, by the published reading. ``totals``: the sums of categories, as MME is reported, of those that
    are there (2,000 points of perception at most, 800 of cognition)."""

    answers: vqa.VqaScores
    official: Mapping[str, Mapping[str, float]]
    totals: Mapping[str, float]

    def to_dict(self) -> dict[str, object]:
        return {**self.answers.to_dict(), "official": {k: dict(v) for k, v in self.official.items()}, **self.totals}


def score_mme(rows: Sequence[AnswerRow], *, seed: int = 0) -> MmeScores:
    """From output rows. Raises DataError when there are none, or a truth is neither yes nor no."""
    answers = vqa.score(rows, rule=YES_NO, seed=seed)
    official = {}
    for kind, some in _by_kind(rows).items():
        right = [parse_as_mme(row["answer"]) == str(row["truth"][0]).strip().lower() for row in some]
        at = {id(row): r for row, r in zip(some, right, strict=True)}
        accuracy, plus = float(np.mean(right)), float(np.mean(_groups(some, lambda row, at=at: at[id(row)])))
        official[kind] = {"accuracy": accuracy, "accuracy_plus": plus, "points": 100 * (accuracy + plus)}
    totals = {
        name: sum(official[k]["points"] for k in categories if k in official)
        for name, categories in (("perception", PERCEPTION), ("cognition", COGNITION))
        if any(k in official for k in categories)
    }
    return MmeScores(answers, official, totals)


@dataclass(frozen=True, kw_only=True)
class MmeTask(BinaryTask):
    """MME: two questions about each picture, one to be affirmed and one to be denied."""

    kind: ClassVar[str] = "mme"

    @classmethod
    def scored(cls, rows: Sequence[QuestionRow], manifest: Manifest) -> MmeScores:
        return score_mme(rows, seed=seed_of(manifest))

    @classmethod
    def outcomes(cls, rows: Sequence[QuestionRow], manifest: Manifest) -> Outcomes:
        return points(rule_of(manifest), rows)


@dataclass(frozen=True, slots=True)
class CircularScores:
    """``answers`` counts every turn of the choices for itself; ``circular`` is the share of questions of which all
    turns are right, overall and by kind, with an interval over questions."""

    answers: vqa.VqaScores
    circular: float
    interval: Interval
    kinds: Mapping[str, float]

    def to_dict(self) -> dict[str, object]:
        facts = self.answers.to_dict()
        facts["kinds"] = {k: s.to_dict() | {"circular": self.kinds[k]} for k, s in self.answers.kinds.items()}
        return facts | {"circular": self.circular, "circular_interval": list(self.interval)}


def score_circular(rows: Sequence[AnswerRow], *, seed: int = 0) -> CircularScores:
    """From output rows. Raises DataError when there are none, or one has no group."""
    answers = vqa.score(rows, rule=CHOICE, seed=seed)

    def solved(some: Sequence[AnswerRow]) -> list[bool]:
        return _groups(some, lambda row: CHOICE.points(row["answer"], row) == 1)

    outcomes = np.array([solved(rows)], dtype=np.float64).T
    interval = intervals(outcomes, lambda sums: sums / len(outcomes), seed=seed)[0]
    kinds = {k: float(np.mean(solved(some))) for k, some in _by_kind(rows).items()}
    return CircularScores(answers, float(outcomes.mean()), interval, kinds)


@dataclass(frozen=True, kw_only=True)
class CircularTask(VqaTask):
    """MMBench: each question once for each turn of its choices."""

    kind: ClassVar[str] = "circular"

    rule: str = "choice"

    @classmethod
    def scored(cls, rows: Sequence[QuestionRow], manifest: Manifest) -> CircularScores:
        return score_circular(rows, seed=seed_of(manifest))
