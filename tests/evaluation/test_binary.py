import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.errors import DataError
from isthmus.evaluation import binary
from isthmus.evaluation.binary import YES_NO, parse, parse_as_pope
from tests.evaluation.fakes import changed, facts_of, row


@pytest.mark.parametrize(
    ("answer", "ours", "published"),
    [
        ("yes", "yes", "yes"),
        ("Yes, there is a dog.", "yes", "yes"),
        ("No", "no", "no"),
        ("no.", "no", "no"),
        ("No, it is not. Yes.", "no", "no"),
        ("there is not a dog", "no", "no"),
        ("There isn't one", "no", "yes"),
        ("NO", "no", "yes"),
        ("True", "yes", "yes"),
        ("false", "no", "yes"),
        ("a dog", None, "yes"),
        ("", None, "yes"),
        ("maybe. yes", None, "yes"),
        ("nothing", None, "yes"),
    ],
)
def test_answers_as_we_read_them_and_as_the_published_parser_does(answer, ours, published):
    assert parse(answer) == ours
    assert parse_as_pope(answer) == published


def said(answer, truth, kind="random"):
    return row(answer=answer, truth=[truth], kind=kind, blind="yes", shuffled="yes", prior="yes")


def test_rates_by_hand():
    """Of 4 yes: 2 found, 1 denied, 1 unparsable. Of 4 no: 1 said yes, 3 found."""
    rows = [said("yes", "yes"), said("yes.", "yes"), said("no", "yes"), said("a dog", "yes"), said("Yes", "no")]
    rows += [said("no", "no")] * 3
    facts = facts_of(binary.score(rows))
    assert facts["accuracy"] == 5 / 8
    assert (facts["precision"], facts["recall"]) == (pytest.approx(2 / 3), 2 / 4)
    assert facts["f1"] == pytest.approx(2 * (2 / 3) * 0.5 / (2 / 3 + 0.5))
    assert facts["yes_ratio"] == 3 / 8
    assert facts["majority"] == 4 / 8
    assert facts["unparsable"] == 1
    assert facts["official"]["all"]["accuracy"] == 6 / 8, "the published parser takes 'a dog' for a yes"
    assert facts["official"]["all"]["yes_ratio"] == 4 / 8
    assert facts["gain"] == pytest.approx(5 / 8 - 4 / 8)


def test_each_sampling_has_its_own_rates_and_their_mean_f1():
    rows = [said("yes", "yes", "random"), said("no", "no", "random"), said("no", "yes", "adversarial")]
    rows += [said("yes", "yes", "adversarial")]
    facts = facts_of(binary.score(rows))
    assert facts["kinds"]["random"]["f1"] == 1.0
    assert facts["kinds"]["adversarial"]["f1"] == pytest.approx(2 / 3)
    assert facts["f1_over_kinds"] == pytest.approx((1 + 2 / 3) / 2)
    assert facts["kinds"]["random"]["n"] == 2


@given(st.lists(st.builds(said, st.sampled_from(["yes", "no", "dog"]), st.sampled_from(["yes", "no"])), min_size=1))
def test_rates_equal_brute_force(rows):
    facts = facts_of(binary.score(rows))
    pairs = [(r["answer"], r["truth"][0]) for r in rows]
    found = pairs.count(("yes", "yes"))
    yes, truly = sum(a == "yes" for a, _ in pairs), sum(t == "yes" for _, t in pairs)
    assert facts["accuracy"] == pytest.approx(sum(a == t for a, t in pairs) / len(pairs))
    assert facts["precision"] == pytest.approx(found / yes if yes else 0.0)
    assert facts["recall"] == pytest.approx(found / truly if truly else 0.0)
    assert facts["unparsable"] == sum(a == "dog" for a, _ in pairs)
    assert 0 <= facts["f1"] <= 1


def test_a_group_is_right_when_all_its_answers_are():
    rows = [changed(said("true", "true"), group="a"), changed(said("false", "false"), group="a")]
    rows += [changed(said("true", "true"), group="b"), changed(said("true", "false"), group="b")]
    assert facts_of(binary.score(rows))["consistency"] == 0.5
    assert "consistency" not in binary.score([*rows, said("yes", "yes")]).to_dict()


def test_an_answer_that_cannot_be_read_is_wrong_both_ways():
    assert YES_NO.points("perhaps", said("", "yes")) == YES_NO.points("perhaps", said("", "no")) == 0.0
    assert YES_NO.says("perhaps", said("", "yes")) is None


def test_a_truth_that_is_neither_is_an_error_and_not_a_point():
    rows = [changed(said("yes", "yes"), id="q0"), changed(said("red", "blue"), id="q1")]
    with pytest.raises(DataError, match="'q1' has the truth 'blue', which says neither yes nor no"):
        binary.score(rows)
    with pytest.raises(DataError, match="'q1'"):
        binary.table(rows)


def test_the_published_parser_knows_no_true_and_false():
    """It would read "false" as a yes, so NLVR is scored by ours alone."""
    facts = binary.score([said("false", "false"), said("true", "true")]).to_dict()
    assert facts["accuracy"] == 1.0
    assert "official" not in facts
