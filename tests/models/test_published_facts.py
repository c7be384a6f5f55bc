"""What papers and their code fix by a number and nothing else would notice: starts, schedules, sizes, gradients."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from isthmus.adapters import Lora
from isthmus.batch import Batch
from isthmus.evaluation import few_shot
from isthmus.evaluation.rerank import RerankTask
from isthmus.interop.hf_blip2 import to_hf
from isthmus.models.blip2 import Blip2, Blip2Config
from isthmus.models.clip import Clip, ClipConfig
from isthmus.models.llava import Llava, LlavaConfig
from isthmus.net import Net
from isthmus.nn.connectors.qformer import QFormerConnector
from isthmus.nn.connectors.resampler import Resampler, ResamplerConfig
from isthmus.nn.gated import GatedBlock, GatedConfig
from isthmus.nn.text_tower import TextConfig
from isthmus.nn.vit import VisionConfig, VisionTransformer
from isthmus.recipes.schema import read_recipe
from isthmus.stage import Group, apply_stage
from isthmus.training.engines import engine
from isthmus.training.gradient import backward
from isthmus.training.precision import context
from tests.models import tiny_blip2, tiny_flamingo, tiny_llava
from tests.narrow import must_be

FP32 = context("fp32", torch.device("cpu"))


def spread(values: Tensor, std: float) -> None:
    """Numbers drawn from N(0, std²), several thousand of them."""
    assert values.numel() > 2000
    assert values.std().item() == pytest.approx(std, rel=0.08)
    assert abs(values.mean().item()) < 0.08 * std


# Starts


def test_siglips_probe_starts_at_the_scale_of_its_width() -> None:
    torch.manual_seed(0)
    config = VisionConfig.siglip(image_size=8, patch_size=4, width=2304, layers=1, heads=1, mlp_width=8)
    pool = VisionTransformer(config).pool
    assert pool is not None
    spread(pool.probe.detach(), 2304**-0.5)
    spread(pool.attn.q_proj.weight.detach(), 2304**-0.5)


def test_queries_start_from_a_small_normal() -> None:
    torch.manual_seed(0)
    config = replace(tiny_blip2.QFORMER, queries=128)
    spread(QFormerConnector(config, 8, text=False).queries.detach(), 0.02)


def test_latents_and_times_start_from_a_standard_normal() -> None:
    torch.manual_seed(0)
    net = Resampler(512, ResamplerConfig(layers=1, frames=8))
    assert net.times is not None
    spread(net.latents.detach(), 1.0)
    spread(net.times.detach(), 1.0)


def test_the_newline_starts_as_long_as_an_embedding() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 2304, "head_dim": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    language = {**tiny_llava.LANGUAGE, **sizes}
    config = LlavaConfig(vision=tiny_llava.VISION, language=language, pinpoints=((16, 32),))
    spread(Llava(config).image_newline.detach(), 2304**-0.5)


def test_clips_image_tower_and_projections_start_by_their_widths() -> None:
    """2103.00020's code: w^-1/2 for the class token and positions, and for both projections."""
    torch.manual_seed(0)
    vision = VisionConfig(image_size=8, patch_size=1, width=256, layers=1, heads=4, mlp_width=8)
    text = TextConfig(vocab_size=8, width=128, layers=1, heads=2, mlp_width=8, eot_id=7)
    net = Clip(ClipConfig(vision=vision, text=text, embed_dim=64))
    spread(must_be(VisionTransformer, net.vision).positions.detach(), 256**-0.5)
    assert isinstance(net.heads.vision_projection, nn.Linear)
    spread(net.heads.vision_projection.weight.detach(), 256**-0.5)
    spread(net.heads.text_projection.weight.detach(), 128**-0.5)


def test_gates_start_closed() -> None:
    """2204.14198, section 3.1.2: at first the language model is the one that was frozen."""
    for block in (GatedBlock(32, 24, GatedConfig.paper(4)), GatedBlock(32, 24, GatedConfig(gate="vector"))):
        assert not block.attn_gate.any()
        assert not block.mlp_gate.any()


def test_what_presets_and_defaults_fix_by_a_number() -> None:
    assert TextConfig.siglip(8, 1, 1, 8).activation == VisionConfig.siglip_b_16().activation == "gelu_tanh"
    heads = Blip2(tiny_blip2.tiny("represent").config).heads
    assert heads is not None
    assert heads.temperature.item() == pytest.approx(0.07)
    defaults = Blip2Config.vit_l_opt_2_7b()
    assert (defaults.norm_eps, defaults.label_smoothing, defaults.embed_dim) == (1e-5, 0.1, 256)
    assert (few_shot.POOL, few_shot.TEXT_SHOTS) == (2048, 2)  # 2204.14198, appendix B.2
    assert Lora(rank=128).scale == 256  # 2310.03744's recipe


def test_the_papers_resampler_and_blocks_square_their_relu() -> None:
    """Table 5 of 2204.14198; OpenFlamingo's have the GELU."""
    x = torch.tensor([-2.0, 0.5, 3.0])
    block = GatedBlock(32, 24, GatedConfig.paper(4))
    resampler = Resampler(32, ResamplerConfig.paper())
    for mlp in (block.mlp, resampler.layers[0].mlp):
        assert torch.equal(mlp.activation(x), torch.tensor([0.0, 0.25, 9.0]))  # type: ignore[union-attr,operator]
    other = GatedBlock(32, 24, GatedConfig.open_flamingo()).mlp
    torch.testing.assert_close(other.activation(x), nn.functional.gelu(x))  # type: ignore[operator]


# Stages, as the shipped recipes have them


def test_llavas_stages() -> None:
    """Table 2 of 2310.03744's appendix: 3 % warm-up, cosine to 0, no decay of weights, gradients clipped at 1."""
    stages = read_recipe("llava-1.5-7b", to_show=True).stages
    assert [(s.name, s.batch_size, s.stage.samples, s.max_length) for s in stages] == [
        ("align", 256, 558_000, 2048),
        ("instruct", 128, 665_000, 2048),
    ]
    assert [(s.template, s.image_mode) for s in stages] == [("plain", "square"), ("vicuna_v1", "pad")]
    assert [[(g.pattern, g.lr) for g in s.stage.train] for s in stages] == [
        [("connector.*", 1e-3)],
        [("connector.*", 2e-5), ("language.*", 2e-5)],
    ]
    for stage in (s.stage for s in stages):
        assert stage.warmup_count == round(0.03 * (stage.samples or 0))
        assert (stage.decay, stage.floor, stage.betas, stage.eps) == ("cosine", 0.0, (0.9, 0.999), 1e-8)
        assert stage.clip_norm == 1.0
        assert {g.weight_decay for g in stage.train} == {0.0}


def test_openflamingos_stage() -> None:
    """2308.01390, section 3: 1,875 steps of 2,048 pages and 4,096 pairs warm up, then a constant rate."""
    (spec,) = read_recipe("open-flamingo-4b", to_show=True).stages
    assert [(e["batch_size"], e["loss_weight"]) for e in spec.data] == [(2048, 1.0), (4096, 0.2)]
    assert (spec.data[0]["min_sim"], spec.data[0]["max_images"]) == (0.24, 6)
    assert spec.stage.warmup_count == 1_875 * (2048 + 4096)
    assert (spec.stage.decay, spec.stage.clip_norm) == ("constant", 1.0)
    decays = {g.pattern: g.weight_decay for g in spec.stage.train}
    assert {g.lr for g in spec.stage.train} == {1e-4}
    assert decays["xattn.*"] == 0.1
    assert {decay for pattern, decay in decays.items() if pattern != "xattn.*"} == {0.0}


def test_blip2s_stages() -> None:
    """2301.12597, section 3.4: betas (0.9, 0.98), decay 0.05, 2,000 steps of warm-up; the second falls to 5e-5."""
    stages = read_recipe("blip2-vit-l-opt-2.7b", to_show=True).stages
    assert [(s.stage.steps, s.batch_size, s.image_mode) for s in stages] == [
        (250_000, 2320, "squash"),
        (80_000, 1920, "squash"),
    ]
    assert [[g.pattern for g in s.stage.train] for s in stages] == [["connector.*", "heads.*"], ["connector.*"]]
    for stage in (s.stage for s in stages):
        assert (stage.betas, stage.warmup_count, stage.decay) == ((0.9, 0.98), 2_000, "cosine")
        assert {(g.lr, g.weight_decay) for g in stage.train} == {(1e-4, 0.05)}
    assert [s.stage.floor * 1e-4 for s in stages] == [0.0, 5e-5]


def test_clips_stage() -> None:
    """2103.00020, appendix F: 32 epochs of 400 M pairs in batches of 32,768, decay 0.2, half a cosine."""
    (spec,) = read_recipe("clip-vit-b-32", to_show=True).stages
    stage = spec.stage
    assert (spec.batch_size, stage.samples, spec.image_mode) == (32_768, 32 * 400_000_000, "square")
    assert stage.warmup_count == 2_000 * 32_768
    assert [(g.pattern, g.lr, g.weight_decay) for g in stage.train] == [("*", 5e-4, 0.2)]
    assert (stage.betas, stage.eps, stage.decay, stage.floor) == ((0.9, 0.98), 1e-6, "cosine", 0.0)
    assert spec.augment is not None
    assert not spec.augment.flip


def test_reranking_takes_128_candidates() -> None:
    """2301.12597, section 4.4."""
    assert RerankTask.__dataclass_fields__["rerank"].default == 128


# Sizes


def test_blip2s_parts_count_as_published_files_do() -> None:
    """The Q-Former with queries alone and with its text half, and the whole for retrieval with and without its ViT."""
    with torch.device("meta"):
        small = Blip2(Blip2Config.vit_l_opt_2_7b()).connector.qformer
        net = Blip2(replace(Blip2Config.vit_g_opt_2_7b(), phase="represent"))
    whole = net.connector.qformer
    tables = [whole.words, whole.positions]
    assert sum(p.numel() for p in small.parameters()) == 101_598_720
    tabled = sum(p.numel() for table in tables for p in table.parameters())  # type: ignore[union-attr]
    assert sum(p.numel() for p in whole.parameters()) - tabled == 161_825_280
    written = to_hf(net.state_dict(), net.config)
    assert sum(t.numel() for t in written.values()) == 1_172_032_258
    assert sum(t.numel() for n, t in written.items() if not n.startswith("vision_model.")) == 186_080_002


# Gradients over splits


def gradients(net: Net, batches: list[Batch]) -> dict[str, Tensor]:
    net.zero_grad()
    backward(engine(net), batches, FP32)
    return {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}


def _llava() -> tuple[Net, Batch, list[Batch]]:
    rows = [tiny_llava.ROWS[name] for name in ("one", "two", "none")]
    return tiny_llava.tiny(), tiny_llava.batch(rows), [tiny_llava.batch(rows[:1]), tiny_llava.batch(rows[1:])]


def _flamingo() -> tuple[Net, Batch, list[Batch]]:
    rows = [tiny_flamingo.ROWS[name] for name in ("one", "two", "none")]
    return (
        tiny_flamingo.tiny(),
        tiny_flamingo.batch(rows),
        [tiny_flamingo.batch(rows[:2]), tiny_flamingo.batch(rows[2:])],
    )


def _blip2() -> tuple[Net, Batch, list[Batch]]:
    rows = [[2, 5, 6, 7, 8, 9], [2, 10, 11], [2, 12, 13, 14]]
    parts = [tiny_blip2.prompts(rows[:1], learn_from=1), tiny_blip2.prompts(rows[1:], learn_from=1, first=1)]
    return tiny_blip2.tiny("generate"), tiny_blip2.prompts(rows, learn_from=1), parts


@pytest.mark.parametrize(("system", "close"), [(_llava, 1e-9), (_flamingo, 1e-9), (_blip2, 1e-5)])
def test_every_tensor_has_the_same_gradient_over_any_split(system, close) -> None:
    """In double precision; BLIP-2's Q-Former stays in single."""
    net, whole, parts = system()
    apply_stage(net, [Group("*", 1e-3)])
    net = net.double().eval()  # an open part would draw its dropout
    doubled = [_double(batch) for batch in (whole, *parts)]
    expected, found = gradients(net, doubled[:1]), gradients(net, doubled[1:])
    assert expected.keys() == found.keys()
    assert sum(bool(g.any()) for g in expected.values()) > 20
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=close * largest, rtol=0, msg=name)


def _double(batch: Batch) -> Batch:
    visuals = tuple(replace(v, pixels=None if v.pixels is None else v.pixels.double()) for v in batch.visuals)
    return replace(batch, visuals=visuals)
