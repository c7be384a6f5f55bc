"""Captions to tokens as the published scores count them: Penn Treebank style, lower case, punctuation dropped.

The reference scorers run Stanford's tokenizer (a Java program) and drop a fixed list of marks. This is our own
reading of its rules for English captions, without Java: ``don't`` -> ``do n't``, ``dog's`` -> ``dog 's``,
``cannot`` -> ``can not``; hyphens, inner slashes, times and abbreviations stay one token. Two oddities of the reference
are kept because scores depend on them: brackets survive as ``-lrb-`` … ``-rcb-`` (its list spells them in capitals,
after lower-casing), and so do runs of marks such as ``?!``.

On curious input (equations, code, smileys, foreign apostrophes) it may cut elsewhere than the reference. How often
the two differ, and what that does to a score, is stated in ``docs/evaluation.md``.
"""

import re
from collections.abc import Iterator

DROPPED = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
"""Marks that are no tokens of a caption."""

_SHORT = (
    "mr mrs ms dr prof rev gen col capt lt sgt maj adm sen rep gov pres hon st mt ave blvd rd jr sr bros vs etc esq "
    "jan feb mar apr jun jul aug sep sept oct nov dec mon tues wed thu thurs fri inc ltd co corp dept univ assn "
    "vol p ph ca ft"
)
_ENDING = "ave blvd rd st jr sr bros etc inc ltd co corp"
_OPENING = "The Then This That There These Those It In He She They We His Her And But So A An"
_ABBREVIATIONS, _MAY_END, _OPENERS = (frozenset(words.split()) for words in (_SHORT, _ENDING, _OPENING))
"""Words with a full stop of their own; those of them that may end a sentence; and the words that begin the next one,
before which such a stop is the sentence's."""

_ASSIMILATED = {
    "cannot": 3, "gonna": 3, "gotta": 3, "gimme": 3, "lemme": 3, "wanna": 3,
    "'tis": 2, "'twas": 2, "y'all": 2, "more'n": 4,
}  # fmt: skip
"""Two words written as one, and where they part."""

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_PLAIN = str.maketrans({
    "“": '"', "”": '"', "‘": "'", "’": "'", "–": "--", "—": "--", "…": "...", "½": " 1/2", "¼": " 1/4", "¾": " 3/4",
})  # fmt: skip

_W = r"[^\W_]"  # a letter or digit of any script
_SCAN = re.compile(
    rf"""
      (?P<whole> (?:https?://|www\.)[^\s"<>]*[^\s"<>.,;:!?')\]]         # addresses
               | [\w.+-]+@{_W}[\w-]*(?:\.[\w-]+)+
               | (?<!\w)[@\#][^\W\d_]\w* | </?\w+\s*/?> | c\+\+
               | \.{{3,}} | [?!]{{2,}} | -{{2,}} | \*{{2,}} | _+ | \'\' | `` | &(?:amp|lt|gt);
               | '(?:s|m|d|ll|re|ve)(?!\w) | (?<!\w)'(?:em|n|\d0s)(?!\w) | (?<=rock)'n'
               | (?<!\w)\d+[.:]\d+(?=[^\W\d_]|/)                         # numbers; before a unit, and others
               | (?<!\w)[-+]?(?:\d+(?:[,.:]\d+)+|\d+/\d+|\d+|\.\d+)(?![\w]|[-/]{_W}) | (?<=\d)\+\d+ )
    | (?P<word>  (?<!\w)'t(?:is|was)(?!\w) | {_W}+(?:(?:[-_/.&']|(?<=\d)[,:](?=\d)){_W}+)*[.']? )
    | (?P<mark>  \S )
    """,
    re.VERBOSE | re.IGNORECASE,
)
_CLITIC = re.compile(r"(?:'(?:s|m|d|ll|re|ve)|n't)$")
_DOTTED = re.compile(r"[^\W\d_](?:\.[^\W\d_])+$")


def tokens(caption: str) -> list[str]:
    """The tokens of a caption, in order."""
    return [t for t in _all(caption.translate(_PLAIN)) if t not in DROPPED]


def _all(text: str) -> Iterator[str]:
    for found in _SCAN.finditer(text):
        piece = found.group()
        if found.lastgroup == "word":
            yield from _word(piece, text[found.end() :])
        elif piece.startswith(("..", "--")):
            yield "..." if piece[0] == "." else "--"
        elif piece.startswith("&") and len(piece) > 1:
            yield {"&amp;": "&", "&lt;": "<", "&gt;": ">"}[piece.lower()]
        else:
            yield _BRACKETS.get(piece, piece.lower().replace('"', "''"))


def _word(word: str, rest: str) -> Iterator[str]:
    """A word without the clitics at its end, then those; ``rest`` is what follows on the line."""
    end = ""
    if word.endswith("'") or (word.endswith(".") and not _abbreviated(word[:-1], rest)):
        word, end = word[:-1], word[-1]
    company = word.isupper() and word.replace("&", "").isalpha()  # AT&T, R&B; but b&w is three tokens
    word = word.lower()
    tail: list[str] = []
    while (clitic := _CLITIC.search(word)) and clitic.start():
        tail.insert(0, clitic.group())
        word = word[: clitic.start()]
    cut = _ASSIMILATED.get(word)
    if "&" in word and not company:
        yield from re.findall(r"&|[^&]+", word)
    elif cut:
        yield from (word[:cut], word[cut:])
    else:
        yield word
    yield from tail
    if end:
        yield end


def _abbreviated(word: str, rest: str) -> bool:
    """Does the full stop after ``word`` belong to it?"""
    following = rest.split(maxsplit=1)
    opens = bool(following) and following[0] in _OPENERS
    lowered = word.lower()
    if _DOTTED.search(word):
        return True
    if len(word) == 1 and word.isalpha():
        return bool(following) and not opens
    if lowered == "no":
        return bool(following) and following[0][0].isdigit()
    return lowered in _ABBREVIATIONS and not (opens and lowered in _MAY_END)
