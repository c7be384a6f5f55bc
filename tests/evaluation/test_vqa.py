import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.data.record import Record, Text
from isthmus.errors import DataError
from isthmus.evaluation.vqa import AnswerPrior, is_right, normalise, pooled, score
from tests.evaluation.fakes import animals, changed, question, row
from tests.narrow import there


@pytest.mark.parametrize(
    ("raw", "normal"),
    [
        ("Red", "red"),
        ("  a  Red\n cube. ", "red cube"),
        ("The cube", "cube"),
        ("an apple", "apple"),
        ("another", "another"),
        ("A.", "a"),
        ("3.5", "3.5"),
        ("no. 5", "no. 5"),
        ("", ""),
        (" . ", ""),
    ],
)
def test_normalisation_is_light(raw, normal):
    assert normalise(raw) == normal


def test_right_is_exact_and_never_empty():
    assert is_right("Yes.", ["yes"])
    assert is_right("hound", ["dog", "a hound"])
    assert not is_right("yes it is", ["yes"])
    assert not is_right("", [""])
    assert not is_right(".", ["."])


def answered(
    answer,
    truth="yes",
    kind="k",
    blind: str | None = "no",
    shuffled: str | None = "no",
    prior: str | None = "no",
):
    return row(answer=answer, truth=[truth], kind=kind, blind=blind, shuffled=shuffled, prior=prior)


words = st.sampled_from(["yes", "no", ""])
rows_strategy = st.lists(
    st.builds(answered, words, truth=st.sampled_from(["yes", "no"]), kind=st.sampled_from("xyz"), blind=words,
              shuffled=words, prior=words),
    min_size=1,
    max_size=40,
)  # fmt: skip


@given(rows_strategy)
def test_scores_equal_brute_force_overall_and_per_kind(rows):
    scores = score(rows)
    assert set(scores.kinds) == {r["kind"] for r in rows}
    for found, some in [(scores.overall, rows)] + [(s, [r for r in rows if r["kind"] == k])
                                                   for k, s in scores.kinds.items()]:  # fmt: skip
        share = {c: sum(r[c] == r["truth"][0] for r in some) / len(some) for c in
                 ("answer", "blind", "shuffled", "prior")}  # fmt: skip
        best = max(share["blind"], share["shuffled"], share["prior"])
        assert found.n == len(some)
        assert found.empty == sum(r["answer"] == "" for r in some)
        assert found.accuracy == pytest.approx(share["answer"])
        assert (found.blind, found.shuffled, found.prior) == pytest.approx(
            (share["blind"], share["shuffled"], share["prior"])
        )
        assert found.best_without_looking == pytest.approx(best)
        assert found.gain == pytest.approx(share["answer"] - best)
        assert found.interval[0] - 1e-9 <= found.accuracy <= found.interval[1] + 1e-9
        low, high = there(found.gain_interval)
        assert low <= high


def test_the_best_without_looking_is_chosen_for_each_kind_by_itself():
    first = [answered("yes", kind="a", blind="yes") for _ in range(10)]
    second = [answered("yes", kind="b", prior="yes") for _ in range(10)]
    scores = score(first + second)
    assert scores.kinds["a"].gain == scores.kinds["b"].gain == 0
    assert scores.overall.best_without_looking == 0.5
    assert scores.overall.gain == 0.5


def test_controls_that_were_not_run_are_left_out():
    some = score([answered("yes", blind=None, shuffled=None) for _ in range(3)]).overall
    assert (some.blind, some.shuffled, some.prior, some.gain) == (None, None, 0.0, 1.0)
    none = score([answered("yes", blind=None, shuffled=None, prior=None)]).overall
    assert none.best_without_looking is None
    assert none.gain is None
    assert none.gain_interval is None


def test_kinds_below_three_hundred_are_marked():
    scores = score([answered("yes", kind="many")] * 300 + [answered("yes", kind="few")] * 299)
    assert scores.kinds["many"].enough
    assert not scores.kinds["few"].enough


@given(rows_strategy)
def test_scores_survive_json(rows):
    facts = score(rows).to_dict()
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts


def test_nothing_to_score_is_an_error():
    with pytest.raises(DataError, match="empty"):
        score([])


def test_the_prior_falls_back_from_question_to_kind_to_all():
    records = [
        question(0, "red", kind="colour", ask="What colour?"),
        question(1, "red", kind="colour", ask="what  colour?"),
        question(2, "blue", kind="colour", ask="Which colour?"),
        question(3, "4", kind="count", ask="How many?"),
        question(4, "3", kind="count", ask="How many?"),
    ]
    prior = AnswerPrior.fit(records)
    assert prior.answer("WHAT colour?", "colour") == "red"
    assert prior.answer("Which colour?", "colour") == "blue"
    assert prior.answer("How many?", "count") == "3", "of equally frequent answers the alphabetically first"
    assert prior.answer("Never asked?", "colour") == "red"
    assert prior.answer("Never asked?", "unknown kind") == "red"
    assert AnswerPrior.fit([]).answer("Anything?", "what") == ""


def test_the_prior_counts_every_turn():
    turns = [Text("One?", role="user"), Text("1", role="assistant", learn=True), Text("Two?", role="user"),
             Text("2", role="assistant", learn=True)]  # fmt: skip
    prior = AnswerPrior.fit([Record(id="c", parts=tuple(turns))])
    assert (prior.answer("One?", "other"), prior.answer("Two?", "other")) == ("1", "2")


def test_the_prior_s_fingerprint_moves_with_what_it_answers():
    assert AnswerPrior.fit(animals()).fingerprint() == AnswerPrior.fit(animals()[::-1]).fingerprint()
    assert AnswerPrior.fit(animals()).fingerprint() != AnswerPrior.fit(animals()[6:]).fingerprint()


def test_pooled_runs_are_means_over_runs_with_a_question_drawn_whole():
    def run(*answers):
        return [changed(answered(a, kind="ab"[i % 2]), id=str(i)) for i, a in enumerate(answers)]

    one, other = run("yes", "yes", "no", "no"), run("yes", "no", "no", "no")
    found = pooled([one, other])
    assert (found.overall.accuracy, found.overall.n) == (0.375, 4)
    assert {k: s.accuracy for k, s in found.kinds.items()} == {"a": 0.5, "b": 0.25}
    assert pooled([one, one]) == score(one)  # the same run twice tells nothing new
    with pytest.raises(DataError, match="same questions"):
        pooled([one, other[:3]])
    with pytest.raises(DataError, match="empty"):
        pooled([[], []])


def test_the_prior_is_spelt_as_most_training_answers_are():
    """Letters are no letters in lower case, and the official VQA rule may take answers as they are."""
    records = [question(i, said, ask="Which?") for i, said in enumerate(["B", "B", "b", "A", "A."])]
    assert AnswerPrior.fit(records).answer("Which?", "what") == "B"
