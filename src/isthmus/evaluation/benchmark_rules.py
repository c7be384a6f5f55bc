"""The official scorers' rules of the benchmarks in :mod:`isthmus.data.sources.benchmarks`.

========  ============================================================================================================
a-okvqa   direct answers: equal strings, a third of a point for each person who said the same, at most one
          (github.com/allenai/aokvqa, ``evaluation/eval_predictions.py``); its choices are scored by ``choice``
anls      DocVQA: 1 - edit distance / length of the longer text, for the nearest truth, and 0 below 0.5; case and
          white space do not matter (Biten et al. 2019, 1907.00490; rrc.cvc.uab.es/?ch=17)
mmmu      choices by ``choice``; open answers as the published ``eval/eval_utils.py`` reads them
========  ============================================================================================================

Where a published scorer guesses what it cannot read (MMMU's choices), nothing is guessed: it is wrong, and counted.
"""

import re
from collections.abc import Iterable

from isthmus.evaluation.choice import CHOICE
from isthmus.evaluation.outputs import AnswerRow
from isthmus.evaluation.vqa import Rule

_ENOUGH = 3
"""People who have to say the same for a full point."""
_NEAR = 0.5
"""Similarity below which an answer is another one, not one misread."""


def _aokvqa(answer: str, row: AnswerRow) -> float:
    given = answer.strip()
    return min(1.0, sum(given == truth for truth in row["truth"]) / _ENOUGH)


def distance(one: str, other: str) -> int:
    """Levenshtein's: characters to insert, delete or replace."""
    if len(one) < len(other):
        one, other = other, one
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, start=1):
        corner, row[0] = row[0], i
        for j, b in enumerate(other, start=1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (a != b))
    return row[-1]


def anls(answer: str, row: AnswerRow) -> float:
    """Of one question; the score is the mean over questions."""
    given = _bare(answer)
    best = 0.0
    for truth in map(_bare, row["truth"]):
        longer = max(len(given), len(truth))
        best = max(best, 1 - distance(given, truth) / longer if longer else 0.0)
    return best if best >= _NEAR else 0.0


def _bare(text: str) -> str:
    return " ".join(str(text).lower().split())


_CUES = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")
_NUMBERS = (
    re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b"),
    re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+"),
    re.compile(r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])"),
)
_MARKS = frozenset(":,.!?;'")


def _mmmu_claims(answer: str) -> list[str]:
    """What the answer comes down to, by line: the shortest text after one of the cues; without any, all of it."""
    text = answer.strip().strip(".").lower()
    lines = text.split("\n")  # the published one also means to split sentences, after it has made all letters small
    claims = []
    for number, line in enumerate(lines, start=1):
        cues = (*_CUES, "=") if number == len(lines) else _CUES
        tails = [line.split(cue)[-1].strip() for cue in cues if cue in line]
        shortest = min((tail for tail in tails if tail), key=len, default="")
        if shortest and shortest not in _MARKS:
            claims.append(shortest)
    return claims or [text]


def _mmmu_forms(texts: Iterable[str]) -> set[str | float]:
    """Numbers to two decimals, other texts small; a single letter with a space on one side, lest any word hold it."""
    found: set[str | float] = set()
    for text in map(str.strip, texts):
        try:
            found.add(round(float(text.replace(",", "")), 2))
        except ValueError:
            small = text.lower()
            found |= {f" {small}", f"{small} "} if len(small) == 1 else {small}
    return found


def _mmmu(answer: str, row: AnswerRow) -> float:
    if row.get("choices"):
        return CHOICE.points(answer, row)
    claims = _mmmu_claims(answer)
    said = _mmmu_forms([*claims, *(n for claim in claims for form in _NUMBERS for n in form.findall(claim))])
    truths = _mmmu_forms(map(str, row["truth"]))
    words = [t for t in truths if isinstance(t, str) and t]
    return float(any(any(w in s for w in words) if isinstance(s, str) else s in truths for s in said))


def _mmmu_says(answer: str, row: AnswerRow) -> str | None:
    return CHOICE.says(answer, row) if row.get("choices") else answer.strip() or None


A_OKVQA = Rule(name="a-okvqa", version=1, points=_aokvqa, says=lambda answer, row: answer.strip())
ANLS = Rule(name="anls", version=1, points=anls, says=lambda answer, row: _bare(answer))
MMMU = Rule(name="mmmu", version=1, points=_mmmu, says=_mmmu_says)
