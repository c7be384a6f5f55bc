import pytest
import torch

from isthmus.data.record import Image, Record
from isthmus.errors import ConfigError, DataError, IsthmusWarning
from isthmus.evaluation.embedding_tasks import ZeroShotTask
from isthmus.evaluation.outputs import ClassRow
from isthmus.evaluation.zero_shot import SEVEN, by_score, class_vectors, classify, score, templates
from isthmus.nn.losses import Similarity
from tests.evaluation.fakes import Space, Word


class Hashed:
    """Any text has its own vector, of any length."""

    def embed_texts(self, texts):
        return torch.stack([torch.randn(6, generator=torch.Generator().manual_seed(sum(map(ord, t)))) * 9
                            for t in texts])  # fmt: skip

    def embed_images(self, images):
        return self.embed_texts(images)


def test_class_vectors_are_the_formula():
    names, prompts = ["cat", "wild {} dog"], ("a {}.", "the {} here", "{}")
    found = class_vectors(Hashed(), names, prompts)
    for row, name in zip(found, names, strict=True):
        vectors = [Hashed().embed_texts([p.replace("{}", name)])[0] for p in prompts]
        mean = torch.stack([v / v.norm() for v in vectors]).mean(0)
        torch.testing.assert_close(row, mean / mean.norm())


def test_the_nearest_class_wins_whatever_the_length_of_the_vectors():
    classes = torch.eye(3)
    order, rank = classify(torch.tensor([[9.0, 1, 0], [0.1, 0.3, 0.2]]), classes, torch.tensor([0, 2]))
    assert order.tolist() == [[0, 1, 2], [1, 2, 0]]
    assert rank.tolist() == [0, 1]


def test_a_model_trained_with_another_similarity_is_ranked_by_it():
    vectors = class_vectors(Hashed(), ["cat"], ("a {}.", "{}"), metric="euclidean")
    torch.testing.assert_close(vectors[0], Hashed().embed_texts(["a cat.", "cat"]).mean(0))
    picture, classes = torch.tensor([[1.0, 0]]), torch.tensor([[9.0, 0], [1, 0.5], [20, 20]])
    nearest: list[tuple[Similarity, int]] = [("cosine", 0), ("euclidean", 1), ("dot", 2)]
    for kind, best in nearest:
        assert classify(picture, classes, torch.tensor([0]), metric=kind)[0][0, 0] == best


def test_ties_count_against_us():
    _, rank = by_score(torch.tensor([[1.0, 1, 1, 0]]), torch.tensor([0]))
    assert rank.tolist() == [2]


def test_scores_stand_beside_the_commonest_class():
    ranked = [("a", 0), ("a", 0), ("a", 4), ("b", 5)]
    rows: list[ClassRow] = [
        {"id": str(n), "truth": truth, "answers": [], "rank": rank, "correct": rank == 0}
        for n, (truth, rank) in enumerate(ranked)
    ]
    scores = score(rows, classes=7)
    assert (scores.top_1, scores.top_5, scores.majority) == (0.5, 0.75, 0.75)
    assert scores.to_dict()["gain"] == -0.25
    assert scores.top_1_interval[0] <= 0.5 <= scores.top_1_interval[1]
    with pytest.raises(DataError):
        score([], classes=2)


def test_templates_by_name_and_from_a_file(tmp_path):
    assert templates("seven") == SEVEN
    assert len(SEVEN) == 7
    file = tmp_path / "templates.txt"
    file.write_text("a {}.\n\n an old photo of {} \n")
    assert templates(file) == ("a {}.", "an old photo of {}")
    file.write_bytes("a {}\r\nein größeres {}".encode("utf-8-sig"))  # as Windows writes it
    assert templates(file) == ("a {}", "ein größeres {}")
    file.write_bytes("ein größeres {}".encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8"):
        templates(file)


@pytest.mark.parametrize(("content", "message"), [("", "no template"), ("a photo", "exactly one"), ("{} {}", "one")])
def test_unusable_templates_are_refused(tmp_path, content, message):
    file = tmp_path / "templates.txt"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        templates(file)
    with pytest.raises(ConfigError, match="needs exactly one"):
        ZeroShotTask(name="t", records=[], templates=("a photo",))
    with pytest.raises(ConfigError, match="must be a list of texts"):
        ZeroShotTask(name="t", records=[], templates="a {}")
    with pytest.raises(ConfigError, match="No templates"):
        templates(tmp_path / "missing.txt")


def test_classes_that_read_alike_are_one_before_the_softmax():
    records = [
        Record(f"r{n}", (Image(Word(w.lower())),), meta={"class": w}) for n, w in enumerate(["crane", "ring", "Crane "])
    ]
    task = ZeroShotTask(name="t", records=records, classes=["crane", "ring", "Crane"])
    with pytest.warns(IsthmusWarning, match=r"1 class names are there again \('crane'\)"):
        rows = [row for rows in task.rows(Space("crane", "ring"), (), chunk=9) for row in rows]
    assert [row["truth"] for row in rows] == ["crane", "ring", "crane"]
    assert {len(row["answers"]) for row in rows} == {2}
