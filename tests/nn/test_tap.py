"""A tap reads the hidden states it names, with a gradient only where the encoder trains."""

import pytest
import torch

from isthmus.batch import Visuals
from isthmus.errors import ConfigError, DataError
from isthmus.nn import attention
from isthmus.nn.tap import Tap
from isthmus.nn.vit import VisionConfig, VisionTransformer

VISION = VisionConfig(image_size=16, patch_size=8, width=8, layers=3, heads=2, mlp_width=16)
PIXELS = torch.randn(2, 1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def encoder(*, opened: bool = False) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(VISION).requires_grad_(opened)


def test_layers_are_joined_on_channels_and_the_class_token_is_kept_or_not() -> None:
    net = encoder()
    states = net(PIXELS[:, 0], layers=(0, -2), pooled=False).layers
    tap = Tap(vision=VISION, layers=(0, -2))
    assert torch.equal(tap.features(net, PIXELS)[:, 0], torch.cat(states, dim=-1)[:, 1:])
    assert (tap.width, tap.tokens((2, 2))) == (16, 4)
    kept = Tap(vision=VISION, layers=(-2,), class_token=True)
    assert torch.equal(kept.features(net, PIXELS)[:, 0], states[1])
    assert (kept.width, kept.tokens((2, 2))) == (8, 5)


@pytest.mark.parametrize("opened", [False, True])
def test_a_gradient_flows_only_through_an_opened_encoder(opened: bool) -> None:
    assert Tap(vision=VISION, layers=(-1,)).features(encoder(opened=opened), PIXELS).requires_grad == opened


@pytest.mark.parametrize("opened", [False, True])
def test_a_frozen_encoder_attends_in_the_quicker_precision(monkeypatch, opened: bool) -> None:
    asked: list[bool] = []
    monkeypatch.setattr(attention, "half_is_quicker", lambda dtype, *, single: asked.append(single) or True)
    tap = Tap(vision=VISION, layers=(-1,))
    whole = tap.features(encoder(opened=opened), PIXELS)
    assert not asked  # in full precision nothing is asked
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = tap.features(encoder(opened=opened), PIXELS)
    assert asked == ([] if opened else [False] * VISION.layers)
    torch.testing.assert_close(half.float(), whole, atol=0.05, rtol=0.05)


def test_cached_features_are_refused_where_they_do_not_fit() -> None:
    tap, net = Tap(vision=VISION, layers=(-1,)), encoder()
    cached = Visuals(index=torch.arange(2), features=tap.features(net, PIXELS))
    assert torch.equal(tap.read(net, cached), tap.read(net, Visuals(index=torch.arange(2), pixels=PIXELS)))
    with pytest.raises(DataError, match="trains the vision encoder"):
        tap.read(encoder(opened=True), cached)
    with pytest.raises(DataError, match="8 wide, the connector reads 16"):
        Tap(vision=VISION, layers=(0, 1)).read(net, cached)


@pytest.mark.parametrize(("layers", "class_token"), [((-1,), False), ((1, -2), False), ((0,), False), ((0,), True)])
def test_unreachable_is_what_no_gradient_reaches(layers: tuple[int, ...], class_token: bool) -> None:
    tap, net = Tap(vision=VISION, layers=layers, class_token=class_token), encoder(opened=True)
    tap.features(net, PIXELS).square().sum().backward()
    silent = {f"vision.{name}" for name, p in net.named_parameters() if p.grad is None or not p.grad.any()}
    named = set(tap.unreachable(f"vision.{name}" for name, _ in net.named_parameters()))
    same_for_all = {name for name in silent | named if name.endswith("k_proj.bias")}  # a softmax does not feel them
    assert silent - same_for_all == named - same_for_all


@pytest.mark.parametrize("layer", [4, -5])
def test_a_hidden_state_that_is_not_there_is_refused(layer: int) -> None:
    with pytest.raises(ConfigError, match="of 3 blocks has 4 hidden states, 0 to 3 or -4 to -1"):
        Tap(vision=VISION, layers=(layer,))
