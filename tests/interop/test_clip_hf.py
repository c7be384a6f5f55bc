"""CLIP and SigLIP against transformers: embeddings, logits, loss, and folders written and read both ways."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    SiglipConfig,
    SiglipModel,
    SiglipVisionModel,
)

from isthmus.batch import Tokens
from isthmus.checkpoint import write_folder
from isthmus.errors import CheckpointError, DataError
from isthmus.interop.hf_clip import (
    clip_config_from_hf,
    clip_config_to_hf,
    clip_from_hf,
    clip_to_hf,
    read_clip_folder,
)
from isthmus.interop.hf_towers import (
    text_config_from_hf,
    text_config_to_hf,
    text_from_hf,
    text_to_hf,
    vision_config_from_hf,
    vision_config_to_hf,
    vision_from_hf,
    vision_to_hf,
)
from isthmus.models.clip import Clip
from isthmus.nn.losses import info_nce, sigmoid_loss
from isthmus.nn.text_tower import TextTower
from isthmus.nn.vit import VisionTransformer
from tests.narrow import must_be, there

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 12,
    "vocab_size": 60,
    "bos_token_id": 1,
    "eos_token_id": 59,
}
KINDS = ["clip", "siglip"]


def _theirs(kind: str, **text) -> CLIPModel | SiglipModel:
    """A tiny random model in which no bias is zero and no gain is one."""
    torch.manual_seed(0)
    towers = {"text_config": {**TEXT, **text}, "vision_config": dict(VISION)}
    net = CLIPModel(CLIPConfig(**towers, projection_dim=32)) if kind == "clip" else SiglipModel(SiglipConfig(**towers))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net.eval()


def _inputs(kind: str) -> tuple[torch.Tensor, Tokens]:
    torch.manual_seed(1)
    ids, lengths = torch.randint(3, 58, (4, 12)), torch.tensor([3, 12, 7, 5])
    if kind == "clip":
        ids[torch.arange(4), lengths - 1] = 59
    else:  # read at the last place, so every row is full
        lengths = torch.full((4,), 12)
    return torch.randn(4, 3, 16, 16), Tokens(ids=ids, lengths=lengths)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@torch.no_grad()
def test_embeddings_logits_and_loss_equal_a_saved_model(kind, dtype, tolerance, tmp_path):
    theirs = _theirs(kind)
    theirs.save_pretrained(tmp_path)
    config, state = read_clip_folder(tmp_path)
    ours = Clip(config)
    ours.load_state_dict(state)
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    pixels, tokens = _inputs(kind)
    pixels = pixels.to(dtype)
    expected = theirs(input_ids=tokens.ids, pixel_values=pixels)

    images, texts = ours.embed_images(pixels), ours.embed_texts(tokens)
    unit = torch.nn.functional.normalize
    for mine, other in [
        (unit(images), expected.image_embeds),
        (unit(texts), expected.text_embeds),
        (ours.logits(images, texts), expected.logits_per_image),
    ]:
        torch.testing.assert_close(mine, other, atol=tolerance, rtol=0)
    if kind == "clip":
        loss = info_nce(images, texts, ours.heads.logit_scale)
    else:
        loss = sigmoid_loss(images, texts, ours.heads.logit_scale, there(ours.heads.logit_bias))
    expected_loss = theirs(input_ids=tokens.ids, pixel_values=pixels, return_loss=True).loss
    torch.testing.assert_close(loss, expected_loss, atol=tolerance, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_is_bit_identical_and_transformers_opens_it(kind, tmp_path):
    theirs = _theirs(kind)
    config = clip_config_from_hf(theirs.config.to_dict())
    state = clip_from_hf(theirs.state_dict(), config)
    _assert_same(clip_to_hf(state, config), theirs.state_dict())
    assert clip_config_from_hf(clip_config_to_hf(config)) == config

    write_folder(
        tmp_path / "out", {"config.json": clip_config_to_hf(config), "model.safetensors": clip_to_hf(state, config)}
    )
    opened: Any = type(theirs).from_pretrained(tmp_path / "out", output_loading_info=True)
    again, report = opened
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    _assert_same(again.state_dict(), theirs.state_dict())
    pixels, tokens = _inputs(kind)
    with torch.no_grad():
        torch.testing.assert_close(
            again(input_ids=tokens.ids, pixel_values=pixels).logits_per_image,
            theirs(input_ids=tokens.ids, pixel_values=pixels).logits_per_image,
        )


def test_sharded_folders(tmp_path):
    theirs = _theirs("clip")
    theirs.save_pretrained(tmp_path, max_shard_size="30kB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    config, state = read_clip_folder(tmp_path)
    _assert_same(clip_to_hf(state, config), theirs.state_dict())
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["logit_scale"] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="outside the folder"):
        read_clip_folder(tmp_path)


@pytest.mark.parametrize(("cls", "kind"), [(CLIPVisionModel, "clip"), (SiglipVisionModel, "siglip")])
@pytest.mark.parametrize("prefix", ["", "vision_model."])
@torch.no_grad()
def test_single_vision_towers_with_and_without_their_prefix(cls, kind, prefix):
    theirs = cls(_theirs(kind).config.vision_config).eval()
    config = vision_config_from_hf(theirs.config.to_dict())
    assert vision_config_from_hf(vision_config_to_hf(config)) == config
    weights = {prefix + name: value for name, value in theirs.state_dict().items()}
    ours = VisionTransformer(config)
    ours.load_state_dict(vision_from_hf(weights, config))
    _assert_same(vision_to_hf(ours.state_dict(), config, prefix=prefix), weights)
    pixels, _ = _inputs(kind)
    torch.testing.assert_close(ours(pixels).pooled, theirs(pixels).pooler_output, atol=1e-5, rtol=0)


@pytest.mark.parametrize("prefix", ["", "text_model."])
@torch.no_grad()
def test_single_text_towers_with_and_without_their_prefix(prefix):
    theirs = CLIPTextModel(must_be(CLIPTextConfig, _theirs("clip").config.text_config)).eval()
    config = text_config_from_hf(theirs.config.to_dict())
    assert text_config_from_hf(text_config_to_hf(config)) == config
    weights = {prefix + name: value for name, value in theirs.state_dict().items()}
    ours = TextTower(config)
    ours.load_state_dict(text_from_hf(weights, config))
    _assert_same(text_to_hf(ours.state_dict(), config, prefix=prefix), weights)
    _, tokens = _inputs("clip")
    expected = theirs(tokens.ids).pooler_output
    torch.testing.assert_close(ours(tokens.ids, tokens.lengths), expected, atol=1e-5, rtol=0)


def _assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_projection_beside_a_single_tower_is_named():
    theirs = CLIPVisionModelWithProjection(must_be(CLIPVisionConfig, _theirs("clip").config.vision_config))
    with pytest.raises(CheckpointError, match=r"unexpected: visual_projection\.weight"):
        vision_from_hf(theirs.state_dict(), vision_config_from_hf(theirs.config.to_dict()))


def test_misfits_are_named_and_position_ids_tolerated():
    theirs = _theirs("clip")
    config, state = clip_config_from_hf(theirs.config.to_dict()), dict(theirs.state_dict())
    buffers = {f"{tower}_model.embeddings.position_ids": torch.arange(4)[None] for tower in ("vision", "text")}
    clip_from_hf(state | buffers, config)
    del state["vision_model.pre_layrnorm.bias"]
    state["text_model.position_ids_other"] = torch.zeros(1)
    state["visual_projection.weight"] = torch.zeros(32, 31)
    with pytest.raises(CheckpointError) as caught:
        clip_from_hf(state, config)
    for part in (
        "missing: vision_model.pre_layrnorm.bias",
        "unexpected: text_model.position_ids_other",
        "mismatched: visual_projection.weight is (32, 31), expected (32, 32)",
    ):
        assert part in str(caught.value)


@pytest.mark.parametrize("eos", [2, 49407])
@torch.no_grad()
def test_legacy_end_of_text_pools_at_the_largest_id(eos):
    """An added id above end-of-text separates the two rules, in transformers and here alike."""
    theirs = _theirs("clip", vocab_size=49410, eos_token_id=eos)
    config = clip_config_from_hf(theirs.config.to_dict())
    assert (config.text.pool, config.text.eot_id) == ("argmax" if eos == 2 else "eot", 49407)
    assert clip_config_to_hf(config)["text_config"]["eos_token_id"] == eos
    ours = Clip(config)
    ours.load_state_dict(clip_from_hf(theirs.state_dict(), config))
    _, tokens = _inputs("clip")
    tokens.ids[tokens.ids == 59] = 49407
    for added in (False, True):
        if added:
            tokens.ids[:, 1] = 49409
        expected: Any = theirs.get_text_features(input_ids=tokens.ids)
        expected = expected if isinstance(expected, torch.Tensor) else expected.pooler_output
        torch.testing.assert_close(ours.embed_texts(tokens), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("vocab_size", [64, 49410])
def test_a_legacy_tower_refuses_a_row_without_end_of_text(vocab_size):
    """transformers would read it at its largest id, whatever that is."""
    config = text_config_from_hf({**TEXT, "model_type": "clip_text_model", "vocab_size": vocab_size, "eos_token_id": 2})
    tower, end = TextTower(config), min(49407, vocab_size - 1)
    assert config.eot_id == end
    ids = torch.tensor([[1, 5, 6, end], [1, 5, 2, vocab_size - 2]])
    assert tower(ids[:1], torch.tensor([4])).isfinite().all()
    with pytest.raises(DataError, match=f"row 1 has no end-of-text .id {end}."):
        tower(ids, torch.tensor([4, 4]))


def test_a_config_dict_beside_the_config_wins_and_resets_what_it_omits():
    values = {
        "model_type": "clip",
        "projection_dim": 32,
        "vision_config": VISION,
        "text_config": {**TEXT, "eos_token_id": 2, "vocab_size": 49408},
        "text_config_dict": {"hidden_size": 48, "num_hidden_layers": 2},
    }
    theirs = must_be(CLIPTextConfig, CLIPConfig(**values).text_config)
    ours = clip_config_from_hf(values).text
    assert (
        (ours.width, ours.context, ours.heads)
        == (theirs.hidden_size, theirs.max_position_embeddings, theirs.num_attention_heads)
        == (48, 77, 8)
    )
    assert (ours.eot_id, ours.pool) == (theirs.eos_token_id, "eot") == (49407, "eot")


def test_defaults_of_left_out_keys_are_transformers():
    for kind, cls in (("clip", CLIPConfig), ("siglip", SiglipConfig)):
        filled = cls(text_config={}, vision_config={}).to_dict()
        assert clip_config_from_hf({"model_type": kind}) == clip_config_from_hf(filled)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "blip"}, "neither 'clip' nor 'siglip'"),
        ({"vision_config": {**VISION, "hidden_act": "swish"}}, "hidden_act 'swish' is unknown"),
        ({"vision_config": {**VISION, "image_size": [16, 24]}}, "16x24 is not square"),
        ({"vision_config": {**VISION, "num_channels": 1}}, "3 channels"),
    ],
)
def test_configurations_that_cannot_be_read(change, message):
    with pytest.raises(CheckpointError, match=message):
        clip_config_from_hf({"model_type": "clip", "vision_config": VISION, "text_config": TEXT, **change})


def test_a_mixture_of_both_has_no_place_there():
    config = clip_config_from_hf(_theirs("clip").config.to_dict())
    mixed = replace(config, loss="sigmoid", init_bias=-10.0)
    with pytest.raises(CheckpointError, match="mixes them"):
        clip_config_to_hf(mixed)
