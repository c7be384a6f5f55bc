"""Multiple choice: the choice that a free answer names, or the one with the highest log-likelihood.

Two readers of answers. ``choice``, the default, takes what names one choice in whatever words (:mod:`.prose`).
``scienceqa`` takes the forms of ScienceQA's published evaluation and no others: the letter alone, the letter with a
full stop and a space, or one "The answer is X". What neither can read is unparsable: wrong and counted, never guessed.
"""

import re
from collections.abc import Callable, Sequence

from isthmus.errors import DataError
from isthmus.evaluation.outputs import AnswerRow
from isthmus.evaluation.prose import LETTERS, named
from isthmus.evaluation.vqa import Rule

Parse = Callable[[str, Sequence[str]], str | None]

_SENTENCE = re.compile(r"The answer is ([A-Z]).")


def parse(answer: str, choices: Sequence[str]) -> str | None:
    """The letter of the one choice that the answer names, or none. A letter beyond the choices names none of them."""
    place = named(answer, choices)
    return None if place is None else LETTERS[place]


def parse_as_scienceqa(answer: str, choices: Sequence[str]) -> str | None:
    """The published rule, without its guess where nothing can be read."""
    text, letters = answer.strip(), LETTERS[: len(choices)]
    if (len(text) == 1 or text[1:3] == ". ") and text[0] in letters:
        return text[0]
    said = _SENTENCE.findall(text)
    return said[0] if len(said) == 1 and said[0] in letters else None


def _choices(row: AnswerRow) -> Sequence[str]:
    choices = row.get("choices")
    if not choices:
        raise DataError(f"Sample {row.get('id')!r} has no `choices`; without them it takes another rule than `choice`.")
    return choices


def _truth(row: AnswerRow) -> str:
    """A choice to the letter or as an answer is read: the data's author wrote it. A single capital is a letter."""
    choices, said = _choices(row), str(row["truth"][0]).strip()
    truth = parse(said, choices)
    if truth is None:
        raise DataError(
            f"Sample {row.get('id')!r} has the truth {said!r}, which is none of its choices {list(choices)}: write the "
            "choice's letter or its text."
        )
    return truth


def _rule(name: str, version: int, read: Parse) -> Rule:
    return Rule(
        name=name,
        version=version,
        points=lambda answer, row: float(_truth(row) == read(answer, _choices(row))),
        says=lambda answer, row: read(answer, _choices(row)),
    )


CHOICE = _rule("choice", 2, parse)
SCIENCEQA = _rule("scienceqa", 1, parse_as_scienceqa)
"""Both raise DataError for a row without choices, and for a truth that is none of them."""


def best(scores: Sequence[float]) -> int | None:
    """The place of the highest score; none where two are equally high, for then nothing was chosen."""
    top = max(scores)
    places = [i for i, s in enumerate(scores) if s == top]
    return places[0] if len(places) == 1 else None
