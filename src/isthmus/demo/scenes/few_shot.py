"""Few-shot tasks in text whose rule is only in the examples: made-up words stand for the values of one attribute.

Each prompt makes up its own words, so nothing but the examples shows what they mean. One fifth of the words is
kept for evaluation and never occurs in training. The hyphen in a word keeps tokenizers from merging those they have
seen: new ones are made of the same pieces.
"""

from dataclasses import dataclass
from itertools import product

from isthmus.demo.scenes.dice import Dice
from isthmus.demo.scenes.scene import COLOURS, HELD_OUT, SHAPES, SIZES
from isthmus.demo.scenes.words import number

_SYLLABLES = tuple(c + v for c, v in product("bdfgklm", "aiou"))
_WORDS = tuple(f"{a}-{b}" for a, b in product(_SYLLABLES, _SYLLABLES))
RESERVED_WORDS = frozenset(w for i, w in enumerate(_WORDS) if i * 7919 % 5 == 0)
"""Made-up words for evaluation only."""
TRAINING_WORDS = tuple(w for w in _WORDS if w not in RESERVED_WORDS)
_EVALUATION_WORDS = tuple(w for w in _WORDS if w in RESERVED_WORDS)
_VALUES: dict[str, tuple[str, ...]] = {"colour": COLOURS, "shape": SHAPES, "size": SIZES, "count": ("1", "2", "3", "4")}


@dataclass(frozen=True, slots=True)
class FewShot:
    """``examples`` are (thing, word) pairs; the last word is the task, and came at least once before."""

    attribute: str
    examples: tuple[tuple[str, str], ...]


def few_shot(dice: Dice, *, reserved: bool = False, shots: int = 6) -> FewShot:
    """A task of two or three made-up words, ``shots`` examples, and one thing to name at the end."""
    attribute = dice.choice(sorted(_VALUES))
    count = min(2 + dice.below(2), len(_VALUES[attribute]))
    values = dice.shuffled(_VALUES[attribute])[:count]
    words = dice.different(_EVALUATION_WORDS if reserved else TRAINING_WORDS, count)
    order = [*dice.shuffled([v for _ in range(shots) for v in values][:shots]), dice.choice(values)]
    meaning = dict(zip(values, words, strict=True))
    return FewShot(attribute, tuple((_thing(dice, attribute, v, reserved), meaning[v]) for v in order))


def echo(dice: Dice) -> tuple[list[str], list[list[str]]]:
    """Six to twelve different short words, syllables and those of scenes, in an order that means nothing; and six
    stretches of the same, from anywhere among them.

    They teach a small model to look up what followed a word before, which lessons then build on: without them none of
    ours found out (docs/notes/2026-12-trainings.md). The repetition begins anywhere, since a full repetition could be
    predicted by counting, too.
    """
    words = dice.different((*_SYLLABLES, *COLOURS, *SHAPES, *SIZES), 6 + dice.below(7))
    starts = [dice.below(len(words) - 3) for _ in range(6)]
    return words, [words[start : start + 3 + dice.below(3)] for start in starts]


def _thing(dice: Dice, attribute: str, value: str, any_pair: bool) -> str:
    """A solid, or a number of them, with the given value and everything else by chance."""
    while True:
        thing = {"size": dice.choice(SIZES), "colour": dice.choice(COLOURS), "shape": dice.choice(SHAPES)}
        if attribute != "count":
            thing[attribute] = value
        if any_pair or (thing["shape"], thing["colour"]) not in HELD_OUT:
            break
    if attribute == "count":
        return number(int(value), f"{thing['colour']} {thing['shape']}")
    return f"{thing['size']} {thing['colour']} {thing['shape']}"
