"""Multiple choice: the letter read from a free answer, or the choice with the highest log-likelihood.

The reader of letters takes the forms of ScienceQA's published evaluation: the letter alone, the letter with a full
stop and a space, or "The answer is X."; beside them "(X)" and "X)", and the text of a choice itself. What is none of
these is unparsable: wrong and counted, never guessed.
"""

import re
from collections.abc import Sequence

from isthmus.errors import DataError
from isthmus.evaluation.vqa import Facts, Rule, normalise

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_FORMS = (
    re.compile(r"\(?([A-Z])[.):]?"),  # the whole answer
    re.compile(r"\(?([A-Z])[.):]\s.*", re.DOTALL),  # the letter, then anything
)
_SENTENCE = re.compile(r"[Tt]he answer is:? \(?([A-Z])\b")


def parse(answer: str, choices: Sequence[str]) -> str | None:
    """The letter of the choice that the answer names, or none. A letter beyond the choices names none of them."""
    text = answer.strip()
    letters = LETTERS[: len(choices)]
    for form in _FORMS:
        found = form.fullmatch(text)
        if found:
            return found[1] if found[1] in letters else None
    said = _SENTENCE.search(text)
    if said:
        return said[1] if said[1] in letters else None
    same = [i for i, c in enumerate(choices) if normalise(c) and normalise(c) == normalise(text)]
    return LETTERS[same[0]] if len(same) == 1 else None


def _choices(row: Facts) -> Sequence[str]:
    if not row.get("choices"):
        raise DataError(f"Sample {row.get('id')!r} has no `choices`; without them it takes another rule than `choice`.")
    return row["choices"]


def _truth(row: Facts) -> str:
    """As an answer is read, else a choice to the letter, or a lower-case letter: the data's author wrote it."""
    choices, told = _choices(row), str(row["truth"][0]).strip()
    same = [letter for letter, choice in zip(LETTERS, choices, strict=False) if choice.strip() == told]
    truth = parse(told, choices) or (same[0] if len(same) == 1 else None)
    if truth is None and len(told.strip(" ().:")) == 1:
        truth = parse(told.upper(), choices)
    if truth is None:
        raise DataError(
            f"Sample {row.get('id')!r} has the truth {told!r}, which is none of its choices {list(choices)}: write the "
            "choice's letter or its text."
        )
    return truth


CHOICE = Rule(
    name="choice",
    version=1,
    points=lambda answer, row: float(_truth(row) == parse(answer, _choices(row))),
    says=lambda answer, row: parse(answer, _choices(row)),
)
"""Raises DataError for a row without choices, and for a truth that is none of them."""


def best(scores: Sequence[float]) -> int | None:
    """The place of the highest score; none where two are equally high, for then nothing was chosen."""
    top = max(scores)
    places = [i for i, s in enumerate(scores) if s == top]
    return places[0] if len(places) == 1 else None
