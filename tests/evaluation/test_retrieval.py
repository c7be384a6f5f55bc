import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.data.record import Image, Record, Text
from isthmus.errors import CapabilityError, DataError
from isthmus.evaluation.embedding import embed
from isthmus.evaluation.embedding_tasks import RetrievalTask
from isthmus.evaluation.retrieval import lots, numbered, ranks, score
from isthmus.evaluation.run import evaluate
from tests.evaluation.fakes import Space, Word


def by_hand(values, owner, words):
    """Ranks, one row sorted at a time: by value, then by lot; equal words belong to all pictures that have them."""
    pictures, captions = range(len(values)), range(len(owner))
    of_texts, of_pictures = lots(len(captions)).tolist(), lots(len(pictures)).tolist()

    def right(i, t):
        return any(owner[s] == i and words[s] == words[t] for s in captions)

    def wrong_before(row, is_right):
        """How many wrong ones stand before the first right one."""
        order = [is_right(place) for place in row]
        return order.index(True)

    image_ranks = [
        wrong_before(sorted(captions, key=lambda t: (-values[i][t], of_texts[t])), lambda t, i=i: right(i, t))
        for i in pictures
    ]
    text_ranks = [
        wrong_before(sorted(pictures, key=lambda i: (-values[i][t], of_pictures[i])), lambda i, t=t: right(i, t))
        for t in captions
    ]
    return image_ranks, text_ranks


@st.composite
def spaces(draw):
    """Whole-numbered vectors (many ties), one to four captions for each of up to seven pictures."""
    per_picture = draw(st.lists(st.integers(1, 4), min_size=1, max_size=7))
    owner = draw(st.permutations([i for i, n in enumerate(per_picture) for _ in range(n)]))
    vectors = st.lists(st.integers(-3, 3), min_size=3, max_size=3)
    images = draw(st.lists(vectors, min_size=len(per_picture), max_size=len(per_picture)))
    texts = draw(st.lists(vectors, min_size=len(owner), max_size=len(owner)))
    words = draw(st.lists(st.integers(0, 5), min_size=len(owner), max_size=len(owner)))
    first = [words.index(w) for w in words]  # equal texts have equal vectors
    return torch.tensor(images).float(), torch.tensor([texts[i] for i in first]).float(), list(owner), words


@settings(deadline=None)
@given(spaces(), st.sampled_from([1, 2, 100]), st.sampled_from(["dot", "euclidean"]))
def test_ranks_equal_brute_force(space, chunk, kind):
    images, texts, owner, words = space
    values = images @ texts.T if kind == "dot" else -((images[:, None] - texts[None]) ** 2).sum(-1)
    for said in (words, list(range(len(owner)))):
        found = ranks(images, texts, torch.tensor(owner), words=torch.tensor(said), metric=kind, chunk=chunk)
        assert tuple(r.tolist() for r in found) == by_hand(values.tolist(), owner, said)


def test_two_pictures_told_alike_are_both_right():
    images, texts = torch.eye(3), torch.eye(3)[[0, 0, 2]]  # the first two have one caption
    words = numbered(["a cat", "a cat", "a dog"])
    image_ranks, text_ranks = ranks(images, texts, torch.arange(3), words=words)
    assert image_ranks[[0, 2]].tolist() == [0, 0]
    of_texts = lots(3).tolist()  # the second picture likes all three alike, and two of them are right
    assert image_ranks[1] == int(of_texts[2] < min(of_texts[:2]))
    assert text_ranks.tolist() == [0, 0, 0]
    captions = [["a cat"], ["a cat"], ["a dog"]]
    scores = score([0, 1, 0], [[0], [0], [0]], captions)
    assert scores.image_to_text.chance[1] == pytest.approx((2 + 2 + 1) / 9)
    assert scores.text_to_image.chance[1] == pytest.approx((2 + 2 + 1) / 9)


def test_the_best_of_five_captions_counts():
    images = torch.eye(2)
    texts = torch.tensor([[1.0, 0]] + [[-1.0, 0.1]] * 4 + [[0, 1.0]] * 5)
    image_ranks, text_ranks = ranks(images, texts, torch.tensor([0] * 5 + [1] * 5))
    assert image_ranks.tolist() == [0, 0]
    assert text_ranks.tolist() == [0, 1, 1, 1, 1, 0, 0, 0, 0, 0]


def test_a_constant_answer_scores_what_guessing_does():
    same = torch.full((40, 8), 0.3)
    image_ranks, text_ranks = ranks(same, same, torch.arange(40))
    scores = score(image_ranks.tolist(), [[r] for r in text_ranks.tolist()])
    for recall in (scores.image_to_text, scores.text_to_image):
        assert recall.recall == pytest.approx(recall.chance)


def test_ties_neither_favour_what_is_right_nor_hold_it_back():
    """Vectors of a few values each: over many spaces the ranks are those of tie-free noise put on top."""
    generator = torch.Generator().manual_seed(0)
    tied, broken = torch.zeros(40), torch.zeros(40)
    for space in range(40):
        images, texts = (torch.randint(-1, 2, (30, 3), generator=generator).float() for _ in range(2))
        tied[space] = ranks(images, texts, torch.arange(30), metric="dot")[0].float().mean()
        noise = 1e-3 * torch.rand(30, 30, generator=generator)
        values = images @ texts.T + noise
        broken[space] = (values > values.diagonal()[:, None]).sum(1).float().mean()
    assert tied.mean().item() == pytest.approx(broken.mean().item(), abs=0.4)


def test_records_of_one_picture_and_pictures_of_one_text(tmp_path):
    """The task: equal pictures are one with all their captions, equal texts one caption of several pictures."""
    shown = [("cat", 0, "a cat"), ("cat", 0, "one cat"), ("cat", 1, "a cat"), ("dog", 0, "a dog")]
    records = [Record(f"r{i}", (Image(Word(w, n)), Text(told))) for i, (w, n, told) in enumerate(shown)]
    rows = evaluate(Space("cat", "dog"), RetrievalTask(name="retrieval", records=records), tmp_path).rows
    assert [(r["id"], r["captions"]) for r in rows] == [
        ("r0", ["a cat", "one cat"]),
        ("r2", ["a cat"]),
        ("r3", ["a dog"]),
    ]
    assert rows[0]["rank"] == rows[2]["rank"] == 0
    assert rows[0]["caption_ranks"][0] == rows[1]["caption_ranks"][0] == 0  # "a cat" tells both pictures
    assert rows[0]["caption_ranks"][1] == int(lots(3)[1] < lots(3)[0])  # "one cat" tells the first


def test_recall_counts_and_chance():
    scores = score([0, 3, 7, 12], [[0, 9], [4], [10, 0, 0], [30]])
    assert scores.image_to_text.recall == {1: 0.25, 5: 0.5, 10: 0.75}
    assert scores.text_to_image.recall == pytest.approx({1: 3 / 7, 5: 4 / 7, 10: 5 / 7})
    assert scores.image_to_text.n == 4
    assert scores.text_to_image.n == 7
    assert scores.text_to_image.chance == {1: 0.25, 5: 1.0, 10: 1.0}
    assert scores.image_to_text.chance[1] == pytest.approx((2 + 1 + 3 + 1) / 4 / 7)
    for recall in (scores.image_to_text, scores.text_to_image):
        for k in (1, 5, 10):
            low, high = recall.intervals[k]
            assert low <= recall.recall[k] <= high


def test_chance_is_what_random_vectors_reach():
    generator = torch.Generator().manual_seed(0)
    owner = torch.arange(60).repeat_interleave(5)
    hits = []
    for _ in range(30):
        images, texts = (torch.randn(n, 16, generator=generator) for n in (60, 300))
        image_ranks, _ = ranks(images, texts, owner)
        hits.append((image_ranks < 10).float().mean().item())
    expected = 1 - math.comb(295, 10) / math.comb(300, 10)
    assert sum(hits) / 30 == pytest.approx(expected, abs=0.03)
    assert score([0] * 60, [[0] * 5] * 60).image_to_text.chance[10] == pytest.approx(expected)


def test_scores_in_json_show_picture_to_text_on_top():
    scores = score([0, 3], [[0, 9], [4]])
    facts = json.loads(json.dumps(scores.to_dict()))
    assert facts["recall_at_1"] == facts["image_to_text"]["recall_at_1"] == 0.5
    assert facts == scores.to_dict(), "keys are texts, intervals lists"


def test_nothing_to_retrieve_is_an_error():
    with pytest.raises(DataError):
        score([], [])


@pytest.mark.parametrize(
    ("vectors", "message"),
    [(torch.full((2, 3), float("nan")), "not finite"), (torch.ones(1, 3), "one row each"), (torch.ones(2), "one row")],
)
def test_vectors_that_cannot_be_ranked_are_refused(vectors, message):
    with pytest.raises(CapabilityError, match=message):
        embed(lambda items: vectors, ["a", "b"], what="pictures")


def test_a_question_is_no_caption(tmp_path):
    """As instruction data has it: what is asked of every picture tells none of them."""
    asked = Text("what is it?", role="user")
    records = [
        Record(f"r{i}", (Image(Word(w, 0)), asked, Text(f"a {w}", role="assistant", learn=True)))
        for i, w in enumerate(("cat", "dog"))
    ]
    rows = evaluate(Space("cat", "dog"), RetrievalTask(name="retrieval", records=records), tmp_path).rows
    assert [r["captions"] for r in rows] == [["a cat"], ["a dog"]]
