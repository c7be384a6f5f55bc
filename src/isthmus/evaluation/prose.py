"""Which choice a free answer names, in whatever words: the letter or the text of one, or none.

From the surest form to the least: the entire answer, what it begins with ("B. because"), what follows "answer is", what
is called correct, "option B", and a single choice named in running text. A letter counts where it stands for itself:
not inside a word, not as the article or pronoun that it may be, not as a part of a name ("vitamin C"). What is denied
("not a boat", "A is wrong") is not named. Two different choices named are none.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

from isthmus.evaluation.vqa import normalise

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_MARKUP = re.compile(r"</?[\w|]{2,}>|[*_`$“”\"]|\\(?:boxed|text|mathbf|mathrm)\b|[{}]")
_LABEL = re.compile(r"\s*(?:\(([A-Za-z])\)|\[([A-Za-z])\]|([A-Za-z])\)|([A-Z])[.:]|([A-Z])(?= ?[-–—] ))(?=\s|[-–—]|$)")
_LISTED = re.compile(r"(?:^|\s)\(?[A-Z][.):]\s")
_LETTER = re.compile(r"\(([A-Za-z])\)|\[([A-Za-z])\]|'([A-Za-z])'|([A-Z])(?![\w'’-])|([a-z])(?=[.)\]!]*\s*(?:$|\n))")
_ARTICLE = re.compile(
    r"[ \t]+(?!(?:and|or|because|since|as|is|but|for|due|not|so|which|with|in|on|from|if|rather|instead|given|based|"
    r"would|should|seems)\b)[a-z]"
)
"""What follows "A" and "I" as words, and does not follow the letter of a choice."""
_FILLER = re.compile(
    r"[\s:=('\[]|\b(?:most|very|likely|probably|definitely|clearly|therefore|thus|either|both|indeed|simply|option|"
    r"choice|letter|number|answer)\b",
    re.IGNORECASE,
)
_ANSWER = re.compile(
    r"\b(?:ans(?:wer)?|choice|option|solution)\b(?:\s+\(?[\w'’]+\)?){0,8}?\s*(?:\b(?:is|was|would be|should be|must be|"
    r"will be)\b|[:=]|[-–—]\s)+",
    re.IGNORECASE,
)
_OPTION = re.compile(r"\b(?:option|choice|letter|answer)(?:\s+|(?=\())(?=[(\[']?[A-Z]\b)", re.IGNORECASE)
_CORRECT = re.compile(
    r"\s+(?:is|seems|looks|must be|would be)\s+(?:(?:the|most|clearly|probably)\s+)*"
    r"(?:correct|right|best|true|answer)\b"
)
_DENIED = re.compile(
    r"['’)\]]*\s+(?:(?:is|are|was|were|can|could|must|would|seems?|looks?)(?:n['’]t|\s+(?:\w+\s+)?(?:not|incorrect|wrong|false|out|"
    r"excluded|ruled|a common mistake|unlikely))|cannot)\b",
    re.IGNORECASE,
)
_DENIES = re.compile(
    r"\b(?:not|no|never|neither|nor|cannot|without|except|unlikely|wrong|incorrect|false|instead of|rather than|"
    r"unlike)\b|n['’]t\b",
    re.IGNORECASE,
)
_BESIDE = re.compile(r"[)\].:]*\s*[(:–-]?\s*")
_JOINT = re.compile(
    r"[)\]'.]*\s*(?:,|/|&|\bor\b|\band\b)(?:\s*\b(?:or|and|maybe|possibly|rather)\b)?\s*", re.IGNORECASE
)
_LEADS = re.compile(
    r"\b(?:think|thinking|choose|chose|pick|picked|select|selected|say|guess|believe|with|for|is|it['’]s|that['’]s|be|"
    r"probably|likely|maybe|perhaps|definitely|certainly|clearly|therefore|thus|hence|so|answer|option|choice),?\s+[(\[']?$",
    re.IGNORECASE,
)
_CLAUSE = re.compile(r"[.,;:!?\n]|\bbut\b", re.IGNORECASE)


def named(answer: str, choices: Sequence[str]) -> int | None:
    """The place of the one choice that the answer names, or none."""
    return _reader(tuple(choices)).read(answer)


@lru_cache(maxsize=256)
def _reader(choices: tuple[str, ...]) -> "_Reader":
    return _Reader(choices)


class _Reader:
    def __init__(self, choices: Sequence[str]) -> None:
        self.letters = LETTERS[: len(choices)]
        bare = [_bare(c) for c in choices]
        labelled = [re.match(rf"\(?{letter}[.):]\s+", c) for letter, c in zip(LETTERS, bare, strict=False)]
        if all(labelled) and bare:  # the texts hold their letters
            bare = [c[m.end() :] for c, m in zip(bare, labelled, strict=False) if m]
        self.texts = [normalise(c) for c in bare]
        self.verbatim = [c.strip() for c in bare]
        longest_first = sorted((t for t in set(self.texts) if t), key=len, reverse=True)
        words = "|".join(r"\s+".join(map(re.escape, text.split())) for text in longest_first)
        self._text = re.compile(
            rf"(?:(?:an?|the)\s+)?(?<![\w-])(?<!\d[.,])({words or '(?!)'})(?![\w-]|[.,]\d)", re.IGNORECASE
        )

    def read(self, answer: str) -> int | None:
        text = _bare(answer)
        if (found := self._exact(text)) is not None:
            return found
        begins, rest = self._beginning(text)
        if begins is not None and begins >= len(self.letters):
            return None  # a letter beyond the choices names none of them
        cued = list(self._after_cues(text))
        if begins is not None:
            said = [rest, re.split(r"[.\n;]", rest.strip())[0]]
            other = next((place for text in said if (place := self._exact(text)) is not None), None)
            if other not in (None, begins) and self._same(said[0].strip()) != begins:
                return other if re.match(r"A:\s*[B-Z]\W*$", text) else None  # "A: B" is short for "Answer: B"
            if len(_LISTED.findall(text)) < 2 or not cued:  # else the choices are repeated before the answer
                cued += [begins, *self._list(text, 0)]
        elif not cued:
            cued = list(self._in_prose(text))
        return _one(cued)

    def _exact(self, text: str) -> int | None:
        """What the text is, and nothing else: a letter with its brackets and stops, or one choice's text."""
        bare = text.strip()
        alone = re.fullmatch(r"[(\[]?([A-Za-z])[)\]]?[.):!,]?", bare)
        if alone and not (alone[1].islower() and self.verbatim.count(bare) == 1):
            place = LETTERS.index(alone[1].upper())
            return place if place < len(self.letters) else None
        return self._same(bare)

    def _same(self, text: str) -> int | None:
        for texts, said in ((self.verbatim, text), (self.texts, normalise(text)), (self.texts, _unended(text))):
            same = [i for i, t in enumerate(texts) if t and t == said]
            if same:
                return same[0] if len(same) == 1 else None
        return None

    def _beginning(self, text: str) -> tuple[int | None, str]:
        """The letter or full choice that the answer begins with, cut off by a sign, and what follows it."""
        if label := _LABEL.match(text):
            letter = next(g for g in label.groups() if g)
            if letter.isupper() or label[1] or label[2] or label[3]:
                return LETTERS.index(letter.upper()), text[label.end() :]
        first = re.match(r"\s*([^.,;:!?\n]+)[.,;:!?\n]+(?=\s|$)", text)
        if first and (found := self._exact(first[1])) is not None:
            return found, ""
        return None, text

    def _after_cues(self, text: str) -> Iterator[int]:
        """What follows "the answer is"; else what is called correct or an option."""
        cues = [m for m in _ANSWER.finditer(text) if not _DENIES.search(_clause(text[: m.start()])[-16:])]
        found = [place for cue in cues for place in self._list(text, cue.end())]
        if not found:
            found = [p for p, _, end in self._mentions(text) if _CORRECT.match(text, end)]
        if not found:
            options = [m.end() for m in _OPTION.finditer(text) if not _DENIES.search(_clause(text[: m.start()]))]
            found = [place for start in options for place in self._list(text, start)]
        if not found and cues and not any(text[cue.end() :].strip() == "" for cue in cues):
            found = [-1]  # an answer is announced and is no choice: nothing else in the text is it either
        yield from found

    def _list(self, text: str, start: int) -> Iterator[int]:
        """The choices that stand here, joined by commas, "or" and "and"."""
        place = start
        while not self._at(text, place) and (filler := _FILLER.match(text, place)):
            place = filler.end()
        while hit := self._at(text, place):
            if not _DENIED.match(text, hit[1]):
                yield hit[0]
                beside = self._text.match(text, _BESIDE.match(text, hit[1]).end())  # type: ignore[union-attr]
                if beside and re.match(r"[)\].!,;]*(?:\s*$|\s*\n)", text[beside.end() :]):
                    yield from [place] if (place := self._same(beside[1])) is not None else []
            joint = _JOINT.match(text, hit[1])
            if not joint:
                return
            place = joint.end()

    def _at(self, text: str, start: int) -> tuple[int, int] | None:
        """(place, end) of the choice that is named exactly here: by its text first, else by its letter."""
        if hit := self._text.match(text, start):
            place = self._same(hit[1])
            if not _is_letter(hit[1]):
                return None if place is None else (place, hit.end())
        return self._letter_at(text, start)

    def _letter_at(self, text: str, start: int) -> tuple[int, int] | None:
        hit = _LETTER.match(text, start)
        if not hit or (start and (text[start - 1].isalnum() or text[start - 1] in "'’-")):
            return None
        if hit[4] in ("A", "I") and _ARTICLE.match(text, hit.end()):
            return None
        if hit[4] and re.match(r"\.[A-Za-z]", text[hit.end() :]):
            return None  # an initial
        place = LETTERS.index(next(g for g in hit.groups() if g).upper())
        return (place, hit.end()) if place < len(self.letters) else None

    def _mentions(self, text: str) -> Iterator[tuple[int, int, int]]:
        """(place, start, end) of every choice named anywhere; of texts in one another the longest."""
        masked = text
        for hit in (m for m in self._text.finditer(text) if not _is_letter(m[1])):
            place = self._same(hit[1])
            masked = masked[: hit.start()] + " " * (hit.end() - hit.start()) + masked[hit.end() :]
            if place is not None:
                yield place, hit.start(), hit.end()
        for start in (m.start() for m in re.finditer(r"[(\['A-Z]", masked)):
            if hit := self._letter_at(masked, start):
                yield hit[0], start, hit[1]

    def _in_prose(self, text: str) -> Iterator[int]:
        """Choices that running text names and does not deny; letters where the words before them lead to one."""
        ended = -1  # where the choice named last ends, for a letter that is joined to it
        for place, start, end in sorted(self._mentions(text), key=lambda mention: mention[1]):
            before = text[:start]
            if _is_letter(text[start:end]) and not (
                _LEADS.search(before)
                or (not before and _alone(text, end))
                or (ended >= 0 and _JOINT.fullmatch(text[ended:start]))
            ):
                continue
            ended = end
            if not _DENIES.search(_clause(before)) and not _DENIED.match(text, end):
                yield place


def _bare(text: str) -> str:
    """Without marks of emphasis, of mathematics and of quotation."""
    return _MARKUP.sub("", text).strip()


def _unended(text: str) -> str:
    return normalise(text.strip().rstrip(".!,;:)'").lstrip("('"))


def _is_letter(text: str) -> bool:
    return len(text) == 1 and text.isalpha()


def _alone(text: str, end: int) -> bool:
    """Whether a letter that ends here, at the beginning of an answer, is followed by what follows no other word."""
    return not text[end : end + 1].isspace() or bool(
        re.match(r"\s+[a-z]", text[end:]) and not _ARTICLE.match(text, end)
    )


def _clause(text: str) -> str:
    """What stands after the last sign that ends a clause."""
    return _CLAUSE.split(text)[-1]


def _one(places: Iterable[int]) -> int | None:
    found = set(places)
    return found.pop() if len(found) == 1 and -1 not in found else None
