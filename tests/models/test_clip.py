"""CLIP: exact counts, starts, gradient cache, refusals, and that it learns."""

import math
from dataclasses import replace

import pytest
import torch

from isthmus.batch import Batch, Visuals
from isthmus.config import merged, plain, strict
from isthmus.errors import ConfigError, DataError
from isthmus.models.clip import Clip, ClipConfig
from isthmus.nn.vit import VisionTransformer
from tests.narrow import must_be, there
from tests.nn.contrastive_ranks import EOT, batch, gradients, tiny, whole

COUNTS = {  # preset: (vision, vision projection, text, text projection, total)
    "vit_b_32": (87_456_000, 393_216, 63_165_952, 262_144, 151_277_313),
    "vit_b_16": (85_799_424, 393_216, 63_165_952, 262_144, 149_620_737),
    "vit_l_14": (303_179_776, 786_432, 123_060_480, 589_824, 427_616_513),
    "vit_l_14_336": (303_507_456, 786_432, 123_060_480, 589_824, 427_944_193),
    "siglip_b_16": (92_884_224, 0, 109_681_152, 590_592, 203_155_970),
    "siglip_so400m_14": (428_225_600, 0, 448_406_640, 1_328_256, 877_960_498),
}


def _meta(preset: str) -> Clip:
    with torch.device("meta"):
        return Clip(getattr(ClipConfig, preset)())


def _count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("preset", COUNTS)
def test_exact_parameter_counts(preset):
    net = _meta(preset)
    parts = (net.vision, net.heads.vision_projection, net.text, net.heads.text_projection, net)
    assert tuple(map(_count, parts)) == COUNTS[preset]


def test_the_counts_follow_the_closed_forms():
    config = ClipConfig.vit_b_32()
    v, t = config.vision, config.text

    def blocks(width: int, layers: int) -> int:
        return layers * (12 * width**2 + 13 * width)

    image = 3 * v.patch_size**2 * v.width + v.width + v.tokens * v.width + 4 * v.width + blocks(v.width, v.layers)
    text = t.vocab_size * t.width + t.context * t.width + blocks(t.width, t.layers) + 2 * t.width
    assert _count(_meta("vit_b_32")) == image + text + (v.width + t.width) * config.embed_dim + 1
    head = there(must_be(VisionTransformer, _meta("siglip_b_16").vision).pool)
    assert _count(head) == 768 + (4 * 768**2 + 4 * 768) + 2 * 768 + (8 * 768**2 + 5 * 768)
    assert _count(Clip.from_config(plain(tiny().config))) == _count(tiny())


def test_siglip_base_at_256_pixels():
    with torch.device("meta"):
        assert _count(Clip(ClipConfig.siglip_b_16(256))) == 203_202_050


def test_state_dict_sizes_and_decay_split():
    assert len(_meta("vit_b_32").state_dict()) == 398
    assert len(_meta("vit_l_14").state_dict()) == 590
    sizes = [(p.ndim >= 2, p.numel()) for _, p in _meta("vit_b_32").named_parameters()]
    assert sum(n for decayed, n in sizes if not decayed) == 204_545
    assert sum(n for decayed, n in sizes if decayed) == 151_072_768


def test_published_starts_and_the_clamp():
    softmax, sigmoid = tiny("softmax"), tiny("sigmoid")
    assert softmax.heads.logit_scale.item() == pytest.approx(math.log(1 / 0.07), abs=1e-6)
    assert sigmoid.heads.logit_scale.item() == pytest.approx(math.log(10), abs=1e-6)
    assert there(sigmoid.heads.logit_bias).item() == -10.0
    assert softmax.heads.logit_bias is None
    for net in (softmax, sigmoid):
        net.heads.logit_scale.data.fill_(5.0)
        net.after_step()
    assert softmax.heads.logit_scale.item() == pytest.approx(math.log(100))
    assert sigmoid.heads.logit_scale.item() == 5.0
    assert tiny(similarity="dot").heads.logit_scale.exp().item() == pytest.approx(10**-0.5)


def test_a_fresh_net_is_near_chance():
    for kind in ("cosine", "dot", "euclidean"):
        net = tiny(similarity=kind)
        assert net.loss(batch(16))["contrastive"].mean.item() == pytest.approx(math.log(16), abs=2.5)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
@pytest.mark.parametrize("similarity", ["cosine", "dot", "euclidean"])
@pytest.mark.parametrize("sizes", [[6], [3, 3], [1, 2, 3], [1] * 6])
def test_gradient_cache_equals_the_whole_batch(loss, similarity, sizes):
    direct, cached = tiny(loss, similarity=similarity), tiny(loss, similarity=similarity)
    term = direct.loss(whole())["contrastive"]
    term.mean.backward()
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    chunks = [whole().select(range(a, a + n)) for a, n in zip(starts, sizes, strict=True)]
    found = cached.cached_loss(chunks)["contrastive"]
    assert (found.count, found.scope, found.total.requires_grad) == (6, "batch", False)
    torch.testing.assert_close(found.mean, term.mean.detach(), atol=1e-10, rtol=0)
    expected, ours = gradients(direct), gradients(cached)
    assert set(ours) == set(expected) == {name for name, _ in direct.named_parameters()}
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, atol=1e-10, rtol=0)


def test_gradient_cache_with_a_frozen_tower():
    net = tiny()
    net.vision.requires_grad_(False)
    net.heads.vision_projection.requires_grad_(False)
    net.cached_loss(whole().split(2))
    assert all(name.startswith(("text.", "heads.text", "heads.logit")) for name in gradients(net))
    assert gradients(net)["text.positions"].any()


def test_gradient_cache_under_autocast_reaches_every_weight():
    """Weights cast while no graph was kept must not be reused when one is."""
    direct, cached = tiny().float(), tiny().float()
    data = _float(whole())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        term = direct.loss(data)["contrastive"].mean
        cached.cached_loss(data.split(3))
    term.backward()
    for name, gradient in gradients(direct).items():
        if "k_proj.bias" not in name:  # a softmax does not feel it: its true gradient is zero
            assert torch.cosine_similarity(gradients(cached)[name].flatten(), gradient.flatten(), dim=0) > 0.98, name


def _float(data: Batch) -> Batch:
    return replace(data, visuals=tuple(Visuals(index=v.index, pixels=there(v.pixels).float()) for v in data.visuals))


def test_pictures_are_matched_to_rows_by_owner_and_index():
    net, data = tiny(), batch()
    expected = net.loss(data)["contrastive"].mean
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    pixels = there(data.visuals[0].pixels)
    # Visual n belongs to row order[n]; the groups hold the visuals in yet another order, in two parts.
    groups = (
        Visuals(index=torch.tensor([5, 2]), pixels=pixels[order[[5, 2]]]),
        Visuals(index=torch.tensor([1, 0, 4, 3]), pixels=pixels[order[[1, 0, 4, 3]]]),
    )
    shuffled = replace(data, visuals=groups, owner=order, keys=tuple(data.keys[i] for i in order.tolist()))
    torch.testing.assert_close(net.loss(shuffled)["contrastive"].mean, expected)


def test_refusals():
    net, data = tiny(), batch()
    with pytest.raises(DataError, match="one picture per sample; sample 'row0' has 2"):
        net.loss(replace(data, owner=torch.tensor([0, 0, 2, 3, 4, 5])))
    two_frames = there(data.visuals[0].pixels).expand(-1, 2, -1, -1, -1)
    with pytest.raises(DataError, match="2 frames"):
        net.loss(replace(data, visuals=(Visuals(index=torch.arange(6), pixels=two_frames),)))
    with pytest.raises(DataError, match="not cached features"):
        net.loss(replace(data, visuals=(Visuals(index=torch.arange(6), features=torch.zeros(6, 1, 4, 12)),)))


def test_configuration_round_trip_and_strictness():
    for preset in COUNTS:
        config = getattr(ClipConfig, preset)()
        assert strict(ClipConfig, plain(config), "clip") == config
    values = merged(plain(tiny().config), {"vision": {"patch_sise": 4}})
    with pytest.raises(ConfigError, match=r"clip\.vision: unknown key 'patch_sise'; did you mean 'patch_size'"):
        strict(ClipConfig, values, "clip")
    with pytest.raises(ConfigError, match="belongs to the sigmoid loss"):
        tiny(init_bias=-1.0)
    with pytest.raises(ConfigError, match="must be the tower's width 12"):
        tiny(vision_projection=False)


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_overfits_64_pairs(loss):
    net = tiny(loss).float()
    data = _float(batch(64))
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3)
    for _ in range(300):
        optimizer.zero_grad()
        net.loss(data)["contrastive"].mean.backward()
        optimizer.step()
        net.after_step()
    with torch.no_grad():
        logits = net.logits(net.embed_images(there(data.visuals[0].pixels)[:, 0]), net.embed_texts(data.text["text"]))
    assert (data.text["text"].ids == EOT).any(dim=1).all()
    assert torch.equal(logits.argmax(dim=1), torch.arange(64))
    assert torch.equal(logits.argmax(dim=0), torch.arange(64))
