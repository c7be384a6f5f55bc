"""A net's tensors: strict loading, tied ones once, no copy where none is needed."""

import pytest
import torch
from torch import nn

from isthmus.errors import CheckpointError
from isthmus.weights import load_into, state_tensors


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.BatchNorm1d(3)


def test_loading_is_strict_and_names_the_nearest():
    net, before = Tied(), {k: v.clone() for k, v in Tied().state_dict().items()}
    net.load_state_dict(before)
    tensors = state_tensors(Tied())
    assert "head.weight" not in tensors
    wrong = dict(tensors)
    wrong["norm.wieght"] = wrong.pop("norm.weight")
    wrong["norm.bias"] = torch.zeros(4)
    with pytest.raises(CheckpointError) as caught:
        load_into(net, wrong, "some/file")
    text = str(caught.value)
    assert "some/file" in text
    assert "'norm.weight' is missing (did you mean 'norm.wieght'?)" in text
    assert "'norm.wieght' is unexpected" in text
    assert "'norm.bias' has shape (4,), the net wants (3,)" in text
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_tied_tensors_load_under_one_or_both_names():
    source = Tied()
    both = {k: v.clone() for k, v in source.state_dict().items()}
    only_head = {k: v for k, v in both.items() if k != "embed.weight"}
    for tensors in (state_tensors(source), both, only_head):
        net = Tied()
        load_into(net, tensors, "x")
        assert torch.equal(net.embed.weight, source.embed.weight)
        assert net.head.weight is net.embed.weight
    both["head.weight"] += 1
    with pytest.raises(CheckpointError, match="one tensor in the net"):
        load_into(Tied(), both, "x")


def test_a_net_without_storage_is_refused():
    with torch.device("meta"):
        net = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="meta device"):
        load_into(net, {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}, "x")


def test_tensors_become_the_weights_without_a_copy_but_never_tie_two():
    a, b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    net = nn.ModuleDict({"a": a, "b": b})
    given = torch.arange(4.0).reshape(2, 2)
    load_into(net, {"a.weight": given, "b.weight": given}, "x")
    assert a.weight.data_ptr() == given.data_ptr()
    assert torch.equal(b.weight, given)
    with torch.no_grad():
        b.weight.zero_()
    assert torch.equal(a.weight, torch.arange(4.0).reshape(2, 2))
    half = {"a.weight": given.half(), "b.weight": given.T}
    load_into(net, half, "x")
    assert a.weight.dtype == torch.float32
    assert b.weight.is_contiguous()
