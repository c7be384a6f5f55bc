"""The block, its activations and its start."""

import pytest
import torch
import torch.nn.functional as F

from isthmus.errors import ConfigError
from isthmus.nn.block import Block, activation, init_block


def test_activations():
    x = torch.linspace(-4, 4, 33, dtype=torch.float64)
    erf = 0.5 * x * (1 + torch.erf(x / 2**0.5))
    torch.testing.assert_close(activation("gelu")(x), erf)
    torch.testing.assert_close(activation("quick_gelu")(x), x / (1 + torch.exp(-1.702 * x)))
    torch.testing.assert_close(activation("gelu_tanh")(x), F.gelu(x, approximate="tanh"))
    torch.testing.assert_close(activation("squared_relu")(x), x.clamp(min=0) ** 2)
    torch.testing.assert_close(activation("relu")(x), x.clamp(min=0))


def test_unknown_activation_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'quick_gelu'"):
        activation("quickgelu")


def test_block_is_pre_norm():
    torch.manual_seed(0)
    block = Block(8, 2, 32, "gelu_tanh", eps=1e-6).double()
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    y = x + block.attn(F.layer_norm(x, (8,), eps=1e-6), causal=True)
    expected = y + block.mlp.fc2(F.gelu(block.mlp.fc1(F.layer_norm(y, (8,), eps=1e-6)), approximate="tanh"))
    torch.testing.assert_close(block(x, causal=True), expected)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, (1, 1, 5, 5), (3, 1, 5, 5), (3, 2, 1, 5)], ids=str)
def test_what_is_read_at_one_place_is_what_the_whole_block_gives_there(
    causal: bool, mask: tuple[int, ...] | None
) -> None:
    torch.manual_seed(0)
    block = Block(8, 2, 32).double()
    x, place = torch.randn(3, 5, 8, dtype=torch.float64), torch.tensor([4, 0, 2])
    seen = None
    if mask is not None:
        seen = torch.rand(mask) < 0.5
        seen[..., 0] = True  # every place sees something
    whole = block(x, mask=seen, causal=causal)
    read = block(x, mask=seen, causal=causal, read=place)
    torch.testing.assert_close(read[:, 0], whole[torch.arange(3), place], atol=1e-12, rtol=0)


def test_initial_deviations_are_openais():
    torch.manual_seed(0)
    width, depth = 256, 8
    block = Block(width, 4, 4 * width)
    init_block(block, depth)
    for layer, expected in [
        (block.attn.q_proj, width**-0.5),
        (block.attn.v_proj, width**-0.5),
        (block.attn.out_proj, (2 * depth * width) ** -0.5),
        (block.mlp.fc1, (2 * width) ** -0.5),
        (block.mlp.fc2, (2 * depth * width) ** -0.5),
    ]:
        assert layer.weight.std().item() == pytest.approx(expected, rel=0.02)
    assert not block.attn.k_proj.bias.any()
    assert not block.attn.out_proj.bias.any()
