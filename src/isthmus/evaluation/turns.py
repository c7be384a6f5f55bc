"""Questions of a record: with their picture, blind (no picture) and shuffled (another's picture)."""

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle

from isthmus.errors import DataError
from isthmus.evaluation.protocols import Picture, S, Sample, TextPart


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and its accepted answers; ``at`` is the place of the answer among the record's parts."""

    question: str
    answers: tuple[str, ...]
    at: int


def turns(record: Sample) -> list[Turn]:
    """Every question of a record with its answer, in order.

    An answer is a text part to be learnt (``learn``), or one the assistant says where nothing is marked. Its
    question is all text between the answer before and itself, without the system's words.
    """
    texts = [(i, p) for i, p in enumerate(record.parts) if isinstance(p, TextPart)]
    marked = any(p.learn for _, p in texts)
    found: list[Turn] = []
    question: list[str] = []
    for i, part in texts:
        is_answer = part.learn if marked else part.role == "assistant"
        if is_answer:
            found.append(Turn(" ".join(question).strip(), _alternatives(part), i))
            question = []
        elif part.role != "system":
            question.append(_alternatives(part)[0])
    return found


def last_turn(record: Sample) -> Turn:
    """The question that is scored: the record's last, with ``meta["answers"]`` as its answers where given.

    Raises DataError when the record has no answer, or only an empty one.
    """
    found = turns(record)
    if not found:
        raise DataError(
            f"Sample {record.id!r} has no answer to score against: its last part must be a text of the assistant."
        )
    turn = found[-1]
    given = texts_of(record, "answers")
    if given:
        turn = replace(turn, answers=given)
    if not any(a.strip() for a in turn.answers):
        raise DataError(f"Sample {record.id!r} has an empty answer; an empty answer cannot be scored.")
    return turn


def kind_of(record: Sample) -> str:
    """The kind of question, ``other`` where the source names none."""
    return str(record.meta.get("kind") or "other")


def texts_of(record: Sample, name: str) -> tuple[str, ...]:
    """What ``meta`` lists under a name, as texts; nothing where it has none of that name."""
    found = record.meta.get(name) or ()
    if not isinstance(found, Iterable):
        raise DataError(f"Sample {record.id!r} has {found!r} as {name!r} in its meta data; a list of texts is due.")
    return tuple(str(text) for text in found)


def prompt(record: S) -> S:
    """The record up to its last question: nothing of the answer is left in it."""
    return replace(record, parts=tuple(record.parts[: last_turn(record).at]))


def without_picture(record: S) -> S:
    """The same words without any picture."""
    return replace(record, parts=tuple(p for p in record.parts if not isinstance(p, Picture)))


def with_pictures_of(record: S, other: Sample) -> S:
    """The same words with the pictures of another record in the same places (repeated where it has fewer)."""
    pictures = cycle(other.images)
    return replace(record, parts=tuple(next(pictures) if isinstance(p, Picture) else p for p in record.parts))


def partners(keys: Sequence[str], seed: int) -> list[int]:
    """For each record the index of one with another picture: a derangement, the same for the same seed.

    ``keys`` name the pictures; records that share one are never partners. Where no picture belongs to more than
    half of the records every record is used exactly once, so the shuffled pictures are the same set of pictures.
    Raises DataError when all keys are equal.
    """
    if len(set(keys)) < 2:
        raise DataError(
            "Shuffled pictures need at least two different pictures among the samples; all of these share one. "
            "Give more samples, or leave the shuffled control out (controls=['blind'])."
        )
    rng = random.Random(seed)
    places: dict[str, list[int]] = {}
    for i in rng.sample(range(len(keys)), len(keys)):
        places.setdefault(keys[i], []).append(i)
    # Records of one picture stand together; a step as long as the largest group leaves every group.
    order = [i for group in places.values() for i in group]
    step = max(len(group) for group in places.values())
    partner = [0] * len(keys)
    for position, i in enumerate(order):
        other = (position + step) % len(order)
        while keys[order[other]] == keys[i]:
            other = (other + 1) % len(order)
        partner[i] = order[other]
    return partner


def _alternatives(part: TextPart) -> tuple[str, ...]:
    return (part.text,) if isinstance(part.text, str) else tuple(part.text)


def captions_of(record: Sample) -> list[str]:
    """All captions of a record, alternatives included: the texts to be learnt, or (where nothing is marked) all."""
    texts = [p for p in record.parts if isinstance(p, TextPart)]
    return [text for part in [p for p in texts if p.learn] or texts for text in _alternatives(part)]
