"""What is wrong with a reply, judged by its picture's captions and boxes. The first thing found is the reason; the word
lists are in ``prompts/checks.yaml``."""

import re
from collections.abc import Collection, Sequence
from pathlib import Path

from isthmus.config import fit
from isthmus.data.instruct.prompts import CHECKS, Prompt, read_prompt_file
from isthmus.data.instruct.symbols import Symbols
from isthmus.endpoint import Reply
from isthmus.errors import ConfigError, nearest

_PATTERNS = ("refusal", "leaked words", "leaked coordinates", "cannot be told", "no answer")
_WORDS = ("colours", "supposing")
NAMES = ("cut", "empty", *_PATTERNS, "bad form", "wrong count", "colour", "not there", "nothing of it")
"""The reasons, in the order in which they are tried."""
NUMBERS = {
    "no": 0, "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8,
    "nine": 9, "ten": 10, "eleven": 11, "twelve": 12,
}  # fmt: skip
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n")

Turns = Sequence[tuple[str, str]]


class Checks:
    """``skip``: names of reasons that are not tried. ``categories``: all that the data know, so that one which a
    picture has not is noticed when it is named."""

    def __init__(
        self, folder: Path | None = None, *, skip: Collection[str] = (), categories: Collection[str] = ()
    ) -> None:
        for name in skip:
            if name not in NAMES:
                raise ConfigError(f"There is no check {name!r}; {nearest(name, NAMES)}")
        self.skip = frozenset(skip)
        self.categories = tuple(sorted(categories))
        self._words = read_prompt_file(CHECKS, folder)
        known = (*_PATTERNS, *_WORDS, "also called")
        for name in self._words:
            if name not in known:
                raise ConfigError(f"{CHECKS}: unknown key {name!r}; {nearest(str(name), known)}")
        for name in _WORDS:
            odd = [w for w in self._listed(name) if not isinstance(w, str)]
            if odd:
                raise ConfigError(f"{CHECKS}: {name!r} holds {odd[0]!r}, no text to YAML; put it in quotes.")
        self.patterns = {name: self._compiled(name) for name in _PATTERNS}
        self.colours = self._any(self._listed("colours"))
        self.supposing = self._any(self._listed("supposing"))
        also = self._words.get("also called") or {}
        self._also: dict[str, list[str]] = fit(dict[str, list[str]], also, f"{CHECKS}: 'also called'")

    def _listed(self, name: str) -> list[object]:
        """A list of the file, which may leave it out."""
        found = self._words.get(name) or []
        if not isinstance(found, list):
            raise ConfigError(f"{CHECKS}: {name!r} should be a list.")
        return found

    def _compiled(self, name: str) -> list[re.Pattern[str]]:
        try:
            return [re.compile(str(p), re.IGNORECASE) for p in self._listed(name)]
        except re.error as error:
            raise ConfigError(f"{CHECKS}: {name!r} holds what is no regular expression: {error}") from None

    @staticmethod
    def _any(words: Sequence[object]) -> re.Pattern[str] | None:
        """One of the words, and no part of a longer one; "n't" is the end of one."""
        ends = [rf"{re.escape(w)}\b" if w.startswith("n't") else rf"\b{re.escape(w)}\b" for w in map(str, words)]
        return re.compile("|".join(ends), re.IGNORECASE) if ends else None

    def fault(self, reply: Reply, prompt: Prompt, symbols: Symbols, turns: Turns | None) -> str:
        """``<name of the reason>: <what was found>``, or empty. ``turns`` is the reply as the prompt reads it."""
        for name in NAMES:
            found = "" if name in self.skip else self._look(name, reply, prompt, symbols, turns)
            if found:
                return f"{name}: {found}"
        return ""

    def _look(self, name: str, reply: Reply, prompt: Prompt, symbols: Symbols, turns: Turns | None) -> str:
        if name == "cut":
            return "the longest reply allowed was reached" if reply.finish == "length" else ""
        if name == "empty":
            return "" if reply.text.strip() else "there is no text"
        if name == "bad form":
            if turns is None or not all(q and a for q, a in turns):
                return f"not of the requested form: {_short(reply.text)}"
            return ""
        turns = turns or [("", reply.text)]
        if name in _PATTERNS:
            return self._matched(name, turns)
        texts = [answer for _, answer in turns]
        if name == "wrong count":
            return self._miscounted(turns, symbols)
        if name == "colour":
            return self._coloured(texts, symbols) if prompt.kind != "reasoning" else ""
        if name == "nothing of it":
            return self._nothing_of_it(texts, symbols) if prompt.kind == "detail" else ""
        return self._not_there(texts, symbols)

    def _matched(self, name: str, turns: Turns) -> str:
        for pattern in self.patterns[name]:
            for question, answer in turns:
                text = {"cannot be told": question, "no answer": answer, "refusal": answer}.get(name)
                shown = text if text is not None else f"{question} {answer}"
                if found := pattern.search(shown):
                    return f"{found[0]!r} in {_short(shown)}"
        return ""

    def _miscounted(self, turns: Turns, symbols: Symbols) -> str:
        """A number of things that the boxes deny: to "how many", or after "there are", another number; elsewhere a
        larger one, for a smaller one may be of some of them. What a caption says too is let pass."""
        captions = " ".join(symbols.captions)
        counts = symbols.counts
        for category in counts.keys() - symbols.uncounted:
            names = self.names(category)
            said = re.compile(rf"\b({'|'.join(NUMBERS)}|\d+)\s+(?:\w+\s+)?({names})\b", re.IGNORECASE)
            how_many = re.compile(rf"\bhow many ({names})\b", re.IGNORECASE)
            allowed = {_number(n) for n, _ in said.findall(captions)} | {counts[category]}
            for question, answer in turns:
                exact = how_many.search(question) is not None
                if exact and (first := re.search(rf"\b({'|'.join(NUMBERS)}|\d+)\b", answer, re.IGNORECASE)):
                    number = _number(first[1])
                    if number not in allowed:
                        return f"{number} {category}, {counts[category]} boxes, in {_short(answer)}"
                for found in said.finditer(answer):
                    number = _number(found[1])
                    opens = re.search(r"\bthere (are|is)( only| exactly)?\s*$", answer[: found.start()], re.IGNORECASE)
                    wrong = number not in allowed if opens else number > max(allowed)
                    if wrong:
                        return f"{found[0]!r}, {counts[category]} boxes, in {_short(answer)}"
        return ""

    def _coloured(self, texts: Sequence[str], symbols: Symbols) -> str:
        if self.colours is None:
            return ""
        named = {c.lower() for c in self.colours.findall(" ".join(symbols.captions))}
        named |= {"grey", "gray"} if named & {"grey", "gray"} else set()
        for sentence in self._claims(texts):
            for colour in self.colours.findall(sentence):
                if colour.lower() not in named:
                    return f"no caption says {colour!r}, in {_short(sentence)}"
        return ""

    def _not_there(self, texts: Sequence[str], symbols: Symbols) -> str:
        """A category of the data that is neither in a box nor in a caption."""
        if not symbols.known:
            return ""
        captions = " ".join(symbols.captions)
        present = "|".join(map(self.names, symbols.counts))
        absent = [c for c in self.categories if c not in symbols.counts and not self._named(c, captions)]
        for sentence in self._claims(texts):
            rest = re.sub(rf"\b({present})\b", "", sentence, flags=re.IGNORECASE) if present else sentence
            for category in absent:
                if re.search(rf"\b({re.escape(category)})(s|es)?\b", rest, re.IGNORECASE):
                    return f"{category!r} is in no box and no caption, in {_short(sentence)}"
        return ""

    def _nothing_of_it(self, texts: Sequence[str], symbols: Symbols) -> str:
        """A description that names no thing of the boxes is one of something else."""
        told = " ".join(texts)
        if not symbols.counts or any(self._named(category, told) for category in symbols.counts):
            return ""
        return f"none of {', '.join(sorted(symbols.counts))}, in {_short(told)}"

    def _claims(self, texts: Sequence[str]) -> list[str]:
        """The sentences that neither suppose nor deny."""
        sentences = [s for text in texts for s in _SENTENCE.split(text)]
        return [s for s in sentences if self.supposing is None or not self.supposing.search(s)]

    def _named(self, category: str, text: str) -> bool:
        return re.search(rf"\b({self.names(category)})\b", text, re.IGNORECASE) is not None

    def names(self, category: str) -> str:
        """The category, its plural and what else it is called, as a pattern, longest first."""
        plural = f"{category[:-1]}ies" if category.endswith("y") else f"{category}s"
        found = {category, plural, f"{category}es", *self._also.get(category, [])}
        return "|".join(re.escape(name) for name in sorted(found, key=len, reverse=True))


def _number(word: str) -> int:
    return int(word) if word.isdigit() else NUMBERS[word.lower()]


def _short(text: str) -> str:
    text = " ".join(text.split())
    return repr(text if len(text) <= 80 else text[:79] + "…")
