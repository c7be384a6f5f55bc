"""Tasks beyond one question and one answer text: yes or no, choices by likelihood, conversations."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np

from isthmus.data.messages import NO_ANSWER
from isthmus.errors import CapabilityError, ConfigError, DataError
from isthmus.evaluation import binary, choice, rules, vqa
from isthmus.evaluation.bootstrap import Interval, Outcomes, intervals
from isthmus.evaluation.controls import answers_with_controls, plan_controls
from isthmus.evaluation.outputs import LikelihoodRow, Manifest, QuestionRow, TurnRow
from isthmus.evaluation.protocols import Answers, S, Sample, TextPart, Weighs
from isthmus.evaluation.tasks import (
    Questions,
    Scores,
    VqaTask,
    listed,
    points,
    rule_of,
    seed_of,
    unique,
)
from isthmus.evaluation.turns import (
    kind_of,
    last_turn,
    prompt,
    texts_of,
    turns,
    with_pictures_of,
    without_picture,
)


@dataclass(frozen=True, kw_only=True)
class BinaryTask(VqaTask):
    """Yes or no (POPE), true or false (NLVR): rates of yes beside the accuracy. The kind is POPE's sampling."""

    kind: ClassVar[str] = "binary"

    rule: str = "yes-no"

    @classmethod
    def scored(cls, rows: Sequence[QuestionRow], manifest: Manifest) -> Scores:
        return binary.score(rows, seed=seed_of(manifest))

    @classmethod
    def outcomes(cls, rows: Sequence[QuestionRow], manifest: Manifest) -> Outcomes:
        return Outcomes(binary.table(rows), lambda sums: binary.rates(sums)[..., [0, 3]], ("accuracy", "f1"))


def choices_of(record: Sample, task: str) -> list[str]:
    """Raises DataError when the record has no choices."""
    found = texts_of(record, "choices")
    if not found:
        raise DataError(f"Task {task!r}: sample {record.id!r} has no `choices` in its meta data.")
    return list(found)


@dataclass(frozen=True, kw_only=True)
class LikelihoodTask(Questions[LikelihoodRow]):
    """Multiple choice by log-likelihood: the choice that the model finds likeliest as its answer.

    ``answer_with``: the candidates are the choices' ``text`` or their ``letter``. ``per``: the log-likelihood as it
    is (``answer``), or over the number of characters, so that long choices are not at a disadvantage. Two equally
    likely best choices are no answer: unparsable and counted.
    """

    kind: ClassVar[str] = "likelihood"
    version: ClassVar[int] = 1
    needs: ClassVar[type] = Weighs

    answer_with: Literal["text", "letter"] = "text"
    per: Literal["answer", "character"] = "answer"
    mixed: bool = False

    def __post_init__(self) -> None:
        Questions.__post_init__(self)
        if self.answer_with not in ("text", "letter") or self.per not in ("answer", "character"):
            raise ConfigError(f"Task {self.name!r}: answer_with is text or letter, per is answer or character.")

    def describe(self) -> dict[str, object]:
        return {**Questions.describe(self), "rule": "choice", "answer_with": self.answer_with, "per": self.per}

    def rows(self, model: Weighs, done: Collection[str], *, chunk: int) -> Iterator[list[LikelihoodRow]]:
        plan = plan_controls(self.records, self.name, self.controls, self.seed, mixed=self.mixed)
        todo = [i for i, name in enumerate(self.ids) if name not in done]
        for record in (self.records[i] for i in todo):  # a truth that is no choice is met before the model runs
            row = self.row(record.id, last_turn(record), kind_of(record), {"answer": ""})
            row["choices"] = choices_of(record, self.name)
            choice.CHOICE.points("", row)
        for places in plan.chunks(todo, chunk):
            yield [self._row(model, self.records[i], self.records[plan.other[i]]) for i in places]

    def _row(self, model: Weighs, record: Sample, other: Sample) -> LikelihoodRow:
        choices, question = choices_of(record, self.name), prompt(record)
        ways: dict[str, Callable[[], Sample]] = {
            "answer": lambda: question,
            "blind": lambda: without_picture(question),
            "shuffled": lambda: with_pictures_of(question, other) if question.images else question,
        }
        scores = {way: self._scores(model, ways[way](), choices) for way in ("answer", *self.controls)}
        said = {way: "" if (i := choice.best(s)) is None else choice.LETTERS[i] for way, s in scores.items()}
        row = self.row(record.id, last_turn(record), kind_of(record), said)
        row["choices"] = choices
        points = choice.CHOICE.points(row["answer"], row)
        return {**row, "log_likelihoods": scores["answer"], "correct": points}

    def _scores(self, model: Weighs, record: Sample, choices: Sequence[str]) -> list[float]:
        candidates = list(choice.LETTERS[: len(choices)]) if self.answer_with == "letter" else list(choices)
        scores = model.score(record.parts, candidates)
        if len(scores) != len(candidates) or not np.isfinite(scores).all():
            raise CapabilityError(f"The model gave {scores} as log-likelihoods of {len(candidates)} candidates.")
        if self.per == "character":
            return [s / max(len(c), 1) for s, c in zip(scores, candidates, strict=True)]
        return list(scores)

    @classmethod
    def scored(cls, rows: Sequence[LikelihoodRow], manifest: Manifest) -> vqa.VqaScores:
        return vqa.score(rows, rule=choice.CHOICE, seed=seed_of(manifest))

    @classmethod
    def outcomes(cls, rows: Sequence[LikelihoodRow], manifest: Manifest) -> Outcomes:
        return points(choice.CHOICE, rows)


@dataclass(frozen=True, kw_only=True)
class ConversationTask(Questions[TurnRow]):
    """Every question of a conversation, in order, one row each (id ``<record>/<turn>``, turns from 1).

    ``history``: the earlier answers in the context are the model's ``own`` (under the same control: the blind
    model remembers what it said blind), or the ``true`` ones. Each follow-up is also put ``alone``, with the
    picture and without the earlier turns: where that scores as well, the follow-up needed no memory.
    """

    kind: ClassVar[str] = "conversation"
    version: ClassVar[int] = 1
    needs: ClassVar[type] = Answers

    decoding: Mapping[str, object] = field(default_factory=dict)
    rule: str = "exact"
    history: Literal["own", "true"] = "own"

    def __post_init__(self) -> None:
        Questions.__post_init__(self)
        if rules.rule(self.rule) in (choice.CHOICE, choice.SCIENCEQA):
            raise ConfigError(f"Task {self.name!r}: the turns of a conversation have no choices; take another rule.")
        if self.history is True:  # as YAML reads `true`
            object.__setattr__(self, "history", "true")
        if self.history not in ("own", "true"):
            raise ConfigError(f"Task {self.name!r}: history is own or true, not {self.history!r}.")

    @cached_property
    def ids(self) -> list[str]:
        return unique([i for r in listed(self.records) for i in self._ids(r)], self.name)

    def _ids(self, record: Sample) -> list[str]:
        count = len(turns(record))
        if not count:
            raise DataError(f"Task {self.name!r}: sample {record.id!r} has no answer to score against.")
        return [f"{record.id}/{n}" for n in range(1, count + 1)]

    def describe(self) -> dict[str, object]:
        own = {"rule": self.rule, "history": self.history, "decoding": dict(self.decoding)}
        return {**Questions.describe(self), **own}

    def rows(self, model: Answers, done: Collection[str], *, chunk: int) -> Iterator[list[TurnRow]]:
        plan = plan_controls(self.records, self.name, self.controls, self.seed)
        todo = [i for i in range(len(self.records)) if not set(self._ids(self.records[i])) <= set(done)]
        for places in plan.chunks(todo, max(1, chunk // 4)):
            others = [self.records[plan.other[i]] for i in places]
            made = self._talk(model, [self.records[i] for i in places], others)
            yield [row for row in made if row["id"] not in done]

    def _talk(self, model: Answers, records: Sequence[Sample], others: Sequence[Sample]) -> list[TurnRow]:
        said: dict[str, list[list[str]]] = {}
        for way in ("answer", *self.controls):
            shown: Sequence[Sample] = {
                "answer": records,
                "blind": [without_picture(r) for r in records],
                "shuffled": [with_pictures_of(r, o) for r, o in zip(records, others, strict=True)],
            }[way]
            said[way] = self._converse(model, shown)
        said["alone"] = self._alone(model, records, said["answer"])
        return [
            self._row(record, n, {way: answers[j][n] for way, answers in said.items()})
            for j, record in enumerate(records)
            for n in range(len(turns(record)))
        ]

    def _converse(self, model: Answers, records: Sequence[Sample]) -> list[list[str]]:
        """The model's answers by record and turn; turn after turn, all records that still have one at once."""
        said: list[list[str]] = [[] for _ in records]
        for n in range(max(len(turns(r)) for r in records)):
            going = [i for i, r in enumerate(records) if len(turns(r)) > n]
            prompts = [_up_to(records[i], n, said[i] if self.history == "own" else None) for i in going]
            answers = answers_with_controls(model, prompts, prompts, (), self.decoding)["answer"]
            for i, answer in zip(going, answers, strict=True):
                said[i].append(answer)
        return said

    def _alone(self, model: Answers, records: Sequence[Sample], first: Sequence[Sequence[str]]) -> list[list[str]]:
        """Follow-ups without what was said before. A first question is alone anyway: its answer stands."""
        places = [(i, n) for i, r in enumerate(records) for n in range(1, len(turns(r)))]
        found = [list(answers) for answers in first]
        if places:
            prompts = [_without_history(records[i], n) for i, n in places]
            for (i, n), answer in zip(
                places, answers_with_controls(model, prompts, prompts, (), self.decoding)["answer"], strict=True
            ):
                found[i][n] = answer
        return found

    def _row(self, record: Sample, n: int, answers: Mapping[str, str]) -> TurnRow:
        all_turns = turns(record)
        turn = last_turn(record) if n == len(all_turns) - 1 else all_turns[n]
        kinds = texts_of(record, "kinds")
        kind = kinds[n] if kinds else kind_of(record)
        row = self.row(f"{record.id}/{n + 1}", turn, kind, answers)
        points = rules.rule(self.rule).points(row["answer"], row)
        return {**row, "turn": n + 1, "alone": answers["alone"], "correct": points}

    @classmethod
    def scored(cls, rows: Sequence[TurnRow], manifest: Manifest) -> "ConversationScores":
        return score_conversation(rows, rule=rule_of(manifest), seed=seed_of(manifest))

    @classmethod
    def outcomes(cls, rows: Sequence[TurnRow], manifest: Manifest) -> Outcomes:
        return points(rule_of(manifest), rows)


def _up_to(record: S, n: int, said: Sequence[str] | None) -> S:
    """The record before its n-th answer, with the earlier answers replaced by ``said`` where given."""
    found = turns(record)
    parts = list(record.parts[: found[n].at])
    for turn, answer in zip(found[:n], said or (), strict=False):
        part = parts[turn.at]
        assert isinstance(part, TextPart)  # as turns are
        parts[turn.at] = replace(part, text=answer.strip() or NO_ANSWER)
    return replace(record, parts=tuple(parts))


def _without_history(record: S, n: int) -> S:
    """All pictures up to the n-th question, and that question alone."""
    found = turns(record)
    before = tuple(p for p in record.parts[: found[n - 1].at + 1] if p in record.images)
    return replace(record, parts=(*before, *record.parts[found[n - 1].at + 1 : found[n].at]))


@dataclass(frozen=True, slots=True)
class ConversationScores:
    """Points with controls, per turn, and of the follow-ups: with what was said before, alone, and the gain of it."""

    answers: vqa.VqaScores
    turns: Mapping[int, float]
    follow_ups: Mapping[str, object]

    def to_dict(self) -> dict[str, object]:
        by_turn = {str(n): value for n, value in self.turns.items()}
        return {**self.answers.to_dict(), "turns": by_turn, "follow_ups": dict(self.follow_ups)}


def score_conversation(rows: Sequence[TurnRow], *, rule: vqa.Rule, seed: int = 0) -> ConversationScores:
    """From output rows. Raises DataError when there are none."""
    answers = vqa.score(rows, rule=rule, seed=seed)
    by_turn: defaultdict[int, list[float]] = defaultdict(list)
    for row in rows:
        by_turn[row["turn"]].append(rule.points(row["answer"], row))
    later = [r for r in rows if r["turn"] > 1]
    follow_ups: dict[str, object] = {"n": len(later)}
    if later:
        points = np.array([[rule.points(r["answer"], r), rule.points(r["alone"], r)] for r in later])
        together, alone = points.mean(axis=0)
        gain: Interval = intervals(points, lambda s: (s[..., :1] - s[..., 1:]) / len(points), seed=seed)[0]
        follow_ups |= {
            "accuracy": float(together),
            "alone": float(alone),
            "gain_of_history": float(together - alone),
            "gain_of_history_interval": list(gain),
        }
    return ConversationScores(answers, {n: float(np.mean(v)) for n, v in sorted(by_turn.items())}, follow_ups)
