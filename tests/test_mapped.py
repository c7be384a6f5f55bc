"""Nets in files: the values of a net made as ever, next to no memory, and none that anybody else notices."""

from pathlib import Path

import pytest
import torch
from torch import nn

from isthmus import mapped
from isthmus.errors import CheckpointError
from isthmus.models.clip import Clip, ClipConfig
from isthmus.models.llava import Llava, LlavaConfig
from isthmus.weights import load_into
from tests.models import tiny_blip2, tiny_flamingo, tiny_llava
from tests.test_weights import Tied


def held() -> int:
    """Bytes of memory that this process holds in no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))


@pytest.mark.parametrize(
    "make",
    [lambda: Clip(ClipConfig.tiny()), tiny_llava.tiny, tiny_flamingo.tiny, tiny_blip2.tiny, Tied],
    ids=["clip", "llava", "flamingo", "blip2", "tied"],
)
def test_a_net_in_a_file_has_the_bits_of_one_in_memory(tmp_path, make):
    torch.manual_seed(3)
    usual = make()
    torch.manual_seed(3)
    net = mapped.made(make, tmp_path)
    assert net.state_dict().keys() == usual.state_dict().keys()
    for name, value in usual.state_dict().items():
        assert torch.equal(net.state_dict()[name], value), name
    assert [n for n, _ in net.named_parameters()] == [n for n, _ in usual.named_parameters()]  # tied as it was
    assert not list(tmp_path.iterdir())
    begins = [p.data_ptr() for p in net.parameters()]
    room = sum(-(-p.nbytes // 4096) * 4096 for p in net.parameters())
    assert max(begins) - min(begins) < 2 * room  # one stretch of memory: the file's


def test_what_is_hollow_has_no_values_and_its_buffers_have(tmp_path):
    usual = Llava(LlavaConfig.tiny())
    with mapped.hollow():
        net = Llava(LlavaConfig.tiny())
        with mapped.solid():
            assert not nn.Linear(2, 2).weight.is_meta
    assert all(p.is_meta for p in net.parameters())
    rest = dict(net.named_buffers())
    assert rest  # the rotary frequencies, which stand in no file
    for name, buffer in usual.named_buffers():
        assert torch.equal(rest[name], buffer)


def test_a_hollow_net_takes_tensors_as_they_are_stored():
    given = {n: t.bfloat16() for n, t in Tied().state_dict().items()}
    with mapped.hollow():
        net = Tied()
        load_into(net, given, "x")
    assert net.head.weight is net.embed.weight
    assert any(net.head.weight.data_ptr() == t.data_ptr() for t in given.values())
    assert net.head.weight.dtype == torch.bfloat16
    assert net.head.weight.requires_grad


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads how much memory a process holds, on Linux")
def test_making_a_net_holds_little_of_it(tmp_path, monkeypatch):
    """Four matrices of 16 MiB, of which the last two may be held."""
    monkeypatch.setattr(mapped, "AT_ONCE", 2**24)
    seen = []

    def make() -> nn.Module:
        net = nn.Sequential()
        for _ in range(4):
            net.append(nn.Linear(2048, 2048, bias=False))
            seen.append(resident())
        return net

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before, anonymous = resident(), held()
    net = mapped.made(make, tmp_path)
    assert max(seen) - before < 3 * 2**24
    assert held() - anonymous < 2**24
    assert 0.005 < float(net.get_parameter("3.weight").detach()[0].std()) < 0.05


def test_what_one_changes_another_does_not_see(tmp_path):
    values = {"a": torch.arange(6.0).view(2, 3), "none": torch.zeros(0, 2), "number": torch.tensor(2.5)}
    found = mapped.shared(values.items(), tmp_path)
    assert all(torch.equal(found[name], value) for name, value in values.items())
    found["a"].zero_()
    assert torch.equal(values["a"], torch.arange(6.0).view(2, 3))
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mapped.os, "posix_fallocate", full)
    with pytest.raises(CheckpointError, match=r"No space left on device.*no process has to hold them all"):
        mapped.made(Tied, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_others_do_not_share_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(mapped, "all_gather", lambda value: [("weights.tmp-0", {})])
    with pytest.raises(CheckpointError, match=r"Process 0 cannot map .*weights.tmp-0 .*must be on a disk that all"):
        mapped.shared({"a": torch.ones(1)}.items(), tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / "weights.tmp-1").write_bytes(b"left over")
    mapped.shared({"a": torch.ones(1)}.items(), tmp_path)
    assert not list(tmp_path.iterdir())
