"""VQA accuracy: by hand, and exactly the official scorer's on the fixture (data)."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.evaluation.vqa_accuracy import accuracy, normalise, stem, stemmed_accuracy


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("HOT-DOG", "hot dog"),
        ("1,000", "1000"),
        ("a\tHot dog", "hot dog"),
        ("3:30 P.M.", "3:30 pm"),
        ("3.30", "3.30"),
        ("dont walk!", "don't walk"),
        ("OCLOCK", "o'clock"),
        ("half past three", "half past 3"),
        ("none", "0"),
        ("The (ice) cream", "ice cream"),
        ("red/black", "red black"),
        ("yall'd've", "y'all'd've"),
        ("somebody'd", "somebodyd"),
        ("a, b", "b"),
        ("the", ""),
        ("." * 40, "." * 8),
    ],
)
def test_normalisation(raw, expected):
    assert normalise(raw) == expected


def test_accuracy_by_hand():
    answers = ["red"] * 3 + ["blue"] * 2 + ["green"] * 5
    assert accuracy("red", answers) == pytest.approx((7 * 1 + 3 * 2 / 3) / 10)
    assert accuracy("blue", answers) == pytest.approx((8 * 2 / 3 + 2 * 1 / 3) / 10)
    assert accuracy("The GREEN.", answers) == 1.0
    assert accuracy("yellow", answers) == 0.0


def test_equal_answers_are_not_normalised():
    assert accuracy("Yes", ["yes"] * 10) == 0.0
    assert accuracy(" yes\n", ["yes"] * 10) == 1.0
    assert accuracy("Yes", ["yes"] * 10, normalise_always=True) == 1.0
    assert accuracy("Yes", ["yes"] * 9 + ["no"]) == 1.0


def test_an_empty_answer_scores_nothing():
    assert accuracy(" ", ["a", "the", "b"] * 3 + ["c"]) == 0.0
    assert stemmed_accuracy("the", ["a", "the", "b"] * 3 + ["c"]) == 0.0


answers = st.lists(st.sampled_from(["yes", "Yes.", "no", "2", "two", "a dog", "dog"]), min_size=10, max_size=10)


@given(st.sampled_from(["yes", "no", "TWO", "dogs", ""]), answers, st.randoms(use_true_random=False))
def test_in_range_and_whatever_the_order(answer, ten, random):
    value = accuracy(answer, ten)
    assert 0.0 <= value <= 1.0
    random.shuffle(ten)
    assert accuracy(answer, ten) == pytest.approx(value)


@pytest.mark.parametrize(
    ("word", "expected"),
    [("riding", "ride"), ("running", "run"), ("eating", "eat"), ("skiing", "ski"), ("watching", "watch"),
     ("dogs", "dog"), ("boxes", "box"), ("cherries", "cherry"), ("children", "child"), ("leaves", "leaf"),
     ("bus", "bus"), ("glass", "glass"), ("tennis", "tennis"), ("king", "king"), ("hot dogs", "hot dog"),
     ("christmas", "christmas"), ("racing", "race")],
)  # fmt: skip
def test_stems(word, expected):
    assert stem(word) == expected


@given(st.text(alphabet="abdegiknrsty ", max_size=14))
def test_stemming_twice_changes_nothing(text):
    assert stem(stem(text)) == stem(text)


def test_ok_vqa_answers_meet_in_their_stem():
    ten = ["race"] * 6 + ["surf"] * 4
    assert accuracy("racing", ten) == 0.0
    assert stemmed_accuracy("Racing", ten) == 1.0
    assert stemmed_accuracy("racing", ["race"] * 10) == 1.0, "the stems of equal answers are normalised as well"


@pytest.mark.data
def test_equal_to_the_official_scorer(real_data):
    folder = real_data / "metrics/vqa_accuracy"
    expected = json.loads((folder / "expected.json").read_text())
    given_answers = {r["question_id"]: r["answer"] for r in json.loads((folder / "results.json").read_text())}
    for question in json.loads((folder / "annotations.json").read_text())["annotations"]:
        value = accuracy(given_answers[question["question_id"]], [a["answer"] for a in question["answers"]])
        assert round(100 * value, 2) == expected["per_question"][str(question["question_id"])]
    for raw, normal in expected["normalised"].items():
        assert normalise(raw) == normal
