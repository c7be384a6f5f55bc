"""VQA accuracy exactly as the official VQA v2 scorer computes it, and OK-VQA's stemming.

An answer given by three or more of the other nine people is right: for each of the ten answers left out in turn,
min(1, agreeing others / 3), then the mean. Both sides are normalised first (:func:`normalise`), **but only when the
ten answers are not all the same string**; otherwise the raw strings, without line breaks, tabs and outer space, must
be equal, so ``Yes`` is wrong where all ten people said ``yes``. That is the official rule; ``normalise_always=True``
leaves it out.
"""

import re
from collections.abc import Sequence

AGREEING = 3
_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
    "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_ARTICLES = frozenset(("a", "an", "the"))
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_STOP = re.compile(r"\.(?!\d)")
_STOPS = 32
"""The official scorer hands a flag to the argument that means "how many", so it removes at most 32 full stops."""

_APOSTROPHES = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've "
    "somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll "
    "that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've "
    "we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's "
    "who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've "
    "you'll you're you've"
)


def _without_one_apostrophe(word: str) -> list[str]:
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


_CONTRACTIONS = {bare: word for word in _APOSTROPHES.split() for bare in _without_one_apostrophe(word)}
_CONTRACTIONS["somebody'd"] = "somebodyd"  # the official table has this one the wrong way round


def tidy(answer: str) -> str:
    """Line breaks and tabs to spaces, no outer space: all that is done where the ten answers are equal."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


def normalise(answer: str) -> str:
    """Punctuation, case, number words, articles and missing apostrophes, as the official scorer has it.

    A mark of punctuation vanishes where it touches a space (or a number with a comma is about), else it becomes a
    space: ``hot-dog`` -> ``hot dog``, ``1,000`` -> ``1000``.
    """
    text = tidy(answer)
    number = _COMMA_IN_NUMBER.search(text) is not None
    out = text
    for mark in _PUNCTUATION:
        out = out.replace(mark, "" if number or f"{mark} " in text or f" {mark}" in text else " ")
    out = _STOP.sub("", out, count=_STOPS)
    words = [_NUMBERS.get(w, w) for w in out.lower().split()]
    return " ".join(_CONTRACTIONS.get(w, w) for w in words if w not in _ARTICLES)


def accuracy(answer: str, answers: Sequence[str], *, normalise_always: bool = False) -> float:
    """The share of right, in 0 … 1, of one answer against the (ten) human ones. An empty answer scores 0."""
    given, theirs = tidy(answer), [tidy(a) for a in answers]
    if not given:
        return 0.0
    if normalise_always or len(set(theirs)) > 1:
        given, theirs = normalise(given), [normalise(a) for a in theirs]
    same = [t == given for t in theirs]
    return sum(min(1.0, (sum(same) - own) / AGREEING) for own in same) / len(same)


# OK-VQA

_IRREGULAR = {
    "men": "man", "women": "woman", "children": "child", "people": "people", "feet": "foot", "teeth": "tooth",
    "mice": "mouse", "geese": "goose", "knives": "knife", "wives": "wife", "lives": "life", "leaves": "leaf",
    "wolves": "wolf", "loaves": "loaf", "shelves": "shelf", "halves": "half", "calves": "calf", "buses": "bus",
    "potatoes": "potato", "tomatoes": "tomato", "shoes": "shoe", "toes": "toe", "lying": "lie", "tying": "tie",
    "dying": "die", "skis": "ski", "skiing": "ski", "movies": "movie", "cookies": "cookie", "pies": "pie",
    "ties": "tie", "being": "be", "seeing": "see", "fleeing": "flee", "heroes": "hero",
}  # fmt: skip
_ENDINGS_OF_THEIR_OWN = (
    "bus gas glass grass dress christmas yes this his its us plus lens tennis news series species jeans pants scissors "
    "shorts glasses lotus cactus virus octopus walrus texas paris jesus ring king wing thing string spring morning "
    "evening ceiling building wedding nothing something anything everything during sibling pudding earring sterling "
    "ping bling sting swing bring sing viking"
)
_KEPT = frozenset(_ENDINGS_OF_THEIR_OWN.split())
_VOWELS = "aeiou"
_DOUBLED = re.compile(r"([bdgmnprt])\1$")


def stem(answer: str) -> str:
    """OK-VQA's consolidation of answers, word by word: ``-ing`` forms to their verb, plural nouns to the singular.

    The released OK-VQA annotations hold answers already stemmed that way (beside ``raw_answer``), with a tagger and
    by hand; this is a rule of spelling, applied to both sides, so answers meet also where their stems are odd.
    Stemming twice changes nothing.
    """
    return " ".join(_stem(w) for w in answer.split())


def _stem(word: str) -> str:
    while (shorter := _stem_once(word)) != word:
        word = shorter
    return word


def _stem_once(word: str) -> str:
    if word in _KEPT or word in _IRREGULAR.values():
        return word
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith("ing") and len(word) > 4 and any(c in "aeiouy" for c in word[:-3]):
        return _verb(word[:-3])
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("sses", "shes", "ches", "xes", "zzes")):
        return word[:-2]
    if word.endswith("s") and len(word) > 3 and not word.endswith(("ss", "us", "is", "'s")):
        return word[:-1]
    return word


def _verb(root: str) -> str:
    """The verb of an -ing form without its ending: running -> run, riding -> ride, eating -> eat."""
    if _DOUBLED.search(root):
        return root[:-1]
    consonant, vowel = root[-1] not in _VOWELS + "wxy", len(root) > 1 and root[-2] in _VOWELS
    syllables = len(re.findall(r"[aeiouy]+", root))
    lone_vowel = consonant and vowel and syllables == 1 and len(root) > 2 and root[-3] not in _VOWELS
    return root + "e" if lone_vowel or root[-1] in "cvz" else root


def stemmed_accuracy(answer: str, answers: Sequence[str]) -> float:
    """:func:`accuracy` after normalising and stemming both sides: OK-VQA's. An empty answer scores 0."""
    given = stem(normalise(answer))
    if not given:
        return 0.0
    same = [stem(normalise(a)) == given for a in answers]
    return sum(min(1.0, (sum(same) - own) / AGREEING) for own in same) / len(same)
