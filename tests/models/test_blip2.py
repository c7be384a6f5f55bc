"""BLIP-2: exact sizes, the three objectives, phases, freezing, precision."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPVisionConfig, CLIPVisionModel

from isthmus.batch import Batch, Visuals
from isthmus.config import plain, strict
from isthmus.data.augment import Augment
from isthmus.errors import CapabilityError, ConfigError, DataError
from isthmus.interop.hf_towers import vision_from_hf
from isthmus.language import Decoding
from isthmus.models.blip2 import Blip2, Blip2Config, layer_decay
from isthmus.nn.lengths import blocks_by_length
from isthmus.nn.patch_positions import add_patch_positions
from isthmus.nn.vit import VisionConfig, VisionTransformer
from isthmus.recipes.schema import read_recipe
from isthmus.stage import Group, apply_stage
from isthmus.systems import system
from tests.models import blip2_ranks
from tests.models.tiny_blip2 import (
    CLS,
    LLAMA,
    OPT,
    QFORMER,
    QUERIES,
    SEP,
    SIZE,
    T5,
    TEXTS,
    VISION,
    pairs,
    picture,
    prompts,
    redraw,
    tiny,
    tokens,
)
from tests.narrow import must_be
from tests.spawning import spawn

NORM = {"l": 2_048, "g": 2_816}
ROWS = [[2, 5, 6, 7, 8], [2, 9, 10]]
UNLIKE = [[CLS, *range(7, 8 + n % 7), SEP] for n in range(20)]

STAGES = read_recipe("blip2-vit-l-opt-2.7b", to_show=True).stages
"""The paper's two stages."""


def on_meta(config: Blip2Config) -> Blip2:
    with torch.device("meta"):
        return Blip2(config)


def count(net: nn.Module | None) -> int:
    assert net is not None
    return sum(p.numel() for p in net.parameters())


# Sizes


@pytest.mark.parametrize(
    ("name", "language", "trained", "total", "paper"),
    [
        ("vit_l_opt_2_7b", 2_651_596_800, 103_591_936, None, 104),
        ("vit_g_opt_2_7b", 2_651_596_800, 107_130_880, 3_744_679_936, 107),
        ("vit_g_opt_6_7b", 6_658_473_984, 108_312_064, 7_752_738_304, 108),
        ("vit_l_flan_t5_xl", 2_849_757_184, 103_198_208, None, 103),
        ("vit_g_flan_t5_xl", 2_849_757_184, 106_737_152, 3_942_446_592, 107),
        ("vit_g_flan_t5_xxl", 11_135_332_352, 108_312_064, 12_229_596_672, 108),
        ("instruct_vicuna_7b", 6_738_423_808, 188_834_560, 7_913_210_624, 189),
    ],
)
def test_published_sizes(name: str, language: int, trained: int, total: int | None, paper: int) -> None:
    net = on_meta(getattr(Blip2Config, name)())
    norm = NORM["l" if "vit_l" in name else "g"]
    assert count(net.language) == language
    assert count(net.connector) - norm == trained
    assert round(trained / 1e6) == paper
    assert count(net.vision) + norm == (985_952_256 if norm == 2_816 else count(net.vision) + norm)
    assert total is None or count(net) == total
    assert net.num_tokens(224, 224) == 32
    opened = apply_stage(net, [Group("connector.*", 1e-4)])
    assert opened.trained + sum(row.unused for row in opened.rows) == trained + norm


def test_every_row_of_the_paper_has_a_preset_and_t5_ties_when_asked() -> None:
    names = {n for n, v in vars(Blip2Config).items() if isinstance(v, classmethod)} - {"from_dict"}
    assert len(names) == 10
    for name in names:
        config = getattr(Blip2Config, name)()
        assert strict(Blip2Config, plain(config), "blip2") == config
    for name, tied in (("xl", 2_783_959_040), ("xxl", 11_003_736_064)):
        config = getattr(Blip2Config, f"vit_g_flan_t5_{name}")()
        language = {k: v for k, v in config.language.items() if k != "tie_word_embeddings"}
        assert count(on_meta(replace(config, language=language)).language) == tied


@pytest.mark.parametrize(("name", "total"), [("vit_g_opt_2_7b", 186_705_470), ("vit_l_opt_2_7b", 183_165_758)])
def test_what_stage_one_trains(name: str, total: int) -> None:
    net = on_meta(replace(getattr(Blip2Config, name)(), phase="represent"))
    assert net.language is None
    assert net.heads is not None
    assert apply_stage(net, STAGES[0].stage.train).trained == total
    assert name != "vit_g_opt_2_7b" or abs(total / 188e6 - 1) < 0.02
    if name == "vit_g_opt_2_7b":
        parts = net.connector
        qformer = count(parts.qformer)
        head = count(net.heads.lm_dense) + count(net.heads.lm_ln) + net.heads.lm_bias.numel()
        assert qformer == 185_660_160
        assert qformer + head == 186_282_811
        assert head == 592_128 + 30_523
        assert parts.queries.numel() == 24_576
        assert count(net.heads.image_proj) + count(net.heads.text_proj) == 393_728
        assert count(net.heads.itm) == 1_538
        layer = parts.qformer.layers[0]
        assert count(layer.attn) + count(layer.ln_attn) == 2_363_904  # type: ignore[operator]
        assert count(layer.cross) + count(layer.ln_cross) == 3_346_944  # type: ignore[operator]
        assert count(layer.ffn_query) == count(layer.ffn_text) == 4_723_968  # type: ignore[operator]
        assert count(parts.qformer.words) + count(parts.qformer.positions) == 23_834_880


def test_the_published_recipe_augments_as_the_paper() -> None:
    stages = read_recipe("blip2-vit-l-opt-2.7b", to_show=True).stages
    assert [stage.augment for stage in stages] == [Augment(crop=0.5, flip=True)] * 2


def test_the_papers_stages() -> None:
    represent, generate = (spec.stage for spec in STAGES)
    assert (represent.steps, generate.steps) == (250_000, 80_000)
    assert [spec.batch_size for spec in STAGES] == [2320, 1920]
    for stage in (represent, generate):
        assert stage.betas == (0.9, 0.98)
        assert stage.warmup == 2000
        assert {(g.lr, g.weight_decay) for g in stage.train} == {(1e-4, 0.05)}
    assert generate.floor * 1e-4 == 5e-5
    groups = layer_decay(VisionConfig.eva_g_14(), 1e-5, 0.95)
    net = on_meta(Blip2Config.vit_g_opt_2_7b())
    table = apply_stage(net, [*groups, Group("connector.*", 1e-5)])
    rates = {name: groups[i].lr for name, i in table.assigned.items() if name.startswith("vision.")}
    assert rates["vision.blocks.38.attn.q_proj.weight"] == 1e-5
    assert rates["vision.blocks.37.attn.q_proj.weight"] == pytest.approx(0.95e-5)
    assert rates["vision.positions"] == pytest.approx(1e-5 * 0.95**39)


# Encoders


@torch.no_grad()
def test_the_vit_l_variant_is_a_clip_tower_without_its_last_block() -> None:
    config = Blip2Config.vit_l_opt_2_7b().vision
    assert (config.layers, config.activation, config.pre_norm, config.post_norm) == (23, "quick_gelu", True, "none")
    sizes: dict[str, Any] = {
        "hidden_size": 24,
        "intermediate_size": 36,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": 4,
    }
    peer = redraw(CLIPVisionModel(CLIPVisionConfig(num_hidden_layers=4, **sizes)))
    small = replace(config, image_size=SIZE, patch_size=4, width=24, layers=3, heads=4, mlp_width=36)
    tower = VisionTransformer(small)
    whole = replace(small, layers=4, post_norm="pooled", pool="class")
    state = vision_from_hf(peer.state_dict(), whole)
    tower.load_state_dict({n: t for n, t in state.items() if not n.startswith(("blocks.3.", "ln_post."))})
    pixels = torch.cat([picture(1), picture(2)])
    theirs = peer(pixels, output_hidden_states=True).hidden_states[-2]
    ours = tower.eval()(pixels, layers=(-1,)).layers[0]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert (theirs[0] - theirs[1]).abs().max() > 0.1


def test_the_key_bias_of_a_vision_block_is_not_felt() -> None:
    net, batch = tiny(), pairs()
    pixels = batch.visuals[0].pixels
    assert pixels is not None
    before = net.visual_features(pixels)
    for block in must_be(VisionTransformer, net.vision).blocks:
        nn.init.zeros_(block.attn.k_proj.bias)  # type: ignore[union-attr,arg-type]
    torch.testing.assert_close(net.visual_features(pixels), before, atol=1e-4, rtol=1e-4)


# Phase represent


def smoothed(logits: torch.Tensor, target: torch.Tensor, smoothing: float = 0.1) -> torch.Tensor:
    log = logits.log_softmax(-1)
    right = log[torch.arange(len(log)), target]
    return -((1 - smoothing) * right + smoothing * log.mean(-1))


@pytest.mark.parametrize("texts", [TEXTS, UNLIKE], ids=["few", "many of unlike length"])
def test_the_three_losses_equal_a_direct_computation(texts: list[list[int]], monkeypatch) -> None:
    monkeypatch.setattr("isthmus.nn.lengths._FEWEST_TOKENS", 64)
    net, batch, rows = tiny(), pairs(texts), len(texts)
    text = batch.text["qformer"]
    assert len(blocks_by_length(text.lengths)) == (1 if texts is TEXTS else 2)
    wrong_image, wrong_text = torch.arange(rows).roll(-1), torch.arange(rows).roll(1)
    monkeypatch.setattr("isthmus.models.blip2.hard_negatives", lambda *_: (wrong_image, wrong_text))
    terms = net.loss(batch)
    assert {n: (t.scope, t.count) for n, t in terms.items()} == {
        "itc": ("batch", rows),
        "itm": ("batch", 3 * rows),
        "itg": ("token", sum(len(t) - 1 for t in texts)),
    }
    assert net.heads is not None
    pixels = batch.visuals[0].pixels
    assert pixels is not None
    images = F.normalize(net.embed_images(pixels[:, 0]), dim=-1)
    alone = torch.cat([net.embed_texts(tokens([ids])) for ids in texts])
    scores = (images @ F.normalize(alone, dim=-1).T).amax(1) / net.heads.temperature
    target = torch.arange(rows)
    itc = (smoothed(scores, target) + smoothed(scores.T, target)).mean() / 2
    torch.testing.assert_close(terms["itc"].mean, itc)

    vision = net.normed(pixels[:, 0])
    itm = torch.tensor(0.0)
    for image, sentence, label in [
        *((i, i, 1) for i in range(rows)),
        *((int(wrong_image[i]), i, 0) for i in range(rows)),
        *((i, int(wrong_text[i]), 0) for i in range(rows)),
    ]:
        logits = net.match_logits(vision[image : image + 1], tokens([texts[sentence]]))
        itm = itm - logits.log_softmax(-1)[0, label]
    torch.testing.assert_close(terms["itm"].total, itm)

    itg = torch.tensor(0.0)
    for row, ids in enumerate(texts):
        seen = net.connector.encode_image(vision[row : row + 1])
        logits = net.writing_logits(seen.past, tokens([ids]))[0]
        itg = itg + smoothed(logits[:-1], torch.tensor(ids[1:])).sum()
        assert torch.equal(logits, net.writing_logits(seen.past, tokens([[5, *ids[1:]]]))[0])  # [DEC] replaces it
    torch.testing.assert_close(terms["itg"].total, itg, atol=1e-3, rtol=1e-5)


def test_two_processes_have_the_loss_of_one_with_the_whole_batch(tmp_path, monkeypatch) -> None:
    """Values and gradients of all three terms."""
    spawn(blip2_ranks.run, 2, str(tmp_path))
    halves = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    monkeypatch.setattr(torch, "multinomial", blip2_ranks.likeliest)
    whole = blip2_ranks.terms_and_gradients(blip2_ranks.frozen_encoder(), blip2_ranks.exact(pairs()))
    for name in blip2_ranks.TERMS:
        total, count, gradients = whole[name]
        (first, n, some), (second, m, others) = (half[name] for half in halves)
        assert n + m == count
        torch.testing.assert_close(first + second, total, atol=0, rtol=1e-10)
        assert some.keys() == others.keys() == gradients.keys()
        assert any(g.abs().max() > 1e-3 for g in gradients.values())
        for parameter, gradient in gradients.items():
            both = some[parameter] + others[parameter]
            torch.testing.assert_close(both, gradient, atol=1e-9, rtol=1e-8, msg=f"{name}: {parameter}")


@torch.no_grad()
def test_writing_does_not_look_ahead_and_sees_the_picture() -> None:
    net = tiny()
    vision = net.normed(torch.cat([picture(1), picture(2)]))
    first = net.writing_logits(net.connector.encode_image(vision[:1]).past, tokens([[CLS, 7, 8, 9, SEP]]))
    later = net.writing_logits(net.connector.encode_image(vision[:1]).past, tokens([[CLS, 7, 8, 20, SEP]]))
    other = net.writing_logits(net.connector.encode_image(vision[1:]).past, tokens([[CLS, 7, 8, 9, SEP]]))
    torch.testing.assert_close(first[:, :3], later[:, :3], atol=1e-5, rtol=0)
    assert (first[:, 3:] - later[:, 3:]).abs().amax() > 0.05
    assert (first - other).abs().amax((0, 2)).min() > 0.05


def test_equal_pictures_and_a_batch_of_one() -> None:
    net = tiny()
    net.loss(pairs(keys=("a", "b", "a", "b")))
    with pytest.raises(DataError, match="has no negative"):
        net.loss(pairs(TEXTS[:1]))
    with pytest.raises(DataError, match="has no negative"):
        net.loss(pairs(keys=("a",) * 4))
    two = replace(pairs(), owner=torch.tensor([0, 0, 1, 2]))
    with pytest.raises(DataError, match="first stage wants one picture per sample; sample 'row 0' has 2"):
        net.loss(two)


def test_objectives_can_be_left_out_and_the_rest_is_listed_as_unused() -> None:
    for wanted in (("itc",), ("itm",), ("itg",), ("itc", "itm")):
        net = tiny(objectives=wanted)
        net.connector.requires_grad_(True)
        terms = net.loss(pairs())
        assert set(terms) == set(wanted)
        sum(t.mean for t in terms.values()).backward()  # type: ignore[union-attr]
        silent = {n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()}
        assert silent >= set(net.unreachable())
        heads = {n for n in silent if n.startswith("heads.")}
        assert heads == {n for n in net.unreachable() if n.startswith("heads.")}
    with pytest.raises(ConfigError, match="choose among itc, itm, itg"):
        tiny(objectives=("itx",))


def test_where_patches_stand_is_told_when_asked_for() -> None:
    plain, told = tiny(), tiny(patch_positions=True)
    told.load_state_dict(plain.state_dict())
    pixels = torch.randn(2, 1, 3, VISION.image_size, VISION.image_size, generator=torch.Generator().manual_seed(0))
    state, grid = plain.visual_features(pixels)[:, 0], (VISION.grid, VISION.grid)
    torch.testing.assert_close(told.visual_features(pixels)[:, 0], add_patch_positions(state, grid))


@pytest.mark.parametrize("instruct", [False, True])
def test_unreachable_is_what_no_gradient_reaches(instruct: bool) -> None:
    question = [[CLS, 7, SEP], [CLS, 8, 9, SEP]] if instruct else None
    for net, batch in (
        (tiny(feature_layer=-2), pairs()),
        (tiny("generate", LLAMA, instruct=instruct), prompts(ROWS, learn_from=1, question=question)),
    ):
        sum(t.mean for t in net.loss(batch).values()).backward()  # type: ignore[union-attr]
        # A bias that all keys share is felt by no softmax: its gradient is rounding.
        silent = {n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()}
        assert {n for n in silent if not n.endswith("k_proj.bias")} == {
            n for n in net.unreachable() if not n.endswith("k_proj.bias")
        }


# Phase generate


@pytest.mark.parametrize("kind", [OPT, LLAMA, T5], ids=["opt", "llama", "t5"])
def test_a_batch_equals_its_rows_alone(kind: dict) -> None:
    net = tiny("generate", kind)
    decoder = [[0, 20, 21, 1], [0, 22, 1]] if kind is T5 else None
    learn = None if kind is T5 else 1
    batch = prompts(ROWS, stream=net.prompt_stream, learn_from=learn, decoder=decoder)
    scores = net.score(batch)
    answers = net.generate(batch, Decoding(max_new_tokens=5))
    for row in range(2):
        alone = batch.select([row])
        assert net.score(alone)[0].item() == pytest.approx(scores[row].item(), abs=2e-4)
        assert net.generate(alone, Decoding(max_new_tokens=5)) == [answers[row]]
    term = net.loss(batch)["lm"]
    assert term.scope == "token"
    assert term.count == batch.supervised()
    assert term.total.item() == pytest.approx(-scores.sum().item(), abs=1e-3)
    other = prompts(ROWS, stream=net.prompt_stream, learn_from=learn, decoder=decoder, first=5)
    assert (net.score(other) - scores).abs().min() > 0.01  # the picture matters


def test_the_prefix_stands_in_front_and_a_wrong_number_of_tokens_is_named() -> None:
    net, batch = tiny("generate", OPT), prompts(ROWS)
    embeds = net.embed_prompt(batch)
    for row, visual in enumerate(net.visual_tokens(batch)):
        torch.testing.assert_close(embeds[row, :QUERIES], visual)
    assert net.language is not None
    torch.testing.assert_close(embeds[0, QUERIES:], net.language.embed(torch.tensor(ROWS[:1]))[0])
    places = replace(batch.places["lm"], length=torch.tensor([QUERIES, QUERIES - 1]))
    with pytest.raises(DataError, match=r"'row 1'.*keeps 3 places.*made 4 tokens"):
        net.embed_prompt(replace(batch, places={"lm": places}))
    blind = Batch(ids=("a",), sources=("t",), text={"lm": tokens([[2, 5, 6]])})
    assert net.generate(blind, Decoding(max_new_tokens=2))  # a question without its picture can still be asked


def test_cached_features_stand_before_the_norm() -> None:
    for net, batch in ((tiny(), pairs()), (tiny("generate", OPT), prompts(ROWS, learn_from=1))):
        net.requires_grad_(False)
        group = batch.visuals[0]
        assert group.pixels is not None
        features = net.visual_features(group.pixels)
        cached = replace(batch, visuals=(Visuals(index=group.index, features=features),))
        for seed in range(2):
            torch.manual_seed(seed)
            expected = {n: t.total for n, t in net.loss(batch).items()}
            torch.manual_seed(seed)
            for name, term in net.loss(cached).items():
                torch.testing.assert_close(term.total, expected[name])
        net.vision.requires_grad_(True)
        with pytest.raises(DataError, match="trains the vision encoder"):
            net.loss(cached)
        net.vision.requires_grad_(False)
        narrow = replace(batch, visuals=(Visuals(index=group.index, features=features[..., :8]),))
        with pytest.raises(DataError, match="8 wide, the connector reads 24"):
            net.loss(narrow)


# Freezing


@pytest.mark.parametrize("phase", ["represent", "generate"])
def test_one_step_moves_the_connector_with_its_norm_and_nothing_else(phase: str) -> None:
    net = tiny(phase, LLAMA)
    key = 0 if phase == "represent" else 1
    apply_stage(net, STAGES[key].stage.train)
    net.train()
    before = copy.deepcopy(net.state_dict())
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-2)
    batch = pairs() if phase == "represent" else prompts(ROWS, learn_from=1)
    sum(t.mean for t in net.loss(batch).values()).backward()  # type: ignore[union-attr]
    optimizer.step()
    assert not any(module.training for module in net.vision.modules())
    assert net.connector.qformer.dropout.training
    for name, tensor in net.state_dict().items():
        if name.startswith(("vision.", "language.")):
            assert torch.equal(tensor, before[name]), name
    for name in ("connector.norm.weight", "connector.norm.bias", "connector.queries"):
        assert not torch.equal(net.state_dict()[name], before[name])
    if phase == "represent":
        for name in ("heads.temperature", "heads.lm_bias", "connector.qformer.words.weight"):
            assert not torch.equal(net.state_dict()[name], before[name])
    else:
        assert "connector.qformer.layers.0.ffn_text.ln.weight" not in before
        assert net.heads is None


def test_query_and_text_ffn_part_after_the_first_step() -> None:
    net = tiny()
    for layer in net.connector.qformer.layers:
        layer.ffn_query.load_state_dict(layer.ffn_text.state_dict())  # type: ignore[union-attr,operator]
    apply_stage(net, [Group("connector.*", 1e-3), Group("heads.*", 1e-3)])
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    sum(t.mean for t in net.loss(pairs()).values()).backward()  # type: ignore[union-attr]
    optimizer.step()
    for layer in net.connector.qformer.layers:
        assert not torch.equal(layer.ffn_query.mlp.fc1.weight, layer.ffn_text.mlp.fc1.weight)  # type: ignore[union-attr]


# Precision


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [OPT, T5], ids=["opt", "t5"])
def test_the_qformer_stays_float32_and_a_t5_never_runs_in_fp16(kind: dict, dtype: torch.dtype) -> None:
    net = tiny("generate", kind)
    before = {n: p.clone() for n, p in net.connector.named_parameters()}
    decoder = [[0, 20, 21, 1], [0, 22, 1]] if kind is T5 else None
    batch = prompts(ROWS, stream=net.prompt_stream, learn_from=None if kind is T5 else 1, decoder=decoder)
    whole = net.score(batch)
    net.cast(dtype)
    assert all(torch.equal(p, before[n]) for n, p in net.connector.named_parameters())
    assert {p.dtype for p in net.vision.parameters()} == {dtype}
    assert net.language is not None
    assert {p.dtype for p in net.language.parameters()} == {torch.bfloat16 if kind is T5 else dtype}
    scores = net.score(batch)
    assert scores.isfinite().all()
    # Half a unit of the precision's last place per rounding: a share of the score, not a number of nats.
    unit = torch.finfo(torch.bfloat16 if kind is T5 else dtype).eps
    torch.testing.assert_close(scores.float(), whole, atol=0, rtol=8 * unit)
    net.half()
    assert {p.dtype for p in net.connector.parameters()} == {torch.float32}


def test_mistakes_in_a_configuration_are_named() -> None:
    config = Blip2Config(vision=VISION, qformer=QFORMER, language=OPT)
    with pytest.raises(ConfigError, match=r"features of width 24.*makes 48"):
        replace(config, vision=replace(VISION, width=48))
    with pytest.raises(ConfigError, match="needs a language model"):
        replace(config, language=None)
    with pytest.raises(ConfigError, match="reads the class token"):
        replace(config, vision=replace(VISION, class_token=False))
    with pytest.raises(ConfigError, match="feature_layer 9"):
        replace(config, feature_layer=9)
    with pytest.raises(ConfigError, match="did you mean 'queries'"):
        strict(Blip2Config, {**plain(config), "qformer": {"vision_width": 24, "querys": 3}}, "blip2")


@pytest.mark.parametrize("instruct", [False, True])
def test_attention_maps_are_distributions_over_patches_behind_the_picture(instruct: bool) -> None:
    net = tiny("generate", instruct=instruct)
    asked: dict[str, Any] = {"question": [[CLS, 7, 8, SEP], [CLS, 9, SEP]]} if instruct else {}
    first, second = net.attention(prompts([[5, 6, 7], [8, 9]], **asked))
    assert [m.shape for m in (*first, *second)] == [(2, QUERIES + 3, 1, 16), (2, QUERIES + 2, 1, 16)]
    torch.testing.assert_close(first[0][:, QUERIES:].sum((-1, -2)), torch.ones(2, 3))
    assert not first[0][:, :QUERIES].any()
    assert (first[0][0, -1] - second[0][0, -1]).abs().max() > 1e-4


def test_no_map_with_an_encoder_decoder() -> None:
    net = tiny("generate", language=T5)
    assert "attend" not in system("blip2").capabilities(net)
    with pytest.raises(CapabilityError, match="causal"):
        net.attention(prompts([[5, 6]], stream="encoder"))


def test_the_first_stage_refuses_clips() -> None:
    net, batch = tiny("represent"), pairs()
    (group,) = batch.visuals
    assert group.pixels is not None
    clips = replace(batch, visuals=(replace(group, pixels=group.pixels.repeat(1, 3, 1, 1, 1)),))
    with pytest.raises(DataError, match="first stage reads single pictures and this is a clip of 3 frames"):
        net.loss(clips)
