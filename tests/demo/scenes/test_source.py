"""The scene generator: determinism, held-out pairs, drawing, right and balanced answers."""

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Set
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image as PilImage

from isthmus.data.record import Image
from isthmus.demo.scenes import (
    COLOURS,
    FORMS,
    HELD_OUT,
    KINDS,
    RESERVED_WORDS,
    SHAPES,
    TRAINING_WORDS,
    Scene,
    SceneSource,
    draw,
    make_scene,
)
from isthmus.demo.scenes.dice import Dice
from isthmus.demo.scenes.draw import PAINT, ScenePicture, strange_paint
from isthmus.demo.scenes.scene import RADIUS, Split
from isthmus.demo.scenes.words import captions, describe, symbols
from isthmus.errors import ConfigError, DataError
from tests.narrow import must_be, there

SPLITS = ("train", "dev", "test")


def test_a_scene_is_a_pure_function_of_its_number():
    first = make_scene(3, "train", 5)
    make_scene.cache_clear()
    assert make_scene(3, "train", 5) == first
    others = [make_scene(4, "train", 5), make_scene(3, "test", 5), make_scene(3, "train", 6)]
    others.append(make_scene(3, "train", 5, 1))
    assert all(other.solids != first.solids for other in others)


def test_dice_never_change():
    text = repr([(s.full_name, s.place, round(s.x, 9)) for i in range(20) for s in make_scene(0, "test", i).solids])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "416a2d29d5658235"


@pytest.mark.parametrize("split", SPLITS)
def test_solids_are_different_apart_and_inside(split):
    for i in range(800):
        solids = make_scene(0, split, i).solids
        assert 1 <= len(solids) <= 4
        assert len({s.name for s in solids}) == len({s.place for s in solids}) == len(solids)
        for s in solids:
            r = RADIUS[s.size]
            assert r < s.x < 1 - r
            assert r < s.y < 1 - r
            assert (int(s.x * 3), int(s.y * 3)) == (s.column, s.row)
        for a in solids:
            for b in solids:
                if a is not b:
                    assert max(abs(a.x - b.x), abs(a.y - b.y)) > RADIUS[a.size] + RADIUS[b.size]
                if a.column < b.column:
                    assert b.x - a.x > 0.19
                if a.row < b.row:
                    assert b.y - a.y > 0.19


def test_held_out_pairs_are_never_trained_and_always_tested():
    assert len(HELD_OUT) == 8
    assert len({c for _, c in HELD_OUT}) == len(COLOURS)
    seen: Counter[str] = Counter()
    for i in range(3000):
        pairs = {(s.shape, s.colour) for s in make_scene(0, "train", i).solids}
        assert not pairs & HELD_OUT
        seen.update(word for pair in pairs for word in pair)
        for split in ("dev", "test"):
            assert {(s.shape, s.colour) for s in make_scene(0, split, i).solids} & HELD_OUT
    assert min(seen[word] for word in (*SHAPES, *COLOURS)) > 500
    names = {f"{colour} {shape}" for shape, colour in HELD_OUT}
    for form in ("questions", "conversations", "symbols", "fewshot", "captions", "describe", "reasoning"):
        source = SceneSource(form, count=600)
        for i in range(600):
            assert not any(name in t for name in names for t in _strings(source[i])), form


def _strings(record):
    return [t for part in record.texts for t in ((part.text,) if isinstance(part.text, str) else part.text)]


def test_unknown_names_are_answered_with_near_ones():
    with pytest.raises(DataError, match="train"):
        make_scene(0, "trian", 0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="captions"):
        SceneSource("caption")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="dev"):
        SceneSource("captions", split="dew")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="count"):
        SceneSource("captions", count=0)
    with pytest.raises(ConfigError, match="wide"):
        draw(make_scene(0, "train", 0), 8)


def test_drawing_is_deterministic_and_shows_the_colours():
    scene = next(s for i in range(100) if len((s := make_scene(0, "train", i)).solids) == 1)
    picture = draw(scene)
    assert picture.mode == "RGB"
    assert picture.size == (64, 64)
    assert picture.tobytes() == draw(scene).tobytes()
    assert draw(scene, 96).size == (96, 96)
    ground = np.median(np.asarray(picture, dtype=float).reshape(-1, 3), 0)
    changed = np.abs(np.asarray(picture, dtype=float) - ground).max(-1) > 60
    solid = scene.solids[0]
    rows, columns = np.nonzero(changed)
    assert abs(rows.mean() / 64 - solid.y) < 0.06
    assert abs(columns.mean() / 64 - solid.x) < 0.06


@pytest.mark.parametrize("form", FORMS)
def test_records_are_deterministic_cheap_and_well_formed(form):
    source = SceneSource(form, split="dev", count=40, seed=2)
    assert len(source) == 40
    again = SceneSource(form, split="dev", count=40, seed=2)
    for i in range(40):
        record = source[i]
        assert record.id == again[i].id
        assert _strings(record) == _strings(again[i])
        assert any(t.learn for t in record.texts)
        assert all(_strings(record))
        if form.startswith("symbol") or form in ("readings", "fewshot", "lesson_texts", "echoes"):
            assert not record.images
        else:
            assert isinstance(record.parts[0], Image)
            assert len(record.images) == 1 or form in ("pages", "lessons")
            assert all("/dev/2/" in image.content_key() for image in record.images)
    with pytest.raises(IndexError):
        source[40]


def test_a_picture_is_drawn_on_reading_and_has_its_own_key():
    source = SceneSource("questions", split="test", count=60)
    keys = {}
    for i in range(60):
        image = source[i].images[0]
        keys.setdefault(image.key, must_be(PilImage.Image, image.source.read()).tobytes())
    assert len(set(keys.values())) == len(keys) == 60


def test_distinct_scenes_differ_in_words():
    source = SceneSource("captions", split="test", count=256, distinct=True)
    assert len({source.scene(i).layout for i in range(256)}) == 256
    assert len({frozenset(_strings(source[i])[0].replace(" and ", ", ").split(", ")) for i in range(256)}) == 256


def test_captions_and_descriptions_name_every_solid():
    for i in range(200):
        scene = make_scene(1, "test", i)
        for text in (*captions(scene), describe(scene), symbols(scene, Dice(i))):
            for s in scene.solids:
                assert s.name in text
                assert s.size in text
        listing = symbols(scene, Dice(i))
        assert all(s.place in listing and s.full_name in listing for s in scene.solids)


def _conversation_kinds(source, count):
    return Counter(kind for i in range(count) for kind in source[i].meta["kinds"])


def test_conversations_mix_kinds_and_hold_follow_ups():
    kinds = _conversation_kinds(SceneSource("conversations", turns=8), 300)
    assert set(kinds) == {*KINDS, "follow_up"}
    assert min(kinds.values()) > 150
    record = SceneSource("conversations", turns=8)[4]
    roles = [t.role for t in record.texts]
    assert roles == ["user", "assistant"] * (len(roles) // 2)
    assert [t.learn for t in record.texts] == [t.role == "assistant" for t in record.texts]


@pytest.mark.parametrize("form", ["conversations", "symbols", "questions"])
def test_kinds_narrow_what_is_asked(form):
    source = SceneSource(form, count=60, kinds=["comparison"])
    asked = [t.text for r in map(source.__getitem__, range(60)) for t in r.texts if t.role == "user"]
    verbs = ("is ", "are there more ", "do ")
    follow_ups = ("what size is it?", "and where is it?", "what colour is it?", "what shape is it?", "and what is ")
    assert asked
    assert all(str(text).split("\n")[-1].startswith((*verbs, *follow_ups)) for text in asked)
    assert all(any(t.learn for t in source[i].texts) for i in range(60))


def test_an_unknown_kind_is_answered_with_a_near_one():
    with pytest.raises(ConfigError, match="comparison"):
        SceneSource("conversations", kinds=["comparisons"])
    with pytest.raises(ConfigError, match="no kind 'count'"):
        SceneSource("lessons", kinds=["count"])
    with pytest.raises(ConfigError, match="kinds is empty"):
        SceneSource("conversations", kinds=[])


def test_comparisons_may_be_led_up_to_by_what_is_compared():
    always = SceneSource("conversations", count=200, kinds=["comparison"], led=1.0)
    compared = Counter()
    for record in (always[i] for i in range(200)):
        texts = [must_be(str, part.text) for part in record.texts]
        told = dict(zip(texts[::2], texts[1::2], strict=True))
        for question, answer in told.items():
            if found := re.fullmatch(r"do (the .+) and (the .+) have the same (\w+)\?", question):
                a, b, attribute = found.groups()
                values = [told[f"what {attribute} is {name}?"] for name in (a, b)]
                assert answer == ("yes" if values[0] == values[1] else "no")
            elif found := re.fullmatch(r"is (the .+) (larger|smaller) than (the .+)\?", question):
                sizes = [told[f"what size is {name}?"] for name in (found[1], found[3])]
                assert answer == ("yes" if sizes[0] == ("large" if found[2] == "larger" else "small") else "no")
                assert sizes[0] != sizes[1]
            elif found := re.fullmatch(r"are there more (.+)s than (.+)s\?", question):
                counts = [int(told[f"how many {noun}s are there?"]) for noun in found.groups()]
                assert answer == ("yes" if counts[0] > counts[1] else "no")
            else:
                continue
            compared[question.split()[0]] += 1
    assert min(compared[word] for word in ("do", "is", "are")) > 20
    half = SceneSource("symbols", count=60, kinds=["comparison"], led=0.5)
    plain = SceneSource("symbols", count=60, kinds=["comparison"])
    assert sum(len(half[i].texts) for i in range(60)) > sum(len(plain[i].texts) for i in range(60))
    with pytest.raises(ConfigError, match="led is a share"):
        SceneSource("symbols", led=2.0)


def test_symbols_put_the_description_where_the_picture_would_stand():
    source = SceneSource("symbols", count=30)
    for i in range(30):
        first = source[i].texts[0].text
        assert isinstance(first, str)
        description, question = first.split("\n")
        assert all(s.full_name in description for s in make_scene(0, "train", i).solids)
        assert bool(question) == (i % 3 != 2)


def test_few_shot_words_are_kept_apart():
    assert not RESERVED_WORDS & set(TRAINING_WORDS)
    assert len(RESERVED_WORDS) > 150
    plain = {
        w
        for form in ("captions", "conversations", "describe")
        for i in range(200)
        for t in _strings(SceneSource(form)[i])
        for w in re.findall("[a-z]+", t)
    }
    assert not plain & (RESERVED_WORDS | set(TRAINING_WORDS))
    allowed: list[tuple[Split, Set[str]]] = [("train", set(TRAINING_WORDS)), ("test", RESERVED_WORDS)]
    for split, words in allowed:
        source = SceneSource("fewshot", split=split, count=200)
        for i in range(200):
            record = source[i]
            made_up = [must_be(str, t.text).strip() for t in record.texts[1::2]]
            assert set(made_up) <= words
            assert record.texts[-1].learn
            assert made_up[-1] in made_up[:-1]


# ---- answers, recomputed from the ground truth by another route


def _fits(solid, phrase):
    """Whether a solid fits words such as ``the small red thing`` or ``the thing at the top left``."""
    place = re.search(r"at the (\w+ \w+)$", phrase)
    if place:
        return solid.place == place[1]
    words = phrase.removeprefix("the ").split()
    return all(w in ("thing", solid.shape, solid.colour, solid.size) for w in words)


def _one(scene, phrase):
    found = [s for s in scene.solids if _fits(s, phrase)]
    assert len(found) == 1, phrase
    return found[0]


NAME = r"(the (?:\w+ )*?(?:thing at the \w+ \w+|thing|" + "|".join(SHAPES) + "))"


def _named(pattern: str, text: str) -> str:
    """What the first group of a whole text's pattern holds."""
    return there(re.fullmatch(pattern, text))[1]


def _truth(scene: Scene, kind: str, text: str) -> str:
    if kind == "what":
        return _one(scene, _named(f"(?:what shape is|what is|which shape has) {NAME}\\?", text)).shape
    if kind == "colour":
        pattern = f"(?:what colour is|which colour has|what is the colour of) {NAME}\\?"
        return _one(scene, _named(pattern, text)).colour
    if kind == "count":
        noun = there(re.search(r"(?:how many|count the) (.*?)s(?: |\.)", text))[1]
        return str(sum(_fits(s, noun) for s in scene.solids))
    if kind == "yesno":
        noun = _named(r"(?:is there|do you see|can you see) an? (.*?)(?: here)?\?", text)
        return "yes" if any(_fits(s, noun) for s in scene.solids) else "no"
    return _truth_of_two(scene, text)


def _truth_of_two(scene: Scene, text: str) -> str:
    if match := re.fullmatch(f"what (shape|colour) is the thing (left of|right of|above|below) {NAME}\\?", text):
        attribute, side, other = match[1], match[2], _one(scene, match[3])
        ahead = {
            "left of": lambda s: s.x < other.x - 0.15,
            "right of": lambda s: s.x > other.x + 0.15,
            "above": lambda s: s.y < other.y - 0.15,
            "below": lambda s: s.y > other.y + 0.15,
        }[side]
        found = [s for s in scene.solids if ahead(s)]
        assert len(found) == 1
        return getattr(found[0], attribute)
    sides = "(left or right of|above or below)"
    if match := (
        re.fullmatch(f"is {NAME} {sides} {NAME}\\?", text)
        or re.fullmatch(f"{NAME} or {NAME}: is the first {sides} the second\\?", text)
    ):
        names = [g for g in match.groups() if g.startswith("the ")]
        a, b = (_one(scene, n) for n in names)
        if "left or right" in text:
            return "left" if a.x < b.x else "right"
        return "above" if a.y < b.y else "below"
    if match := re.fullmatch(f"is {NAME} (larger|smaller) than {NAME}\\?", text):
        a, b = RADIUS[_one(scene, match[1]).size], RADIUS[_one(scene, match[3]).size]
        return "yes" if (a > b if match[2] == "larger" else a < b) else "no"
    if match := re.fullmatch(r"are there more (.*)s than (.*)s\?", text):
        a, b = (sum(_fits(s, match[g]) for s in scene.solids) for g in (1, 2))
        return "yes" if a > b else "no"
    match = re.fullmatch(f"do {NAME} and {NAME} have the same (colour|shape)\\?", text)
    assert match, text
    return "yes" if getattr(_one(scene, match[1]), match[3]) == getattr(_one(scene, match[2]), match[3]) else "no"


@pytest.mark.parametrize("split", ["train", "test"])
def test_answers_are_right(split):
    source = SceneSource("questions", split=split, count=3000, seed=1)
    for i in range(3000):
        record = source[i]
        assert record.meta["kind"] == KINDS[i % 6]
        question, answer = _strings(record)
        scene = make_scene(1, split, i, must_be(int, record.meta["attempt"]))
        (told,) = must_be(tuple, record.meta["answers"])
        assert _truth(scene, str(record.meta["kind"]), question) == answer == told, question
        assert 1 <= len(answer.split()) <= 2


def _asked(split, per_kind):
    source = SceneSource("questions", split=split, count=per_kind * len(KINDS))
    by_kind = defaultdict(list)
    for i in range(len(source)):
        record = source[i]
        by_kind[record.meta["kind"]].append(tuple(_strings(record)))
    return by_kind


def test_guessing_from_the_question_text_gains_little():
    """The best answer per question text of the training questions (else the kind's commonest), on test questions."""
    train, test = _asked("train", 3000), _asked("test", 3000)
    limit = {"what": 0.25, "colour": 0.20, "count": 0.42, "relation": 0.45, "yesno": 0.58, "comparison": 0.58}
    for kind in KINDS:
        counts = defaultdict(Counter)
        for question, answer in train[kind]:
            counts[question][answer] += 1
            counts[""][answer] += 1
        right = [(counts[q] if q in counts else counts[""]).most_common(1)[0][0] == a for q, a in test[kind]]
        assert sum(right) / len(right) < limit[kind], kind
    for kind in ("yesno", "comparison"):
        assert abs(sum(a == "yes" for _, a in test[kind]) / 3000 - 0.5) < 0.04


def test_outlines_are_in_paints_without_a_name_that_training_allows():
    """What tells shapes apart must not need colours, and no held-out pair may be met on the way."""
    records = [SceneSource("outlines")[i] for i in range(200)]
    assert len({r.images[0].content_key() for r in records}) == 200
    picture = must_be(ScenePicture, records[0].images[0].source)
    assert picture.repainted
    plain, painted = (np.asarray(replace(picture, repainted=r).read(), dtype=int) for r in (False, True))
    assert np.array_equal(plain, np.asarray(draw(make_scene(0, "train", 0)), dtype=int))
    changed = np.abs(plain - painted).max(-1) > 0
    assert 0.02 < changed.mean() < 0.3  # the solids alone, not the ground
    dice = Dice("paints")
    for shape, colour in HELD_OUT:
        for _ in range(300):
            assert np.linalg.norm(np.subtract(strange_paint(dice, shape), PAINT[colour])) >= 0.3
    assert not {"red", "blue"} & set(" ".join(map(str, records[0].texts[0].text)).split())
