"""BLEU, ROUGE-L and CIDEr-D: by hand, by their properties, and equal to the reference scorer (data)."""

import json
import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.errors import DataError
from isthmus.evaluation.captions import NAMES, score_captions, tokens
from isthmus.evaluation.captions.cider import CiderD
from isthmus.evaluation.captions.rouge import longest_common, rouge_l

WORDS = ("a", "man", "dog", "red", "wave", "rides", "on", "the", "board")
sentences = st.lists(st.sampled_from(WORDS), min_size=1, max_size=9).map(" ".join)
sets = st.lists(st.tuples(sentences, st.lists(sentences, min_size=1, max_size=3)), min_size=2, max_size=6)


def scored(items, **options):
    names = [str(i) for i in range(len(items))]
    return score_captions(
        {n: refs for n, (_, refs) in zip(names, items, strict=True)},
        {n: candidate for n, (candidate, _) in zip(names, items, strict=True)},
        **options,
    )


def test_bleu_by_hand():
    """Candidate of 5 words, 4 of them in a reference of 4; common bigrams 2 of 4 (this is, is a)."""
    found = scored([("this is a good test", ["this is a test", "this is also a test"])])
    assert found.corpus["Bleu_1"] == pytest.approx(4 / 5, abs=1e-6)
    assert found.corpus["Bleu_2"] == pytest.approx(math.sqrt(4 / 5 * 2 / 4), abs=1e-6)
    assert found.corpus["Bleu_3"] == pytest.approx((4 / 5 * 2 / 4 * 1 / 3) ** (1 / 3), abs=1e-6)
    assert found.corpus["Bleu_4"] == pytest.approx((4 / 5 * 2 / 4 * 1 / 3 * 1e-15 / 2) ** (1 / 4), rel=1e-6)
    assert found.corpus["CIDEr"] == 0.0, "with one picture every n-gram is in every document"


def test_repeated_words_are_clipped_and_short_captions_pay():
    found = scored([("the the the the", ["the cat sat on the mat"])])
    precision, brevity = 2 / 4, math.exp(1 - 6 / 4)
    assert found.corpus["Bleu_1"] == pytest.approx(precision * brevity, abs=1e-6)


def test_rouge_by_hand():
    assert longest_common("abcd", "bxd") == 2
    # precision of the best reference 2/3, recall of the best 2/2, from different references
    found = rouge_l("abc", ["ab", "axcyz"])
    assert found == pytest.approx((1 + 1.44) * (2 / 3) * 1 / (1 + 1.44 * (2 / 3)))
    assert rouge_l([], [["a"]]) == rouge_l(["a"], [["b"]]) == 0.0


def test_cider_by_hand():
    """Three pictures with one reference of one word each; only unigrams, weight log 3; lengths are equal."""
    references = [[["cat"]], [["dog"]], [["owl"]]]
    cider = CiderD(references)
    assert cider.score(["cat"], references[0]) == pytest.approx(10 / 4), "one order of four agrees wholly"
    assert cider.score(["dog"], references[0]) == 0.0
    weight = math.log(3)
    both = 10 / 4 * weight * weight / (math.sqrt(2) * weight * weight) * math.exp(-1 / 72)
    assert cider.score(["cat", "dog"], references[0]) == pytest.approx(both), "half the vector, one bigram longer"


def test_identical_captions_reach_ten_where_every_n_gram_is_rare():
    captions = ["a b c d e", "f g h i j", "k l m n o"]
    found = scored([(c, [c]) for c in captions])
    assert found.corpus["CIDEr"] == pytest.approx(10.0)
    assert found.corpus["ROUGE_L"] == pytest.approx(1.0)
    assert found.corpus["Bleu_4"] == pytest.approx(1.0)


@settings(max_examples=40, deadline=None)
@given(sets)
def test_scores_keep_their_range_and_corpus_means_are_means(items):
    found = scored(items)
    for scores in (found.corpus, *found.per_item.values()):
        assert all(-1e-12 <= scores[n] <= 1 + 1e-9 for n in NAMES[:5])
        assert -1e-9 <= scores["CIDEr"] <= 10 + 1e-9
        powers = [scores[f"Bleu_{n}"] ** n for n in range(1, 5)]  # brevity^n p_1 ... p_n: every factor is at most 1
        assert all(longer <= shorter + 1e-9 for shorter, longer in pairwise(powers))
    for name in ("ROUGE_L", "CIDEr"):
        assert found.corpus[name] == pytest.approx(sum(p[name] for p in found.per_item.values()) / len(items))
    for name, (low, high) in found.intervals.items():
        assert low <= high, name


@settings(max_examples=25, deadline=None)
@given(sets, st.randoms(use_true_random=False))
def test_the_order_of_items_and_of_references_does_not_matter(items, random):
    names = [str(i) for i in range(len(items))]
    references = {n: list(refs) for n, (_, refs) in zip(names, items, strict=True)}
    candidates = {n: c for n, (c, _) in zip(names, items, strict=True)}
    found = score_captions(references, candidates)
    random.shuffle(names)
    again = score_captions({n: references[n][::-1] for n in names}, candidates)
    assert again.corpus == pytest.approx(found.corpus)
    for n in names:
        assert again.per_item[n] == pytest.approx(found.per_item[n])


def test_an_empty_caption_is_counted_and_scores_nothing():
    found = scored([("a man rides", ["a man rides"]), (" . ", ["a dog sits"]), ("x y", ["a red board"])])
    assert found.empty == 1
    assert found.per_item["1"] == pytest.approx(dict.fromkeys(NAMES, 0.0), abs=1e-6)


def test_what_cannot_be_scored_is_named():
    with pytest.raises(DataError, match="empty"):
        score_captions({}, {})
    with pytest.raises(DataError, match="first is 'b'"):
        score_captions({"a": ["x"], "b": ["y"]}, {"a": "x"})
    with pytest.raises(DataError, match="'a' has no reference"):
        score_captions({"a": ["."]}, {"a": "x"})


@pytest.mark.data
@pytest.mark.parametrize("name", ["coco_fakecap126", "coco_human500"])
@pytest.mark.parametrize("own_tokens", [False, True])
def test_equal_to_the_reference_scorer_with_its_tokens_and_with_ours(real_data, name, own_tokens):
    folder = real_data / "metrics" / name
    expected = json.loads((folder / "expected.json").read_text())
    if own_tokens:
        references: dict[str, list[str]] = {}
        for a in json.loads((folder / "references.json").read_text())["annotations"]:
            references.setdefault(str(a["image_id"]), []).append(a["caption"])
        given = json.loads((folder / "candidates.json").read_text())
        candidates = {str(c["image_id"]): c["caption"] for c in given}
    else:
        content = json.loads((folder / "tokens.json").read_text())
        references = content["references"]
        candidates = {k: v if isinstance(v, str) else v[0] for k, v in content["candidates"].items()}
    found = score_captions(references, candidates, tokenised=not own_tokens)
    for metric in NAMES:
        assert found.corpus[metric] == pytest.approx(expected["corpus"][metric], abs=1e-6)
        for i, scores in expected["per_image"].items():
            assert found.per_item[i][metric] == pytest.approx(scores[metric], abs=1e-6)


@pytest.mark.data
def test_equal_to_the_scores_another_project_asserts(real_data):
    for case in json.loads((real_data / "metrics/nlg_eval.json").read_text())["cases"]:
        found = scored(list(zip(case["candidates"], case["references"], strict=True)), tokenised=True)
        for name in NAMES:
            assert found.corpus[name] == pytest.approx(case["expected"][name], abs=10 ** -case["places"])
        assert tokens(case["candidates"][0]) == case["candidates"][0].split()
