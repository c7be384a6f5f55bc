"""ITC over queries and hard negatives: by direct computation, on one process and on two."""

import pytest
import torch
import torch.nn.functional as F

from isthmus.errors import DataError
from isthmus.nn.losses import similarity
from isthmus.nn.matching import Contrast, barred_pairs, hard_negatives, query_contrast
from tests.nn import matching_ranks as ranks
from tests.spawning import spawn

SMOOTH = 0.1


def smoothed(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with label smoothing written out: 0.9 on the target, 0.1 spread over all columns."""
    log = logits.log_softmax(-1)
    right = log[torch.arange(len(log)), target]
    return -(0.9 * right + 0.1 * log.mean(-1)).mean()


def by_hand(images, texts, temperature):
    """The whole (G, G) similarity of pictures with texts."""
    return torch.stack([torch.stack([(i @ t).max() for t in texts]) for i in images]) / temperature


def test_one_process_equals_the_formula_with_gradients_on_both_sides() -> None:
    images, texts, temperature = ranks.leaves()
    found = query_contrast(images, texts, temperature, smoothing=SMOOTH)
    scores = by_hand(images, texts, temperature)
    target = torch.arange(ranks.ROWS)
    expected = (smoothed(scores, target) + smoothed(scores.T, target)) / 2
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(found.image_to_text, scores)
    torch.testing.assert_close(found.text_to_image, scores.T)
    for ours, theirs in zip(
        torch.autograd.grad(found.loss, [images, texts, temperature]),
        torch.autograd.grad(expected, [images, texts, temperature]),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
        assert ours.abs().max() > 0
    torch.testing.assert_close(similarity(images, texts), by_hand(images, texts, torch.tensor(1.0)))


def test_the_maximum_comes_before_the_temperature_and_is_over_queries() -> None:
    images = F.normalize(torch.randn(2, 3, 4), dim=-1)
    texts = F.normalize(torch.stack([images[0, 2], images[1, 0]]), dim=-1)
    found = query_contrast(images, texts, torch.tensor(0.5)).image_to_text
    torch.testing.assert_close(found.diagonal(), torch.full((2,), 2.0))


def test_two_processes_have_values_and_gradients_of_one(tmp_path) -> None:
    spawn(ranks.run, 2, str(tmp_path))
    results = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    images, texts, temperature = ranks.leaves()
    whole = query_contrast(images, texts, temperature)
    whole.loss.backward()
    scores = by_hand(images, texts, temperature).detach()
    torch.testing.assert_close((results[0]["loss"] + results[1]["loss"]) / 2, whole.loss.detach())
    for name, leaf in (("images", images), ("texts", texts), ("temperature", temperature)):
        torch.testing.assert_close((results[0][name] + results[1][name]) / 2, leaf.grad)
    for rank, result in enumerate(results):
        own = slice(3 * rank, 3 * rank + 3)
        torch.testing.assert_close(result["image_to_text"], scores[own])
        torch.testing.assert_close(result["text_to_image"], scores.T[own])
        assert result["ids"].shape == (6, 5)  # as wide as the other rank's
        assert torch.equal(result["ids"], ranks.text().ids)
        assert torch.equal(result["lengths"], ranks.text().lengths)
        drawn = result["drawn"].T  # (3, draws) numbers among all six rows
        for i, row in enumerate(range(3 * rank, 3 * rank + 3)):
            allowed = {n for n in range(6) if ranks.KEYS[n] != ranks.KEYS[row]}
            assert set(drawn[i].tolist()) == allowed  # all ranks' rows, never the own picture's


def uniform(rows: int) -> Contrast:
    return Contrast(torch.tensor(0.0), torch.zeros(rows, rows), torch.zeros(rows, rows))


def test_negatives_are_never_the_own_pair_nor_the_same_picture() -> None:
    torch.manual_seed(0)
    keys = ("a", "b", "a", "", "")
    names = [f"row {i}" for i in range(5)]
    allowed = [{1, 3, 4}, {0, 2, 3, 4}, {1, 3, 4}, {0, 1, 2, 4}, {0, 1, 2, 3}]
    drawn = torch.stack([torch.stack(hard_negatives(uniform(5), keys, names)) for _ in range(200)])
    for side in range(2):
        assert [set(drawn[:, side, row].tolist()) for row in range(5)] == allowed
    assert barred_pairs(keys, torch.zeros(5, 5)).sum() == 7


def test_likely_mistakes_are_drawn_more_often() -> None:
    torch.manual_seed(0)
    text_to_image = torch.tensor([[9.0, 0.0, 3.0], [0.0, 9.0, 0.0], [0.0, 0.0, 9.0]])
    contrast = Contrast(torch.tensor(0.0), torch.zeros(3, 3), text_to_image)
    drawn = torch.stack([hard_negatives(contrast, ("a", "b", "c"), ["0", "1", "2"])[0] for _ in range(300)])
    assert (drawn[:, 0] == 2).float().mean() > 0.9
    assert 0.35 < (drawn[:, 1] == 0).float().mean() < 0.65


@pytest.mark.parametrize("keys", [("a",), ("a", "a", "a")])
def test_a_batch_without_a_negative_is_refused(keys: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match=r"'row 0' has no negative.*raise batch_size"):
        hard_negatives(uniform(len(keys)), keys, [f"row {i}" for i in range(len(keys))])
