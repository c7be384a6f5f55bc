"""Connectors: one dict, options by name, tokens counted truly, batch = single, a step trained, saved and loaded."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from isthmus.checkpoint import load_tensors, write_folder
from isthmus.errors import CapabilityError, ConfigError
from isthmus.nn.connectors import CONNECTORS, Connector, build_connector, named_mlp
from isthmus.nn.connectors.pooling import AveragePool, PixelShuffle
from isthmus.user_code import pin
from isthmus.weights import load_into, state_tensors
from tests.narrow import must_be

WIDTH, OUT, SIDE = 24, 20, 4
SPECS = {
    "linear": {},
    "mlp": {"depth": 3},
    "resampler": {"latents": 5, "layers": 2, "heads": 2, "head_width": 8, "frames": 2},
    "qformer": {"queries": 3, "width": 16, "layers": 2, "heads": 2, "mlp_width": 32, "dropout": 0.0},
    "pixel_shuffle": {"factor": 2, "norm": True},
    "average_pool": {"factor": 4, "depth": 1},
    "attention_pool": {"queries": 6, "heads": 4},
}
TOKENS = {
    "linear": 32,
    "mlp": 32,
    "resampler": 5,
    "qformer": 6,
    "pixel_shuffle": 8,
    "average_pool": 2,
    "attention_pool": 12,
}


def make(kind: str, **more) -> Connector:
    torch.manual_seed(1)
    return must_be(Connector, build_connector({"kind": kind, **SPECS[kind], **more}, WIDTH, OUT))


def features(count: int = 3, frames: int = 2) -> Tensor:
    torch.manual_seed(2)
    return torch.randn(count, frames, SIDE**2, WIDTH)


def test_all_of_them_are_tested_here():
    assert set(SPECS) == set(TOKENS) == set(CONNECTORS)


@pytest.mark.parametrize("kind", SPECS)
@torch.no_grad()
def test_tokens_are_counted_and_rows_are_alone(kind):
    net = make(kind).eval()
    out = net(features())
    assert out.shape == (3, net.num_tokens(2, (SIDE, SIDE)), OUT) == (3, TOKENS[kind], OUT)
    one = torch.cat([net(row[None]) for row in features()])
    torch.testing.assert_close(one, out, atol=1e-5, rtol=1e-5)
    assert net(features()[:, :1]).shape[1] == net.num_tokens(1, (SIDE, SIDE))


@pytest.mark.parametrize("kind", SPECS)
def test_a_step_trains_every_parameter_and_comes_back_from_a_file(kind, tmp_path):
    net = make(kind)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    (net(features()) * torch.randn(OUT)).square().sum().backward()
    optimizer.step()
    unmoved = [n for n, tensor in net.state_dict().items() if torch.equal(tensor, before[n])]
    assert unmoved == [n for n in unmoved if n.endswith("k_proj.bias")]  # a bias of the keys moves no softmax
    write_folder(tmp_path / "c", {"model.safetensors": state_tensors(net)})
    again = make(kind)
    load_into(again, load_tensors(tmp_path / "c" / "model.safetensors"), where=tmp_path)
    assert torch.equal(again.eval()(features()), net.eval()(features()))


@pytest.mark.parametrize("kind", SPECS)
@torch.no_grad()
def test_each_says_which_patches_its_tokens_are_made_of(kind):
    weights = make(kind).eval().patch_weights(features())
    assert weights.shape == (3, TOKENS[kind], 2, SIDE**2)
    torch.testing.assert_close(weights.sum((2, 3)), torch.ones(3, TOKENS[kind]))
    if kind != "resampler":  # the tokens of the first frame are made of nothing of the second
        assert not weights[:, : TOKENS[kind] // 2, 1].any()


@torch.no_grad()
def test_blocks_are_neighbours_of_the_map():
    """Both against a plain loop over the map: rows of blocks, and the patches of a block row by row."""
    x = features(1, 1)
    maps = x[0, 0].unflatten(0, (SIDE, SIDE))
    blocks = [maps[r : r + 2, c : c + 2].flatten(0, 1) for r in (0, 2) for c in (0, 2)]
    pool, shuffle = must_be(AveragePool, make("average_pool", factor=2)), must_be(PixelShuffle, make("pixel_shuffle"))
    torch.testing.assert_close(pool(x)[0], pool.mlp(torch.stack([b.mean(0) for b in blocks])[None, None])[0])
    joined = torch.stack([b.flatten() for b in blocks])[None, None]
    torch.testing.assert_close(shuffle(x)[0], shuffle.mlp(shuffle.norm(joined))[0])
    assert pool.patch_weights(x)[0, 1, 0].nonzero().flatten().tolist() == [2, 3, 6, 7]


@pytest.mark.parametrize("name", ["linear", "mlp2x_gelu", "mlp3x_gelu"])
def test_llavas_names_are_those_of_its_files(name):
    depth = 1 if name == "linear" else int(name[3])
    net = build_connector(name, 6, 5)
    assert sorted(net.state_dict()) == sorted(f"linear_{i + 1}.{p}" for i in range(depth) for p in ("bias", "weight"))
    x = torch.randn(2, 1, 4, 6)
    y = x.flatten(1, 2)
    for number, layer in enumerate(net.children()):
        y = layer(nn.functional.gelu(y) if number else y)
    assert torch.equal(net(x), y)
    assert named_mlp(name) == depth
    assert [named_mlp(other) for other in ("resampler", {"kind": "mlp"}, "mlp0x_gelu")] == [None] * 3


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("mlp2xgelu", "did you mean 'mlp2x_gelu'"),
        ({"kind": "resampler", "latent": 3}, "unknown key 'latent'; did you mean 'latents'"),
        ({"kind": "resampler", "latents": "8"}, "latents: expected int, found str '8'"),
        ({"kind": "average_pool", "factr": 2}, "projector average_pool: unknown option 'factr'; did you mean 'factor'"),
        ({"kind": "pixel_shuffle", "factor": "2"}, "factor: expected int"),
        ({"kind": "average_pool", "factor": 0}, "at least 1, not 0"),
        ({"kind": "attention_pool", "heads": 7}, "share the features' 24 channels evenly"),
        ({"kind": "mlp", "depth": 0}, "at least one layer"),
        ({"kind": "linear", "depth": 2}, "unknown option 'depth'"),
        ({"latents": 8}, "give the connector's name as kind"),
        ("mine:Mean", "a checkpoint named it and not you"),
    ],
)
def test_what_does_not_fit_says_so(spec, words):
    with pytest.raises(ConfigError, match=words):
        build_connector(spec, WIDTH, OUT)


@pytest.mark.parametrize("kind", ["pixel_shuffle", "average_pool"])
def test_maps_that_are_not_cut_into_blocks_are_refused(kind):
    net = make(kind, factor=2)
    for patches in (15, 9):
        with pytest.raises(ConfigError, match=f"side is a multiple of 2, and here are {patches} patches"):
            net(torch.zeros(1, 1, patches, WIDTH))
    with pytest.raises(ConfigError, match="1 rows and 17 columns"):
        net.num_tokens(1, (1, 17))


MINE = """
from torch import nn
from isthmus.nn.connectors import Connector

class Mean(nn.Module):
    def __init__(self, vision_width, out_width, bias: bool = True):
        super().__init__()
        self.layer = nn.Linear(vision_width, out_width, bias=bias)
    def forward(self, features, mask=None, times=None, text=None):
        return self.layer(features.mean(2))
    def num_tokens(self, frames, grid):
        return frames

class Named(Connector, Mean):
    forward, num_tokens = Mean.forward, Mean.num_tokens

class NoWidths(Mean):
    def __init__(self):
        super().__init__(1, 1)

class NotOne(nn.Module):
    def __init__(self, *widths):
        super().__init__()
"""


def test_a_class_of_ones_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    net = build_connector({"kind": pin("mine:Mean"), "bias": False}, 6, 5)
    assert net(torch.zeros(2, 3, 4, 6)).shape == (2, net.num_tokens(3, (2, 2)), 5)
    assert list(net.state_dict()) == ["layer.weight"]
    with pytest.raises(ConfigError, match=r"mine\.py:Mean: unknown option 'bais'; did you mean 'bias'"):
        build_connector({"kind": pin("mine:Mean"), "bais": False}, 6, 5)
    with pytest.raises(ConfigError, match="bias: expected bool"):
        build_connector({"kind": pin("mine:Mean"), "bias": "no"}, 6, 5)
    with pytest.raises(ConfigError, match="must be a class that derives from"):
        build_connector(pin("mine:NotOne"), 6, 5)
    with pytest.raises(ConfigError, match=r"NoWidths\(vision_width, out_width, \.\.\.\), and does not take these"):
        build_connector(pin("mine:NoWidths"), 6, 5)
    named = build_connector(pin("mine.py:Named"), 6, 5)
    assert isinstance(named, Connector)
    with pytest.raises(CapabilityError, match="Named does not say which patches"):
        named.patch_weights(torch.zeros(1, 1, 4, 6))
    assert math.prod(named(torch.zeros(2, 3, 4, 6)).shape) == 30
