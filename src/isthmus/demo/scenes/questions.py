"""Questions about a scene, one function per kind, each with its answers balanced.

Without the picture there should be as little to gain as possible, so
- an answer is drawn first, and the scene is then searched for the question; a scene that cannot give the drawn
  answer gives none (the caller draws another scene or another kind);
- a yes/no question needs a scene in which both answers are possible;
- a thing that a question refers to is always there, and the only one that fits the words.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations

from isthmus.demo.scenes.dice import Dice
from isthmus.demo.scenes.scene import COLOURS, COLUMNS, HELD_OUT, ROWS, SHAPES, SIZES, Scene, Solid
from isthmus.demo.scenes.words import an, listed, number


@dataclass(frozen=True, slots=True)
class Question:
    """``about`` is the one solid a follow-up may call "it"; ``reason`` says why the answer holds. ``steps`` are the
    questions whose answers give this one's."""

    kind: str
    text: str
    answer: str
    about: Solid | None = None
    reason: str = ""
    steps: tuple["Question", ...] = ()


def make_question(scene: Scene, kind: str, dice: Dice) -> Question | None:
    """A question of this kind about this scene, or nothing where the answer drawn cannot be had."""
    return _KINDS[kind](scene, dice)


def only(scene: Scene, **attributes: str) -> Solid | None:
    """The one solid with these attributes, if there is exactly one."""
    found = [s for s in scene.solids if all(getattr(s, k) == v for k, v in attributes.items())]
    return found[0] if len(found) == 1 else None


def reference(scene: Scene, dice: Dice, hidden: str) -> tuple[Solid, str]:
    """A solid and words that fit it alone and do not name its ``hidden`` attribute (shape or colour)."""
    given = "colour" if hidden == "shape" else "shape"
    options: list[tuple[Solid, str]] = []
    for s in scene.solids:
        known = getattr(s, given)
        noun = f"{known} thing" if given == "colour" else known
        if only(scene, **{given: known}):
            options.append((s, f"the {noun}"))
        if only(scene, **{given: known, "size": s.size}):
            options.append((s, f"the {s.size} {noun}"))
        options.append((s, f"the thing at the {s.place}"))
    return dice.choice(options)


def named(scene: Scene, dice: Dice, solid: Solid) -> str:
    """Words for a known solid: its colour and shape, or one of them where that is enough."""
    names = [f"the {solid.name}"] * 2
    if only(scene, shape=solid.shape):
        names.append(f"the {solid.shape}")
    if only(scene, colour=solid.colour):
        names.append(f"the {solid.colour} thing")
    return dice.choice(names)


def _what(scene: Scene, dice: Dice) -> Question:
    solid, name = reference(scene, dice, hidden="shape")
    text = dice.choice((f"what shape is {name}?", f"what is {name}?", f"which shape has {name}?"))
    return Question("what", text, solid.shape, solid, f"{name} is a {solid.full_name}")


def _colour(scene: Scene, dice: Dice) -> Question:
    solid, name = reference(scene, dice, hidden="colour")
    text = dice.choice((f"what colour is {name}?", f"which colour has {name}?", f"what is the colour of {name}?"))
    return Question("colour", text, solid.colour, solid, f"{name} is a {solid.full_name}")


def _count(scene: Scene, dice: Dice) -> Question | None:
    form = dice.below(4)
    if form == 0:
        wanted, options = 1 + dice.below(4), [("thing", len(scene.solids))]
    elif form == 1:
        wanted, options = dice.below(4), [(f"{z} thing", sum(s.size == z for s in scene.solids)) for z in SIZES]
    else:
        wanted = dice.weighted((0, 1, 2, 3), (3, 3, 3, 1))
        if form == 2:
            options = [(f"{c} thing", sum(s.colour == c for s in scene.solids)) for c in COLOURS]
        else:
            options = [(p, sum(s.shape == p for s in scene.solids)) for p in SHAPES]
    fitting = [noun for noun, count in options if count == wanted]
    if not fitting:
        return None
    noun = dice.choice(fitting)
    text = dice.choice((f"how many {noun}s are there?", f"how many {noun}s do you see?", f"count the {noun}s."))
    reason = f"there {'is' if wanted == 1 else 'are'} {number(wanted, noun)}"
    return Question("count", text, str(wanted), reason=reason)


def _relation(scene: Scene, dice: Dice) -> Question | None:
    return _which_side(scene, dice) if dice.chance(0.5) else _what_is_beside(scene, dice)


def _which_side(scene: Scene, dice: Dice) -> Question | None:
    axis, words = dice.choice((("column", ("left", "right")), ("row", ("above", "below"))))
    answer = dice.below(2)
    pairs = [
        (a, b)
        for a, b in permutations(scene.solids, 2)
        if (getattr(a, axis) > getattr(b, axis)) == bool(answer) and getattr(a, axis) != getattr(b, axis)
    ]
    if not pairs:
        return None
    one, other = dice.choice(pairs)
    a, b = named(scene, dice, one), named(scene, dice, other)
    either = "left or right of" if axis == "column" else "above or below"
    text = dice.choice((f"is {a} {either} {b}?", f"{a} or {b}: is the first {either} the second?"))
    return Question("relation", text, words[answer], one, f"{a} is at the {one.place} and {b} at the {other.place}")


DIRECTIONS: dict[str, Callable[[Solid, Solid], bool]] = {
    "left of": lambda a, b: a.column < b.column,
    "right of": lambda a, b: a.column > b.column,
    "above": lambda a, b: a.row < b.row,
    "below": lambda a, b: a.row > b.row,
}


def beside(scene: Scene, direction: str, solid: Solid) -> list[Solid]:
    return [s for s in scene.solids if DIRECTIONS[direction](s, solid)]


def _what_is_beside(scene: Scene, dice: Dice) -> Question | None:
    options = [(d, s) for d in DIRECTIONS for s in scene.solids if len(beside(scene, d, s)) == 1]
    if not options:
        return None
    direction, solid = dice.choice(options)
    found = beside(scene, direction, solid)[0]
    name = named(scene, dice, solid)
    if dice.chance(0.5):
        text, answer = f"what shape is the thing {direction} {name}?", found.shape
    else:
        text, answer = f"what colour is the thing {direction} {name}?", found.colour
    return Question("relation", text, answer, found, f"the {found.full_name} is {direction} {name}")


def _yesno(scene: Scene, dice: Dice) -> Question:
    yes = dice.chance(0.5)
    form = dice.below(6)
    if form < 3:
        noun = _pair(scene, dice, yes)
    elif form == 3:
        noun = _present_or_absent([s.colour for s in scene.solids], COLOURS, dice, yes) + " thing"
    elif form == 4:
        noun = _present_or_absent([s.shape for s in scene.solids], SHAPES, dice, yes)
    else:
        places = [f"{row} {column}" for row in ROWS for column in COLUMNS]
        noun = "thing at the " + _present_or_absent([s.place for s in scene.solids], places, dice, yes)
    text = dice.choice((f"is there {an(noun)}?", f"do you see {an(noun)}?", f"can you see {an(noun)} here?"))
    things = listed([f"a {s.full_name} at the {s.place}" for s in scene.solids])
    return Question("yesno", text, "yes" if yes else "no", reason=f"there is {things}")


def _present_or_absent(present: list[str], known: list[str] | tuple[str, ...], dice: Dice, yes: bool) -> str:
    return dice.choice(present if yes else [k for k in known if k not in present])


def _pair(scene: Scene, dice: Dice, yes: bool) -> str:
    """A colour and shape that are there together, or are not: half of those mix attributes that are both there.

    Training never asks for a held-out pair, lest "no" be learnt for it; the other splits deny them as often as
    they affirm them.
    """
    present = {(s.shape, s.colour) for s in scene.solids}
    if yes:
        shape, colour = dice.choice(sorted(present))
        return f"{colour} {shape}"
    pairs = [(p, c) for p in SHAPES for c in COLOURS if (p, c) not in present]
    held_out = [pair for pair in pairs if pair in HELD_OUT]
    share = len([p for p in present if p in HELD_OUT]) / len(present)
    pairs = held_out if dice.chance(share) else [p for p in pairs if p not in HELD_OUT]
    shapes, colours = {p for p, _ in present}, {c for _, c in present}
    mixed = [(p, c) for p, c in pairs if p in shapes and c in colours]
    shape, colour = dice.choice(mixed if mixed and dice.chance(0.5) else pairs)
    return f"{colour} {shape}"


def _comparison(scene: Scene, dice: Dice) -> Question | None:
    form = dice.below(4)
    if form == 0:
        return _larger(scene, dice)
    if form == 1:
        return _more(scene, dice)
    return _same(scene, dice, "colour" if form == 2 else "shape")


def _larger(scene: Scene, dice: Dice) -> Question | None:
    yes = dice.chance(0.5)
    pairs = [(a, b) for a, b in permutations(scene.solids, 2) if (a.size, b.size) == ("large", "small")]
    if not pairs:
        return None
    large, small = dice.choice(pairs)
    word = dice.choice(("larger", "smaller"))
    one, other = (large, small) if yes == (word == "larger") else (small, large)
    a, b = named(scene, dice, one), named(scene, dice, other)
    reason = f"{a} is {one.size} and {b} is {other.size}"
    steps = tuple(Question("step", f"what size is {name}?", solid.size) for name, solid in ((a, one), (b, other)))
    return Question("comparison", f"is {a} {word} than {b}?", "yes" if yes else "no", one, reason, steps)


def _more(scene: Scene, dice: Dice) -> Question | None:
    """More of this than of that, both there, in different numbers: the order of the two decides the answer."""
    yes = dice.chance(0.5)
    values = [s.shape for s in scene.solids] if dice.chance(0.5) else [f"{s.colour} thing" for s in scene.solids]
    counts = {v: values.count(v) for v in values}
    pairs = [(a, b) for a, b in permutations(sorted(counts), 2) if counts[a] > counts[b]]
    if not pairs:
        return None
    many, few = dice.choice(pairs)
    a, b = (many, few) if yes else (few, many)
    reason = f"there are {number(counts[a], a)} and {number(counts[b], b)}"
    steps = tuple(Question("step", f"how many {noun}s are there?", str(counts[noun])) for noun in (a, b))
    text = f"are there more {a}s than {b}s?"
    return Question("comparison", text, "yes" if yes else "no", reason=reason, steps=steps)


def _same(scene: Scene, dice: Dice, attribute: str) -> Question | None:
    yes = dice.chance(0.5)
    both: dict[bool, list[tuple[Solid, Solid]]] = {True: [], False: []}
    for a, b in permutations(scene.solids, 2):
        both[getattr(a, attribute) == getattr(b, attribute)].append((a, b))
    if not (both[True] and both[False]):
        return None
    one, other = dice.choice(both[yes])
    # Full names would give the answer away; places and the other attribute do not.
    a, b = without(scene, dice, one, attribute), without(scene, dice, other, attribute)
    both_given = ((a, getattr(one, attribute)), (b, getattr(other, attribute)))
    reason = " and ".join(f"{name} is {value}" for name, value in both_given)
    steps = tuple(Question("step", f"what {attribute} is {name}?", value) for name, value in both_given)
    text = f"do {a} and {b} have the same {attribute}?"
    return Question("comparison", text, "yes" if yes else "no", one, reason, steps)


def without(scene: Scene, dice: Dice, solid: Solid, hidden: str) -> str:
    """Words for a known solid that do not name its ``hidden`` attribute."""
    given = "colour" if hidden == "shape" else "shape"
    value = getattr(solid, given)
    if only(scene, **{given: value}) and dice.chance(0.7):
        return f"the {value} thing" if given == "colour" else f"the {value}"
    return f"the thing at the {solid.place}"


_KINDS: dict[str, Callable[[Scene, Dice], Question | None]] = {
    "what": _what,
    "colour": _colour,
    "count": _count,
    "relation": _relation,
    "yesno": _yesno,
    "comparison": _comparison,
}
KINDS = tuple(_KINDS)


def follow_up(scene: Scene, solid: Solid, dice: Dice) -> Question | None:
    """A question that only makes sense after a turn about ``solid``."""
    form = dice.below(5)
    if form == 0:
        return Question("follow_up", "what size is it?", solid.size, solid, f"the {solid.name} is {solid.size}")
    if form == 1:
        reason = f"the {solid.name} is at the {solid.place}"
        return Question("follow_up", "and where is it?", solid.place, solid, reason)
    if form == 2:
        return Question("follow_up", "what colour is it?", solid.colour, solid, f"it is a {solid.full_name}")
    if form == 3:
        return Question("follow_up", "what shape is it?", solid.shape, solid, f"it is a {solid.full_name}")
    direction = dice.choice(sorted(DIRECTIONS))
    found = beside(scene, direction, solid)
    if len(found) > 1:
        return None
    answer, about = (found[0].name, found[0]) if found else ("nothing", None)
    reason = f"there is {an(answer) if found else answer} {direction} the {solid.name}"
    return Question("follow_up", f"and what is {direction} it?", answer, about, reason)
