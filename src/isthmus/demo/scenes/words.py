"""Scenes in words: captions, detailed descriptions, and the symbolic description a language model reads in place of
the picture. All of them name every solid with its attributes and say where it is, alone or by its relation to others.
"""

from collections.abc import Sequence
from itertools import pairwise

from isthmus.demo.scenes.dice import Dice
from isthmus.demo.scenes.scene import Scene, Solid

CAPTION_FORMS = 5


def number(count: int, noun: str) -> str:
    """``1 thing``, ``2 things``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def an(noun: str) -> str:
    """``a red cube``, ``an orange cube``."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def listed(items: Sequence[str]) -> str:
    """``a, b and c``."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def relation(one: Solid, other: Solid) -> str:
    """Where ``one`` is from ``other``; they stand in different cells, so there is always an answer."""
    if one.column != other.column:
        return "left of" if one.column < other.column else "right of"
    return "above" if one.row < other.row else "below"


def captions(scene: Scene) -> tuple[str, ...]:
    """One caption of each form, the solids in reading order: row by row, from the left."""
    return tuple(_caption(form, in_reading_order(scene)) for form in range(CAPTION_FORMS))


def outlines(scene: Scene) -> tuple[str, ...]:
    """Captions with shapes and where they are, and no colours.

    Among a batch of pictures colours and places alone distinguish nearly all, so a contrastive model may leave the
    shapes unseen; these captions need them. Without the places shapes are learnt far
    worse (docs/notes/2026-12-trainings.md).
    """
    solids = in_reading_order(scene)
    return (
        listed([f"a {s.shape} at the {s.place}" for s in solids]),
        listed([f"a {s.size} {s.shape} at the {s.place}" for s in solids]),
    )


def in_reading_order(scene: Scene) -> list[Solid]:
    return sorted(scene.solids, key=lambda s: (s.row, s.column))


def _caption(form: int, solids: list[Solid]) -> str:
    if form == 0:
        return listed([f"a {s.full_name} at the {s.place}" for s in solids])
    if form == 1:
        things = [f"a {s.full_name} at the {s.place}" for s in solids]
        verb = "is" if len(solids) == 1 else "are"
        return f"there {verb} {number(len(solids), 'thing')}: {listed(things)}"
    if form == 2:
        return listed([f"at the {s.place} a {s.full_name}" for s in solids])
    if form == 3:
        # A chain: each solid is placed by the one named before it.
        links = [f"a {s.full_name} {relation(s, before)} the {before.name}" for before, s in pairwise(solids)]
        return listed([f"a {solids[0].full_name} at the {solids[0].place}", *links])
    return ". ".join(f"the {s.name} at the {s.place} is {s.size}" for s in solids)


def describe(scene: Scene) -> str:
    """A detailed description: how many solids, each with its place, then how neighbours in the telling are related."""
    solids = in_reading_order(scene)
    verb = "is" if len(solids) == 1 else "are"
    sentences = [f"there {verb} {number(len(solids), 'thing')} in the picture"]
    sentences += [f"a {s.full_name} is at the {s.place}" for s in solids]
    sentences += [f"the {s.name} is {relation(s, before)} the {before.name}" for before, s in pairwise(solids)]
    return ". ".join(sentences) + "."


def symbols(scene: Scene, dice: Dice) -> str:
    """The scene as compact text: every solid with size, colour, shape and place, in reading order or (half of the
    time) any other, and one of two styles.

    ``large red cube top left, small blue ring middle centre``
    """
    solids = in_reading_order(scene) if dice.chance(0.5) else dice.shuffled(scene.solids)
    if dice.chance(0.5):
        return ", ".join(f"{s.full_name} {s.place}" for s in solids)
    return ", ".join(f"{s.place} {s.full_name}" for s in solids)
