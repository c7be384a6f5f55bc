"""Gated cross-attention: which image a token sees, exact zeros, and the formula of its size."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isthmus.errors import DataError
from isthmus.nn.gated import GatedBlock, GatedConfig, media_index, media_mask
from tests.models.redrawn import redraw
from tests.narrow import there

TAGS = torch.tensor([[0, 0, 1, 0, 0, 1, 0, 0]]).bool()
VARIANTS = {
    "plain": GatedConfig(heads=2, head_width=8),
    "paper": GatedConfig(heads=2, head_width=8, activation="squared_relu"),
    "idefics": GatedConfig.idefics(32, 4, 48),
    "vector": GatedConfig.idefics(32, 4, 48, gate="vector", qk_norm=False),
}


def block(variant: str) -> GatedBlock:
    net = GatedBlock(32, 24, VARIANTS[variant])
    redraw(net)
    return net


def test_the_papers_three_ways_to_number_images():
    assert media_index(TAGS).tolist() == [[0, 0, 1, 1, 1, 2, 2, 2]]
    assert media_index(TAGS, mode="next").tolist() == [[1, 1, 1, 2, 2, 2, 0, 0]]
    look = media_mask(media_index(TAGS, mode="all"), 2, 1, "all")[0]
    assert look.int().tolist() == [[0, 0]] * 2 + [[1, 0]] * 3 + [[1, 1]] * 3
    assert media_mask(media_index(TAGS), 3, 2)[0, 5].int().tolist() == [0, 0, 1, 1, 0, 0]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=12), st.lists(st.integers(0, 12), max_size=3))
def test_numbers_do_not_depend_on_the_chunks(tags, cuts):
    whole = torch.tensor([tags])
    bounds = sorted({0, len(tags), *(c for c in cuts if c < len(tags))})
    base, parts = torch.zeros(1, dtype=torch.long), []
    for a, b in itertools.pairwise(bounds):
        parts.append(media_index(whole[:, a:b], base=base))
        base = parts[-1][:, -1]
    assert torch.equal(torch.cat(parts, 1), media_index(whole))


def test_other_than_as_many_tags_as_images_is_refused():
    assert media_index(TAGS, counts=[2]).max() == 2
    with pytest.raises(DataError, match=r"sample 'page 7': the text has 2 <image> and the sample 1 visual"):
        media_index(TAGS, counts=[1], names=["page 7"])
    with pytest.raises(DataError, match="2 <image> and the sample 3 visual"):
        media_index(TAGS, counts=torch.tensor([3]))
    media_index(TAGS, counts=[3], base=torch.tensor([1]))


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_attention_is_zero_without_an_image_and_local_to_its_own(variant):
    net, y, media = block(variant), torch.randn(1, 8, 32), torch.randn(1, 2, 5, 24)
    seen = media_index(TAGS)
    mask = media_mask(seen, 2, 5)
    out = net(y, *net.keys_values(media), mask)
    net.attn_gate.zero_()
    without = net(y, *net.keys_values(media), mask)
    assert torch.equal(out[:, :2], without[:, :2])
    assert not torch.equal(without[:, :2], y[:, :2])  # the MLP still runs
    redraw(net)
    other = media.clone()
    other[:, 1] += 1
    changed = (net(y, *net.keys_values(other), mask) != net(y, *net.keys_values(media), mask)).any(-1)
    assert torch.equal(changed, seen == 2)
    net.attn_gate.zero_()
    net.mlp_gate.zero_()
    assert torch.equal(net(y, *net.keys_values(media), mask), y)


def test_no_gradient_is_lost_or_not_a_number_where_nothing_is_seen():
    net, y = block("plain"), torch.randn(1, 8, 32, requires_grad=True)
    media = torch.randn(1, 2, 5, 24, requires_grad=True)
    net(y, *net.keys_values(media), media_mask(media_index(TAGS), 2, 5))[:, :2].sum().backward()
    assert torch.isfinite(there(y.grad)).all()
    assert not there(media.grad).any()


@torch.no_grad()
def test_weights_are_what_the_block_attends_with():
    net, y, media = block("plain"), torch.randn(1, 8, 32), torch.randn(1, 2, 5, 24)
    mask = media_mask(media_index(TAGS), 2, 5)
    keys, _values = net.keys_values(media)
    weights = net.weights(y, keys, mask)
    torch.testing.assert_close(weights.sum(-1), (media_index(TAGS) > 0).float())
    assert not weights[~mask].any()


@pytest.mark.parametrize(("width", "media", "heads"), [(2048, 1536, 16), (4096, 1536, 32), (8192, 1536, 64)])
def test_size_is_the_formula(width, media, heads):
    with torch.device("meta"):
        count = sum(p.numel() for p in GatedBlock(width, media, GatedConfig.paper(heads)).parameters())
    inner = 128 * heads
    assert count == 2 * width * inner + 2 * media * inner + 8 * width**2 + 4 * width + 2
