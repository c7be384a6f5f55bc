"""Records and models that cost nothing: pictures are words, and models look them up."""

from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import torch

from isthmus.data.record import Image, Record, Text
from isthmus.evaluation.outputs import QuestionRow
from isthmus.evaluation.run import Result
from isthmus.evaluation.tasks import Scores
from isthmus.evaluation.vqa import VqaScores
from tests.narrow import must_be


@dataclass(frozen=True)
class Word:
    """A picture that shows a word; pictures of one word differ by their number."""

    word: str
    number: int = 0

    def describe(self) -> str:
        return f"{self.word} {self.number}"

    def read(self) -> bytes:
        return self.describe().encode()


def word_of(image: Image) -> str:
    """The word that a picture shows."""
    return must_be(Word, image.source).word


def vqa_scores(result: Result) -> VqaScores:
    """The scores of a task of questions."""
    return must_be(VqaScores, result.scores)


def question(number: int, word: str, *, kind: str = "what", ask: str = "What is it?", **meta) -> Record:
    parts = (Image(Word(word, number)), Text(ask, role="user"), Text(word, role="assistant", learn=True))
    return Record(id=f"q{number}", parts=parts, meta={"kind": kind, **meta})


class RowKeys(TypedDict, total=False):
    """Those of a row of answers."""

    id: str
    kind: str
    question: str
    truth: list[str]
    answer: str
    blind: str | None
    shuffled: str | None
    prior: str | None
    choices: list[str]
    group: str
    correct: float


def row(**given: Unpack[RowKeys]) -> QuestionRow:
    """A whole row out of the keys that a test is about; a control that is not among them was not run."""
    return {"id": "q", "kind": "other", "question": "?", "truth": [], "answer": "", "correct": 0.0, **given}


def changed(row: QuestionRow, **given: Unpack[RowKeys]) -> QuestionRow:
    """The row with other values under a few keys."""
    return {**row, **given}


def animals() -> list[Record]:
    """Ten questions about ten pictures: six cats, four dogs, in two kinds."""
    words = ["cat"] * 6 + ["dog"] * 4
    return [question(i, w, kind="what" if i % 2 else "which") for i, w in enumerate(words)]


def facts_of(scores: Scores) -> dict[str, Any]:
    """What ``scores.json`` holds of them."""
    return scores.to_dict()


class Reader:
    """Answers with the word in the picture, with ``blind`` where there is none; is interrupted after ``limit``."""

    def __init__(self, blind: str = "cat", limit: int | None = None) -> None:
        self.blind, self.limit = blind, limit
        self.asked: list[str] = []
        self.decodings: list[dict] = []

    def answer_records(self, records, **decoding):
        self.decodings.append(decoding)
        for record in records:
            assert all(t.role != "assistant" for t in record.texts), "the answer must not be shown"
            if self.limit is not None and len(self.asked) >= self.limit:
                raise KeyboardInterrupt
            self.asked.append(record.id)
        return [word_of(r.images[0]) if r.images else self.blind for r in records]


class Space:
    """Embeds each word as a unit vector of its own; templates around a word do not matter."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def embed_texts(self, texts):
        places = [next(i for i, w in enumerate(self.words) if w in t) for t in texts]
        return torch.eye(len(self.words))[places]

    def embed_images(self, images):
        return self.embed_texts([word_of(i) for i in images])

    vision_features = embed_images
