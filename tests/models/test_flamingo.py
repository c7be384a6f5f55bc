"""Flamingo: exact sizes, who sees which image, what trains, weighted sources, pictures of any size, clips."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from isthmus.batch import IGNORE, Visuals
from isthmus.config import plain, strict
from isthmus.data.augment import Augment
from isthmus.errors import ConfigError, DataError
from isthmus.interop.hf_towers import vision_from_hf
from isthmus.language import Decoding
from isthmus.models.flamingo import Flamingo, FlamingoConfig
from isthmus.nn.patch_positions import add_patch_positions
from isthmus.nn.vit import VisionTransformer
from isthmus.recipes.schema import read_recipe
from isthmus.stage import Group, apply_stage
from isthmus.training.engines import engine
from isthmus.training.gradient import backward
from tests.models.tiny_flamingo import END, IMAGE, ROWS, VISION, V, batch, picture, tiny
from tests.narrow import must_be, there

TRAINED = (*read_recipe("open-flamingo-4b", to_show=True).stages[0].stage.train, Group("language.new_rows.*", 1e-4))
"""What the paper trains (sec. 3.2, app. B.1), and OpenFlamingo but for its 4B, which left the new rows alone."""


def on_meta(name: str) -> Flamingo:
    with torch.device("meta"):
        return Flamingo(getattr(FlamingoConfig, name)())


def count(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("name", "block", "blocks", "xattn", "trained"),
    [
        ("open_flamingo_3b", 36_708_354, 24, 881_000_496, 944_019_504),
        ("open_flamingo_4b", 56_109_058, 16, 897_744_928, 960_763_936),
        ("open_flamingo_9b", 139_476_994, 8, 1_115_815_952, 1_178_834_960),
    ],
)
def test_openflamingo_sizes_exactly(name, block, blocks, xattn, trained):
    net = on_meta(name)
    assert (count(net.xattn[0]), len(net.xattn), count(net.xattn)) == (block, blocks, xattn)
    assert count(net.connector) == 63_019_008
    table = apply_stage(net, TRAINED)
    rows = 2 * net.language.width * (1 if net.language.new_rows.output is None else 2)
    assert table.trained == trained + rows
    every = net.config.every
    assert [i for i in range(len(net.language.decoder_layers())) if i in net.language._blocks] == list(
        range(every - 1, len(net.language.decoder_layers()), every)
    )


def test_the_published_recipe_flips_and_keeps_new_rows_as_the_4b_did():
    (spec,) = read_recipe("open-flamingo-4b", to_show=True).stages
    assert spec.augment == Augment(flip=True)
    net = on_meta("open_flamingo_4b")
    assert apply_stage(net, spec.stage.train).trained == count(net.connector) + count(net.xattn)
    assert not net.language.new_rows.input.requires_grad


@pytest.mark.parametrize(
    ("name", "blocks", "xattn"),
    [("flamingo_3b", 24, 1.158e9), ("flamingo_9b", 10, 1.804e9), ("flamingo_80b", 12, 8.355e9)],
)
def test_paper_sizes_by_its_table(name, blocks, xattn):
    net = on_meta(name)
    assert len(net.xattn) == blocks
    assert count(net.xattn) == pytest.approx(xattn, rel=1e-3)
    assert count(net.connector) == pytest.approx(170.0e6, rel=1e-3)
    assert list(net.language._blocks)[:2] == [0, net.config.every]
    if name == "flamingo_3b":
        assert count(net.xattn) == pytest.approx(1.2e9, rel=0.04)


def test_changing_an_image_changes_nothing_before_its_tag():
    net = tiny()
    row = ["b", 9, 9, END, "c", 30, 31, 32, 33]
    one, two = net.logits(batch([row])), net.logits(batch([["b", 9, 9, END, "x", 30, 31, 32, 33]]))
    changed = (one - two).abs().amax(-1)[0]
    assert not changed[:4].any()
    assert changed[4:].min() > 1e-3
    first = net.logits(batch([["x", 9, 9, END, "c", 30, 31, 32, 33]]))
    assert (first - one).abs().amax(-1)[0].min() > 1e-4  # earlier images reach later text through the LM itself


def test_a_batch_of_unlike_counts_sizes_and_lengths_equals_its_rows_alone():
    net, names = tiny(), ["two", "none", "one", "clip"]
    together = batch([ROWS[n] for n in names])
    assert len(together.visuals) == 3
    scores = net.score(together)
    for i, name in enumerate(names):
        alone = batch([ROWS[name]])
        length = int(alone.text["lm"].lengths[0])
        torch.testing.assert_close(net.logits(alone)[0], net.logits(together)[i, :length], atol=2e-5, rtol=1e-4)
        assert net.score(together.select([i]))[0].item() == pytest.approx(scores[i].item(), abs=2e-4)
    assert net.loss(together)["lm"].total.item() == pytest.approx(-scores.sum().item(), abs=1e-3)
    assert all(tokens.shape == (5, 24) for tokens in net.visual_tokens(together))


def test_frames_of_a_clip_are_told_apart():
    net, rows = tiny(), batch([ROWS["clip"]])
    (group,) = rows.visuals
    back = replace(rows, visuals=(replace(group, pixels=there(group.pixels).flip(1)),))
    still = replace(rows, visuals=(replace(group, pixels=there(group.pixels)[:, :1]),))
    scores = [net.score(r).item() for r in (rows, back, still)]
    assert len({round(s, 3) for s in scores}) == 3


def test_more_tags_than_images_and_images_without_tags_are_refused():
    net = tiny()
    rows = batch([ROWS["one"], ROWS["two"]])
    fewer = replace(rows, visuals=rows.visuals[:1], places={}, owner=torch.tensor([0, 1]), keys=("a", "b"))
    with pytest.raises(DataError, match="sample 'row 1': the text has 2 <image> and the sample 1 visual"):
        net.loss(fewer)
    ids = rows.text["lm"].ids.clone()
    ids[0, 2] = 5
    with pytest.raises(DataError, match="sample 'row 0': the text has 0 <image> and the sample 1"):
        net.generate(replace(rows, text={"lm": replace(rows.text["lm"], ids=ids)}), Decoding(max_new_tokens=2))


def test_numbers_given_with_the_batch_are_used():
    net, rows = tiny(), batch([ROWS["two"]])
    ahead = replace(rows.text["lm"], media_index=torch.tensor([[1, 2, 2, 2, 2, 0, 0, 0, 0]]))
    same = replace(rows.text["lm"], media_index=torch.tensor([[1, 1, 1, 1, 2, 2, 2, 2, 2]]))
    torch.testing.assert_close(net.logits(replace(rows, text={"lm": same})), net.logits(rows))
    changed = (net.logits(replace(rows, text={"lm": ahead})) - net.logits(rows)).abs().amax(-1)[0]
    assert changed[0] < 1e-5
    assert changed[1:].min() > 1e-3


@pytest.mark.parametrize("tied", [True, False])
def test_trains_exactly_the_new_parts_and_leaves_the_rest_bit_identical(tied):
    net = tiny(lm={"tie_word_embeddings": tied})
    table = apply_stage(net, TRAINED)
    expected = {n for n, _ in net.named_parameters() if n.startswith(("connector.", "xattn.", "language.new_rows."))}
    assert set(table.assigned) == expected == {n for n, p in net.named_parameters() if p.requires_grad}
    assert not net.vision.training
    assert not net.language.lm.training
    before = {n: p.clone() for n, p in net.named_parameters()}
    net.loss(batch([ROWS["one"], ROWS["two"], ROWS["clip"]]))["lm"].mean.backward()
    silent = {n for n in expected if not there(net.get_parameter(n).grad).any()}
    assert silent == set()
    torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-3).step()
    assert {n for n, p in net.named_parameters() if not torch.equal(p, before[n])} == expected


def test_text_alone_still_touches_everything_that_trains():
    net = tiny()
    apply_stage(net, TRAINED)
    net.loss(batch([ROWS["none"]]))["lm"].total.backward()
    assert all((p.grad is not None) == p.requires_grad for p in net.parameters())


def test_a_step_over_four_sources_is_one_backward_of_the_weighted_sum():
    net = tiny()
    weights = {"pages": 1.0, "pairs": 0.2, "more": 0.2, "clips": 0.03}
    parts = [
        batch([ROWS["two"], ROWS["two"][:6]], sources=("pages", "pages"), loss_weights=weights),
        batch([ROWS["one"]], sources=("pairs",), loss_weights=weights),
        batch([ROWS["one"][:5], ROWS["none"]], sources=("more", "more"), loss_weights=weights),
        batch([ROWS["clip"]], sources=("clips",), loss_weights=weights),
    ]
    means = backward(engine(net), [*parts[0].split(2), *parts[1:]], nullcontext())
    found = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    plain = [net.loss(replace(part, loss_weights={}))["lm"].mean for part in parts]
    torch.stack([w * mean for w, mean in zip(weights.values(), plain, strict=True)]).sum().backward()
    for name, value in found.items():
        torch.testing.assert_close(value, net.get_parameter(name).grad, atol=1e-6, rtol=1e-4, msg=name)
    assert list(means) == [f"lm/{s}" for s in weights]
    torch.testing.assert_close(torch.tensor(list(means.values())), torch.stack(plain).detach())
    joined = batch([ROWS["two"], ROWS["one"]], sources=("pages", "pairs"), loss_weights=weights)
    terms = net.loss(joined)
    assert {n: t.weight for n, t in terms.items()} == {"lm/pages": 1.0, "lm/pairs": 0.2}
    assert sum(t.count for t in terms.values()) == joined.supervised()


def test_features_are_the_last_layers_patches_before_the_norm():
    net = tiny()
    theirs = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=24,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=16,
            patch_size=4,
            hidden_act="quick_gelu",
        )
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
        net.vision.load_state_dict(vision_from_hf(theirs.state_dict(), VISION))
        pixels = torch.stack([picture("a"), picture("b")])
        expected = theirs(pixels[:, 0]).last_hidden_state[:, 1:]
        found = net.visual_features(pixels)[:, 0]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert (must_be(VisionTransformer, net.vision).ln_post(found) - found).abs().max() > 0.1
    assert set(net.unreachable()) == {"vision.ln_post.weight", "vision.ln_post.bias"}


def test_another_hidden_state_can_be_read():
    net, pixels = tiny(feature_layer=-2), torch.stack([picture("a"), picture("b")])
    found = net.visual_features(pixels)[:, 0]
    (state,) = net.vision(pixels[:, 0], layers=(1,), pooled=False).layers
    torch.testing.assert_close(found, state[:, 1:])
    dead = {name for name, _ in net.named_parameters() if name.startswith(("vision.blocks.1.", "vision.ln_post."))}
    assert set(net.unreachable()) == dead
    with pytest.raises(ConfigError, match=r"feature_layer 3 does not exist: .* has 3 hidden states"):
        tiny(feature_layer=3)


def test_where_patches_stand_is_told_when_asked_for():
    plain, told = tiny(), tiny(patch_positions=True)
    told.load_state_dict(plain.state_dict())
    pixels = torch.stack([picture("a"), picture("b")])
    state = plain.vision(pixels[:, 0], layers=(-1,), pooled=False).layers[0]
    expected = add_patch_positions(state, plain.vision.grid(*pixels.shape[-2:]))[:, 1:]
    torch.testing.assert_close(told.visual_features(pixels)[:, 0], expected)
    turned = told.connector(expected[:, None].flip(2)) - told.connector(expected[:, None])
    assert turned.abs().max() < 1e-4  # once told, the order of patches says nothing more


def test_scoring_endings_behind_one_beginning_equals_scoring_whole_rows():
    net, start = tiny(), [1, "a", 5, 6, "b", 7]
    endings = [[8, 9, END], [20], [8, 30, 31, 32]]
    calls = []
    net.vision.register_forward_hook(lambda *_: calls.append(1))
    found = net.score_endings(batch([start]), [torch.tensor(e) for e in endings], [torch.tensor(e) for e in endings])
    assert calls == [1]
    whole = net.score(batch([start + e for e in endings], learn_from=len(start)))
    torch.testing.assert_close(found, whole, atol=1e-4, rtol=1e-5)
    skipped = [torch.tensor([IGNORE, 9, END]), torch.tensor([20]), torch.tensor([8, 30, 31, 32])]
    again = net.score_endings(batch([start]), [torch.tensor(e) for e in endings], skipped)
    assert again[0] > found[0]
    torch.testing.assert_close(again[1:], found[1:])


def test_attention_maps_are_distributions_over_the_images_patches():
    net, rows = tiny(), batch([ROWS["two"], ROWS["clip"], ROWS["none"]])
    two, clip, none = net.attention(rows)
    assert [m.shape for m in two] == [(2, 9, 1, 16), (2, 9, 1, 8)]
    assert clip[0].shape == (2, 4, 3, 16)
    assert none == []
    first, second = (m.sum((-1, -2)) for m in two)
    torch.testing.assert_close(first[:, :4], torch.ones(2, 4))
    torch.testing.assert_close(second[:, 4:], torch.ones(2, 5))
    assert not first[:, 4:].any()
    assert not second[:, :4].any()
    assert (two[0][0, 0] - two[0][0, 1]).abs().max() > 1e-4


def test_all_previous_images_when_asked_for():
    near, far = tiny(every=4), tiny(every=4, media="all")
    rows = batch([ROWS["two"]])
    torch.testing.assert_close(near.logits(rows)[0, :4], far.logits(rows)[0, :4])
    assert (near.logits(rows) - far.logits(rows))[0, 5:].abs().max() > 1e-3


def test_cached_features_equal_pixels():
    net, rows = tiny(), batch([ROWS["one"], ROWS["clip"]])
    net.vision.requires_grad_(False)
    visuals = tuple(
        Visuals(index=g.index, features=net.visual_features(there(g.pixels)).detach()) for g in rows.visuals
    )
    torch.testing.assert_close(net.score(replace(rows, visuals=visuals)), net.score(rows))
    narrow = tuple(replace(g, features=there(g.features)[..., :8]) for g in visuals)
    with pytest.raises(DataError, match="8 wide, the connector reads 24"):
        net.score(replace(rows, visuals=narrow))
    net.vision.requires_grad_(True)
    with pytest.raises(DataError, match="trains the vision encoder"):
        net.score(replace(rows, visuals=visuals))


def test_bad_configurations_are_explained():
    with pytest.raises(ConfigError, match="offset from 0 to every - 1"):
        tiny(every=2, offset=2)
    with pytest.raises(ConfigError, match=r"no gated block fits: every 9, offset 8, .* 4 layers"):
        tiny(every=9, offset=8)
    with pytest.raises(ConfigError, match="did you mean 'resampler'"):
        strict(FlamingoConfig, {**plain(FlamingoConfig.tiny()), "resample": {}}, "flamingo")
    assert strict(FlamingoConfig, plain(FlamingoConfig.tiny()), "flamingo") == FlamingoConfig.tiny()
    assert (IMAGE, END) == (V + 1, V)


def test_it_learns_two_pictures_apart_with_a_frozen_language_model():
    net = tiny(gates=(0.0, 0.0), every=1)
    apply_stage(net, TRAINED)
    rows = batch([["a", 5, 6], ["b", 5, 7]], learn_from=2)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = net.loss(rows)["lm"].mean
        loss.backward()
        optimizer.step()
    assert loss < 0.2  # without looking at the picture it cannot fall below log 2 = 0.69
    assert net.generate(batch([["b", 5], ["a", 5]]), Decoding(max_new_tokens=1)) == [[7], [6]]
