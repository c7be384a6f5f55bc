"""What a score folder keeps: the rows of ``outputs.jsonl``, one per item, and what is read again of ``manifest.json``.

Both come from a task, or from the files of an earlier call; a file that was edited is met where it is scored again.
"""

from typing import Literal, NotRequired, TypedDict, TypeVar

Way = Literal["answer", "blind", "shuffled", "prior"]
"""How an answer came about: with the picture, or by one of the controls."""


class ScoredRow(TypedDict):
    """What every row has; a task's other keys are its own. ``gap`` is how near another answer was, where that was
    measured."""

    id: str
    gap: NotRequired[float]


R = TypeVar("R", bound=ScoredRow)


class SaidRow(ScoredRow):
    """What was said about an item, and the accepted truths; a control that was not run is none, and is left out by
    scores of files."""

    truth: list[str]
    answer: str
    blind: NotRequired[str | None]
    shuffled: NotRequired[str | None]
    prior: NotRequired[str | None]


class AnswerRow(SaidRow):
    """An answer, and what else a rule reads; scores of files hold no more."""

    kind: str
    choices: NotRequired[list[str]]
    group: NotRequired[str]


class AskedRow(AnswerRow):
    """With the question."""

    question: str


class QuestionRow(AskedRow):
    """With the answer's points."""

    correct: float


class LikelihoodRow(QuestionRow):
    """The choices' log-likelihoods, in their order."""

    log_likelihoods: list[float]


class TurnRow(QuestionRow):
    """The answer to a conversation's question number ``turn``, from 1; ``alone`` is the one without what was said."""

    turn: int
    alone: str


class RankRow(ScoredRow):
    """A picture with its captions: the rank of the best of them, and each one's rank of the picture, from 0."""

    captions: list[str]
    rank: int
    caption_ranks: list[int]


class RerankRow(RankRow):
    """The ranks after the second step, and after the first alone."""

    first_rank: int
    first_caption_ranks: list[int]


class ClassRow(ScoredRow):
    """The true class, the five likeliest ones, and the true one's rank, from 0."""

    truth: str
    answers: list[str]
    rank: int
    correct: bool


class ProbeRow(ClassRow):
    """By a linear probe of this strength of regularisation."""

    strength: float


class MatchingRow(ScoredRow):
    """A caption, whether it belongs to the picture shown with it, and the scores with that one and with another."""

    caption: str
    label: bool
    score: float
    shuffled: float


class ReviewFacts(TypedDict):
    """A judge's two scores (none: unreadable), the number of requests, and the last reply."""

    scores: list[float] | None
    tries: int
    text: str


class JudgedRow(ScoredRow):
    """An answer as a judge scored it beside a reference, in both orders."""

    kind: str
    question: str
    truth: list[str]
    answer: str
    reference_first: ReviewFacts
    candidate_first: ReviewFacts


class Manifest(TypedDict, total=False):
    """What is read again of a manifest; what a task describes of itself stands there too."""

    task: str
    kind: str
    seed: int
    items: int
    left_out: int
    rule: str
    code: str | None


class ClassManifest(Manifest):
    """With the names of the classes among which the model chose."""

    classes: list[str]


def said(row: SaidRow, way: Way) -> str:
    """What was said in a way that was run."""
    return row["answer"] if way == "answer" else row.get(way) or ""
