"""The vision transformer against transformers, layer by layer, and its refusals."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from isthmus.config import plain, strict
from isthmus.errors import ConfigError
from isthmus.interop.hf_towers import vision_config_from_hf, vision_from_hf
from isthmus.nn.vit import PatchEmbedding, VisionConfig, VisionTransformer, resize_positions
from tests.fixtures import OPEN_CLIP

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}


def _pair(kind: str):
    torch.manual_seed(1)
    clip = kind == "clip"
    theirs = CLIPVisionModel(CLIPVisionConfig(**SIZES)) if clip else SiglipVisionModel(SiglipVisionConfig(**SIZES))
    theirs = theirs.double().eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    ours = VisionTransformer(vision_config_from_hf(theirs.config.to_dict())).double()
    ours.load_state_dict(vision_from_hf(theirs.state_dict(), ours.config))
    return ours, theirs


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@torch.no_grad()
def test_all_hidden_states_and_the_pooled_vector_equal_transformers(kind):
    ours, theirs = _pair(kind)
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = theirs(pixels, output_hidden_states=True)
    output = ours(pixels, layers=range(4))
    torch.testing.assert_close(output.pooled, expected.pooler_output, atol=1e-10, rtol=0)
    for mine, other in zip(output.layers, expected.hidden_states, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-10, rtol=0)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("size", [(48, 48), (16, 40), (45, 67)])
@torch.no_grad()
def test_other_sizes_equal_transformers(kind, size):
    ours, theirs = _pair(kind)
    pixels = torch.randn(1, 3, *size, dtype=torch.float64)
    expected = theirs(pixels, interpolate_pos_encoding=True).pooler_output
    torch.testing.assert_close(ours(pixels, interpolate="hf").pooled, expected, atol=1e-10, rtol=0)
    rows, columns = ours.grid(*size)
    assert ours(pixels, layers=[-1], interpolate="hf").layers[0].shape[1] == rows * columns + (kind == "clip")


def test_resized_tables_equal_open_clip():
    tensors = load_file(OPEN_CLIP / "positions.safetensors")
    for side in (12, 4):
        resized = resize_positions(tensors["table"], (8, 8), (side, side), how="open_clip", class_token=True)
        torch.testing.assert_close(resized, tensors[f"resized_{side}"], atol=1e-6, rtol=0)
        plain_bicubic = resize_positions(tensors["table"], (8, 8), (side, side), how="hf", class_token=True)
        assert (plain_bicubic - resized).abs().max() > 0.1
        assert torch.equal(plain_bicubic[0], tensors["table"][0])


@pytest.mark.parametrize("size", [(16, 16), (19, 13)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_patch_embedding_is_the_convolution(size, bias):
    torch.manual_seed(0)
    patches = PatchEmbedding(3, 7, 4, 4, bias=bias).double()
    pixels = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = torch.nn.Conv2d.forward(patches, pixels).flatten(2).transpose(1, 2)
    torch.testing.assert_close(patches(pixels), expected, atol=1e-12, rtol=0)


def test_same_grid_keeps_the_table():
    table = torch.randn(17, 4)
    assert resize_positions(table, (4, 4), (4, 4), how="hf", class_token=True) is table


def test_no_block_above_the_highest_asked_for_is_computed():
    net = VisionTransformer(strict(VisionConfig, TINY, "vision"))
    calls = []
    for number, block in enumerate(net.blocks):
        block.register_forward_hook(lambda *_, number=number: calls.append(number))
    pixels = torch.randn(1, 3, 16, 16)
    output = net(pixels, layers=(-2, 1), pooled=False)
    assert calls == [0, 1]
    assert output.pooled is None
    full = net(pixels, layers=(2, 1))
    assert torch.equal(output.layers[0], full.layers[0])
    assert torch.equal(output.layers[1], full.layers[1])
    calls.clear()
    net(pixels, layers=(0,), pooled=False)
    assert calls == []


TINY: dict[str, Any] = {"image_size": 16, "patch_size": 8, "width": 16, "layers": 3, "heads": 2, "mlp_width": 32}


def test_wrong_size_and_wrong_layer_are_refused():
    net = VisionTransformer(VisionConfig(**TINY))
    with pytest.raises(ConfigError, match="16x16 pixels and was given 16x24"):
        net(torch.randn(1, 3, 16, 24))
    with pytest.raises(ConfigError, match="smaller than one 8x8 patch"):
        net(torch.randn(1, 3, 4, 16), interpolate="hf")
    with pytest.raises(ConfigError, match="4 hidden states"):
        net(torch.randn(1, 3, 16, 16), layers=[4])
    with pytest.raises(ConfigError, match="does not fit a grid"):
        resize_positions(torch.randn(16, 4), (4, 4), (2, 2), how="hf", class_token=True)
    with pytest.raises(ConfigError, match="unknown interpolation"):
        resize_positions(torch.randn(16, 4), (4, 4), (2, 2), how="nearest", class_token=False)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("change", [{"patch_size": 32}, {"class_token": False}, {"pool": "none"}])
def test_variants_that_make_no_sense(change):
    with pytest.raises(ConfigError):
        VisionConfig(**{**TINY, **change})


def test_configuration_round_trip_and_strictness():
    config = VisionConfig.siglip_b_16()
    assert strict(VisionConfig, plain(config), "vision") == config
    with pytest.raises(ConfigError, match="vision: unknown key 'patch_sise'; did you mean 'patch_size'"):
        strict(VisionConfig, {**TINY, "patch_sise": 8}, "vision")


def test_all_parameters_get_a_gradient():
    for config in (VisionConfig(**TINY), VisionConfig.siglip(**TINY)):
        net = VisionTransformer(config)
        net(torch.randn(2, 3, 16, 16)).pooled.square().sum().backward()
        assert all(p.grad is not None for p in net.parameters())
