"""Yes-or-no answers: accuracy, precision, recall, F1 and the share of yes, as POPE reports them (Li et al. 2023).

An answer that says neither is unparsable: a class of its own, wrong, and counted. The published POPE parser instead
takes every answer without a "no" for a yes; that reading stands beside ours under ``official``, so that numbers can
be held against published ones and the difference shows. It knows no true and false: NLVR has no ``official``.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from isthmus.errors import DataError
from isthmus.evaluation import vqa
from isthmus.evaluation.bootstrap import Array, Interval, intervals
from isthmus.evaluation.outputs import AnswerRow
from isthmus.evaluation.vqa import Rule

_WORDS = {
    "yes": "yes", "yeah": "yes", "yep": "yes", "true": "yes", "correct": "yes",
    "no": "no", "not": "no", "nope": "no", "false": "no", "incorrect": "no",
}  # fmt: skip
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?")


def parse(answer: str) -> str | None:
    """``yes``, ``no`` or none. The first sentence counts; a "no" or "not" in it outweighs a "yes"."""
    words = _WORD.findall(answer.casefold().replace("’", "'").split(".", 1)[0])
    found = {_WORDS.get(w) or ("no" if w.endswith("n't") else None) for w in words}
    return "no" if "no" in found else "yes" if "yes" in found else None


def parse_as_pope(answer: str) -> str:
    """The published rule: text before the first full stop, commas dropped; "No", "no" or "not" among the words is a
    no and everything else, an empty answer too, a yes."""
    words = answer.split(".", 1)[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def _truth(row: AnswerRow) -> str:
    truth = parse(str(row["truth"][0]))
    if truth is None:
        raise DataError(
            f"Sample {row.get('id')!r} has the truth {row['truth'][0]!r}, which says neither yes nor no (nor true nor "
            "false); answers to it take another task or rule."
        )
    return truth


YES_NO = Rule(
    name="yes-no",
    version=1,
    points=lambda answer, row: float(_truth(row) == parse(answer)),
    says=lambda answer, row: parse(answer),
)
"""Raises DataError for a truth that is neither."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Binary:
    """Of the positive class "yes". A fraction whose denominator is empty is 0. ``yes_ratio`` is of all questions."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float
    f1_interval: Interval | None = None

    def to_dict(self) -> dict[str, object]:
        facts: dict[str, object] = {k: getattr(self, k) for k in ("accuracy", "precision", "recall", "f1", "yes_ratio")}
        return facts | ({"f1_interval": list(self.f1_interval)} if self.f1_interval else {})


def table(rows: Sequence[AnswerRow], *, official: bool = False) -> Array:
    """(n, 5): true yes, false yes, true no, false no, one. An unparsable answer to a yes counts as a missed yes."""
    out = np.zeros((len(rows), 5))
    for i, row in enumerate(rows):
        said = parse_as_pope(row["answer"]) if official else parse(row["answer"])
        truth = _truth(row)
        right = said == truth
        column = (0 if right else 1) if said == "yes" else 2 if right else 3 if truth == "yes" else None
        if column is not None:
            out[i, column] = 1
        out[i, 4] = 1
    return out


def rates(sums: Array) -> Array:
    """(…, 5) sums of :func:`table` -> (…, 5): accuracy, precision, recall, F1, share of yes."""
    true_yes, false_yes, true_no, false_no, n = np.moveaxis(np.asarray(sums, dtype=np.float64), -1, 0)

    def over(part: Array, total: Array) -> Array:
        return np.divide(part, total, out=np.zeros_like(part), where=total > 0)

    precision, recall = over(true_yes, true_yes + false_yes), over(true_yes, true_yes + false_no)
    f1 = over(2 * precision * recall, precision + recall)
    return np.stack([(true_yes + true_no) / n, precision, recall, f1, (true_yes + false_yes) / n], axis=-1)


@dataclass(frozen=True, slots=True)
class BinaryScores:
    """Accuracy with its controls (:class:`VqaScores`), and the rates of yes, overall and per kind (POPE: per
    sampling). ``official`` are the rates under the published parser, where all truths are yes or no;
    ``f1_over_kinds`` is the mean F1 of the kinds; ``majority`` the accuracy of saying the commoner truth always;
    ``consistency`` the share of groups (NLVR: the box orders of one example) of which every answer is right.
    """

    answers: vqa.VqaScores
    overall: Binary
    kinds: Mapping[str, Binary]
    official: Mapping[str, Binary]
    majority: float
    consistency: float | None = None

    def to_dict(self) -> dict[str, object]:
        facts = self.answers.to_dict()
        facts["kinds"] = {k: s.to_dict() | self.kinds[k].to_dict() for k, s in self.answers.kinds.items()}
        mean = sum(k.f1 for k in self.kinds.values()) / len(self.kinds)
        facts |= self.overall.to_dict() | {"f1_over_kinds": mean, "majority": self.majority}
        if self.official:
            facts["official"] = {k: b.to_dict() for k, b in self.official.items()}
        return facts if self.consistency is None else facts | {"consistency": self.consistency}


def score(rows: Sequence[AnswerRow], *, seed: int = 0) -> BinaryScores:
    """From output rows, as :func:`vqa.score`. Raises DataError: there are none, or a truth is neither yes nor no."""
    answers = vqa.score(rows, rule=YES_NO, seed=seed)
    kinds: defaultdict[str, list[AnswerRow]] = defaultdict(list)
    for row in rows:
        kinds[row["kind"]].append(row)
    named = {k: kinds[k] for k in sorted(kinds)}
    in_words = all(str(row["truth"][0]).strip().rstrip(".").casefold() in ("yes", "no") for row in rows)
    official = {"all": rows, **named} if in_words else {}
    return BinaryScores(
        answers,
        _binary(rows, seed),
        {k: _binary(some, seed) for k, some in named.items()},
        {k: _binary(some, seed, official=True) for k, some in official.items()},
        _majority(rows),
        _consistency(rows),
    )


def _majority(rows: Sequence[AnswerRow]) -> float:
    truths = [_truth(row) for row in rows]
    return max(map(truths.count, set(truths))) / len(rows)


def _consistency(rows: Sequence[AnswerRow]) -> float | None:
    groups: defaultdict[str, list[float]] = defaultdict(list)
    for row in rows:
        if "group" not in row:
            return None
        groups[row["group"]].append(YES_NO.points(row["answer"], row))
    return sum(all(points) for points in groups.values()) / len(groups)


def _binary(rows: Sequence[AnswerRow], seed: int, *, official: bool = False) -> Binary:
    counts = table(rows, official=official)
    accuracy, precision, recall, f1, yes = rates(counts.sum(axis=0))
    spread = None if official else intervals(counts, rates, seed=seed)[3]
    return Binary(
        accuracy=float(accuracy),
        precision=float(precision),
        recall=float(recall),
        f1=float(f1),
        yes_ratio=float(yes),
        f1_interval=spread,
    )
