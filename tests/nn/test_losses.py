"""The contrastive losses against their formulas, transformers and a run on several processes."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from isthmus.nn.losses import info_nce, sigmoid_loss, similarity
from tests.nn import contrastive_ranks as ranks
from tests.spawning import spawn


@pytest.fixture
def embeddings():
    torch.manual_seed(0)
    return torch.randn(5, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)


def test_similarities(embeddings):
    images, texts = embeddings
    for i in range(5):
        for j in range(5):
            a, b = images[i], texts[j]
            assert similarity(images, texts)[i, j].item() == pytest.approx((a @ b / (a.norm() * b.norm())).item())
            assert similarity(images, texts, "dot")[i, j].item() == pytest.approx((a @ b).item())
            distance = similarity(images, texts, "euclidean")[i, j].item()
            assert distance == pytest.approx(-((a - b) ** 2).sum().item())


def test_info_nce_equals_transformers(embeddings):
    images, texts = embeddings
    log_scale = torch.tensor(1.3, dtype=torch.float64)
    logits = log_scale.exp() * F.normalize(texts) @ F.normalize(images).T
    expected = image_text_contrastive_loss(logits)
    torch.testing.assert_close(info_nce(images, texts, log_scale), expected, atol=1e-12, rtol=0)


def test_sigmoid_loss_equals_its_double_sum(embeddings):
    images, texts = embeddings
    log_scale, bias = torch.tensor(1.1, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64)
    logits = log_scale.exp() * similarity(images, texts) + bias
    total = 0.0
    for i in range(5):
        for j in range(5):
            z = 1 if i == j else -1
            total += math.log1p(math.exp(-z * logits[i, j].item()))
    assert sigmoid_loss(images, texts, log_scale, bias).item() == pytest.approx(total / 5, abs=1e-12)


def test_the_same_picture_is_neither_negative_nor_positive(embeddings):
    images, texts = embeddings
    images = torch.cat([images[:4], images[:1]])
    keys, scale = ("a", "b", "c", "d", "a"), torch.tensor(1.0, dtype=torch.float64)
    bias = torch.tensor(-1.0, dtype=torch.float64)
    logits = scale.exp() * similarity(images, texts)
    logits[0, 4] = logits[4, 0] = -torch.inf
    target = torch.arange(5)
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    torch.testing.assert_close(info_nce(images, texts, scale, keys=keys), expected)
    terms = F.logsigmoid((2 * torch.eye(5) - 1) * (scale.exp() * similarity(images, texts) + bias))
    terms[0, 4] = terms[4, 0] = 0.0
    torch.testing.assert_close(sigmoid_loss(images, texts, scale, bias, keys=keys), -terms.sum() / 5)


def test_unique_or_empty_keys_change_nothing(embeddings):
    images, texts = embeddings
    scale = torch.tensor(1.0, dtype=torch.float64)
    expected = info_nce(images, texts, scale)
    for keys in (("a", "b", "c", "d", "e"), ("",) * 5):
        assert torch.equal(info_nce(images, texts, scale, keys=keys), expected)


def test_float32_under_autocast(embeddings):
    images, texts = (x.float() for x in embeddings)
    scale, bias = torch.tensor(2.0), torch.tensor(-3.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(similarity(images, texts), similarity(images.clone(), texts.clone()))
        nce, sigmoid = info_nce(images, texts, scale), sigmoid_loss(images, texts, scale, bias)
        assert similarity(images.bfloat16(), texts.bfloat16()).dtype == torch.float32
    assert torch.equal(nce, info_nce(images, texts, scale))
    assert torch.equal(sigmoid, sigmoid_loss(images, texts, scale, bias))


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_several_processes_equal_one(world, tmp_path):
    spawn(ranks.run, world, str(tmp_path))
    results = torch.load(tmp_path / "results.pt")
    for (loss, _), result in zip(ranks.CASES, results, strict=True):
        net = ranks.tiny(loss)
        expected = net.loss(ranks.whole())["contrastive"].mean
        expected.backward()
        torch.testing.assert_close(result.pop("loss"), expected.detach(), atol=1e-10, rtol=0)
        single = ranks.gradients(net)
        assert "heads.logit_scale" in single
        assert set(result) == set(single)
        for name, gradient in single.items():
            torch.testing.assert_close(result[name], gradient, atol=1e-10, rtol=0)
