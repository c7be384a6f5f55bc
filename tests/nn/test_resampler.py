"""The Perceiver resampler: always R tokens, frames in order, patches without, padding unseen."""

import pytest
import torch

from isthmus.errors import ConfigError
from isthmus.nn.connectors import Connector
from isthmus.nn.connectors.resampler import Resampler, ResamplerConfig, stretch
from tests.models.redrawn import redraw


def small(**changes) -> Resampler:
    net = Resampler(
        24, ResamplerConfig(**{"layers": 2, "latents": 64, "heads": 2, "head_width": 8, "frames": 8, **changes})
    )
    redraw(net)
    return net.eval()


@pytest.mark.parametrize("frames", [1, 8, 30])
@pytest.mark.parametrize("patches", [49, 256, 576])
@torch.no_grad()
def test_always_64_tokens(frames, patches):
    net = small()
    assert isinstance(net, Connector)
    out = net(torch.randn(2, frames, patches, 24))
    assert out.shape == (2, net.num_tokens(frames, (patches, 1)), 24) == (2, 64, 24)


@torch.no_grad()
def test_order_of_frames_matters_and_order_of_patches_does_not():
    net, features = small(), torch.randn(2, 3, 9, 24)
    out = net(features)
    torch.testing.assert_close(net(features[:, :, torch.randperm(9)]), out, atol=1e-5, rtol=1e-5)
    assert (net(features[:, [2, 0, 1]]) - out).abs().max() > 0.05
    assert (net(features[:, :1]) - out).abs().max() > 0.05


def test_time_table_is_stretched_to_longer_clips():
    table = torch.randn(8, 4)
    for align in ("ends", "cells"):
        assert torch.equal(stretch(table, 8, align), table)
        assert torch.equal(stretch(table, 3, align), table[:3])
        assert stretch(table, 30, align).shape == (30, 4)
    ends = stretch(table, 15, "ends")
    torch.testing.assert_close(ends[::2], table)
    torch.testing.assert_close(ends[1::2], (table[1:] + table[:-1]) / 2)
    cells = stretch(table, 16, "cells")
    torch.testing.assert_close(cells[1], 0.75 * table[0] + 0.25 * table[1])
    assert stretch(table[:1], 5, "ends").shape == (5, 4)


def test_clips_need_time_embeddings_and_frames():
    net = small(frames=0)
    assert net(torch.zeros(1, 1, 9, 24)).shape == (1, 64, 24)
    with pytest.raises(ConfigError, match="3 frames needs time embeddings"):
        net(torch.zeros(1, 3, 9, 24))
    with pytest.raises(ConfigError, match="0 frames"):
        small()(torch.zeros(1, 0, 9, 24))
    with pytest.raises(ConfigError, match=r"resampler\.latents is 0"):
        ResamplerConfig(latents=0)


@torch.no_grad()
def test_patch_weights_are_distributions_and_follow_what_is_looked_at():
    net, features = small(latents=5), torch.randn(2, 3, 9, 24)
    weights = net.patch_weights(features)
    assert weights.shape == (2, 5, 3, 9)
    torch.testing.assert_close(weights.sum((2, 3)), torch.ones(2, 5))
    order = torch.randperm(9)
    torch.testing.assert_close(net.patch_weights(features[:, :, order]), weights[..., order])


def test_presets_differ_where_the_systems_do():
    paper, ours, idefics = (
        ResamplerConfig.paper(),
        ResamplerConfig.open_flamingo(),
        ResamplerConfig.idefics(qk_norm=True),
    )
    keys = {name: set(Resampler(16, c).state_dict()) for name, c in (("p", paper), ("o", ours), ("i", idefics))}
    assert keys["p"] - keys["o"] == {"times"}
    assert keys["o"] - keys["p"] == {"norm.weight", "norm.bias"}
    assert len(keys["i"] - keys["o"]) == 6 * 4
    with torch.device("meta"):
        count = {w: sum(p.numel() for p in Resampler(w, c).parameters()) for w, c in ((1024, ours), (1280, idefics))}
    assert count == {1024: 63_019_008, 1280: 125_961_984}
