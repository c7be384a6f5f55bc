import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isthmus.data.record import Image, Record, Text
from isthmus.errors import CapabilityError, ConfigError, DataError
from isthmus.evaluation import evaluate
from isthmus.evaluation.matching import MatchingHeadTask, MatchingTask, auc
from tests.evaluation.fakes import Reader, Space, Word, facts_of, word_of


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=2, max_size=30))
def test_auc_is_the_share_of_pairs_in_order(items):
    scores, labels = np.array([float(s) for s, _ in items]), np.array([x for _, x in items])
    if labels.all() or not labels.any():
        with pytest.raises(DataError, match="pairs that match and pairs that do not"):
            auc(scores, labels)
        return
    wins = [(p > n) + 0.5 * (p == n) for p in scores[labels] for n in scores[~labels]]
    assert auc(scores, labels) == pytest.approx(sum(wins) / len(wins))


def pair(name, word, caption, **meta):
    return Record(id=name, parts=(Image(Word(word, len(name))), Text(caption, learn=True)), meta=meta)


PAIRS = [pair("a", "cat", "a cat"), pair("bb", "dog", "a dog"), pair("ccc", "owl", "an owl")]


def test_captions_with_their_own_and_with_another_picture(tmp_path):
    result = evaluate(Space("cat", "dog", "owl"), MatchingTask(name="m", records=PAIRS), tmp_path)
    assert [r["id"] for r in result.rows] == ["a", "a/other", "bb", "bb/other", "ccc", "ccc/other"]
    assert [r["label"] for r in result.rows] == [True, False] * 3
    facts = facts_of(result.scores)
    assert (facts["auc"], facts["shuffled"], facts["gain"], facts["matching"]) == (1.0, 0.5, 0.5, 3)


def test_a_matching_head_and_given_pairs(tmp_path):
    class Head:
        def match(self, image, text):
            return float(word_of(image) in text)

    given_pairs = [*PAIRS, pair("dddd", "cat", "a dog", answers=["false"])]
    given_pairs[:3] = [pair(r.id, word_of(r.images[0]), r.texts[0].text, answers=["true"]) for r in PAIRS]
    task = MatchingHeadTask(name="m", records=given_pairs, pairs="given")
    facts = evaluate(Head(), task, tmp_path / "a").scores.to_dict()
    assert (facts["auc"], facts["n"], facts["matching"]) == (1.0, 4, 3)
    with pytest.raises(CapabilityError, match="match"):
        evaluate(Reader(), task, tmp_path / "b")
    with pytest.raises(DataError, match="'a' says neither"):
        evaluate(Head(), MatchingHeadTask(name="m", records=PAIRS, pairs="given"), tmp_path / "c")
    with pytest.raises(ConfigError, match="made or given"):
        MatchingTask(name="m", records=PAIRS, pairs="all")  # pyright: ignore[reportArgumentType]
