"""Connectors by name, and the projector against its formula."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import gelu, linear

from isthmus.errors import ConfigError
from isthmus.nn.connectors import CONNECTORS, Connector, build_connector


@pytest.mark.parametrize(("name", "depth"), [("linear", 1), ("mlp2x_gelu", 2), ("mlp4x_gelu", 4)])
def test_projector_is_linear_layers_with_exact_gelu_between(name: str, depth: int) -> None:
    torch.manual_seed(0)
    net = build_connector(name, 6, 5)
    assert isinstance(net, Connector)
    assert list(net.state_dict()) == [f"linear_{n + 1}.{leaf}" for n in range(depth) for leaf in ("weight", "bias")]
    features = 3 * torch.randn(2, 3, 4, 6)
    expected = features.reshape(2, 12, 6)
    for n in range(depth):
        layer = net.get_submodule(f"linear_{n + 1}")
        expected = linear(gelu(expected) if n else expected, layer.weight, layer.bias)
    found = net(features)
    torch.testing.assert_close(found, expected)
    assert found.shape[1] == net.num_tokens(3, (2, 2)) == 12


def test_every_name_in_the_dict_builds() -> None:
    for name in CONNECTORS:
        assert build_connector(name, 6, 5)(torch.zeros(1, 1, 4, 6)).shape == (1, 4, 5)


MINE = """
import torch
from torch import nn

class Mean(nn.Module):
    def __init__(self, vision_width, out_width):
        super().__init__()
        self.layer = nn.Linear(vision_width, out_width)
    def forward(self, features, mask=None, times=None, text=None):
        return self.layer(features.mean(2))
    def num_tokens(self, frames, grid):
        return frames

class NotOne(nn.Module):
    def __init__(self, *widths):
        super().__init__()
"""


def test_a_class_of_ones_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    net = build_connector("mine:Mean", 6, 5)
    assert net(torch.zeros(2, 3, 4, 6)).shape == (2, net.num_tokens(3, (2, 2)), 5)
    with pytest.raises(ConfigError, match=r"no class Meen; did you mean 'Mean'"):
        build_connector("mine:Meen", 6, 5)
    with pytest.raises(ConfigError, match="must be an nn"):
        build_connector("mine:NotOne", 6, 5)
    with pytest.raises(ConfigError, match=r"there is no other\.py"):
        build_connector("other:Mean", 6, 5)
    with pytest.raises(ConfigError, match="in the current folder"):
        build_connector("../mine:Mean", 6, 5)


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'mlp2x_gelu'"):
        build_connector("mlp2xgelu", 6, 5)
