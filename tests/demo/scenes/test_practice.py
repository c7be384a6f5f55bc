"""Practice questions: true answers about the one thing that is named, for training alone."""

from collections import Counter

import pytest

from isthmus.demo.scenes.dice import Dice
from isthmus.demo.scenes.practice import PRACTICE, practise
from isthmus.demo.scenes.questions import KINDS
from isthmus.demo.scenes.scene import COLOURS, SHAPES, SIZES, make_scene
from isthmus.demo.scenes.source import SceneSource
from isthmus.errors import ConfigError


def meant(scene, name):
    """The one solid that the words ``the small red cube``, ``the red thing`` or ``the thing at the top left`` fit."""
    words = name.removeprefix("the ").split(" at the ")
    fitting = [s for s in scene.solids if len(words) == 1 or s.place == words[1]]
    for word in words[0].split():
        assert word == "thing" or word in (*SHAPES, *COLOURS, *SIZES)
        fitting = [s for s in fitting if word in ("thing", s.shape, s.colour, s.size)]
    (solid,) = fitting
    return solid


def sort(scene, noun):
    """All solids that ``cubes`` or ``red things`` name."""
    word = noun.removesuffix(" things") if noun.endswith("things") else noun.removesuffix("s")
    return [s for s in scene.solids if word in (s.shape, s.colour, s.size)]


def truth(scene, kind, text):
    text = text.removesuffix("?")
    if kind == "size":
        name = text.removeprefix("what size is ").removeprefix("is ").removesuffix(" large or small")
        return meant(scene, name).size
    if kind == "place":
        return meant(scene, text.removeprefix("where is ")).place
    if kind == "half":
        name, _, words = (
            text.removeprefix("is ")
            .removesuffix(" the centre")
            .partition(" left or right of" if "left or right" in text else " above or below")
        )
        assert words == ""
        solid = meant(scene, name)
        at = solid.column if "left" in text else solid.row
        assert at != 1
        return (("left", "right") if "left" in text else ("above", "below"))[at // 2]
    if kind == "role":
        pair, _, asked = text.partition(": ")
        names = pair.split(" or ")
        solid = meant(scene, names[asked.endswith("second")])
        return solid.place if asked.startswith("where") else getattr(solid, asked.split()[1])
    if kind == "any":
        return "yes" if sort(scene, text.removeprefix("are there any ")) else "no"
    if kind == "all":
        found = sort(scene, text.removeprefix("which ").removesuffix(" are there"))
        articles = {s: "an" if s.full_name[0] in "aeiou" else "a" for s in found}
        return {f"{articles[s]} {s.full_name} at the {s.place}" for s in found} or {"none"}
    if kind == "both":
        place = text.startswith("where")
        names = (text.removeprefix("where are ") if place else text.split(" are ", 1)[1]).split(" and ")
        asked = "place" if place else text.split()[1]
        assert not any(getattr(meant(scene, name), asked) in name for name in names)
        return " and ".join(getattr(meant(scene, name), asked) for name in names)
    if kind == "alike":
        told, shared = text.split()[1], text.partition("that has the ")[2].split()[0]
        solid = meant(scene, text.partition(f"the {shared} of ")[2])
        others = [s for s in scene.solids if s is not solid and getattr(s, shared) == getattr(solid, shared)]
        assert len(others) < 2
        assert {told, shared} == {"colour", "shape"}
        return getattr(others[0], told) if others else "nothing"
    assert kind == "is"
    name, _, value = text.removeprefix("is ").rpartition(" ")
    solid = meant(scene, name.removesuffix(" a").removesuffix(" an"))
    assert value not in name
    return "yes" if value in (solid.colour, solid.shape) else "no"


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("kind", PRACTICE)
def test_answers_are_true_and_both_ways(kind, split):
    answers = Counter()
    for number in range(300):
        scene = make_scene(3, split, number)
        question = practise(scene, kind, Dice("practice", kind, number))
        if question is None:
            continue
        told = question.answer
        if kind == "all":
            told = set(told.replace(" and ", ", ").split(", "))
        assert told == truth(scene, kind, question.text)
        answers[question.answer] += 1
    assert answers.total() > (60 if kind == "alike" else 200)  # few scenes have two things of a colour or shape
    assert len(answers) > 1
    if kind in ("size", "half", "any", "is", "alike"):
        assert max(answers.values()) < 0.75 * answers.total()


def kinds_of(source):
    return {kind for i in range(len(source)) for kind in source[i].meta["kinds"]}


def test_they_are_asked_where_they_are_named_and_nowhere_else():
    for form in ("conversations", "symbols"):
        SceneSource(form, count=5, kinds=["role", "count"])[0]
    asked = SceneSource("conversations", count=50, kinds=["role", "count"], turns=4)
    kinds = kinds_of(asked)
    assert kinds == {"role", "count", "follow_up"}
    plain = SceneSource("conversations", count=50)
    assert not kinds_of(plain) & set(PRACTICE)
    for form in ("questions", "readings", "reasoning"):
        assert set(SceneSource(form, count=12).kinds) == set(KINDS)
        with pytest.raises(ConfigError, match="there is no kind 'role'"):
            SceneSource(form, count=5, kinds=["role"])
