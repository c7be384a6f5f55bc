"""Two-step retrieval against brute force, and its paired gain."""

import pytest
import torch

from isthmus.data.record import Image, Record, Text
from isthmus.errors import CapabilityError, ConfigError
from isthmus.evaluation import retrieval
from isthmus.evaluation.rerank import OTHERS, RerankScores, RerankTask, two_step
from isthmus.evaluation.run import evaluate
from tests.evaluation.fakes import Space, Word, facts_of

WORDS = [f"w{i:02d}" for i in range(12)]


def records(captions: int = 1) -> list[Record]:
    return [
        Record(f"r{i}", (Image(Word(w)), Text(tuple(f"{w} {c}" for c in range(captions))))) for i, w in enumerate(WORDS)
    ]


class Judge(Space):
    """Embeddings that confuse neighbours, and a matcher that knows better (or, turned, worse)."""

    def __init__(self, sign: float = 1.0) -> None:
        super().__init__(*WORDS)
        self.sign, self.asked = sign, 0

    def embed_images(self, images):
        return super().embed_images(images) + 1.2 * torch.roll(super().embed_images(images), 1, 1)

    def match_logits(self, images, texts, pairs):
        self.asked += len(pairs)
        right = [images[i].source.word in texts[j] for i, j in pairs.tolist()]
        return self.sign * (2.0 * torch.tensor(right).float() - 1.0)


def test_with_k_over_all_pairs_the_score_is_brute_force() -> None:
    torch.manual_seed(0)
    first, logits = torch.randn(5, 7), torch.randn(5, 7)

    class Table:
        def match_logits(self, images, texts, pairs):
            return logits[pairs[:, 0], pairs[:, 1]]

    by_image, by_text = two_step(Table(), range(5), ["x"] * 7, first, 99)  # type: ignore[arg-type]
    torch.testing.assert_close(by_image, first + logits)
    torch.testing.assert_close(by_text, first + logits)
    by_image, by_text = two_step(Table(), range(5), ["x"] * 7, first, 2)  # type: ignore[arg-type]
    for values, dim, other in ((by_image, 1, first), (by_text, 0, first)):
        kept = values > OTHERS
        assert (kept.sum(dim) == 2).all()
        torch.testing.assert_close(values[kept], (first + logits)[kept])
        worst = other.masked_fill(~kept, torch.inf).amin(dim)
        assert (worst >= other.masked_fill(kept, -torch.inf).amax(dim)).all()


@pytest.mark.parametrize(("sign", "gain"), [(1.0, 1.0), (-1.0, 0.0)])
def test_the_gain_is_paired(sign: float, gain: float, tmp_path) -> None:
    model = Judge(sign)
    task = RerankTask(name="retrieval", records=records(), rerank=3)
    scores = evaluate(model, task, tmp_path).scores
    assert isinstance(scores, RerankScores)
    assert isinstance(scores, retrieval.RetrievalScores)
    assert scores.first.image_to_text.recall[1] == 0.0  # the neighbour is always ahead
    assert scores.image_to_text_gain.value == scores.text_to_image_gain.value == gain
    assert scores.image_to_text_gain.interval == (gain, gain)
    assert scores.image_to_text.recall[1] == gain
    assert model.asked < 12 * 12
    facts = facts_of(scores)
    assert facts["recall_at_1"] == gain
    assert facts["first_step"]["recall_at_1"] == 0.0


def test_several_captions_and_resuming(tmp_path) -> None:
    task = RerankTask(name="retrieval", records=records(3), rerank=4)
    first = evaluate(Judge(), task, tmp_path)
    assert all(len(row["caption_ranks"]) == 3 for row in first.rows)
    again = evaluate(None, task, tmp_path)  # everything is there: the model is not asked
    assert again.scores == first.scores
    with pytest.raises(ConfigError, match="rerank: 4 there, 5 now"):
        evaluate(Judge(), RerankTask(name="retrieval", records=records(3), rerank=5), tmp_path)


def test_what_cannot_rerank_is_named(tmp_path) -> None:
    task = RerankTask(name="retrieval", records=records())
    with pytest.raises(CapabilityError, match="match_logits"):
        evaluate(Space(*WORDS), task, tmp_path)
    with pytest.raises(ConfigError, match="at least 1 candidate"):
        RerankTask(name="x", records=records(), rerank=0)

    class Broken(Judge):
        def match_logits(self, images, texts, pairs):
            return torch.full((len(pairs),), torch.nan)

    with pytest.raises(CapabilityError, match="one finite number per pair"):
        evaluate(Broken(), task, tmp_path / "b")
