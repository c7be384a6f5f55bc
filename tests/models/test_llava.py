"""LLaVA: exact sizes, one path for any number of pictures, gradients per stage, generation."""

import json
from dataclasses import replace

import pytest
import torch

from isthmus.batch import IGNORE, Batch, Visuals
from isthmus.config import plain, strict
from isthmus.errors import CapabilityError, ConfigError, DataError
from isthmus.language import Decoding
from isthmus.models.llava import Llava, LlavaConfig
from isthmus.nn.vit import VisionConfig, VisionTransformer
from isthmus.recipes.schema import read_recipe
from isthmus.stage import apply_stage, named_parameters
from tests.models.tiny_llava import LANGUAGE, PATCHES, ROWS, SIZE, VISION, V, batch, tiny
from tests.narrow import must_be, there

TOWER_224, TOWER_336, PROJECTOR = 303_179_776, 303_507_456, {"7b": 20_979_712, "13b": 31_467_520}


def on_meta(config: LlavaConfig) -> Llava:
    with torch.device("meta"):
        return Llava(config)


def count(net: torch.nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


@pytest.mark.parametrize(
    ("config", "tower", "connector", "total"),
    [
        (LlavaConfig.v1_5_7b(), TOWER_336, PROJECTOR["7b"], 7_062_902_784),
        (LlavaConfig.v1_5_13b(), TOWER_336, PROJECTOR["13b"], 13_350_839_296),
        (LlavaConfig.v1_5_7b(32064), TOWER_336, PROJECTOR["7b"], 7_063_427_072),
        (LlavaConfig.v1_5_13b(32064), TOWER_336, PROJECTOR["13b"], 13_351_494_656),
        (LlavaConfig.v1_7b(), TOWER_224, 4_198_400, 7_045_793_792),
        (LlavaConfig.v1_13b(), TOWER_224, 5_248_000, 13_324_292_096),
    ],
)
def test_published_sizes_and_counts(config: LlavaConfig, tower: int, connector: int, total: int) -> None:
    net = on_meta(config)
    assert (count(net.vision), count(net.connector), count(net)) == (tower, connector, total)
    assert len(net.state_dict()) == {4096: 686, 5120: 758}[net.language.width] - 2 * (config.projector == "linear")
    size = config.vision.image_size
    assert net.num_tokens(size, size) == {224: 256, 336: 576}[size]
    dead = set(net.unreachable())
    lost = {name: p.numel() for name, p in net.named_parameters() if name in dead}
    assert sum(n for name, n in lost.items() if "ln_post" in name) == 2_048
    assert sum(n for name, n in lost.items() if "blocks.23." in name) == 12_596_224
    assert sum(lost.values()) == 12_596_224 + 2_048


@pytest.mark.parametrize(
    ("size", "trained"), [("7b", (20_979_712, 6_759_395_328)), ("13b", (31_467_520, 13_047_331_840))]
)
def test_stages_open_the_published_numbers(size: str, trained: tuple[int, int]) -> None:
    net = on_meta(getattr(LlavaConfig, f"v1_5_{size}")())
    stages = [spec.stage for spec in read_recipe("llava-1.5-7b", to_show=True).stages]
    found = [apply_stage(net, stage.train).trained for stage in stages]
    assert tuple(found) == trained
    align, instruct = stages
    assert (there(align.samples) // 256, -(-there(instruct.samples) // 128)) == (
        2_179,
        5_196,
    )  # papers' exact sets: 2,181, 5,198


def test_the_two_stages_reach_exactly_their_parts() -> None:
    net, rows = tiny(), batch([ROWS["one"], ROWS["two"], ROWS["none"]])
    before = {name: p.clone() for name, p in net.named_parameters()}
    for open_parts in (("connector.",), ("connector.", "language.")):
        for name, p in net.named_parameters():
            p.requires_grad_(name.startswith(open_parts))
            p.grad = None
        assert not net.visual_features(torch.zeros(1, 1, 3, 16, 16)).requires_grad
        net.loss(rows)["lm"].mean.backward()
        assert {n for n, p in net.named_parameters() if p.grad is not None and p.grad.any()} == {
            n for n in before if n.startswith(open_parts)
        }
        torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-3).step()
        changed = {n for n, p in named_parameters(net) if not torch.equal(p, before[n])}
        assert changed == {n for n in before if n.startswith(open_parts)}


@pytest.mark.parametrize(
    ("layer", "select"), [(-2, "patch"), (-1, "cls_patch"), ((1, -2), "patch"), (0, "patch"), (1, "cls_patch")]
)
def test_unreachable_is_what_no_gradient_reaches(layer: int | tuple[int, ...], select: str) -> None:
    net = tiny(feature_layer=layer, feature_select=select)
    per_picture = net.num_tokens(16, 16)
    assert per_picture == PATCHES + (select == "cls_patch")
    net.loss(batch([ROWS["one"]], per_picture=per_picture))["lm"].total.backward()
    silent = {n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()}
    assert silent == set(net.unreachable()) != set()


def test_a_batch_of_no_one_and_two_pictures_equals_its_rows_alone() -> None:
    net, names = tiny(), ["two", "none", "one"]
    together = batch([ROWS[n] for n in names])
    embeds = net.embed_prompt(together)
    scores = net.score(together)
    for i, name in enumerate(names):
        alone = batch([ROWS[name]])
        length = int(alone.text["lm"].lengths[0])
        torch.testing.assert_close(net.embed_prompt(alone)[0], embeds[i, :length])
        logits = net.language.logits(embeds, together.text["lm"].lengths)[i, :length]
        torch.testing.assert_close(net.language.logits(net.embed_prompt(alone))[0], logits, atol=2e-5, rtol=1e-5)
        assert net.score(alone)[0].item() == pytest.approx(scores[i].item(), abs=2e-4)
        assert net.score(together.select([i]))[0].item() == pytest.approx(scores[i].item(), abs=2e-4)
    total = net.loss(together)["lm"]
    assert total.count == together.supervised()
    assert total.total.item() == pytest.approx(-scores.sum().item(), abs=1e-3)


def test_the_picture_matters_and_each_picture_has_its_own_place() -> None:
    net = tiny()
    row = ROWS["two"]
    swapped = [{"b": "c", "c": "b"}.get(item, item) if isinstance(item, str) else item for item in row]
    first, second = (net.language.logits(net.embed_prompt(batch([r])))[0, -1] for r in (row, swapped))
    assert (first - second).abs().max() > 0.1
    assert net.score(batch([row])) != net.score(batch([swapped]))


def test_visual_tokens_are_the_projected_patches_of_the_tapped_state() -> None:
    for layers in ((-2,), (1, -2)):
        net = tiny(feature_layer=layers[0] if len(layers) == 1 else layers)
        rows = batch([ROWS["two"]])
        pixels = rows.visuals[0].pixels
        assert pixels is not None
        states = net.vision(pixels[:, 0], layers=layers).layers
        expected = net.connector.get_submodule("linear_1")(torch.cat([s[:, 1:] for s in states], -1))
        expected = net.connector.get_submodule("linear_2")(torch.nn.functional.gelu(expected))
        embeds = net.embed_prompt(rows)[0]
        torch.testing.assert_close(embeds[2:18], expected[0])
        torch.testing.assert_close(embeds[20:36], expected[1])
        text = torch.tensor([1, 4, 9, 9, 30, 31, 32, 33, 34])
        kept = [*range(2), *range(18, 20), *range(36, 41)]
        torch.testing.assert_close(embeds[kept], net.language.embed(text[None])[0])


def test_no_block_above_the_tapped_state_is_computed() -> None:
    net, computed = tiny(feature_layer=-2), []
    for number, block in enumerate(must_be(VisionTransformer, net.vision).blocks):
        block.register_forward_hook(lambda *_, n=number: computed.append(n))
    net.loss(batch([ROWS["one"]]))
    assert computed == [0, 1]


def test_cached_features_equal_pixels() -> None:
    net, rows = tiny(feature_layer=(1, -2)), batch([ROWS["one"], ROWS["two"]])
    group = rows.visuals[0]
    assert group.pixels is not None
    order = torch.tensor([2, 0, 1])  # a group may hold its visuals in any order, and there may be several groups
    features = net.visual_features(group.pixels).detach()
    split = (
        Visuals(index=order[:2], features=features[order[:2]]),
        Visuals(index=order[2:], pixels=group.pixels[order[2:]]),
    )
    for p in net.vision.parameters():
        p.requires_grad_(False)
    cached = replace(rows, visuals=split)
    torch.testing.assert_close(net.score(cached), net.score(rows), atol=1e-5, rtol=1e-5)
    wrong = replace(rows, visuals=(Visuals(index=group.index, features=features[..., :24]),))
    with pytest.raises(DataError, match="24 wide, the connector reads 48"):
        net.loss(wrong)
    next(net.vision.parameters()).requires_grad_(True)
    with pytest.raises(DataError, match="trains the vision encoder"):
        net.loss(cached)


def test_frames_follow_each_other() -> None:
    net = tiny()
    rows = batch([ROWS["one"]], per_picture=net.num_tokens(16, 16, frames=2), frames=2)
    pixels = rows.visuals[0].pixels
    assert pixels is not None
    embeds = net.embed_prompt(rows)[0]
    for frame in range(2):
        still = net.connector(net.visual_features(pixels[:, frame : frame + 1]))[0]
        torch.testing.assert_close(embeds[1 + 16 * frame : 17 + 16 * frame], still)


@pytest.mark.parametrize("opened", [("connector.",), ("connector.", "language.", "vision.")])
def test_text_alone_still_touches_everything_that_trains(opened: tuple[str, ...]) -> None:
    net, rows = tiny(), batch([ROWS["none"]])
    dead = set(net.unreachable())
    for name, p in net.named_parameters():
        p.requires_grad_(name.startswith(opened) and name not in dead)
    net.loss(rows)["lm"].total.backward()
    assert all((p.grad is not None) == p.requires_grad for p in net.parameters())
    assert not any(p.grad.any() for p in net.connector.parameters() if p.grad is not None)
    torch.testing.assert_close(net.embed_prompt(rows), net.language.embed(rows.text["lm"].ids))


def test_batched_generation_equals_one_by_one() -> None:
    net, names = tiny(), ["one", "two", "none", "one"]
    rows = batch([ROWS[n] for n in names])
    for decoding in (Decoding(max_new_tokens=12), Decoding(max_new_tokens=12, num_beams=2, stop_ids=(3,))):
        together = net.generate(rows, decoding)
        assert [net.generate(batch([ROWS[n]]), decoding)[0] for n in names] == together
        assert together[0] == together[3] != together[1]


def test_pictures_are_encoded_once_per_generation() -> None:
    net, calls = tiny(), []
    net.vision.register_forward_hook(lambda *_: calls.append(1))
    net.generate(batch([ROWS["two"]]), Decoding(max_new_tokens=8))
    assert calls == [1]


def test_a_truncated_row_keeps_its_picture_in_front() -> None:
    """A sample of 3,000 tokens arrives cut to 2,048; its picture stands whole at the front."""
    net = tiny(language={**LANGUAGE, "max_position_embeddings": 2048})
    whole = batch([[1, 2, "a", *(3 + i % 50 for i in range(2982))]])
    assert whole.text["lm"].ids.shape == (1, 3000)
    cut = replace(
        whole,
        text={
            "lm": replace(
                whole.text["lm"],
                ids=whole.text["lm"].ids[:, :2048],
                lengths=torch.tensor([2048]),
                labels=whole.text["lm"].labels[:, :2048] if whole.text["lm"].labels is not None else None,
            )
        },
    )
    embeds = net.embed_prompt(cut)
    assert embeds.shape == (1, 2048, 32)
    torch.testing.assert_close(embeds[0, 2:18], net.visual_tokens(cut)[0])
    assert net.loss(cut)["lm"].count == 2048 - 18
    with pytest.raises(ConfigError, match="3000 tokens passes the LM's context of 2048"):
        net.loss(whole)


def test_errors_name_sample_and_numbers() -> None:
    net = tiny()
    with pytest.raises(DataError, match=r"sample 'row 1': the text keeps 15 places for visual 0, .* made 16"):
        net.loss(batch([ROWS["none"], ROWS["one"]], per_picture=15))
    rows = batch([ROWS["one"]])
    harmless = replace(rows.text["lm"], ids=rows.text["lm"].ids.clamp(min=0))
    with pytest.raises(DataError, match="visual 0 of the batch has no place"):
        net.loss(replace(rows, places={}, text={"lm": harmless}))
    with pytest.raises(DataError, match="a place is for visual 0, but the batch has 0"):
        net.loss(replace(rows, visuals=()))
    with pytest.raises(DataError, match="neither pixels nor cached features"):
        net.loss(replace(rows, visuals=(Visuals(index=torch.zeros(1).long()),)))
    with pytest.raises(ConfigError, match=r"feature_layer 4 does not exist: .* 3 blocks has 4 hidden states"):
        LlavaConfig(vision=VISION, language=LANGUAGE, feature_layer=4)
    with pytest.raises(ConfigError, match="feature layer is to hold the class token, and this vision encoder has none"):
        LlavaConfig(vision=VisionConfig.siglip_b_16(), language=LANGUAGE, feature_select="cls_patch")
    with pytest.raises(ConfigError, match="names no hidden state"):
        LlavaConfig(vision=VISION, language=LANGUAGE, feature_layer=())


def test_configurations_survive_json_and_refuse_the_unknown() -> None:
    for config in (LlavaConfig.tiny(), LlavaConfig.v1_7b(), replace(LlavaConfig.tiny(), feature_layer=(-2, -1))):
        assert strict(LlavaConfig, plain(config), "llava") == config
    with pytest.raises(ConfigError, match="unknown key 'projektor'; did you mean 'projector'"):
        Llava.from_config({**plain(LlavaConfig.tiny()), "projektor": "linear"})
    assert Llava.from_config(plain(LlavaConfig.tiny())).num_tokens(64, 64) == 16


def test_other_language_models_and_towers_join_alike() -> None:
    opt = {
        "model_type": "opt",
        "vocab_size": V,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "word_embed_proj_dim": 16,
    }
    siglip = VisionConfig.siglip(image_size=16, patch_size=4, width=24, layers=3, heads=4, mlp_width=32)
    net = tiny(language=opt, vision=siglip, projector="linear")
    rows = batch([ROWS["one"], ROWS["none"]])
    assert {n.split(".")[1] for n in net.unreachable()} == {"blocks", "ln_post", "pool"}
    one: Batch = batch([ROWS["one"]])
    assert net.score(rows)[0].item() == pytest.approx(net.score(one)[0].item(), abs=1e-4)
    labels = rows.text["lm"].labels
    assert labels is not None
    assert net.loss(rows)["lm"].count == int((labels[:, 1:] != IGNORE).sum())


def test_attention_maps_share_out_what_each_token_gave_to_a_picture() -> None:
    net = tiny()
    two, none = net.attention(batch([ROWS["two"], ROWS["none"]]))
    assert none == []
    length = len(ROWS["two"]) - 2 + 2 * PATCHES
    assert [m.shape for m in two] == [(2, length, 1, PATCHES)] * 2
    sums = [m.sum((-1, -2)) for m in two]
    for total, end in zip(sums, (2 + PATCHES, 4 + 2 * PATCHES), strict=True):
        torch.testing.assert_close(total[:, end:], torch.ones(2, length - end))
        assert not total[:, :end].any()
    assert (two[0][0, -1] - two[1][0, -1]).abs().max() > 1e-4
    (alone,) = net.attention(batch([ROWS["two"]]))
    torch.testing.assert_close(alone[1], two[1], atol=1e-6, rtol=0)


def test_attention_leaves_the_class_token_out() -> None:
    net = tiny(feature_select="cls_patch")
    ((found,),) = net.attention(batch([ROWS["one"]], per_picture=PATCHES + 1))
    assert found.shape[-1] == PATCHES
    torch.testing.assert_close(found[:, -1].sum((-1, -2)), torch.ones(2))


class Pooled(torch.nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(width, out)

    def forward(self, features: torch.Tensor, *rest: object) -> torch.Tensor:
        return self.linear(features.flatten(1, 2).mean(1, keepdim=True))

    def num_tokens(self, frames: int, grid: tuple[int, int]) -> int:
        return 1


def test_tokens_that_are_no_patches_have_no_map() -> None:
    net = tiny()
    net.add_module("connector", Pooled(24, 32))
    with pytest.raises(CapabilityError, match="derive it from"):
        net.attention(batch([ROWS["one"]], per_picture=1))


CONNECTORS = (
    ({"kind": "mlp", "depth": 1}, 16),
    ({"kind": "resampler", "latents": 3, "layers": 1, "heads": 2, "head_width": 8}, 3),
    ({"kind": "qformer", "queries": 5, "width": 16, "layers": 2, "heads": 2, "mlp_width": 32, "dropout": 0.0}, 5),
    ({"kind": "pixel_shuffle", "factor": 2}, 4),
    ({"kind": "average_pool", "factor": 2}, 4),
    ({"kind": "attention_pool", "queries": 2, "heads": 4}, 2),
)


@pytest.mark.parametrize(("projector", "tokens"), CONNECTORS, ids=[p["kind"] for p, _ in CONNECTORS])
def test_any_connector_stands_before_the_language_model(projector, tokens):
    """Its tokens fit their places; rows alone = rows together; it learns; maps are told; the configuration survives."""
    net = tiny(projector=projector)
    assert net.num_tokens(SIZE, SIZE) == tokens
    rows = batch([ROWS["one"], ROWS["two"], ROWS["none"]], per_picture=tokens)
    alone = [net.score(batch([ROWS[name]], per_picture=tokens)) for name in ("one", "two", "none")]
    torch.testing.assert_close(net.score(rows), torch.cat(alone), atol=1e-4, rtol=1e-4)
    net.loss(rows)["lm"].total.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.connector.parameters())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in net.connector.parameters())
    ((found,),) = net.attention(batch([ROWS["one"]], per_picture=tokens))
    torch.testing.assert_close(found[:, -1].sum((-1, -2)), torch.ones(2))
    again = Llava.from_config(json.loads(json.dumps(plain(net.config))))
    again.load_state_dict(net.state_dict())
    torch.testing.assert_close(again.eval().score(rows), net.score(rows))


def test_attention_maps_are_the_lms_own_attention_to_the_patches():
    net = tiny()
    rows = batch([ROWS["two"], ROWS["one"]])
    maps = net.attention(rows)
    assert [len(m) for m in maps] == [2, 1]
    lengths = rows.text["lm"].lengths.tolist()
    embeds = net.embed_prompt(rows)
    net.language.lm.set_attn_implementation("eager")
    with torch.no_grad():
        weights = net.language.lm(inputs_embeds=embeds[1:, : lengths[1]], output_attentions=True).attentions
    places = rows.places["lm"]
    (place,) = (places.row == 1).nonzero().flatten().tolist()
    start, size = int(places.start[place]), int(places.length[place])
    own = torch.stack([w[0].mean(0) for w in weights])[:, :, start : start + size]
    assert maps[1][0].shape == (len(weights), lengths[1], 1, PATCHES)
    torch.testing.assert_close(
        maps[1][0][:, :, 0][:, start + size :], (own / own.sum(-1, keepdim=True))[:, start + size :]
    )
    for row in maps:
        for found in row:
            sums = found.sum((-1, -2))
            before = sums.amax(0) == 0  # what stands before a picture has not seen it
            assert before.any()
            torch.testing.assert_close(sums[:, ~before], torch.ones_like(sums[:, ~before]))
