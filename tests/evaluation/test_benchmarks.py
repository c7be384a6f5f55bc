"""Official scorers' rules on fixed strings, and scores over groups."""

import json
from collections.abc import Sequence

import pytest

from isthmus.errors import DataError
from isthmus.evaluation import rules
from isthmus.evaluation.benchmark_rules import distance
from isthmus.evaluation.grouped import CircularTask, MmeTask, parse_as_mme, score_circular, score_mme
from isthmus.evaluation.rescore import rescore
from isthmus.evaluation.run import evaluate
from tests.evaluation.fakes import Reader, changed, facts_of, question, row


def points(rule, answer, *truth: str, choices: Sequence[str] = ()):
    asked = row(truth=list(truth))
    return rules.rule(rule).points(answer, changed(asked, choices=list(choices)) if choices else asked)


@pytest.mark.parametrize(("a", "b", "n"), [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2)])
def test_edit_distance(a, b, n):
    assert distance(a, b) == distance(b, a) == n


@pytest.mark.parametrize(
    ("answer", "truths", "value"),
    [
        ("1998", ["1998"], 1.0),
        ("  In  1998 ", ["in 1998"], 1.0),
        ("1989", ["1998"], 0.5),  # two of four characters: just near enough
        ("1985", ["1998"], 0.5),
        ("1885", ["1998"], 0.0),
        ("dr. smith", ["smith", "Dr Smith"], 1 - 1 / 9),
        ("", ["x"], 0.0),
    ],
)
def test_anls(answer, truths, value):
    assert points("anls", answer, *truths) == pytest.approx(value)


def test_aokvqa_direct_answers():
    ten = ["dog"] * 2 + ["hound"] * 4 + ["cur"]
    assert [points("a-okvqa", a, *ten) for a in ("dog", "hound", " cur ", "Dog", "")] == [2 / 3, 1.0, 1 / 3, 0.0, 0.0]


@pytest.mark.parametrize(
    ("answer", "truths", "value"),
    [
        ("The answer is 3.14159", ["3.14"], 1.0),
        ("so x = 1,250", ["1250"], 1.0),
        ("It is 12 or 13.", ["13"], 1.0),
        ("2.5e3", ["2500"], 1.0),
        ("The ratio is 24/7.", ["24/7", "3.429"], 1.0),
        ("It is a Baroque church.", ["baroque"], 1.0),
        ("vitamin", ["A"], 0.0),
        ("it is vitamin a", ["A"], 1.0),
        ("12", ["13"], 0.0),
        ("", ["x"], 0.0),
    ],
)
def test_mmmu_open_answers(answer, truths, value):
    assert points("mmmu", answer, *truths) == value


def test_mmmu_choices_are_read_and_not_guessed():
    choices = ["cat", "dog"]
    assert points("mmmu", "(B)", "B", choices=choices) == 1.0
    assert points("mmmu", "hm", "B", choices=choices) == 0.0
    assert rules.rule("mmmu").says("hm", row(choices=choices)) is None


@pytest.mark.parametrize(
    ("answer", "said"),
    [("Yes", "yes"), ("yes, it is", "yes"), ("No.", "no"), (" no", "no"), ("It is, yes", "other"), ("", "other")],
)
def test_mme_reads_four_characters(answer, said):
    assert parse_as_mme(answer) == said


def mme_row(n, kind, group, truth, answer):
    return row(id=f"r{n}", kind=kind, group=group, truth=[truth], answer=answer)


def test_mme_accuracy_plus_needs_both():
    rows = [
        mme_row(0, "count", "a", "Yes", "yes"),
        mme_row(1, "count", "a", "No", "no"),
        mme_row(2, "count", "b", "Yes", "yes"),
        mme_row(3, "count", "b", "No", "Well: no"),  # ours reads it, the published scorer does not
        mme_row(4, "code_reasoning", "a", "Yes", "no"),
        mme_row(5, "code_reasoning", "a", "No", "no"),
    ]
    facts = facts_of(score_mme(rows))
    assert facts["official"]["count"] == {"accuracy": 0.75, "accuracy_plus": 0.5, "points": 125.0}
    assert (facts["perception"], facts["cognition"]) == (125.0, 50.0)
    assert facts["accuracy"] == pytest.approx(5 / 6)
    with pytest.raises(DataError, match="no `group`"):
        score_mme([row(id=r["id"], kind=r["kind"], truth=r["truth"], answer=r["answer"]) for r in rows])


def circular_rows(said):
    choices = ["cat", "dog", "cow"]
    return [
        row(id=f"{g}{k}", kind="k", group=g, truth=["ACB"[k]], answer=a, choices=choices[k:] + choices[:k])
        for g, answers in said.items()
        for k, a in enumerate(answers)
    ]


def test_circular_needs_every_turn():
    """Whoever always says A is right once in each question and solves none."""
    facts = facts_of(score_circular(circular_rows({"p": "ACB", "q": "AAA"})))
    assert facts["accuracy"] == pytest.approx(4 / 6)
    assert facts["circular"] == facts["kinds"]["k"]["circular"] == 0.5


@pytest.mark.parametrize("task", [MmeTask, CircularTask])
def test_both_are_evaluated_and_scored_again(tmp_path, task):
    word = ("yes", "A")[task is CircularTask]
    records = [
        question(i, word if i % 2 else "no", group=f"g{i // 2}", choices=["x", "y"], answers=(word,)) for i in range(4)
    ]
    result = evaluate(Reader(blind="no"), task(name="t", records=records, controls=["blind"]), tmp_path)
    facts = json.loads((tmp_path / "scores.json").read_text())
    assert facts["accuracy"] == 0.5
    assert rescore(tmp_path).scores.to_dict() == result.scores.to_dict()
