"""True statements about scenes: each holds, each is told of one solid alone, and none tells more than its scene."""

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.demo.scenes import SceneSource, make_scene
from isthmus.demo.scenes.dice import Dice
from isthmus.demo.scenes.facts import facts
from isthmus.demo.scenes.scene import Scene, Solid

FORMS = (
    re.compile(r"the thing at the (?P<place>\w+ \w+) is a (?P<size>\w+) (?P<colour>\w+) (?P<shape>\w+)"),
    re.compile(r"the (?P<shape>\w+) is (?P<size>\w+) and (?P<colour>\w+) at the (?P<place>\w+ \w+)"),
    re.compile(r"the (?P<colour>\w+) thing is a (?P<size>\w+) (?P<shape>\w+) at the (?P<place>\w+ \w+)"),
)
KEYS = ("place", "shape", "colour")


def _read(statement: str) -> tuple[str, dict[str, str]]:
    """The attribute a statement starts from, and all that it tells."""
    for key, form in zip(KEYS, FORMS, strict=True):
        if found := form.fullmatch(statement):
            return key, found.groupdict()
    raise AssertionError(statement)


def _fitting(scene: Scene, told: dict[str, str]) -> list[Solid]:
    return [s for s in scene.solids if all(getattr(s, k) == v for k, v in told.items())]


@settings(deadline=None, max_examples=80)
@given(number=st.integers(0, 10_000), split=st.sampled_from(("train", "dev", "test")), count=st.integers(1, 12))
def test_every_statement_is_true_of_the_one_solid_it_starts_from(number, split, count):
    scene = make_scene(0, split, number)
    text = facts(scene, Dice("facts", number), count)
    statements = text.removesuffix(".").split(". ")
    assert len(statements) == len(set(statements)) <= count
    for statement in statements:
        key, told = _read(statement)
        (solid,) = _fitting(scene, told)
        assert _fitting(scene, {key: getattr(solid, key)}) == [solid]


def test_every_attribute_that_one_solid_alone_has_is_a_way_to_find_it():
    scene = next(s for i in range(100) if len((s := make_scene(0, "train", i)).solids) == 3)
    statements = facts(scene, Dice("all"), 100).removesuffix(".").split(". ")
    ways = {(key, told[key]) for key, told in map(_read, statements)}
    for attribute in KEYS:
        values = [getattr(s, attribute) for s in scene.solids]
        alone = {(attribute, v) for v in values if values.count(v) == 1}
        assert alone <= ways


def test_the_order_is_drawn_and_repeatable():
    scene = make_scene(0, "train", 7)
    orders = {facts(scene, Dice("order", i)) for i in range(8)}
    assert len(orders) > 1
    assert facts(scene, Dice("order", 1)) == facts(scene, Dice("order", 1))


def test_a_description_stands_in_for_the_picture():
    seen, read = SceneSource("facts", count=3), SceneSource("symbol_facts", count=3)
    told = SceneSource("symbol_captions", count=3)
    for i in range(3):
        assert len(seen[i].images) == 1
        assert not read[i].images
        assert not told[i].images
        assert [t.learn for t in seen[i].texts] == [True]
        assert [t.learn for t in read[i].texts] == [t.learn for t in told[i].texts] == [False, True]
        scene = read.scene(i)
        for solid in scene.solids:
            assert f"{solid.full_name}" in read[i].texts[0].text
            assert solid.place in read[i].texts[0].text
