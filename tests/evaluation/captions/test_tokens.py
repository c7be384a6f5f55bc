"""The tokenizer: what the reference's Java tokenizer gives for these lines, and for real captions (data)."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.evaluation.captions.tokens import DROPPED, tokens


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A man riding a wave.", "a man riding a wave"),
        ("The diners enjoy their meals..", "the diners enjoy their meals"),
        ("A young skater isn't bigger than his dog's board.", "a young skater is n't bigger than his dog 's board"),
        ("They can't and cannot, I'm sure they'd've gone", "they ca n't and can not i 'm sure they 'd 've gone"),
        ("A girls' game; men's \"final\"", "a girls game men 's final"),
        ("Close up of an hors d'oeuvre at 5 o'clock", "close up of an hors d'oeuvre at 5 o'clock"),
        ("a tub/shower, a well-lit room and/or w/ bath", "a tub/shower a well-lit room and/or w / bath"),
        ("A dog in a St. Patrick hat on St. James St.", "a dog in a st. patrick hat on st. james st."),
        ("A t.v. at 8:25 p.m. costs $1,234.50", "a t.v. at 8:25 p.m. costs $ 1,234.50"),
        ("7:30pm, 50% off & 1st", "7:30 pm 50 % off & 1st"),
        ("girls .neck", "girls neck"),
        ("sign (left) [right]", "sign -lrb- left -rrb- -lsb- right -rsb-"),
        ("What?! No!! Yes.", "what ?! no !! yes"),
        ("a–b … it’s “so”", "a b it 's so"),
        ("wanna gonna 'tis the 90's and '80s", "wan na gon na 't is the 90 's and '80s"),
        ("", ""),
        (" . , ; ", ""),
    ],
)
def test_lines_as_the_reference_cuts_them(caption, expected):
    assert " ".join(tokens(caption)) == expected


@given(st.text(max_size=60))
def test_tokens_are_lower_case_pieces_without_space_or_dropped_marks(caption):
    found = tokens(caption)
    assert all(t and not any(c.isspace() for c in t) and t not in DROPPED for t in found)


@given(st.lists(st.sampled_from(["a", "man", "with", "two", "well-lit", "dogs", "25"]), max_size=12))
def test_plain_words_are_their_own_tokens(words):
    assert tokens(" ".join(words)) == words
    assert tokens(" ".join(words).upper() + ".") == words


@pytest.mark.data
@pytest.mark.parametrize("name", ["coco_fakecap126", "coco_human500"])
def test_captions_of_the_fixtures_are_cut_as_by_the_reference(real_data, name):
    folder = real_data / "metrics" / name
    expected = json.loads((folder / "tokens.json").read_text())
    raw: dict[str, list[str]] = {}
    for a in json.loads((folder / "references.json").read_text())["annotations"]:
        raw.setdefault(str(a["image_id"]), []).append(a["caption"])
    for i, captions in raw.items():
        assert [" ".join(tokens(c)) for c in captions] == expected["references"][i]
    for c in json.loads((folder / "candidates.json").read_text()):
        theirs = expected["candidates"][str(c["image_id"])]
        assert " ".join(tokens(c["caption"])) == (theirs if isinstance(theirs, str) else theirs[0])
