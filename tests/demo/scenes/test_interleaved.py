"""Pages, lessons and clips of the scenes: what they hold, and that what should not be told is not told."""

from collections import Counter

import numpy as np
import pytest

from isthmus.data.record import Image, Text, Video
from isthmus.data.sources import open_source
from isthmus.demo.scenes import COLOURS, HELD_OUT, RESERVED_WORDS, SHAPES
from isthmus.demo.scenes.interleaved import MadeScene, SceneClip
from isthmus.errors import ConfigError
from tests.narrow import must_be


def source(form, **options):
    return open_source({"kind": "scenes", "form": form, "count": 60, **options})


def solids(record):
    return [must_be(MadeScene, p.source).scene.solids[0] for p in record.images]


def frames_of(clip):
    return must_be(SceneClip, clip.source).frames


def words(record):
    return [str(p.text) for p in record.texts if p.role == "assistant"]


def test_pages_are_pictures_with_captions_behind_them():
    pages = source("pages")
    counts = Counter(len(pages[i].images) for i in range(60))
    assert set(counts) == {2, 3, 4}
    for i in range(5):
        kinds = [isinstance(p, Image) for p in pages[i].parts]
        assert kinds == [True, False] * (len(kinds) // 2)
        assert all(p.learn for p in pages[i].texts)


@pytest.mark.parametrize("shots", [0, 4, 8])
def test_a_lesson_can_be_solved_from_its_examples_and_only_from_them(shots):
    lessons = source("lessons", split="test", shots=shots)
    for i in range(30):
        record = lessons[i]
        attribute = str(record.meta["kind"]).removeprefix("lesson_")
        *shown, asked = solids(record)
        *told, answer = words(record)
        assert len(shown) == shots
        meaning = {getattr(s, attribute): w for s, w in zip(shown, told, strict=True)}
        assert len(set(meaning.values())) == len(meaning) == min(shots, 4)
        assert set(told) | {answer} <= RESERVED_WORDS
        assert record.meta["answers"] == (answer,)
        if shots:
            assert meaning[getattr(asked, attribute)] == answer
            assert max(Counter(told).values()) == shots // 4
    assert len({words(lessons[i])[-1] for i in range(30)}) > 20


def test_permuted_lessons_keep_pictures_and_truth():
    plain, spoilt = source("lessons", shots=8), source("lessons", shots=8, control="permuted")
    same = 0
    for i in range(20):
        a, b = plain[i], spoilt[i]
        assert [p.content_key() for p in a.images] == [p.content_key() for p in b.images]
        assert sorted(words(a)) == sorted(words(b))
        assert words(a)[-1] == words(b)[-1]
        same += words(a) == words(b)
    assert same < 3


def test_learnt_is_what_an_example_has_explained():
    for form in ("lessons", "lesson_texts"):
        record = source(form, shots=8)[3]
        answers = record.texts if form == "lessons" else record.texts[1::2]
        assert form == "lessons" or {str(p.text).split()[-1] for p in record.texts[::2]} <= {*COLOURS, *SHAPES}
        seen = set()
        for p in answers[:-1]:
            assert p.learn == (p.text in seen)
            seen.add(p.text)
        assert answers[-1].learn
    text = source("lesson_texts", shots=4)[0]
    assert not text.images
    assert all(isinstance(p, Text) for p in text.parts)


def test_examples_in_words_stand_before_those_with_pictures():
    """And explain them: the pictures' words are then learnt from the first on."""
    plain, partly = (source("lessons", shots=12, in_words=count, kinds=["colour"]) for count in (0, 8))
    for i in range(20):
        record = partly[i]
        told, shown = record.texts[:8], record.parts[8:]
        assert all(p.role == "system" and not p.learn for p in told)
        assert [isinstance(p, Image) for p in shown] == [True, False] * 5
        assert record.images == plain[i].images[8:]
        explained = {str(p.text).split()[0]: str(p.text).split()[1].rstrip(".,;") for p in told}
        assert {s.colour: w for s, w in zip(solids(record), words(record), strict=True)}.items() >= {
            (s.colour, explained[s.colour]) for s in solids(record) if s.colour in explained
        }
        assert [p.learn for p in record.texts[8:-1]] == [
            w in explained.values() or w in words(record)[:n] for n, w in enumerate(words(record)[:-1])
        ]


@pytest.mark.parametrize("key", ["in_words", "told"])
@pytest.mark.parametrize(
    "options", [{"shots": 4, "n": 5}, {"n": 5}, {"shots": 4, "n": -1}, {"form": "lesson_texts", "n": 2}]
)
def test_more_examples_in_words_than_there_are_is_refused(key, options):
    form, given = options.get("form", "lessons"), {"shots": options.get("shots"), key: options["n"]}
    with pytest.raises(ConfigError, match=rf"{key}=-?\d is for lessons, and at most their 4 shots"):
        source(form, **given)


def test_examples_in_words_go_by_the_key_of_before_too():
    given = {"kind": "scenes", "form": "lessons", "count": 4, "shots": 12, "kinds": ["colour"]}
    named, before = (open_source({**given, key: 8}) for key in ("in_words", "told"))
    assert [named[i].parts for i in range(4)] == [before[i].parts for i in range(4)]
    with pytest.raises(ConfigError, match="give in_words alone"):
        open_source({**given, "in_words": 8, "told": 8})


def test_the_examples_of_a_text_end_alike_in_one_of_several_ways():
    """A tiny LM that has met one form alone counts tokens, and breaks with the first new one among them."""
    ends = set()
    for i in range(60):
        values = [str(p.text) for p in source("lesson_texts", shots=4)[i].texts[::2]]
        (end,) = {v[: v.index(" ")] for v in values[1:]}
        assert values[0].startswith(" ")
        ends.add(end)
    assert ends == {"", ".", ",", ";", "\n"}


def test_an_echo_learns_what_followed_a_word_before():
    for i in range(40):
        whole, *stretches = source("echoes")[i].texts
        assert source("echoes")[i].parts == (whole, *stretches)
        words = str(whole.text).split()
        assert 6 <= len(words) == len(set(words)) <= 12
        assert not whole.learn
        assert len(stretches) == 12
        for first, rest in zip(stretches[::2], stretches[1::2], strict=True):
            at = words.index(str(first.text).strip())
            told = str(rest.text).split()
            assert told == words[at + 1 : at + 1 + len(told)] != []
            assert (first.learn, rest.learn) == (False, True)
    assert source("echoes")[0].parts != source("echoes")[1].parts


def test_training_lessons_hold_no_reserved_pair_or_word():
    lessons = source("lessons")
    for i in range(60):
        assert not {(s.shape, s.colour) for s in solids(lessons[i])} & HELD_OUT
        assert not set(words(lessons[i])) & RESERVED_WORDS
    assert {len(lessons[i].images) for i in range(60)} == {5, 6, 7, 8, 9}


def test_lessons_can_keep_to_one_attribute():
    lessons = source("lesson_texts", kinds=["colour"])
    assert {lessons[i].meta["kind"] for i in range(60)} == {"lesson_colour"}
    assert {source("lesson_texts")[i].meta["kind"] for i in range(60)} == {"lesson_colour", "lesson_shape"}


def test_clips_show_what_their_questions_ask():
    clips = source("clip_questions", frames=4)
    kinds = Counter(clips[i].meta["kind"] for i in range(60))
    assert kinds == {"moved": 15, "appeared": 15, "vanished": 15, "sequence": 15}
    for i in range(60):
        (clip,) = clips[i].images
        assert isinstance(clip, Video)
        frames, (answer,) = frames_of(clip), must_be(tuple, clips[i].meta["answers"])
        first, last = frames[0].solids, frames[-1].solids
        if clips[i].meta["kind"] == "moved":
            dx, dy = last[0].x - first[0].x, last[0].y - first[0].y
            way = ("right" if dx > 0 else "left") if abs(dx) > abs(dy) else ("down" if dy > 0 else "up")
            assert answer == way
        elif clips[i].meta["kind"] == "sequence":
            came = [f.solids[0].name for f in frames]
            assert len(set(came)) == 4
            assert answer == came[0 if "first" in clips[i].texts[0].text else -1]
        else:
            more, less = (last, first) if clips[i].meta["kind"] == "appeared" else (first, last)
            assert [s.name for s in more if s not in less] == [answer]
    pictures = must_be(SceneClip, clips[0].images[0].source).read()
    assert len(pictures) == 4
    assert (np.asarray(pictures[0]) != np.asarray(pictures[3])).any()
    assert must_be(str, source("clips")[1].texts[0].text).startswith(("a small", "a large"))


def test_the_sentence_about_a_move_says_whence_and_whither():
    told = source("clips", kinds=["moved"])
    for i in range(60):
        (start,), (end,) = (frames_of(told[i].images[0])[n].solids for n in (0, -1))
        for solid in (start, end):
            assert (int(3 * solid.y), int(3 * solid.x)) == (solid.row, solid.column)
        assert str(told[i].texts[0].text).endswith(f"from the {start.place} to the {end.place}")
        assert start.place != end.place


def test_a_cell_tells_nothing_of_the_way_along_it():
    moved, starts = source("clip_questions", kinds=["moved"], count=600), Counter()
    for i in range(600):
        path = [frame.solids[0] for frame in frames_of(moved[i].images[0])]
        axis = "column" if path[0].row == path[-1].row else "row"
        ends = sorted((getattr(path[0], axis), getattr(path[-1], axis)))
        starts[axis, *ends, getattr(path[0], axis) == ends[0]] += 1
    assert len(starts) == 12
    assert all(25 <= count <= 80 for count in starts.values())


def test_a_clip_in_words_holds_what_its_question_asks():
    texts = source("symbol_clips", count=200)
    asked = [record for record in texts if record.meta.get("answers")]
    assert 100 < len(asked) < 170
    for record in asked:
        told, question = str(record.texts[0].text).split("\n")
        first, last = told.removeprefix("first ").split(", then ")
        (answer,) = must_be(tuple, record.meta["answers"])
        assert record.texts[1].text == answer
        assert record.texts[1].learn
        if record.meta["kind"] == "moved":
            assert question == "which way did it move?"
            assert first != last
        elif record.meta["kind"] == "sequence":
            assert answer in (first if question == "what came first?" else last)
        else:
            more, less = (last, first) if record.meta["kind"] == "appeared" else (first, last)
            assert answer in more
            assert answer not in less


def test_controls_of_clips():
    plain = source("clip_questions")[0].images[0]
    shuffled = source("clip_questions", control="shuffled")[0].images[0]
    single = source("clip_questions", control="frame-2")[0].images[0]
    assert sorted(map(str, frames_of(shuffled))) == sorted(map(str, frames_of(plain)))
    still = source("clip_questions", control="still-2")[0].images[0]
    assert frames_of(single) == (frames_of(plain)[2],)
    assert frames_of(still) == (frames_of(plain)[2],) * 4
    assert len({c.content_key() for c in (plain, shuffled, single, still)}) == 4
    with pytest.raises(ConfigError, match="known: shuffled, frame-0 to frame-3, still-0 to still-3"):
        source("clip_questions", control="frame-7")[0]
    with pytest.raises(ConfigError, match="at least two frames"):
        source("clips", frames=1)[0]


def test_clips_can_keep_to_one_kind_of_event():
    moved = source("clip_questions", kinds=["moved"])
    assert {moved[i].meta["kind"] for i in range(9)} == {"moved"}
    assert {source("clip_questions")[i].meta["kind"] for i in range(9)} == {"moved", "appeared", "vanished", "sequence"}
    with pytest.raises(ConfigError, match="no kind 'colour'"):
        source("clips", kinds=["colour"])
