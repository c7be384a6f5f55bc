import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import DataError
from isthmus.evaluation import AnswerPrior, VqaTask, evaluate
from isthmus.evaluation.choice import CHOICE, best, parse, parse_as_scienceqa
from isthmus.evaluation.prose import LETTERS
from isthmus.evaluation.rules import rule
from tests.evaluation.fakes import Reader, question, row, vqa_scores
from tests.narrow import there

CHOICES = ["a cat", "a dog", "an owl"]


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        (" B ", "B"),
        ("B.", "B"),
        ("(B)", "B"),
        ("B. a dog", "B"),
        ("B) because", "B"),
        ("The answer is C. BECAUSE: owls fly.", "C"),
        ("Owls fly. The answer is C", "C"),
        ("A lecture.\nThe answer is B.", "B"),
        ("The answer is B. No: the answer is C.", None),
        ("A dog", "B"),
        ("a dog.", "B"),
        ("owl", "C"),
        ("E", None),
        ("The answer is E.", None),
        ("A cat or a dog", None),
        ("b", "B"),
        ("", None),
        ("I do not know", None),
    ],
)
def test_letters_as_they_are_read(answer, letter):
    assert parse(answer, CHOICES) == letter


VEHICLES = ["A tram", "A sledge", "A glider", "A canoe"]
PROSE = {
    "A": ["A", "a", "The answer is A", "Answer: A because it has rails", "A, since it runs on rails", "A tram."],
    "B": [
        "**B**",
        "$B$",
        "\\boxed{B}",
        "<answer>B</answer>",
        "B</s>",
        "(b)",
        "b.",
        "Answer: $B",
        "A: B",
        "B: A sledge",
        "B - A sledge",
        "Option B",
        "The answer is A sledge.",
        "The answer is 'a sledge'",
        "A sledge",
        "Sledge, not a tram",
        "The answer is B. Note that A is a common mistake.",
        "The answer is B, A is wrong",
        "It's not A, it's B",
        "The correct choice is (B) A sledge.",
        "A large sledge stands there",
        "A is wrong, B is right",
        "I think it's B",
        "The wrong answer is A, the correct answer is B",
        "(A) A tram (B) A sledge (C) A glider. The answer is B",
    ],
    "D": [
        "Answer: D",
        "ANSWER IS D. A is incorrect.",
        "I considered (A), but the answer is D.",
        "The answer is a canoe",
        "The answer to the question is most likely (d).",
        "My answer: D!",
        "The best option is D because A and B are wrong.",
        "The answer:\n\n**(D) A canoe**",
        "I would pick D",
        "The picture shows a canoe.",
    ],
    None: [
        "Answer: AB",
        "The answer is A ... no, the answer is B.",
        "I think A or B",
        "Answer: A, B",
        "A or B",
        "A B",
        "A/B",
        "a tram or a canoe",
        "B. A tram",
        "The answer is B) A tram",
        "A man rides",
        "The answer is a common thing",
        "E",
        "It is vitamin C",
        "It has vitamins A and C",
        "The answer is not A.",
        "It is not a canoe",
        "A is wrong",
        "Bob",
        "Neither A nor B",
        "The answer is Bob",
        "The answer is E.",
        "I see nothing",
    ],
}


@pytest.mark.parametrize("letter", PROSE)
def test_one_choice_named_in_prose(letter):
    assert {answer: parse(answer, VEHICLES) for answer in PROSE[letter]} == dict.fromkeys(PROSE[letter], letter)


@pytest.mark.parametrize(
    ("choices", "answers"),
    [
        (
            ["red", "dark red", "blue"],
            {"It is dark red": "B", "The answer is red": "A", "dark-red": None, "bluish": None},
        ),
        (["2", "3", "3.5", "12"], {"There are 12 dogs": "D", "It is 3.5 cm": "C", "There are 3.": "B", "two": None}),
        (["yes", "no"], {"No, there is not": "B", "Yes.": "A", "There is no dog": "B"}),
        (["(A) car", "(B) bus"], {"bus": "B", "(B) bus": "B", "The answer is bus": "B"}),
        (["only A", "only B", "both A and B"], {"The answer is both A and B": "C", "The answer is only A.": "A"}),
        (["C", "A", "B"], {"C": "C", "The answer is A": "A", "B. A": "B", "(B)": "B"}),  # a capital is a letter
    ],
)
def test_choices_in_one_another_and_choices_that_are_letters(choices, answers):
    assert {answer: parse(answer, choices) for answer in answers} == answers


@pytest.mark.parametrize(
    ("answer", "letter"),
    [
        ("B", "B"),
        ("B. a dog", "B"),
        ("B.", None),  # only with a space behind it
        ("B.C. is before Christ", None),
        ("Owls fly. The answer is C.", "C"),
        ("(B)", None),
        ("b", None),
        ("Answer: B", None),
        ("a dog", None),
        ("The answer is B. No: The answer is C.", None),
    ],
)
def test_the_published_reading_by_name(answer, letter):
    assert parse_as_scienceqa(answer, CHOICES) == letter
    assert rule("scienceqa").points(answer, row(truth=["b"], choices=CHOICES)) == float(letter == "B")


def test_points_and_choices_that_read_alike():
    dog = row(truth=["B"], choices=CHOICES)
    assert CHOICE.points("a dog", dog) == 1.0
    assert CHOICE.points("A", dog) == CHOICE.points("nonsense", dog) == 0.0
    assert parse("dog", ["a dog", "the dog"]) is None, "two choices read alike, so none was chosen"


@given(st.text(max_size=30), st.integers(1, 5))
def test_never_a_letter_beyond_the_choices(answer, count):
    assert parse(answer, ["x"] * count) in {None, *LETTERS[:count]}


@given(st.lists(st.floats(-9, 0), min_size=1, max_size=5))
def test_the_best_is_the_highest_or_nobody(scores):
    found = best(scores)
    if scores.count(max(scores)) > 1:
        assert found is None
    else:
        assert scores[there(found)] == max(scores)


@pytest.mark.data
def test_the_published_outputs_of_scienceqa(real_data):
    """200 answers of GPT-3 in the form QCM-ALE: every non-empty one names a letter, and none is guessed for the rest
    (the published scores hold guesses: an empty output is marked right here and there)."""
    content = json.loads((real_data / "formats/scienceqa/gpt3_results_slice.json").read_text())
    read = {i: parse(text, ["x"] * 5) for i, text in content["outputs"].items()}
    assert len(read) == 200
    assert all((letter is not None) == bool(content["outputs"][i]) for i, letter in read.items())
    assert any(content["results"][i] == 1 for i, letter in read.items() if letter is None)


def test_the_prior_of_a_choice_task_gets_points(tmp_path):
    train = [question(i, said, ask="Which?") for i, said in enumerate(["B", "B", "A"])]
    records = [question(i, w, ask="Which?", choices=CHOICES, answers=["B"]) for i, w in enumerate(["B", "C"])]
    task = VqaTask(name="c", records=records, rule="choice", controls=(), prior=AnswerPrior.fit(train))
    assert vqa_scores(evaluate(Reader(), task, tmp_path)).overall.prior == 1.0


def test_a_sample_without_choices_is_named():
    with pytest.raises(DataError, match="Sample 'q3' has no `choices`"):
        CHOICE.points("A", row(id="q3", truth=["A"]))


@pytest.mark.parametrize("truth", ["B", "b", "b.", " (b) ", "a dog", "B. a dog"])
def test_the_truth_as_letter_or_text(truth):
    assert CHOICE.points("B", row(truth=[truth], choices=CHOICES)) == 1.0


def test_a_truth_that_is_a_choice_to_the_letter_is_no_letter():
    assert CHOICE.points("B", row(truth=["a"], choices=["b", "a"])) == 1.0  # an article to the reader of answers


@pytest.mark.parametrize("truth", ["1", "a fish", "e", ""])
def test_a_truth_that_is_none_of_the_choices_is_no_zero_but_an_error(truth):
    with pytest.raises(DataError, match="which is none of its choices"):
        CHOICE.points("B", row(id="q7", truth=[truth], choices=CHOICES))
