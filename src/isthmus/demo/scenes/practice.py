"""Simpler questions that the harder ones are made of, for training alone: they are never scored.

To say on which side of B the thing A is, a model must find A, read where it stands, and know that the question is about
A and not B. An answer of one word teaches all of this at once or nothing; these questions teach each by itself:
attributes that no scored question asks for (``size``, ``place``), one thing where a harder question has two (``half``),
which of two things is meant (``role``), finding all of a sort (``any``, ``all``), whether two values are one (``is``),
reading one attribute of two things (``both``), and finding a thing by what another one is like (``alike``).
"""

from collections.abc import Callable, Sequence

from isthmus.demo.scenes.dice import Dice
from isthmus.demo.scenes.questions import Question, named, without
from isthmus.demo.scenes.scene import COLOURS, SHAPES, SIZES, Scene, Solid
from isthmus.demo.scenes.words import an, listed


def practise(scene: Scene, kind: str, dice: Dice) -> Question | None:
    """A question of this kind about this scene, or nothing where it has none."""
    return _KINDS[kind](scene, dice)


def _size(scene: Scene, dice: Dice) -> Question:
    solid = dice.choice(scene.solids)
    name = named(scene, dice, solid)
    return Question("size", dice.choice((f"what size is {name}?", f"is {name} large or small?")), solid.size, solid)


def _place(scene: Scene, dice: Dice) -> Question:
    solid = dice.choice(scene.solids)
    return Question("place", f"where is {named(scene, dice, solid)}?", solid.place, solid)


def _half(scene: Scene, dice: Dice) -> Question | None:
    axis, words, either = dice.choice(
        (("column", ("left", "right"), "left or right of"), ("row", ("above", "below"), "above or below"))
    )
    answer = dice.below(2)
    fitting = [s for s in scene.solids if getattr(s, axis) == 2 * answer]
    if not fitting:
        return None
    solid = dice.choice(fitting)
    return Question("half", f"is {named(scene, dice, solid)} {either} the centre?", words[answer], solid)


def _role(scene: Scene, dice: Dice) -> Question | None:
    """One attribute of one of two things that are named."""
    if len(scene.solids) < 2:
        return None
    pair = dice.shuffled(scene.solids)[:2]
    which = dice.below(2)
    solid, place = pair[which], ("first", "second")[which]
    hidden, a, b = _hiding(scene, dice, pair)
    question = f"where is the {place}?" if hidden == "place" else f"what {hidden} is the {place}?"
    return Question("role", f"{a} or {b}: {question}", getattr(solid, hidden), solid)


def _hiding(scene: Scene, dice: Dice, pair: Sequence[Solid]) -> tuple[str, str, str]:
    """An attribute to ask for, and words for two things that do not name it."""
    hidden = dice.choice(("size", "place", "colour", "shape"))
    if hidden in ("colour", "shape"):
        a, b = (without(scene, dice, s, hidden) for s in pair)
    else:
        a, b = (named(scene, dice, s) for s in pair)
    return hidden, a, b


def _any(scene: Scene, dice: Dice) -> Question:
    noun, found = _sort(scene, dice)
    return Question("any", f"are there any {noun}s?", "yes" if found else "no")


def _all(scene: Scene, dice: Dice) -> Question:
    noun, found = _sort(scene, dice)
    given = [f"{an(s.full_name)} at the {s.place}" for s in sorted(found, key=lambda s: (s.row, s.column))]
    return Question("all", f"which {noun}s are there?", listed(given) if given else "none")


def _is(scene: Scene, dice: Dice) -> Question:
    """Whether a named thing has an attribute that its name does not give; a wrong one is mostly another thing's."""
    solid = dice.choice(scene.solids)
    hidden = dice.choice(("colour", "shape"))
    true = getattr(solid, hidden)
    others = sorted({getattr(s, hidden) for s in scene.solids} - {true})
    unlike = [v for v in (COLOURS if hidden == "colour" else SHAPES) if v != true]
    value = true if dice.chance(0.5) else dice.choice(others if others and dice.chance(0.7) else unlike)
    words = value if hidden == "colour" else an(value)
    return Question("is", f"is {without(scene, dice, solid, hidden)} {words}?", "yes" if value == true else "no", solid)


def _both(scene: Scene, dice: Dice) -> Question | None:
    """One attribute of two things, in the order of the question."""
    if len(scene.solids) < 2:
        return None
    pair = dice.shuffled(scene.solids)[:2]
    hidden, a, b = _hiding(scene, dice, pair)
    text = f"where are {a} and {b}?" if hidden == "place" else f"what {hidden} are {a} and {b}?"
    return Question("both", text, " and ".join(getattr(s, hidden) for s in pair))


def _alike(scene: Scene, dice: Dice) -> Question | None:
    """The other thing of one's colour or shape; one time in three there is none, in a scene where others have one."""
    shared, given = dice.choice((("colour", "shape"), ("shape", "colour")))
    answers: dict[bool, list[tuple[Solid, str]]] = {True: [], False: []}
    for solid in scene.solids:
        others = [s for s in scene.solids if s is not solid and getattr(s, shared) == getattr(solid, shared)]
        if len(others) < 2:
            answers[bool(others)].append((solid, getattr(others[0], given) if others else "nothing"))
    if not answers[True]:
        return None
    solid, answer = dice.choice(answers[not answers[False] or dice.chance(2 / 3)])
    name = without(scene, dice, solid, shared)
    return Question("alike", f"what {given} is the other thing that has the {shared} of {name}?", answer)


def _sort(scene: Scene, dice: Dice) -> tuple[str, list[Solid]]:
    """A noun, present or (one time in three) not, and the things it names: mostly a shape, or a colour or size."""
    form = dice.below(4)
    attribute, values = (("shape", SHAPES), ("shape", SHAPES), ("colour", COLOURS), ("size", SIZES))[form]
    present = [getattr(s, attribute) for s in scene.solids]
    absent = [v for v in values if v not in present]
    value = dice.choice(absent) if absent and dice.chance(1 / 3) else dice.choice(present)
    noun = value if attribute == "shape" else f"{value} thing"
    return noun, [s for s in scene.solids if getattr(s, attribute) == value]


_KINDS: dict[str, Callable[[Scene, Dice], Question | None]] = {
    "size": _size,
    "place": _place,
    "half": _half,
    "role": _role,
    "any": _any,
    "all": _all,
    "is": _is,
    "both": _both,
    "alike": _alike,
}
PRACTICE = tuple(_KINDS)
